"""Sweeps: what ranges mean, how files are named, and that each file is what its own merge writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lib_loramerge import cli
from lib_loramerge.delta import Cache, small
from lib_loramerge.errors import RecipeError
from lib_loramerge.merge import Shared, run_merge
from lib_loramerge.merge.read import SourceReader
from lib_loramerge.sweep import expand, running
from lib_loramerge.sweep.axes import values_of
from tests.helpers import format_files as ff
from tests.helpers.fixtures import SD1_LAYERS, lora_tensors, make_lora


@pytest.fixture
def loras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_lora(tmp_path / "style.safetensors", SD1_LAYERS, rank=4, seed=1)
    make_lora(tmp_path / "subject.safetensors", SD1_LAYERS, rank=4, seed=2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> int:
    return cli.main([*words, "--lora-dir", "."])


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.2..1.0/5", ("0.2", "0.4", "0.6", "0.8", "1")),
        ("1..-1/3", ("1", "0", "-1")),
        ("0.1..0.3/3", ("0.1", "0.2", "0.3")),
        ("0.5..0.9/1", ("0.5",)),
        ("0.2/0.5/0.8", ("0.2", "0.5", "0.8")),
        ("0.2-1.0 [5]", ("0.2", "0.4", "0.6", "0.8", "1")),
        ("0-1 (+0.25)", ("0", "0.25", "0.5", "0.75", "1")),
        ("1-0 (-0.5)", ("1", "0.5", "0")),
        ("0-1 (+0.3)", ("0", "0.3", "0.6", "0.9")),
        ("ALL/MIDD", ("ALL", "MIDD")),
        ("0.7", ("0.7",)),
        ("-0.7", ("-0.7",)),
    ],
)
def test_ranges_and_lists(text, values):
    assert values_of(text) == values


@pytest.mark.parametrize("text", ["0..1/0", "0..1/99999999", "0-1 (-0.5)", "0-1 (+0)"])
def test_ranges_of_no_points_are_refused(text):
    with pytest.raises(RecipeError):
        values_of(text)


def test_names_say_what_varies_and_nothing_else():
    points = expand(
        ["folder/style.safetensors:-0.2/0.5", "subject:1:lbw=ALL/1,0,1"],
        {"rank": ["8", "same"]},
        {},
        prefix="both",
    )
    assert [point.name for point in points] == [
        f"both_style-{strength}_subject-lbw-{blocks}_{rank}"
        for strength in ("m0.2", "0.5")
        for blocks in ("ALL", "list2")
        for rank in ("r8", "same")
    ]
    assert [point.recipe.inputs[0].te for point in points] == [-0.2] * 4 + [0.5] * 4
    assert points[0].recipe.rank == 8
    assert points[1].recipe.rank == "same"
    assert points[2].recipe.inputs[1].lbw == "1,0,1"


def test_axes_are_combined_or_zipped():
    texts = ["a:0/0.5/1", "b:unet=1/0.5/0"]
    assert len(expand(texts, {}, {})) == 9
    zipped = expand(texts, {}, {}, zipped=True)
    assert [(p.recipe.inputs[0].unet, p.recipe.inputs[1].unet) for p in zipped] == [
        (0, 1),
        (0.5, 0.5),
        (1, 0),
    ]
    with pytest.raises(RecipeError, match="a has 2, b has 3"):
        expand(["a:0/1", "b:0/1/2"], {}, {}, zipped=True)


def test_a_mix_shares_the_strengths_of_two():
    points = expand(["a", "b:0.5"], {}, {}, mix="0..1/5")
    assert [(p.recipe.inputs[0].te, p.recipe.inputs[1].te) for p in points] == [
        (1, 0), (0.75, 0.125), (0.5, 0.25), (0.25, 0.375), (0, 0.5),
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="exactly two"):
        expand(["a", "b", "c"], {}, {}, mix="0..1/5")


def test_a_parameter_goes_to_the_modes_that_have_it():
    points = expand(["a", "b"], {"mode": ["svd", "ties"]}, {"density": ["0.3", "0.5"]})
    assert [(p.name, p.recipe.mode, dict(p.recipe.params)) for p in points] == [
        ("svd", "svd", {}),
        ("ties_density-0.3", "ties", {"density": "0.3"}),
        ("ties_density-0.5", "ties", {"density": "0.5"}),
    ]


@pytest.mark.parametrize("texts", [["a:0.5", "b"], ["a:0.5/0.5"]])
def test_a_sweep_in_which_nothing_or_the_same_varies_is_refused(texts):
    with pytest.raises(RecipeError):
        expand(texts, {}, {})


def test_every_file_is_byte_for_byte_that_of_its_own_merge(loras):
    assert run("sweep", "style:0.3/-0.8", "subject:1:lbw=ALL/MIDD", "--mode", "svd,ties", "-o", "out") == 0
    rows = json.loads((loras / "out" / "sweep.json").read_text())["files"]
    assert len(rows) == 8
    for row in rows:
        values = row["values"]
        (loras / "single").mkdir(exist_ok=True)
        assert (
            run(
                "merge", f"style:{values['style']}", f"subject:1:lbw={values['subject lbw']}",
                "--mode", values["mode"], "-o", f"./single/{row['file']}",
            )
            == 0
        )  # fmt: skip
        assert (loras / "out" / row["file"]).read_bytes() == (loras / "single" / row["file"]).read_bytes()
        assert row["size_bytes"] == (loras / "out" / row["file"]).stat().st_size


BLOCK = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn"
ALIKE = {f"{BLOCK}{n}_to_{part}": (640, 640) for n in (1, 2) for part in ("q", "out_0")}
CONV = {"lora_unet_down_blocks_0_resnets_0_conv1": (320, 320, 3, 3)}


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Layers that are merged together, in 16 and 32 bits, and one stored whole."""
    layers = SD1_LAYERS | ALIKE | CONV
    make_lora(tmp_path / "half.safetensors", layers, rank=4, alpha=2, seed=1, dtype=torch.float16)
    make_lora(tmp_path / "brain.safetensors", layers, rank=6, alpha=6, seed=2, dtype=torch.bfloat16)
    make_lora(tmp_path / "single.safetensors", SD1_LAYERS, rank=4, seed=3)
    tensors = lora_tensors(layers, rank=4, seed=4)
    name = next(iter(ALIKE))
    whole = tensors.pop(f"{name}.lora_up.weight") @ tensors.pop(f"{name}.lora_down.weight")
    save_file(tensors | {f"{name}.diff": whole}, str(tmp_path / "whole.safetensors"))
    return tmp_path


RECIPES = [
    (("half:0.8", "brain:0.5"), {}),
    (("half:-0.3", "brain:1.2"), {}),
    (("half:0.7", "brain:0.5"), {"rank": 3, "conv_rank": 2}),
    (("half:0:unet=0.4", "brain:0.5"), {}),
    (("half:0.8", "brain:0.5", "half:0.1"), {}),
    (("half:0.8:dyn=2", "brain:0.5"), {}),
    (("half:0.8", "brain:0.5"), {"mode": "ties"}),
    (("half:0.8", "brain:0.5"), {"mode": "concat"}),
    (("half:0.8", "brain:0.5"), {"mode": "knots"}),
    (("half:0.8", "brain:0.5"), {"size": 0.2}),
    (("half:0.8", "brain:0.5"), {"keep": 0.9}),
    (("half:0.6", "brain:0.9"), {"dtype": "float32"}),
    (("half:0.5", "single:0.5"), {}),
    (("half:0.5", "whole:0.5"), {"rank": 4}),
    (("half:0.7", "whole:-0.5"), {"rank": 4}),
]


@pytest.mark.parametrize("room", [0, 60_000, 1 << 30])
def test_a_file_has_the_same_bytes_whatever_merges_went_before(several, room):
    """Little room keeps some layers and not others."""
    shared = Shared(cache=Cache(room))
    for index, (loras, settings) in enumerate([*RECIPES, *RECIPES]):
        plan = ff.plan(several, *loras, **settings)
        for folder, common in (("alone", None), ("shared", shared)):
            (several / folder).mkdir(exist_ok=True)
            run_merge(plan, several / folder / f"{index}.safetensors", shared=common)
        alone, found = (several / folder / f"{index}.safetensors" for folder in ("alone", "shared"))
        assert alone.read_bytes() == found.read_bytes(), (loras, settings)


def test_a_source_that_another_program_replaces_is_read_again(several):
    shared = Shared()
    before, after = several / "before.safetensors", several / "after.safetensors"
    run_merge(ff.plan(several, "half:0.8", "brain"), before, shared=shared)
    layers = SD1_LAYERS | ALIKE | CONV
    make_lora(several / "half.safetensors", layers, rank=4, alpha=2, seed=9, dtype=torch.float16)
    run_merge(ff.plan(several, "half:0.8", "brain"), after, shared=shared)
    (several / "alone").mkdir()
    run_merge(ff.plan(several, "half:0.8", "brain"), several / "alone" / "after.safetensors")
    assert after.read_bytes() == (several / "alone" / "after.safetensors").read_bytes() != before.read_bytes()


def test_every_tensor_is_read_and_every_gram_matrix_made_once(several, monkeypatch):
    reads, grams = [], []
    read, gram = SourceReader.read, small.gram
    monkeypatch.setattr(SourceReader, "read", lambda self, key: reads.append(key) or read(self, key))
    monkeypatch.setattr(small, "gram", lambda rows: grams.append(rows.shape) or gram(rows))
    monkeypatch.chdir(several)
    assert run("merge", "half:0.3", "brain", "--rank", "4", "-o", "./one.safetensors") == 0
    once = sorted(reads), sorted(grams)
    reads.clear()
    grams.clear()
    assert run("sweep", "half:0.3/0.5/0.9", "brain:-1/1", "--rank", "4", "-o", "out") == 0
    assert (sorted(reads), sorted(grams)) == once


def test_the_table_lists_values_error_and_what_is_kept(loras):
    assert run("sweep", "style:0.8", "subject:0.5/1", "--rank", "1,full", "-o", "out") == 0
    with (loras / "out" / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["subject"], row["rank"]) for row in rows] == [
        ("0.5", "1"), ("0.5", "full"), ("1", "1"), ("1", "full"),
    ]  # fmt: skip
    assert float(rows[0]["error"]) > 0.1 > float(rows[1]["error"])
    assert float(rows[0]["kept of subject"]) < 0.9 < float(rows[1]["kept of subject"])


def test_a_spreadsheet_takes_no_name_for_a_formula(loras):
    name = "=HYPERLINK(1)"
    make_lora(loras / f"{name}.safetensors", SD1_LAYERS, rank=4, seed=9)
    assert run("sweep", f"{name}:0.5/-0.5", f"{name}:1:lbw=ALL/MIDD", "-o", "+1") == 0
    with (loras / "+1" / "sweep.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert [cell for cell in cells if cell[:1] in tuple("=+@")] == []
    assert {cell for cell in cells if cell[:1] == "-"} == {"-0.5"}
    assert {f"'{name}", f"'{name} lbw", f"kept of {name}"} <= set(cells)


def test_a_second_sweep_into_a_folder_keeps_the_rows_of_the_first(loras):
    assert run("sweep", "style:0.3/0.8", "subject", "-o", "out") == 0
    assert run("sweep", "style", "subject:0.2/0.4", "--rank", "1,2", "-o", "out") == 0
    (loras / "out" / "out_style-0.3.safetensors").unlink()
    assert run("sweep", "style:0.9/1.1", "subject", "-o", "out") == 0
    rows = json.loads((loras / "out" / "sweep.json").read_text())["files"]
    assert {row["file"] for row in rows} == {path.name for path in (loras / "out").glob("*.safetensors")}
    assert len(rows) == 7
    with (loras / "out" / "sweep.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["style"], row["subject"], row["rank"]) for row in table] == [
        ("0.8", "", ""),
        *(("", strength, rank) for strength in ("0.2", "0.4") for rank in ("1", "2")),
        ("0.9", "", ""),
        ("1.1", "", ""),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("sweep.json", "[]"),
        ("sweep.json", "no json"),
        ("sweep.json", "[" * 100_000),
        ("sweep.json", '{"files": [1]}'),
        ("sweep.json", '{"files": [{"file": "a.safetensors", "values": 3}]}'),
        ("sweep.json", '{"files": [{"file": "a.safetensors", "kept": "all"}]}'),
        ("sweep.json", '{"files": {"a": {}}}'),
        ("sweep.csv", "mine"),
    ],
)
def test_a_table_of_something_else_is_not_lost(loras, capsys, name, content):
    (loras / "out").mkdir()
    (loras / "out" / name).write_text(content)
    for more in ([], ["--resume"], ["--dry-run"]):
        assert run("sweep", "style:0.3/0.8", "subject", "-o", "out", *more) == 1
        assert "was not written by a sweep" in capsys.readouterr().err
    assert (loras / "out" / name).read_text() == content
    assert [path.name for path in (loras / "out").iterdir()] == [name]


def test_each_source_is_hashed_once(loras, monkeypatch):
    from lib_loramerge.merge.read import SourceReader

    hashed, hash_of = [], SourceReader.model_hash

    def counted(reader, stop=None):
        hashed.append(reader.identity[0].name)
        return hash_of(reader, stop)

    monkeypatch.setattr(SourceReader, "model_hash", counted)
    assert run("sweep", "style:0.3/0.8", "subject:0.5/1", "-o", "out") == 0
    assert sorted(hashed) == ["style.safetensors", "subject.safetensors"]


def test_the_picture_has_the_numbers_of_the_table(loras):
    from lib_loramerge.webui import plots

    words = ["sweep", "style:0.8", "subject", "--rank", "1,2,full", "-o", "out", "--plot", "sweep.png"]
    assert run(*words) == 0
    assert (loras / "sweep.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((loras / "out" / "sweep.json").read_text())["files"]
    error, kept, size = plots.sweep_figure(rows).axes
    assert list(error.lines[0].get_ydata()) == [row["error"] for row in rows]
    shares = {line.get_label(): list(line.get_ydata()) for line in kept.lines}
    assert shares == {name: [row["kept"][name] for row in rows] for name in ("style", "subject")}
    assert [bar.get_height() for bar in size.patches] == [row["size_bytes"] / 1e6 for row in rows]
    assert [text.get_text() for text in size.get_xticklabels()] == ["1", "2", "full"]
    (loras / "sweep.png").unlink()
    (loras / "out" / rows[1]["file"]).unlink()
    assert run(*words, "--resume") == 0
    assert (loras / "sweep.png").is_file()


def test_existing_names_are_refused_together_or_kept(loras, capsys):
    words = ["sweep", "style:0.3/0.8", "subject", "-o", "out"]
    assert run(*words) == 0
    (loras / "out" / "out_style-0.8.safetensors").unlink()
    before = (loras / "out" / "out_style-0.3.safetensors").stat()
    assert run(*words) == 1
    assert not (loras / "out" / "out_style-0.8.safetensors").exists()
    assert run(*words, "--resume") == 0
    after = (loras / "out" / "out_style-0.3.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    rows = json.loads((loras / "out" / "sweep.json").read_text())["files"]
    assert all(row["size_bytes"] for row in rows)
    # Another source under the same name: what was made from the old one is not the sweep's.
    make_lora(loras / "subject.safetensors", SD1_LAYERS, rank=4, seed=3)
    capsys.readouterr()
    assert run(*words, "--resume") == 1
    assert "made from another recipe or other files" in capsys.readouterr().err


def test_too_many_files_or_too_little_room_is_said_before_any_work(loras, capsys, monkeypatch):
    assert run("sweep", "style:0..1/5", "subject:0..1/5", "--max", "24", "-o", "out") == 1
    assert "25 files, and --max allows 24" in capsys.readouterr().err
    monkeypatch.setattr(running, "free_space", lambda folder: 1000)
    assert run("sweep", "style:0.1..1/5", "subject", "-o", "out") == 1
    assert "0.00 GB are free" in capsys.readouterr().err
    assert not (loras / "out").exists()


def test_an_error_names_its_point_and_nothing_is_written(loras, capsys):
    assert run("sweep", "style:1:lbw=ALL/NOSUCH", "subject", "-o", "out") == 1
    error = capsys.readouterr().err
    assert "style-lbw-NOSUCH" in error
    assert "Traceback" not in error
    assert not (loras / "out").exists()


def test_a_dry_run_lists_the_files(loras, capsys):
    assert run("sweep", "style:0.5/1", "subject", "-o", "out", "--dry-run") == 0
    assert "out_style-0.5.safetensors" in capsys.readouterr().out
    assert not (loras / "out").exists()
