"""The benchmark's layers are those of a real SDXL LoRA."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks.sdxl_shapes import sdxl_layers, shape_counts
from tests.helpers.fixtures import sample_data


def test_there_are_as_many_layers_as_a_kohya_sdxl_lora_has():
    layers = sdxl_layers()
    assert len(layers) == 986
    assert sum(name.startswith("lora_unet_") for name in layers) == 722
    assert len(shape_counts()) == 12


def test_names_and_shapes_are_those_of_the_sample_list():
    folder = sample_data()
    if folder is None:
        pytest.skip("the sample data is not beside this checkout")
    rows = json.loads((folder / "shapes" / "sdxl_kohya.json").read_text("utf-8"))
    wanted = {name: (up[0], down[1]) for name, up, down in rows}
    assert sdxl_layers() == wanted
