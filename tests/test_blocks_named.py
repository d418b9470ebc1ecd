"""Block weights by name: what they mean, how they are written, and that no entry is neglected in silence."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_loramerge import models
from lib_loramerge.blocks import (
    BlockWeights,
    Presets,
    check_reach,
    fitting,
    load_presets,
    resolve,
    save_preset,
)
from lib_loramerge.errors import RecipeError
from lib_loramerge.recipe import LoraInput, format_input, parse_input
from tests.helpers import format_files as ff
from tests.helpers.fixtures import SD1_LAYERS, SDXL_LAYERS, make_lora
from tests.test_blocks_models import PRESETS, TRANSFORMERS, UNETS, layers_of

NONE = Presets()
SEVENTEEN = ",".join(["1"] * 17)


def found(model: str, lbw: str, presets: Presets = NONE) -> BlockWeights:
    record = models.ARCHITECTURES[model]
    size = record.sizes[0] if record.sizes else None
    given = LoraInput("a", lbw=lbw)
    return resolve(given, presets, rng=random.Random(0), model=models.block_map(model, size))


def weights(model: str, lbw: str, presets: Presets = NONE) -> dict[str, float]:
    """The blocks that have another weight than 1."""
    return {block: value for block, value in found(model, lbw, presets).values.items() if value != 1}


@pytest.mark.parametrize("mark", [":", "="])
def test_names_ranges_and_stars_and_the_rest_1(mark):
    text = "D00-D07:0.5,S*:0.25,BASE:0".replace(":", mark)
    expected = {f"D{n:02}": 0.5 for n in range(8)} | {f"S{n:02}": 0.25 for n in range(38)}
    assert weights("flux1", text) == expected | {"CLIP": 0, "T5": 0}
    assert weights("sdxl", "IN04-IN07:0,M00:X") == {"IN04": 0, "IN05": 0, "IN06": 0, "IN07": 0}
    assert weights("zimage", "B01 - B00:2") == {"B00": 2, "B01": 2}
    assert set(weights("zimage", "B*:0")) == {f"B{n:02}" for n in range(30)}
    assert set(weights("zimage", "B1*:0")) == {f"B{n:02}" for n in range(10, 20)}
    assert set(weights("zimage", "*:0")) == set(models.block_map("zimage").ids)


def test_the_later_of_two_entries_for_one_block_counts():
    assert weights("zimage", "B*:0,B03:0.5")["B03"] == 0.5
    with pytest.raises(RecipeError, match="'B03' has no effect"):
        found("zimage", "B03:0.5,B*:0")


@pytest.mark.parametrize("text", ["D00:0.5", "B30:1", "B05-B99:0", "S*:1", "Q*:0", "MID:0.5", "B00:0.5,T5:0"])
def test_a_name_that_is_no_block_names_those_of_the_model(text):
    with pytest.raises(
        RecipeError, match=r"no block of Z-Image, which has BASE IN NR00-NR01 CR00-CR01 B00-B29"
    ):
        found("zimage", text)


@pytest.mark.parametrize("text", ["B00:0.5,1,1", "B00:0.5=1", "B00:", ":1,", "B00:x", "B00:nan", "B00:1001"])
def test_an_entry_that_makes_no_sense_is_refused(text):
    with pytest.raises(RecipeError):
        found("zimage", text)


def test_an_entry_that_governs_no_layer_is_an_error():
    model = models.block_map("zimage")
    layers = [("unet", "B03", "lora_unet_layers_3_attention_qkv")]
    with pytest.raises(RecipeError, match=r"'BASE' governs no layer of this LoRA, which has layers of B03"):
        check_reach(found("zimage", "B03:0.5,BASE:0"), layers, model, NONE)
    assert check_reach(found("zimage", "B0*:0.5"), layers, model, NONE) == []


def test_it_is_stored_as_numbers_of_the_whole_list():
    for name in (*TRANSFORMERS, *UNETS):
        first = found(name, "*:R,BASE:0.5")
        text, _ = first.as_input_fields()
        assert text is not None
        assert ":" not in text
        again = found(name, text)
        assert {block: again.values[block] for block in first.values} == first.values
        assert set(first.values) == set(models.block_map(name, *models.ARCHITECTURES[name].sizes[:1]).ids)


@pytest.mark.parametrize(
    ("text", "lbw"),
    [
        ("a:1:lbw=D00-D07:0.5,S*:1,BASE:0", "D00-D07:0.5,S*:1,BASE:0"),
        ("a:lbw=D00-D07=0.5,S*=1,BASE=0:1", "D00-D07=0.5,S*=1,BASE=0"),
        ("a:1:w=D00=0.5,S*:1,BASE=0,IN:-.5:1", "D00=0.5,S*:1,BASE=0,IN:-.5"),
        ("<lora:a:1:lbw=S*:0.5:x=1>", "S*:0.5"),
        ("a:lbw=B00:R,B01:X+0.1", "B00:R,B01:X+0.1"),
        ("a:lbw=BASE:0:1:1", "BASE:0"),
        ("a:lbw=MIDD:1:1", "MIDD"),
        ("a:lbw=26-MIDD:1", "26-MIDD"),
        ("a:lbw=@0-0.5:1", "@0-0.5"),
        ("a:1:lbw=1,0.5,R", "1,0.5,R"),
    ],
)
def test_the_grammar_of_tags_holds_it_beside_other_fields(text, lbw):
    read = parse_input(text)
    assert (read.lbw, read.te, read.unet) == (lbw, 1, 1)
    assert parse_input(format_input(read)) == read


def test_other_fields_after_it_keep_their_places():
    read = parse_input("a:lbw=D00:0.5,S*:0.25:0.7:0.6:8:lbwe=B00:attn:0")
    assert (read.lbw, read.te, read.unet, read.dyn) == ("D00:0.5,S*:0.25", 0.7, 0.6, 8)
    assert read.lbwe == "B00:attn:0"


def test_a_strength_behind_a_preset_that_is_called_like_a_block_is_not_guessed():
    presets = Presets(weights={"OUT": "B*:0.5"})
    with pytest.raises(RecipeError, match="the block or the preset OUT"):
        found("zimage", parse_input("a:lbw=OUT:0.8").lbw, presets)
    assert weights("zimage", "OUT=0.8", presets) == {"OUT": 0.8}
    assert weights("zimage", "OUT", presets)["B00"] == 0.5


def test_preset_files_hold_names_beside_lists_and_rules(tmp_path):
    path = tmp_path / "preset.txt"
    save_preset(path, "A", "D00-D07 : 0.5,\nS*:1")
    save_preset(path, "A", "IN05:attn:0")
    save_preset(path, "B", ",".join(["1"] * 37))
    read = load_presets([path])
    assert read.problems == ()
    assert read.weights == {"A": "D00-D07 : 0.5,S*:1", "B": ",".join(["1"] * 37)}
    assert read.elements == {"A": "IN05:attn:0"}
    assert fitting(read, models.block_map("zimage")) == ["B"]
    assert fitting(read, models.block_map("flux1")) == ["A"]


@pytest.mark.parametrize("name", [*TRANSFORMERS, *UNETS])
def test_no_text_encoder_is_a_preset_of_every_model(name):
    at_0 = weights(name, "NO-TEXT-ENCODER", PRESETS)
    assert set(at_0) == set(models.block_map(name).ids) & models.TEXT_ENCODERS
    assert set(at_0.values()) == {0}
    assert "NO-TEXT-ENCODER" in fitting(PRESETS, models.block_map(name))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(TRANSFORMERS), st.randoms(use_true_random=False))
def test_every_entry_changes_a_layer_or_is_an_error(name, chance):
    size = chance.choice(models.ARCHITECTURES[name].sizes)
    known = chance.sample(layers_of(name, size), 3)
    model = models.block_map(name, size, [block for _, block, _ in known])
    blocks = [*model.ids, "D00", "B00", "S*", "B*", "OUT", "BASE", "*"]
    entries = [f"{chance.choice(blocks)}:{number}" for number in (0.5, 0.25)]
    try:
        read = resolve(LoraInput("a", lbw=",".join(entries)), NONE, rng=random.Random(0), model=model)
        check_reach(read, known, model, NONE)
    except RecipeError:
        return
    assert {0.5, 0.25} <= {read.weight(*layer) for layer in known}


@pytest.mark.parametrize(
    ("layers", "written", "said"),
    [
        (SD1_LAYERS, "a:1:lbwe=:ff:0", "'ff' in an elemental rule is a part of 'diffusion_model'"),
        (SD1_LAYERS, "a:1:te2=0.5", "te2 changes nothing, as Stable Diffusion 1 has no such text encoder"),
        (SDXL_LAYERS, "a:1:te3=0.5", "te3 changes nothing, as Stable Diffusion XL has no such text encoder"),
        (SDXL_LAYERS, f"a:1:lbw={SEVENTEEN}", "no entry for OUT01, so 1 of 9 layers have weight 0"),
    ],
)
def test_what_does_other_than_it_seems_is_a_warning(tmp_path, layers, written, said):
    make_lora(tmp_path / "a.safetensors", layers)
    assert any(said in text for text in ff.merge(tmp_path, written).warnings)


@pytest.mark.parametrize("written", ["a:1:lbwe=:ff_net:0", "a:1:te1=0.5", f"a:1:lbw={SEVENTEEN}"])
def test_what_does_what_it_says_needs_no_warning(tmp_path, written):
    make_lora(tmp_path / "a.safetensors", SD1_LAYERS)
    assert ff.merge(tmp_path, written).warnings == []
