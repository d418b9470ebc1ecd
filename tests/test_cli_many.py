"""Many files in one run of the command line: a bad one is named, and the rest is done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lib_loramerge import cli, interrupts
from tests.helpers.fixtures import SD1_LAYERS, make_lora


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_lora(tmp_path / "a.safetensors", SD1_LAYERS, rank=4, seed=1)
    make_lora(tmp_path / "b.v2.safetensors", SD1_LAYERS, rank=4, seed=2)
    (tmp_path / "bad.safetensors").write_bytes(b"no header")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_resizes_every_lora_alone_and_goes_on_after_a_bad_one(folder, capsys):
    words = ["merge", "a.safetensors", "bad.safetensors", "b.v2.safetensors"]
    assert cli.main([*words, "--each", "--rank", "2", "-o", "small"]) == 1
    said = capsys.readouterr()
    assert "bad.safetensors" in said.err
    assert "2 written, 1 failed" in said.out
    assert sorted(path.name for path in (folder / "small").iterdir()) == ["a.safetensors", "b.v2.safetensors"]
    assert cli.main(["merge", "a.safetensors", "--rank", "2", "-o", "./one"]) == 0
    ours, theirs = load_file("small/a.safetensors"), load_file("one.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)


def test_files_that_exist_stay_unless_overwrite_is_given(folder, capsys):
    words = ["merge", "a.safetensors", "b.v2.safetensors", "--each", "-o", "small"]
    assert cli.main(words) == 0
    before = (folder / "small" / "a.safetensors").stat()
    assert cli.main([*words, "--rank", "1"]) == 1
    assert (folder / "small" / "a.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    assert cli.main([*words, "--rank", "1", "--overwrite"]) == 0


def test_two_results_of_one_name_are_refused_before_any_work(folder, capsys):
    make_lora(folder / "other" / "a.safetensors", SD1_LAYERS, rank=4, seed=3)
    assert cli.main(["merge", "a.safetensors", "other/a.safetensors", "--each", "-o", "small"]) == 1
    assert "would both be written" in capsys.readouterr().err
    for more in ((), ("--overwrite",)):
        assert cli.main(["convert", "a.safetensors", "other/a.safetensors", "-o", "small", *more]) == 1
        assert "a.safetensors and other" in capsys.readouterr().err
    assert not (folder / "small").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("merge", "a.safetensors", "b.v2.safetensors", "--each", "-o", "new"),
        ("convert", "a.safetensors", "b.v2.safetensors", "-o", "new"),
        ("sweep", "a.safetensors:0.5/1", "-o", "new"),
    ],
)
def test_an_interrupted_run_of_many_says_what_stays(folder, capsys, monkeypatch, words):
    monkeypatch.setattr(interrupts, "asked", lambda: bool(list(folder.glob("new/*.safetensors"))))
    assert cli.main([*words]) == 130
    assert "interrupted, 1 complete files stay" in capsys.readouterr().err
    assert len(list(folder.glob("new/*.safetensors"))) == 1
    monkeypatch.setattr(interrupts, "asked", lambda: True)
    assert cli.main(["merge", "a.safetensors", "-o", "./one"]) == 130
    assert "nothing was written" in capsys.readouterr().err


def test_no_merge_of_a_list_replaces_what_another_reads(folder, capsys):
    lines = [{"inputs": ["a"], "rank": 1, "output": "b.v2"}, {"inputs": ["b.v2"], "rank": 1, "output": "c"}]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    before = (folder / "b.v2.safetensors").read_bytes()
    words = ["merge", "--recipe", "list.jsonl", "--lora-dir", ".", "-o", ".", "--overwrite"]
    assert cli.main(words) == 1
    assert "line 1: b.v2.safetensors is one of the LoRAs being merged" in capsys.readouterr().err
    assert (folder / "b.v2.safetensors").read_bytes() == before
    assert (folder / "c.safetensors").is_file()


def test_a_name_in_a_list_may_hold_what_ends_a_line_elsewhere(folder):
    line = json.dumps({"inputs": ["a"], "output": "a\u2028b"}, ensure_ascii=False)
    (folder / "list.jsonl").write_text(line, encoding="utf-8")
    assert cli.main(["merge", "--recipe", "list.jsonl", "--lora-dir", ".", "-o", "new"]) == 0
    assert (folder / "new" / "a\u2028b.safetensors").is_file()


def test_convert_takes_many_files(folder):
    assert cli.main(["convert", "a.safetensors", "b.v2.safetensors", "--dtype", "float32", "-o", "wide"]) == 0
    assert cli.main(["convert", "a.safetensors", "--dtype", "float32", "-o", "alone/"]) == 0
    for path in ("wide/a.safetensors", "wide/b.v2.safetensors", "alone/a.safetensors"):
        assert {str(tensor.dtype) for tensor in load_file(folder / path).values()} == {"torch.float32"}


def test_a_list_of_recipes_is_merged_line_by_line(folder, capsys):
    lines = [
        {"inputs": ["a.safetensors:0.5", "b.v2.safetensors"], "output": "both"},
        {"inputs": ["bad.safetensors"]},
        {"inputs": ["a.safetensors"], "rank": 1},
    ]
    (folder / "list.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    assert cli.main(["merge", "--recipe", "list.jsonl", "-o", "out", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in said["failed"]] == ["line 3"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "both.safetensors",
        "merge-005.safetensors",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"inputs": []}',
        '{"inputs": ["a"], "output": 3}',
        '{"inputs": ["a.safetensors"], "inputs": ["b.safetensors"]}',
        '{"inputs": ["a"], "output": ".."}',
        "[" * 100_000,
    ],
)
def test_a_list_with_a_line_that_is_no_recipe_is_refused_whole(folder, capsys, line):
    good = json.dumps({"inputs": ["a.safetensors"]})
    (folder / "list.jsonl").write_text(f"{good}\n{line}\n", encoding="utf-8")
    assert cli.main(["merge", "--recipe", "list.jsonl", "-o", "out"]) == 1
    assert "list.jsonl, line 2: " in capsys.readouterr().err
    assert not (folder / "out").exists()
