"""Faults of other LoRA mergers in reading strengths and block weights, each a test that it is not ours."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lib_loramerge.blocks import BLOCK_IDS, Presets, bundled_preset_path, load_presets
from lib_loramerge.errors import LoraMergeError, RecipeError
from lib_loramerge.merge import plan_merge
from lib_loramerge.recipe import LoraInput, MergeRecipe, parse_inputs
from tests.helpers.fixtures import SD1_LAYERS, SDXL_LAYERS, make_lora

PRESETS = load_presets([bundled_preset_path()])
FLUX_LAYERS = {
    "lora_unet_double_blocks_0_img_attn_qkv": (9216, 3072),
    "lora_unet_single_blocks_37_linear2": (3072, 15360),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    make_lora(tmp_path / "a.safetensors", SD1_LAYERS, rank=2, alpha=2, seed=1)
    make_lora(tmp_path / "b.safetensors", SD1_LAYERS, rank=3, alpha=1, seed=2)
    make_lora(tmp_path / "xl.safetensors", SDXL_LAYERS, rank=2, alpha=2, seed=3)
    make_lora(tmp_path / "flux.safetensors", FLUX_LAYERS, rank=2, alpha=2, seed=4)
    return tmp_path


def plan(folder: Path, *texts: str, presets: Presets = PRESETS, **settings):
    recipe = MergeRecipe(parse_inputs(texts), **settings)
    return plan_merge(recipe, find=lambda name: folder / f"{name}.safetensors", presets=presets)


def weights(folder: Path, *texts: str, presets: Presets = PRESETS) -> dict[str, float]:
    """Block or text encoder -> strength times block weight of the first LoRA; 0 for what is left out."""
    made = plan(folder, *texts, presets=presets)
    found = {}
    for layer in made.layers:
        for index, strength, block_weight in layer.inputs:
            if index == 0:
                found[layer.component if layer.component != "unet" else layer.block] = strength * block_weight
    return found


def test_a_strength_is_not_ignored_when_block_weights_are_given(folder):
    """`<lora:x:0.5:lbw=...>` was merged at 1.0 x blocks by another tab."""
    ones = ",".join(["1"] * 17)
    assert set(weights(folder, f"a:0.5:lbw={ones}").values()) == {0.5}
    assert weights(folder, "a:0.5:lbw=MIDD") == {"te": 0.5, "M00": 0.5, "OUT05": 0.5}


def test_a_strength_is_linear_and_keeps_its_sign(folder):
    """Ratios squared, and minus become plus, in four other tools."""
    for strength in (0.7, -0.7, 0, 1.5, -2):
        expected = set() if strength == 0 else {strength}
        assert set(weights(folder, f"a:{strength}", "b").values()) == expected


def test_negative_and_large_block_weights_are_kept(folder):
    values = ",".join(["-1.5"] * 26)
    assert set(weights(folder, f"a:2:lbw={values}").values()) == {-3.0}


def test_a_lora_at_strength_0_leaves_nothing_behind(folder):
    """`--ratios 1 0` still showed the second LoRA elsewhere."""
    assert all(index == 0 for layer in plan(folder, "a", "b:0").layers for index, *_ in layer.inputs)


def test_text_encoder_and_denoiser_have_their_own_strengths(folder):
    found = weights(folder, "a:0.25:0.75")
    assert found.pop("te") == 0.25
    assert set(found.values()) == {0.75}
    found = weights(folder, "xl:0.5:te1=0.1:te2=-0.2")
    assert (found.pop("te1"), found.pop("te2")) == (0.1, -0.2)
    assert set(found.values()) == {0.5}


def test_base_is_the_weight_of_the_text_encoders_on_every_run(folder):
    """A cached second run forgot BASE."""
    text = "a:0.5:lbw=" + ",".join(["0.5"] + ["1"] * 16)
    first = weights(folder, text)
    assert first["te"] == 0.25
    assert weights(folder, text) == first


@pytest.mark.parametrize(("name", "count"), [("a", 26), ("a", 17), ("xl", 26), ("xl", 20), ("xl", 12)])
def test_no_block_is_off_by_one(folder, name, count):
    """Every IN block was shifted by one, and IN00 was BASE, in the original LoRA Merger."""
    values = [round(0.1 * (n + 1), 1) for n in range(count)]
    named = dict(zip(BLOCK_IDS[count], values, strict=True))
    found = weights(folder, f"{name}:lbw=" + ",".join(map(str, values)))
    assert len(found) >= 4
    for block, value in found.items():
        assert value == named["BASE" if block.startswith("te") else block]


def test_all_ones_delete_no_layer(folder):
    """17 ones deleted down_blocks_*_attentions_0, 12 ones input_blocks_4 and 7, elsewhere."""
    for name, count in (("a", 17), ("xl", 12), ("xl", 20), ("a", 26), ("flux", 61)):
        plain, ones = plan(folder, name), plan(folder, f"{name}:lbw=" + ",".join(["1"] * count))
        assert [layer.inputs for layer in ones.layers] == [layer.inputs for layer in plain.layers]


@pytest.mark.parametrize("text", ["a:lbw=MIDDD", "a:lbwe=ATTNDEEPONN", "a:lbw=1,1,1", "a:1:1,1,1,1,1"])
def test_an_unknown_preset_or_a_wrong_count_is_not_taken_for_all_ones(folder, text):
    with pytest.raises(RecipeError, match="'a'"):
        plan(folder, text)


@pytest.mark.parametrize(
    ("text", "count"), [("flux:lbw=MIDD", "61"), ("a:lbw=FLUXALL", "17"), ("xl:lbw=FLUXALL", "12")]
)
def test_block_weights_of_another_base_model_do_not_end_up_in_base(folder, text, count):
    with pytest.raises(RecipeError, match=count):
        plan(folder, text)


def test_flux_blocks_have_weights_of_their_own(folder):
    values = [str(n + 2) for n in range(61)]
    found = weights(folder, "flux:lbw=" + ",".join(values))
    ids = BLOCK_IDS[61]
    assert found == {"te1": 2, "D00": ids.index("D00") + 2, "S37": ids.index("S37") + 2}


def test_a_preset_file_with_blank_lines_comments_and_more_colons_stops_nothing(folder):
    path = folder / "preset.txt"
    path.write_text("\n# x\n\nA:1,2:3\nB:" + ",".join(["1"] * 17) + "\nC\n", encoding="utf-8")
    assert set(weights(folder, "a:lbw=B", presets=load_presets([path])).values()) == {1}


def test_a_lora_whose_name_looks_like_a_field_is_read_whole(folder):
    """Fields were found anywhere in the tag, so that a LoRA called te=... broke it."""
    make_lora(folder / "te=0.5 lbw=x.safetensors", SD1_LAYERS, rank=2)
    assert set(weights(folder, "te=0.5 lbw=x:0.5").values()) == {0.5}


def test_random_entries_are_the_same_in_every_run_of_a_recipe(folder):
    """Random block weights and random methods were drawn anew each time elsewhere."""
    text = "a:lbw=" + ",".join(["R"] * 17)
    first = plan(folder, text, seed=3)
    assert first.recipe == plan(folder, text, seed=3).recipe != plan(folder, text, seed=4).recipe
    assert set(first.recipe.inputs[0].lbw) <= set("0123456789.,")
    random.seed(0)
    state = random.getstate()
    plan(folder, text, seed=3)
    assert random.getstate() == state


def test_two_uses_of_one_random_preset_are_drawn_apart(folder):
    text = "lbw=" + ",".join(["R"] * 17)
    first, second = plan(folder, f"a:{text}", f"b:{text}").recipe.inputs
    assert first.lbw != second.lbw


def test_the_resolved_recipe_makes_the_same_plan_without_the_presets(folder):
    made = plan(folder, "a:0.5:lbw=MIDD:lbwe=ATTNDEEPOFF", "b:-1:lbw=" + ",".join(["U"] * 17), seed=9)
    again = plan_merge(
        made.recipe, find=lambda name: folder / f"{Path(name).stem}.safetensors", presets=Presets()
    )
    assert [layer.inputs for layer in again.layers] == [layer.inputs for layer in made.layers]


@pytest.mark.parametrize("field", ["te", "unet", "te1", "x"])
def test_strengths_that_are_no_numbers_never_reach_the_arithmetic(field):
    for bad in (float("nan"), float("inf"), "1", None if field in ("te", "unet") else "x", True):
        with pytest.raises(LoraMergeError):
            LoraInput("a", **{field: bad})
