"""Every base model has block lists of its own, and none is neglected in silence."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_loramerge import models
from lib_loramerge.blocks import bundled_preset_path, check_reach, load_presets, resolve
from lib_loramerge.errors import RecipeError
from lib_loramerge.recipe import LoraInput

PRESETS = load_presets([bundled_preset_path()])
UNETS = ("sd1", "sd2", "sdxl")
# Model, size -> length of the whole list, and of the list without BASE, IN and OUT.
LENGTHS = {
    ("flux1", ""): (61, 57), ("chroma", ""): (61, 57), ("flux2", "dev"): (59, 56),
    ("flux2", "Klein 9B"): (35, 32), ("flux2", "Klein 4B"): (28, 25), ("hunyuan_video", ""): (63, 60),
    ("hunyuan_image", ""): (63, 60), ("wan", "14B"): (43, 40), ("wan", "1.3B"): (33, 30),
    ("qwen_image", ""): (63, 60), ("zimage", ""): (37, 30), ("lumina2", ""): (33, 26), ("sd3", ""): (27, 24),
    ("sd3_large", ""): (41, 38), ("krea2", ""): (31, 28), ("hidream", ""): (51, 48),
}  # fmt: skip
LETTERS = {
    "double_blocks": "D", "single_blocks": "S", "double_layers": "D", "single_layers": "S",
    "double_stream_blocks": "D", "single_stream_blocks": "S", "joint_blocks": "B", "blocks": "B",
    "layers": "B", "transformer_blocks": "B", "decoder_layers": "B", "visual_transformer_blocks": "B",
    "noise_refiner": "NR", "context_refiner": "CR", "ref_image_refiner": "RR",
    "text_transformer_blocks": "TB", "vace_blocks": "V", "face_adapter_fuser_blocks": "F",
    "audio_injector_injector": "A", "audio_injector_injector_adain_layers": "A", "down_blocks": "D",
    "up_blocks": "U",
}  # fmt: skip
TRANSFORMERS = [name for name, record in models.ARCHITECTURES.items() if record.names is not None]
ROOTS = "|".join(sorted(LETTERS, key=len, reverse=True))


def layers_of(name: str, size: models.Size) -> list[tuple[str, str | None, str]]:
    """(component, block, layer) of every denoiser layer of a model, by its table."""
    found = []
    record = models.ARCHITECTURES[name]
    for template in record.names.layers:
        text = record.names.counts.get(template.partition(".{}")[0], "2")
        count = int(text) if text.isdigit() else size.dims[text]
        for number in range(count if "{}" in template else 1):
            path = template.replace("{}", str(number)).replace(".", "_").replace("-", "_")
            layer = f"lora_unet_{path}"
            found.append(("unet", models.block(name, layer), layer))
    return found


def halves(count: int) -> LoraInput:
    return LoraInput("a", lbw=",".join(["0.5"] * count))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_layer_is_in_the_block_that_its_name_says(name):
    for size in models.ARCHITECTURES[name].sizes:
        ids = models.block_map(name, size).all
        for _, block, layer in layers_of(name, size):
            path = layer.removeprefix("lora_unet_")
            match = re.match(rf"({ROOTS})_(\d+)_", path)
            if path.startswith("distilled_guidance_layer"):
                assert block is None
                continue
            if match:
                assert block == f"{LETTERS[match[1]]}{int(match[2]):02}"
            else:
                assert block in ("IN", "OUT"), layer
            assert block in ids, layer


@pytest.mark.parametrize(("name", "label"), LENGTHS)
def test_each_entry_of_each_list_goes_to_its_own_block(name, label):
    size = next(size for size in models.ARCHITECTURES[name].sizes if size.label == label)
    model = models.block_map(name, size)
    assert tuple(len(entry.ids) for entry in model.lists) == LENGTHS[name, label]
    assert len(set(model.ids)) == len(model.ids)
    for entry in model.lists:
        text = ",".join(str(n + 1) for n in range(len(entry.ids)))
        found = resolve(LoraInput("a", lbw=text), PRESETS, rng=random.Random(0), model=model)
        for index, block in enumerate(entry.ids):
            assert found.weight("unet", block, "lora_unet_x") == index + 1
        for block in set(model.ids) - set(entry.ids):
            assert found.weight("unet", block, "lora_unet_x") == 1
        stored = LoraInput("a", lbw=found.as_input_fields()[0])
        assert dict(resolve(stored, PRESETS, rng=random.Random(9), model=model).values) == dict(found.values)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(TRANSFORMERS), st.integers(1, 70), st.randoms(use_true_random=False))
def test_any_list_governs_a_layer_or_is_an_error(name, count, chance):
    size = chance.choice(models.ARCHITECTURES[name].sizes)
    known = chance.sample(layers_of(name, size), 3)
    model = models.block_map(name, size, [block for _, block, _ in known])
    try:
        found = resolve(halves(count), PRESETS, rng=random.Random(0), model=model)
        check_reach(found, known, model, PRESETS)
    except RecipeError:
        return
    assert any(found.weight(*layer) == 0.5 for layer in known)


def test_a_preset_for_another_model_names_the_lists_and_the_presets_that_fit():
    model = models.block_map("zimage")
    with pytest.raises(RecipeError) as caught:
        resolve(LoraInput("a", lbw="MIDD"), PRESETS, rng=random.Random(0), model=model)
    for word in ("'a'", "MIDD", "17", "Z-Image", "37", "NR00-NR01", "B00-B29", "FIRST-THIRD"):
        assert word in str(caught.value)


def test_a_list_for_blocks_that_the_lora_lacks_is_an_error():
    model = models.block_map("zimage")
    layers = [("te", "BASE", "lora_te_layers_0_mlp_up_proj")]
    found = resolve(halves(30), PRESETS, rng=random.Random(0), model=model)
    with pytest.raises(RecipeError) as caught:
        check_reach(found, layers, model, PRESETS)
    for word in ("govern no layer of this LoRA", "BASE", "37"):
        assert word in str(caught.value)


def test_rules_that_pick_nothing_are_an_error_and_one_of_several_is_named():
    model = models.block_map("zimage")
    layers = [("unet", "B03", "lora_unet_layers_3_attention_qkv")]
    rule = resolve(LoraInput("a", lbwe="IN05-OUT05:attn:0"), PRESETS, rng=random.Random(0), model=model)
    with pytest.raises(RecipeError, match="govern no layer"):
        check_reach(rule, layers, model, PRESETS)
    text = "IN05-OUT05:attn:0,B00-B09:attention:0"
    rules = resolve(LoraInput("a", lbwe=text), PRESETS, rng=random.Random(0), model=model)
    (note,) = check_reach(rules, layers, model, PRESETS)
    assert "reaches no layer" in note
    assert rules.weight(*layers[0]) == 0


def test_a_partial_list_says_what_it_leaves_at_1():
    model = models.block_map("zimage")
    layers = [("unet", "B03", "lora_unet_layers_3_attention_qkv"), ("unet", "IN", "lora_unet_x_embedder")]
    found = resolve(halves(30), PRESETS, rng=random.Random(0), model=model)
    (note,) = check_reach(found, layers, model, PRESETS)
    assert "1 of 2 layers" in note
    assert "lora_unet_x_embedder" in note


@pytest.mark.parametrize("name", [*TRANSFORMERS, "sd1", "sd2", "sdxl", "sdxl_refiner"])
def test_presets_by_place_part_every_model_in_thirds(name):
    model = models.block_map(name)
    thirds = [
        resolve(LoraInput("a", lbw=preset), PRESETS, rng=random.Random(0), model=model).values
        for preset in ("FIRST-THIRD", "MIDDLE-THIRD", "LAST-THIRD")
    ]
    for block in model.ids:
        expected = 3 if block in models.TEXT_ENCODERS else 1
        assert sum(third[block] for third in thirds) == expected, block


def test_a_part_of_a_model_that_makes_no_sense_is_refused():
    for text in ("@", "@0.5-0.2", "@0-2", "@a-b"):
        with pytest.raises(RecipeError, match="@FROM-TO"):
            resolve(LoraInput("a", lbw=text), PRESETS, rng=random.Random(0), model=models.block_map("sdxl"))


def test_a_file_with_more_blocks_than_its_table_shows_the_count():
    assert [len(entry.ids) for entry in models.block_map("anima", None, ["B39"]).lists] == [43, 40]
    assert {len(entry.ids) for entry in models.block_map("anima").lists} == {31, 28, 43, 40}
