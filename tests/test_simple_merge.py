"""The library in one call."""

from __future__ import annotations

import subprocess
import sys

import pytest
from safetensors.torch import load_file

import lib_loramerge
from lib_loramerge import cli
from lib_loramerge.errors import OutputError, RecipeError
from tests.helpers.fixtures import SD1_LAYERS, make_lora


def test_one_call_does_what_the_command_does(tmp_path):
    make_lora(tmp_path / "a.safetensors", SD1_LAYERS, rank=4, seed=1)
    make_lora(tmp_path / "b.safetensors", SD1_LAYERS, rank=4, seed=2)
    words = [f"{tmp_path / 'a.safetensors'}:0.8", f"{tmp_path / 'b.safetensors'}:0.5:lbw=MIDD"]
    report = lib_loramerge.merge(words, tmp_path / "one.safetensors", rank=3)
    assert cli.main(["merge", *words, "--rank", "3", "-o", str(tmp_path / "two.safetensors")]) == 0
    ours, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)
    assert report.layers == len(SD1_LAYERS)


def test_names_are_found_in_a_folder_and_tags_work(tmp_path):
    make_lora(tmp_path / "a.safetensors", SD1_LAYERS, rank=4, seed=1)
    out = tmp_path / "out.safetensors"
    assert lib_loramerge.merge("<lora:a:0.5>", out, lora_dir=tmp_path).inputs[0].unet == 0.5
    with pytest.raises(OutputError, match="exists"):
        lib_loramerge.merge("<lora:a:0.5>", out, lora_dir=tmp_path)
    with pytest.raises(RecipeError, match="no setting ranks"):
        lib_loramerge.merge("<lora:a:0.5>", out, lora_dir=tmp_path, ranks=4)


def test_the_call_exists_without_an_import_of_torch():
    code = (
        "import sys, lib_loramerge; assert 'torch' not in sys.modules; assert callable(lib_loramerge.merge)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
