"""Layers merged many at once, as on an accelerator, are the layers merged one by one."""

from __future__ import annotations

import torch

from lib_loramerge.blocks import bundled_preset_path, load_presets
from lib_loramerge.files import LoraFolder
from lib_loramerge.merge import plan_merge
from lib_loramerge.merge.layer import open_merger
from lib_loramerge.recipe import MergeRecipe, parse_inputs
from tests.fixtures import SD1_LAYERS, make_lora


def test_a_batch_gives_what_single_layers_give(tmp_path, monkeypatch):
    from lib_loramerge.delta import write_layers

    make_lora(tmp_path / "a.safetensors", SD1_LAYERS, rank=4, alpha=2, seed=1)
    make_lora(tmp_path / "b.safetensors", SD1_LAYERS, rank=6, alpha=6, seed=2)
    recipe = MergeRecipe(inputs=parse_inputs(["a:0.8", "b:-0.5"]), rank=5)
    plan = plan_merge(recipe, find=LoraFolder([tmp_path]).find, presets=load_presets([bundled_preset_path()]))
    with open_merger(plan) as merger:
        single = [merger.merge(layer, None) for layer in plan.layers]
        # The batched route needs no accelerator, only to be taken.
        monkeypatch.setattr(
            merger,
            "_store",
            lambda prepared, allotted: write_layers(
                [p.merged for p in prepared],
                merger.dtype,
                [merger._chooser(p.layer, p.merged, a) for p, a in zip(prepared, allotted)],
            ),
        )
        batched = merger.merge_together(plan.layers, [None] * len(plan.layers))
    for one, other in zip(single, batched, strict=True):
        assert one.tensors.keys() == other.tensors.keys()
        assert one.result.rank == other.result.rank == 5
        up = next(t for k, t in one.tensors.items() if "lora_up" in k).double()
        down = next(t for k, t in one.tensors.items() if "lora_down" in k).double()
        up2 = next(t for k, t in other.tensors.items() if "lora_up" in k).double()
        down2 = next(t for k, t in other.tensors.items() if "lora_down" in k).double()
        torch.testing.assert_close(up2 @ down2, up @ down, rtol=1e-4, atol=1e-7)
        assert abs(one.result.error - other.result.error) < 1e-6
