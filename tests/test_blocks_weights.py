"""Block weights and elemental rules: from what a person writes to the factor of a layer."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_loramerge.blocks import BLOCK_IDS, BlockWeights, Presets, blocks_help, resolve
from lib_loramerge.errors import RecipeError
from lib_loramerge.recipe import LoraInput, parse_input

SD = BLOCK_IDS[26]
LAYER = "lora_unet_input_blocks_5_1_transformer_blocks_0_attn1_to_q"
PRESETS = Presets(
    weights={"MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0", "SHORT": "1,0,0", "1,2": "never"},
    elements={"ON": "IN05-OUT05:attn:1", "BAD": "IN05:attn"},
)


def weights(text: str, seed: object = 0, presets: Presets = PRESETS) -> BlockWeights:
    return resolve(parse_input(text), presets, rng=random.Random(str(seed)))


def ones(count: int, **others: str) -> str:
    """A list of ``count`` entries, all 1 but those of the named blocks."""
    return ",".join(others.get(block, "1") for block in BLOCK_IDS[count])


@pytest.mark.parametrize("count", BLOCK_IDS)
def test_each_entry_goes_to_its_own_block_and_absent_blocks_get_0(count):
    ids = BLOCK_IDS[count]
    found = weights("a:lbw=" + ",".join(str(n + 1) for n in range(count)))
    assert dict(found.values) == {
        block: ids.index(block) + 1 if block in ids else 0 for block in (SD if count < 61 else ids)
    }


def test_the_lists_are_the_ones_of_lora_block_weight():
    assert [len(ids) for ids in BLOCK_IDS.values()] == list(BLOCK_IDS) == [12, 17, 20, 26, 61]
    assert " ".join(BLOCK_IDS[12]) == "BASE IN04 IN05 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05"
    assert " ".join(BLOCK_IDS[17]) == (
        "BASE IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"
    )
    assert SD[:2] + SD[12:15] + SD[-1:] == ("BASE", "IN00", "IN11", "M00", "OUT00", "OUT11")
    assert BLOCK_IDS[20] == SD[:10] + SD[13:23]
    flux = BLOCK_IDS[61]
    assert flux[:4] + flux[21:23] + flux[-2:] == ("CLIP", "T5", "IN", "D00", "D18", "S00", "S37", "OUT")


def test_without_block_weights_every_layer_has_1():
    found = weights("a:0.5")
    assert found.weight("unet", "IN05", LAYER) == found.weight("te", "BASE", "lora_te_x") == 1
    assert found.as_input_fields() == (None, None)


def test_a_layer_of_no_block_has_1_whatever_the_list():
    assert weights("a:lbw=" + ",".join(["0"] * 26)).weight("unet", None, "lora_unet_time_embed_0") == 1


def test_entries_are_numbers_of_any_sign_spaces_around_them_are_skipped():
    found = weights("a:lbw= -2 ,1e-3,.5 ," + ",".join(["+1.25"] * 9))
    assert list(found.values.values())[:1] == [-2]
    assert found.values["IN04"] == 0.001
    assert found.values["IN05"] == 0.5
    assert found.values["OUT05"] == 1.25


@pytest.mark.parametrize(
    ("entry", "x", "value"),
    [
        ("X", "", 1),
        ("X", ":x=0.7", 0.7),
        ("X+0.1", ":x=0.5", 0.6),
        ("X-0.1", ":x=-0.5", -0.6),
        ("X-1", "", 0),
    ],
)
def test_an_x_entry_is_the_x_of_the_lora_with_its_offset(entry, x, value):
    found = weights(f"a:lbw={ones(17, IN05=entry)}{x}")
    assert found.values["IN05"] == pytest.approx(value, abs=1e-12)
    assert found.values["IN04"] == 1


def test_random_entries_are_drawn_once_from_the_seed_within_their_ranges():
    text = "a:lbw=" + ",".join(["R"] * 13 + ["U"] * 13)
    found = [weights(text, seed) for seed in range(200)]
    drawn_r = [f.values[block] for f in found for block in SD[:13]]
    drawn_u = [f.values[block] for f in found for block in SD[13:]]
    assert 0 <= min(drawn_r) < 0.01
    assert 0.99 < max(drawn_r) <= 1
    assert -0.5 <= min(drawn_u) < -0.49
    assert 1.49 < max(drawn_u) <= 1.5
    assert all(round(value, 3) == value for value in drawn_r + drawn_u)
    assert weights(text, 3) == found[3] != found[4]


def test_what_is_stored_is_numbers_and_gives_the_same_weights_again():
    written = parse_input(f"a:lbw={ones(17, IN05='R', IN07='U', BASE='X+0.1')}:lbwe=ON:x=0.3")
    found = resolve(written, PRESETS, rng=random.Random(5))
    lbw, lbwe = found.as_input_fields()
    assert set(lbw) <= set("0123456789.,-e")
    stored = replace(written, lbw=lbw, lbwe=lbwe, x=None)
    assert resolve(stored, Presets(), rng=random.Random(99)) == found


@settings(deadline=None)
@given(st.lists(st.floats(-1000, 1000, allow_nan=False), min_size=61, max_size=61))
def test_stored_weights_lose_no_digit(numbers):
    stored = BlockWeights(BLOCK_IDS[61], dict(zip(BLOCK_IDS[61], numbers, strict=True)))
    again = resolve(LoraInput("a", lbw=stored.as_input_fields()[0]), Presets(), rng=random.Random(0))
    assert again.values == stored.values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a:lbw=MIDDD", ["'a'", "no preset 'MIDDD'", "Nearest: MIDD"]),
        ("a:lbw=midd", ["no preset 'midd'", "Nearest: MIDD"]),
        ("a:lbwe=ONN", ["'a'", "no preset 'ONN'", "Nearest: ON"]),
        ("a:lbw=0.5", ["no preset '0.5'"]),
        ("a:lbw=1,1,1", ["'a'", "3 block weights", "12", "17", "20", "26", "61", "SDXL", "Flux"]),
        ("a:lbw=" + "1," * 17, ["18 block weights"]),
        ("a:lbw=SHORT", ["preset SHORT", "3 block weights"]),
        ("a:lbw=" + ones(17, IN05=""), ["block weight", "''"]),
        ("a:lbw=" + ones(17, IN05="nan"), ["block weight", "'nan'"]),
        ("a:lbw=" + ones(17, IN05="inf"), ["'inf'"]),
        ("a:lbw=" + ones(17, IN05="1_0"), ["'1_0'"]),
        ("a:lbw=" + ones(17, IN05="1001"), ["1000", "'1001'"]),
        ("a:lbw=" + ones(17, IN05="r"), ["R, U, X", "'r'"]),
        ("a:lbw=" + ones(17, IN05="X0.5"), ["X+0.1", "'X0.5'"]),
        ("a:lbw=" + ones(17, IN05="X+"), ["'X+'"]),
        ("a:lbw=" + ones(17, IN05="X+1.2.3"), ["offset", "1.2.3"]),
        ("a:lbw=" + ones(17, IN05="X+999") + ":x=999", ["1000", "X+999"]),
        ("a:lbwe=BAD", ["preset BAD", "blocks:elements:ratio", "'IN05:attn'"]),
        ("a:lbwe=IN05:attn:nan", ["ratio", "nan"]),
        ("a:lbwe=IN05:attn:", ["ratio"]),
        ("a:lbwe=IN05:attn:R", ["ratio"]),
        ("a:lbwe=IN05-OUT5:attn:1", ["'IN05-OUT5'", "Nearest: OUT05"]),
        ("a:lbwe=IN05-S01:attn:1", ["no range"]),
        ("a:lbwe=MID:attn:1", ["no block 'MID'", "M00"]),
        ("a:lbwe=IN12:attn:1", ["no block 'IN12'", "Nearest"]),
        (f"a:lbw={ones(61)}:lbwe=IN05:attn:0", ["picks nothing", "CLIP to OUT"]),
        (f"a:lbw={ones(61)}:lbwe=ON", ["preset ON", "no range"]),
    ],
)
def test_block_weights_that_make_no_sense_are_refused_with_the_way_out(text, words):
    with pytest.raises(RecipeError) as caught:
        weights(text)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("count", "component", "block"),
    [
        (17, "unet", "D00"),
        (26, "te1", "CLIP"),
        (12, "te3", "T5"),
        (61, "unet", "IN04"),
        (61, "te", "BASE"),
        (61, "unet", "B00"),
    ],
)
def test_a_list_for_another_base_model_is_refused(count, component, block):
    with pytest.raises(RecipeError, match=rf"'a'.*block {block}"):
        weights(f"a:lbw={ones(count)}").weight(component, block, "lora_x")


def test_of_a_list_for_sd_another_transformer_takes_base_alone():
    found = weights("a:lbw=" + ",".join(["0.25"] * 26))
    assert found.weight("te2", "BASE", "lora_te2_x") == 0.25
    assert {found.weight("unet", block, "lora_unet_x") for block in ("IN", "B00", "B37", "OUT")} == {1}


@pytest.mark.parametrize(
    ("rules", "hit"),
    [
        ("IN05:attn:7", True), ("IN05:attn1:7", True), ("IN05:attn2:7", False), ("IN04:attn:7", False),
        ("IN04 IN05:attn2 attn1:7", True), ("IN04-OUT05:attn:7", True), ("OUT05-IN04:attn:7", True),
        ("IN06-OUT05:attn:7", False), ("IN06-IN04:attn:7", True), ("NOT IN05:attn:7", False),
        ("NOT IN04:attn:7", True), ("NOT IN04-IN06:attn:7", False), ("IN05:NOT attn:7", False),
        ("IN05:NOT attn2:7", True), ("NOT IN04:NOT attn2 ff_net:7", True), ("::7", True), (":attn:7", True),
        ("IN05::7", True), ("IN0:attn:7", True), ("IN:attn:7", True), ("OUT:attn:7", False),
        ("input_blocks_5_:attn:7", True), ("IN05:diffusion_model:7", True), ("IN05:to_q:7", True),
        ("  IN05   IN06 : attn  ff : 7 ", True), ("IN04:attn:7, IN05:attn:7", True),
    ],
)  # fmt: skip
def test_a_rule_picks_layers_by_block_and_by_part_of_the_name(rules, hit):
    found = weights(f"a:1:1:lbw={ones(17, IN05='0.5')}:lbwe={rules}")
    assert found.weight("unet", "IN05", LAYER) == (7 if hit else 0.5)


def test_ff_is_a_part_of_diffusion_model_and_so_of_every_denoiser_layer():
    """A trap of the extension that is kept, since a rule must mean here what it means in the prompt."""
    found = weights("a:lbwe=IN05:ff:0,IN04:ff_net:0")
    assert found.weight("unet", "IN05", LAYER) == 0
    assert found.weight("unet", "IN04", LAYER.replace("blocks_5", "blocks_4")) == 1


def test_a_ratio_takes_the_place_of_the_block_weight_and_the_last_rule_wins():
    found = weights(f"a:lbw={ones(17, IN05='0.5')}:lbwe=IN05:attn:2,IN05:to_q:3,IN05:attn2:4")
    assert found.weight("unet", "IN05", LAYER) == 3
    assert found.weight("unet", "IN05", LAYER.replace("attn1_to_q", "ff_net_2")) == 0.5


def test_proj_means_the_feed_forward_projection_as_well():
    found = weights("a:lbwe=IN05:proj:0")
    for part in ("proj_in", "proj_out", "transformer_blocks_0_ff_net_0_proj"):
        assert found.weight("unet", "IN05", f"lora_unet_input_blocks_5_1_{part}") == 0
    assert found.weight("unet", "IN05", LAYER) == 1


def test_a_rule_reaches_layers_of_no_block_by_their_name_alone():
    found = weights("a:lbwe=:time_embed:0")
    assert found.weight("unet", None, "lora_unet_time_embed_0") == 0
    assert found.weight("unet", None, "lora_unet_out_2") == 1
    assert weights("a:lbwe=IN05:time_embed:0").weight("unet", None, "lora_unet_time_embed_0") == 1


def test_rules_without_a_list_may_name_the_blocks_of_any_base_model():
    found = weights("a:lbwe=D00-D03:attn:0,B02-B04:attn:0,IN04:attn:0")
    assert found.weight("unet", "D02", "lora_unet_double_blocks_2_img_attn_qkv") == 0
    assert found.weight("unet", "D04", "lora_unet_double_blocks_4_img_attn_qkv") == 1
    assert found.weight("unet", "B04", "lora_unet_joint_blocks_4_x_block_attn_qkv") == 0
    assert found.weight("unet", "IN05", LAYER) == 1


def test_text_encoder_layers_are_searched_by_the_names_the_webui_gives_them():
    found = weights("a:lbwe=BASE:c_fc:0")
    assert found.weight("te2", "BASE", "lora_te2_text_model_encoder_layers_3_mlp_fc1") == 0
    assert found.weight("te1", "BASE", "lora_te1_text_model_encoder_layers_3_mlp_fc1") == 1
    for component, block in (("te", "BASE"), ("te1", "BASE"), ("te2", "BASE"), ("te1", "CLIP")):
        layer = f"lora_{component}_text_model_encoder_layers_3_self_attn_q_proj"
        assert weights(f"a:lbwe={block}:attn:0").weight(component, block, layer) == 0
    assert weights("a:lbwe=T5:t5xxl:0").weight("te3", "T5", "lora_te3_encoder_block_0_layer_0_x") == 0


def test_the_help_names_every_list_and_its_ends():
    text = blocks_help()
    for count, ids in BLOCK_IDS.items():
        row = next(line for line in text.splitlines() if line.split()[:1] == [str(count)])
        assert ids[0] in row
        assert ids[-1] in row
