"""Words for elements in ``lbwe=``: each layer has the one that its name says, in every base model."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_loramerge import models
from lib_loramerge.blocks import (
    WORDS,
    Presets,
    check_reach,
    elements_of,
    resolve,
)
from lib_loramerge.cli import main
from lib_loramerge.errors import RecipeError
from lib_loramerge.recipe import LoraInput
from tests.test_blocks_models import PRESETS, TRANSFORMERS, UNETS, layers_of

Layers = list[tuple[str, "str | None", str]]
# Layer of a model -> its word; ATTENTION goes with each that ends in it.
EXPECTED = {
    ("flux1", "double_blocks_3_img_attn_qkv"): "IMAGE-ATTENTION",
    ("flux1", "double_blocks_3_txt_attn_proj"): "TEXT-ATTENTION",
    ("flux1", "double_blocks_3_txt_mlp_2"): "MLP",
    ("flux1", "double_blocks_3_img_mod_lin"): "MODULATION",
    ("flux1", "single_blocks_3_modulation_lin"): "MODULATION",
    ("flux1", "single_blocks_3_linear1"): "FUSED",
    ("flux1", "img_in"): "",
    ("flux2", "double_stream_modulation_img_lin"): "MODULATION",
    ("sd3", "joint_blocks_3_context_block_attn_qkv"): "TEXT-ATTENTION",
    ("sd3", "joint_blocks_3_x_block_attn2_qkv"): "IMAGE-ATTENTION",
    ("sd3", "joint_blocks_3_x_block_attn_ln_q"): "NORM",
    ("sd3", "t_embedder_mlp_0"): "",
    ("auraflow", "double_layers_0_attn_w1q"): "TEXT-ATTENTION",
    ("auraflow", "double_layers_0_attn_w2q"): "IMAGE-ATTENTION",
    ("auraflow", "single_layers_0_attn_w1q"): "ATTENTION",
    ("auraflow", "double_layers_0_modCX_1"): "MODULATION",
    ("zimage", "layers_3_attention_qkv"): "ATTENTION",
    ("zimage", "layers_3_feed_forward_w2"): "MLP",
    ("zimage", "layers_3_ffn_norm1"): "NORM",
    ("zimage", "layers_3_adaLN_modulation_0"): "MODULATION",
    ("qwen_image", "transformer_blocks_3_attn_to_q"): "IMAGE-ATTENTION",
    ("qwen_image", "transformer_blocks_3_attn_to_add_out"): "TEXT-ATTENTION",
    ("qwen_image", "transformer_blocks_3_txt_mod_1"): "MODULATION",
    ("qwen_image21", "transformer_blocks_3_attn_to_q"): "ATTENTION",
    ("hidream", "double_stream_blocks_3_block_attn1_to_q_t"): "TEXT-ATTENTION",
    ("hidream", "double_stream_blocks_3_block_attn1_to_q"): "IMAGE-ATTENTION",
    ("hidream", "single_stream_blocks_3_block_attn1_to_q"): "ATTENTION",
    ("hidream", "single_stream_blocks_3_block_ff_i_experts_2_w1"): "MLP",
    ("wan", "blocks_3_self_attn_q"): "SELF-ATTENTION",
    ("wan", "blocks_3_cross_attn_k_img"): "CROSS-ATTENTION",
    ("wan", "blocks_3_ffn_0"): "MLP",
    ("wan", "blocks_3_modulation"): "MODULATION",
    ("anima", "blocks_3_adaln_modulation_cross_attn_1"): "MODULATION",
    ("anima", "blocks_3_mlp_layer1"): "MLP",
    ("ltx_video", "transformer_blocks_3_attn2_to_q"): "CROSS-ATTENTION",
    ("ltx_video", "transformer_blocks_3_ff_net_0_proj"): "MLP",
    ("ernie_image", "layers_3_adaLN_sa_ln"): "NORM",
    ("mochi", "blocks_3_attn_qkv_y"): "TEXT-ATTENTION",
    ("mochi", "blocks_3_mlp_y_w1"): "MLP",
    ("ace_step", "transformer_blocks_3_attn_to_q"): "SELF-ATTENTION",
    ("sdxl", "input_blocks_4_1_transformer_blocks_0_attn1_to_q"): "SELF-ATTENTION",
    ("sdxl", "input_blocks_4_1_transformer_blocks_0_attn2_to_q"): "CROSS-ATTENTION",
    ("sdxl", "input_blocks_4_1_transformer_blocks_0_ff_net_2"): "MLP",
    ("sdxl", "input_blocks_4_1_proj_in"): "",
}  # fmt: skip
# In numbered blocks, but none of these elements.
OTHERS = ("before_proj", "after_proj", "skip_linear", "depthwise", "_conv1", "_conv2")


def known_layers(name: str) -> Layers:
    if name in UNETS:
        listed = [layer for layer in models.layers(name) if layer.startswith("lora_unet_")]
        return [("unet", models.block(name, layer), layer) for layer in listed]
    return layers_of(name, models.ARCHITECTURES[name].sizes[0])


def governed(name: str, lbwe: str, layers: Layers, presets: Presets = PRESETS) -> dict[str, float]:
    """Layer to weight, where it is not 1; checked as a merge does."""
    size = models.ARCHITECTURES[name].sizes[0] if models.ARCHITECTURES[name].sizes else None
    model = models.block_map(name, size, [block for _, block, _ in layers])
    found = resolve(LoraInput("a", lbwe=lbwe), presets, rng=random.Random(0), model=model)
    check_reach(found, layers, model, presets)
    weights = {layer: found.weight(part, block, layer) for part, block, layer in layers}
    return {layer: weight for layer, weight in weights.items() if weight != 1}


@pytest.mark.parametrize(("name", "path"), EXPECTED)
def test_a_layer_has_the_word_that_its_name_says(name, path):
    layer = f"lora_unet_{path}"
    layers = [*known_layers(name), ("unet", models.block(name, layer), layer)]
    word = EXPECTED[name, path]
    found = {each for each in elements_of(name) if layer in governed(name, f":{each}:0", layers)}
    assert found == ({word, "ATTENTION"} if word.endswith("ATTENTION") else {word} - {""})


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_layer_of_a_numbered_block_has_a_word(name):
    layers = known_layers(name)
    found = {layer for word in elements_of(name) for layer in governed(name, f":{word}:0", layers)}
    left = [layer for _, block, layer in layers if block and block[-1].isdigit() and layer not in found]
    assert [layer for layer in left if not layer.endswith(OTHERS)] == []


@pytest.mark.parametrize("name", [*TRANSFORMERS, *UNETS])
def test_the_presets_by_element_are_for_every_model(name):
    layers = known_layers(name)
    assert {"ATTENTION", "MLP"} <= set(elements_of(name))
    without = governed(name, "NO-MLP", layers)
    alone = governed(name, "ATTENTION-ONLY", layers)
    attention = set(governed(name, ":ATTENTION:0", layers))
    fused = set(governed(name, ":FUSED:0", layers)) if "FUSED" in elements_of(name) else set()
    assert set(without.values()) == set(alone.values()) == {0}
    assert set(without) <= set(alone)
    assert not set(alone) & (attention | fused)
    assert attention | set(alone) | fused == {layer for _, _, layer in layers}
    encoder = [("te", "BASE", "lora_te_text_model_encoder_layers_0_mlp_fc1")]
    assert set(governed(name, "ATTENTION-ONLY", [*layers, *encoder])) == set(alone)


def test_a_preset_that_governs_nothing_names_the_words_of_the_model():
    layers = [("unet", "B03", "lora_unet_layers_3_attention_qkv")]
    words = "ATTENTION, IMAGE-ATTENTION, TEXT-ATTENTION, MLP, MODULATION, NORM"
    with pytest.raises(RecipeError, match=rf"govern no layer .* elements: {words}"):
        governed("zimage", "NO-MLP", layers)
    with pytest.raises(RecipeError, match="govern no layer"):
        governed("zimage", ":FUSED:0", layers)


def test_a_word_that_is_none_is_an_error_also_behind_not():
    for text in (":ATENTION:0", ":NOT ATENTION:0", ":IMAGE-MLP:0"):
        with pytest.raises(RecipeError, match=r"no word .*ATTENTION"):
            governed("flux1", text, known_layers("flux1"))


def test_rules_with_words_are_stored_as_they_are_and_read_back():
    model = models.block_map("flux1")
    given = LoraInput("a", lbwe="D00-D01:NOT ATTENTION FUSED:0.5")
    found = resolve(given, PRESETS, rng=random.Random(0), model=model)
    _, text = found.as_input_fields()
    assert text == "D00 D01:NOT ATTENTION FUSED:0.5"
    assert resolve(LoraInput("a", lbwe=text), PRESETS, rng=random.Random(0), model=model) == found


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([*TRANSFORMERS, *UNETS]), st.sampled_from(list(WORDS)), st.integers(0, 999))
def test_any_rule_changes_a_layer_or_is_an_error(name, word, seed):
    chance = random.Random(seed)
    layers = chance.sample(known_layers(name), 3)
    blocks = chance.choice(["", "B00-B09", "D00", "NOT B", "OUT"]) + chance.choice([":", ":NOT "])
    try:
        found = governed(name, f"{blocks}{word}:0.5", layers)
    except RecipeError:
        return
    assert set(found.values()) == {0.5}


def test_the_words_of_a_model_are_listed(capsys):
    assert main(["presets", "--elements", "Z-Image"]) == 0
    listed = capsys.readouterr().out
    assert "MODULATION" in listed
    assert "_feed_forward_w" in listed
    assert "FUSED" not in listed
    assert main(["presets", "--elements", "flux1", "--json"]) == 0
    assert '"FUSED"' in capsys.readouterr().out
    assert main(["presets", "--elements", "nonsense"]) == 1
    assert "no base model" in capsys.readouterr().err
