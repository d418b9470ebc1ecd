"""The command line, as a person in a terminal meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lib_loramerge import cli
from lib_loramerge.files import read_header
from lib_loramerge.metadata import read_recipe
from tests.helpers.fixtures import (
    SD1_LAYERS,
    SDXL_LAYERS,
    dense_deltas,
    make_lora,
    relative_error,
    weighted_sum,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_lora(tmp_path / "a.safetensors", SD1_LAYERS, rank=4, alpha=2, seed=1)
    make_lora(tmp_path / "b.safetensors", SD1_LAYERS, rank=6, alpha=6, seed=2)
    return tmp_path


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_merge_writes_the_file_and_prints_the_report(folder, capsys):
    assert run("merge", "a:0.8", "b:0.5", "--lora-dir", folder, "-o", "both", "--rank", "full") == 0
    text = capsys.readouterr().out
    assert "both.safetensors" in text
    assert "Stable Diffusion 1" in text
    wanted = weighted_sum([(folder / "a.safetensors", 0.8), (folder / "b.safetensors", 0.5)])
    assert relative_error(dense_deltas(folder / "both.safetensors"), wanted) < 1e-6


def test_json_is_alone_on_stdout_and_has_the_promised_fields(folder, capsys):
    assert run("merge", "a", "b", "--lora-dir", folder, "-o", "both", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    for name in ("output", "size_bytes", "layers", "error", "warnings", "sshs_model_hash", "seconds"):
        assert name in report
    assert report["size_bytes"] == (folder / "both.safetensors").stat().st_size
    assert report["layers"] == len(SD1_LAYERS)


@pytest.mark.parametrize("words", [("<lora:a:0.8> a cat <lora:b:0.5>",), ("a:0.8", "<lyco:b:0.5>")])
def test_prompt_tags_and_plain_names_are_the_same(folder, words):
    assert run("merge", *words, "--lora-dir", folder, "-o", "both", "--rank", "full") == 0
    wanted = weighted_sum([(folder / "a.safetensors", 0.8), (folder / "b.safetensors", 0.5)])
    assert relative_error(dense_deltas(folder / "both.safetensors"), wanted) < 1e-6


def test_paths_need_no_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert (
        run("merge", f"{folder / 'a.safetensors'}:0.8", "b.safetensors:0.5", "-o", "out/both.safetensors")
        == 1
    )
    (folder / "out").mkdir()
    assert (
        run("merge", f"{folder / 'a.safetensors'}:0.8", "b.safetensors:0.5", "-o", "out/both.safetensors")
        == 0
    )
    assert (folder / "out" / "both.safetensors").exists()


def test_an_error_is_one_line_on_stderr_with_status_1(folder, capsys):
    make_lora(folder / "xl.safetensors", SDXL_LAYERS)
    assert run("merge", "a", "xl", "--lora-dir", folder, "-o", "both") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert "different base models" in captured.err


def test_an_unknown_name_gets_the_nearest_ones(folder, capsys):
    make_lora(folder / "watercolour.safetensors", SD1_LAYERS)
    assert run("merge", "watercolor", "--lora-dir", folder, "-o", "both") == 1
    assert "watercolour" in capsys.readouterr().err


def test_wrong_usage_is_status_2(capsys):
    with pytest.raises(SystemExit) as caught:
        run("merge", "--no-such-option")
    assert caught.value.code == 2
    capsys.readouterr()


def test_nothing_is_overwritten_unasked(folder, capsys):
    before = (folder / "b.safetensors").read_bytes()
    assert run("merge", "a", "--lora-dir", folder, "-o", "b") == 1
    assert "overwrit" in capsys.readouterr().err
    assert (folder / "b.safetensors").read_bytes() == before
    assert run("merge", "a:2", "--lora-dir", folder, "-o", "b", "--overwrite") == 0
    assert (folder / "b.safetensors").read_bytes() != before


def test_a_dry_run_writes_nothing_and_foresees_the_size(folder, capsys):
    before = sorted(os.listdir(folder))
    assert run("merge", "a", "b", "--lora-dir", folder, "-o", "both", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert sorted(os.listdir(folder)) == before
    assert run("merge", "a", "b", "--lora-dir", folder, "-o", "both") == 0
    size = (folder / "both.safetensors").stat().st_size
    assert plan["predicted_bytes"] == pytest.approx(size, rel=0.02)
    assert plan["predicted_bytes"] >= size


def test_a_merged_file_is_its_own_recipe(folder, capsys):
    words = ("a:0.8:lbw=R,1,U,1,1,1,1,X+0.1,1,1,1,1,1,1,1,1,1:x=0.5", "b:-0.5:lbw=MIDD")
    assert run("merge", *words, "--lora-dir", folder, "-o", "one", "--rank", 3, "--seed", 11) == 0
    assert run("merge", "--recipe", folder / "one.safetensors", "--lora-dir", folder, "-o", "two") == 0
    one, two = load_file(folder / "one.safetensors"), load_file(folder / "two.safetensors")
    assert one.keys() == two.keys()
    assert all(one[key].equal(two[key]) for key in one)
    recipe = read_recipe(read_header(folder / "one.safetensors").metadata)
    assert recipe is not None
    assert "R" not in recipe.inputs[0].lbw
    assert str(folder) not in json.dumps(read_header(folder / "one.safetensors").metadata["loramerge_recipe"])


def test_a_changed_source_is_refused_unless_allowed(folder, capsys):
    assert run("merge", "a", "b", "--lora-dir", folder, "-o", "one") == 0
    make_lora(folder / "b.safetensors", SD1_LAYERS, rank=6, alpha=6, seed=3)
    again = ("merge", "--recipe", folder / "one.safetensors", "--lora-dir", folder, "-o", "two")
    assert run(*again) == 1
    assert "changed" in capsys.readouterr().err
    assert run(*again, "--allow-changed-sources") == 0


def test_a_hash_by_its_first_digits_is_enough(folder):
    assert run("merge", "a", "--lora-dir", folder, "-o", "one") == 0
    kept = read_recipe(read_header(folder / "one.safetensors").metadata)
    assert kept is not None
    digits = kept.inputs[0].hash
    for hash_, status in ((digits[:12], 0), ("0" * 12, 1)):
        recipe = folder / "recipe.txt"  # any name but that of a LoRA, and as Windows editors write it
        text = json.dumps({"inputs": [{"name": "a", "hash": hash_}]})
        recipe.write_text(text, encoding="utf-8-sig")
        out = folder / f"two{status}"
        assert run("merge", "--recipe", recipe, "--lora-dir", folder, "-o", out) == status


@pytest.mark.parametrize(
    "words",
    [
        ("--size", 1),
        ("--retain", 0.9),
        ("--rank", 2),
        ("--mode", "concat"),
        ("--mode", "ties", "--density", 0.3),
    ],
)
def test_options_beside_a_recipe_take_the_place_of_its_own_and_of_those_they_exclude(folder, words):
    recipe = folder / "recipe.json"
    stored = {"inputs": ["a", "b"], "mode": "dare_ties", "params": {"density": 0.7}, "rank": 4}
    stored["conv_rank"] = 2
    recipe.write_text(json.dumps(stored), encoding="utf-8")
    words = ("merge", "--recipe", recipe, "--lora-dir", folder, "-o", "out", *words)
    assert run(*words, "--json") == 0
    kept = read_recipe(read_header(folder / "out.safetensors").metadata)
    assert kept is not None
    if "--mode" not in words:
        assert kept.params["density"] == 0.7


@pytest.mark.parametrize("output", ["", " ", ".", "..", "./", "/", "sub/"])
def test_an_output_that_names_no_file_is_refused(folder, capsys, output):
    assert run("merge", "a", "--lora-dir", folder, "-o", output) == 1
    assert "give the name of a file" in capsys.readouterr().err
    assert sorted(os.listdir(folder)) == ["a.safetensors", "b.safetensors"]


def test_a_dry_run_refuses_a_device_that_is_not_there(folder, capsys):
    assert run("merge", "a", "--lora-dir", folder, "--dry-run", "--device", "cuda:99") == 1
    assert "cuda:99" in capsys.readouterr().err


def test_the_report_shows_the_weight_of_every_block_zeros_too(folder, capsys):
    assert run("merge", "a:0.8:te1=0.3:lbw=MIDD", "--lora-dir", folder, "-o", "out", "--json") == 0
    (told,) = json.loads(capsys.readouterr().out)["inputs"]
    assert told["blocks"] == {"BASE te": 0.3, "IN01": 0, "M00": 0.8, "OUT05": 0.8}


def test_a_file_without_a_recipe_says_so(folder, capsys):
    assert run("merge", "--recipe", folder / "a.safetensors", "-o", folder / "two.safetensors") == 1
    assert "no recipe" in capsys.readouterr().err


def test_inspect_says_what_the_file_is(folder, capsys):
    assert run("inspect", folder / "a.safetensors", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"] == "sd1"
    assert facts["ranks"] == {"4": len(SD1_LAYERS)}
    assert facts["alphas"] == {"2": len(SD1_LAYERS)}
    norms = sum(float(d.square().sum()) for d in dense_deltas(folder / "a.safetensors").values()) ** 0.5
    assert facts["norm"] == pytest.approx(norms, rel=1e-6)
    assert run("inspect", folder / "a.safetensors", folder / "b.safetensors") == 0
    assert "Base model" in capsys.readouterr().out


def test_convert_keeps_every_delta(folder):
    assert run("convert", folder / "a.safetensors", "-o", folder / "c.safetensors") == 0
    assert (
        relative_error(dense_deltas(folder / "c.safetensors"), dense_deltas(folder / "a.safetensors")) < 1e-7
    )


def test_methods_and_presets_are_listed(capsys):
    assert run("methods") == 0
    assert "concat" in capsys.readouterr().out
    assert run("methods", "--json") == 0
    assert {"svd", "add", "concat"} <= {method["name"] for method in json.loads(capsys.readouterr().out)}
    assert run("presets") == 0
    assert "MIDD" in capsys.readouterr().out
    assert run("presets", "--json") == 0
    assert "MIDD" in json.loads(capsys.readouterr().out)["weights"]


def test_the_demo_merges_two_samples(tmp_path, capsys):
    assert run("demo", "--dir", tmp_path / "demo") == 0
    assert "Error" in capsys.readouterr().out
    wanted_layers = set(dense_deltas(tmp_path / "demo" / "style.safetensors"))
    assert set(dense_deltas(tmp_path / "demo" / "merged.safetensors")) <= wanted_layers
    assert run("demo", "--dir", tmp_path / "demo") == 0


@pytest.mark.parametrize(
    "name", ["with space", "quote'\"s", "日本語のロラ", "a" * 230, "dots.and,commas", "-dash", "(paren)"]
)
def test_unusual_names_work_as_input_and_output(tmp_path, name):
    make_lora(tmp_path / f"{name}.safetensors", SD1_LAYERS, rank=2, alpha=2)
    assert run("merge", f"<lora:{name}:0.5>", "--lora-dir", tmp_path, "-o", tmp_path / f"{name}2") == 0
    assert (tmp_path / f"{name}2.safetensors").exists()


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "1e999", "", "one"])
def test_numbers_that_are_none_are_refused_by_name(folder, capsys, bad):
    assert run("merge", f"<lora:a:{bad}>", "--lora-dir", folder, "-o", "both") == 1
    assert "a" in capsys.readouterr().err
    assert not (folder / "both.safetensors").exists()


def test_help_needs_no_torch():
    code = "import sys; from lib_loramerge import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules or 'gradio' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, check=False
        ).returncode
        == 0
    )


STOPPED_IN = """
import signal, sys, time
# Tests that run in the background inherit a shell's order to ignore Ctrl+C.
signal.signal(signal.SIGINT, signal.default_int_handler)
from lib_loramerge import cli, interrupts
from lib_loramerge.merge import run

def check_space(*_):
    print("MERGING", flush=True)
    {meanwhile}

run.check_space = check_space
cli.run_and_exit()
"""
# A signal that comes in the middle of a destructor: Python prints the exception there and goes on.
SWALLOWED = """class Dying:
        def __del__(self):
            while not interrupts.asked():
                time.sleep(0.01)
    Dying()"""


@pytest.mark.skipif(os.name == "nt", reason="signals work differently on Windows")
@pytest.mark.parametrize(
    "meanwhile", ["while True: time.sleep(0.01)", SWALLOWED], ids=["between two steps", "in a destructor"]
)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_merge_that_is_interrupted_ends_and_leaves_nothing(folder, meanwhile, number, status):
    code = STOPPED_IN.format(meanwhile=meanwhile)
    words = ["merge", "a", "b", "--lora-dir", str(folder), "-o", "out", "--rank", "full"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"MERGING\n"
    process.send_signal(number)
    _, told = process.communicate(timeout=600)
    assert process.returncode == status, told
    assert told.splitlines()[-1] == b"loramerge: interrupted, nothing was written"
    assert sorted(os.listdir(folder)) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("words", [("merge", "a", "b"), ("merge", "a", "--dry-run"), ("convert", "{a}")])
@pytest.mark.parametrize("spelling", ["a", "sub/../a", "link"])
def test_an_output_that_is_one_of_the_inputs_is_refused(folder, capsys, words, spelling):
    (folder / "sub").mkdir()
    (folder / "link.safetensors").hardlink_to(folder / "a.safetensors")
    before = (folder / "a.safetensors").read_bytes()
    words = [word.format(a=folder / "a.safetensors") for word in words]
    more = () if words[0] == "convert" else ("--lora-dir", folder)
    assert run(*words, *more, "-o", f"{folder}/{spelling}", "--overwrite") == 1
    assert "is one of the LoRAs being merged" in capsys.readouterr().err
    assert (folder / "a.safetensors").read_bytes() == before
