# ruff: noqa: E501  (tables of names are easier to read one row to a line)
"""Properties of the tables of dialects, slots and refused files."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_loramerge.dialects import DIALECTS, SLOTS, is_adapters, output_key, parse_file, split_key
from lib_loramerge.dialects.refusals import claimed, refused
from lib_loramerge.dialects.slots import WRITTEN
from lib_loramerge.errors import UnsupportedError
from lib_loramerge.refused import KINDS
from tests.helpers.dialect_cases import CASES, KOHYA, LISTS, SD1_CANONICAL, lora, tensors_of


def claims(key: str) -> list[str]:
    return [name for name, dialect in DIALECTS.items() if dialect.parse(key) is not None]


@pytest.mark.parametrize("name", DIALECTS)
def test_each_dialect_claims_its_example_and_no_other_dialect_does(name):
    assert DIALECTS[name].name == name
    assert claims(DIALECTS[name].example) == [name]


@pytest.mark.parametrize("name", CASES)
def test_no_key_of_any_case_is_claimed_twice(name):
    for key in CASES[name][0]:
        assert len(claims(key.replace("_orig_mod.", "").replace("module.", ""))) == 1, key


@pytest.mark.parametrize("name", LISTS)
def test_no_key_of_the_complete_lists_is_claimed_twice(name):
    for key in tensors_of(LISTS[name]):
        assert len(claims(key)) == 1, key


PREFIXES = [
    "lora_unet_", "lora_unet__", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "oft_unet_", "lora_prior_unet_",
    "lora_prior_te_", "lora_transformer_", "lycoris_", "diffusion_model_", "model_diffusion_model_", "diffusion_model.",
    "model.diffusion_model.", "unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", "prior.",
    "base_model.model.", "unet.base_model.model.", "transformer.base_model.model.", "text_encoders.clip_l.",
    "clip_l.", "clip_g.", "t5.", "",
]  # fmt: skip
PATHS = [
    "double_blocks.0.processor.qkv_lora1", "single_blocks.3.processor.qkv_lora", "double_blocks.0.img_attn.qkv",
    "down_blocks.0.attentions.0.proj_in", "text_model.encoder.layers.0.mlp.fc1", "proj_out", "unet.conv_in",
    "transformer.transformer_blocks.0.attn.to_q", "base_model.model.conv_in", "model.layers.0.mlp", "diffusion_model_x",
]  # fmt: skip
ENDINGS = [
    *SLOTS,
    "lora_A.default.weight",
    "lora_B.a_name.weight",
    "lora_magnitude_vector.default",
    "up.weight",
]


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(PREFIXES), st.sampled_from(PATHS), st.booleans(), st.sampled_from(ENDINGS))
def test_no_key_built_from_known_pieces_is_claimed_by_two_dialects(prefix, path, flatten, ending):
    key = f"{prefix}{path.replace('.', '_') if flatten else path}.{ending}"
    assert len(claims(key)) <= 1, key


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_no_text_whatever_makes_the_reader_fail_or_two_dialects_agree(text):
    assert len(claims(text)) <= 1
    assert len(claims(f"{text}.lora_up.weight")) <= 1
    try:
        parsed = parse_file({text: (2, 2)}, {})
    except UnsupportedError:
        return
    kept = [key for part in parsed.parts for key in part.slots.values()]
    assert [*kept, *parsed.unknown, *parsed.orphans, *parsed.embeddings.values()] == [text]


@pytest.mark.parametrize("ending", SLOTS)
def test_every_ending_is_read_as_its_slot_on_flattened_and_dotted_names(ending):
    for layer in ("lora_unet_x", "transformer.blocks.0.attn"):
        split = split_key(f"{layer}.{ending}")
        assert (split.layer, split.slot) == (layer, SLOTS[ending])


@pytest.mark.parametrize("slot", WRITTEN)
@pytest.mark.parametrize("dialect", ["auto", "diffusers"])
def test_every_slot_is_read_back_from_the_key_we_write(slot, dialect):
    for prefix in ("lora_unet_x", "transformer.blocks.0.attn"):
        split = split_key(output_key(prefix, slot, dialect))
        expected = "diff_b" if (slot, dialect) == ("up_bias", "auto") else slot
        assert (split.layer, split.slot) == (prefix, expected)


def test_plain_lora_is_written_with_the_endings_that_every_host_reads():
    assert output_key("lora_unet_x", "up") == "lora_unet_x.lora_up.weight"
    assert output_key("lora_unet_x", "down") == "lora_unet_x.lora_down.weight"
    assert output_key("lora_unet_x", "alpha") == "lora_unet_x.alpha"
    assert output_key("transformer.x", "up", "diffusers") == "transformer.x.lora_B.weight"
    assert output_key("transformer.x", "down", "diffusers") == "transformer.x.lora_A.weight"


# Kind of file to keys as such files have them.
NOT_LORAS = {
    "a ControlNet-LLLite": ["lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight"],
    "an IP-Adapter": ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"],
    "a Control-LoRA (a ControlNet)": ["lora_controlnet"],
    "a hypernetwork": ["768.0.linear.0.weight", "768.1.linear.0.weight"],
    "an hlora": ["hlora.blocks.0.weight"],
    "a T-LoRA": [f"{SD1_CANONICAL}.q_layer.weight", f"{SD1_CANONICAL}.p_layer.weight", f"{SD1_CANONICAL}.lambda_layer"],
    "a VeRA": ["base_model.vera_A", "base_model.vera_B", "base_model.model.x.vera_lambda_b", "base_model.model.x.vera_lambda_d"],
    "a FourierFT adapter": ["base_model.model.down_blocks.0.proj.fourierft_spectrum"],
    "an AdaLoRA": ["base_model.model.x.lora_E", "base_model.model.y.lora_E"],
    "an adapter of PEFT's OFT": ["base_model.model.x.oft_R.weight", "base_model.model.y.oft_r"],
    "an adapter of PEFT's BOFT": ["base_model.model.x.boft_R", "base_model.model.x.boft_s"],
    "an adapter of PEFT's (IA)^3": ["base_model.model.x.ia3_l"],
    "a HRA or bone adapter": ["base_model.model.x.hra_u"],
    "a LoRA of an embedding table": ["base_model.model.embed.lora_embedding_A", "base_model.model.embed.lora_embedding_B"],
    "a ControlNet": ["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"],
    "an AnimateDiff motion module": ["down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight"],
    "a whole checkpoint": ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"],
    "a VAE": ["decoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight", "quant_conv.bias"],
    "a textual inversion embedding": ["emb_params"],
    "an upscaler": ["model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"],
    "a CLIP vision model": ["vision_model.encoder.layers.0.mlp.fc1.weight"],
    "a T2I-Adapter": ["body.0.block1.weight", "body.0.block1.bias"],
    "a whole text encoder or language model": ["text_model.encoder.layers.0.mlp.fc1.weight"],
    "a whole denoiser": ["down_blocks.0.resnets.0.conv1.weight", "down_blocks.0.resnets.0.conv1.bias"],
}  # fmt: skip


def test_every_refused_kind_has_an_example_here():
    assert set(NOT_LORAS) == {kind.name for kind in KINDS}


@pytest.mark.parametrize("kind", NOT_LORAS)
def test_a_file_that_is_no_lora_is_refused_with_what_it_is_and_why(kind):
    keys = NOT_LORAS[kind]
    with pytest.raises(UnsupportedError) as caught:
        parse_file(dict.fromkeys(keys, (4, 4)), {}, where="thing.safetensors")
    message = str(caught.value)
    assert message.startswith(f"thing.safetensors: this is {kind}, which cannot be merged: ")
    assert len(message) < 300
    assert {found.name: shown for found, shown in claimed(keys).items()} == {kind: tuple(keys)}


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"],
            "checkpoint",
        ),
        (["double_blocks.0.img_attn.qkv.weight", "img_in.weight"], "denoiser"),
        (["transformer_blocks.0.attn.to_q.weight"], "denoiser"),
        (["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"], "denoiser"),
        (["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"], "a VAE"),
        (["encoder.down_blocks.0.resnets.0.conv1.weight"], "a VAE"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "text encoder"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"], "text encoder"),
        (["emb_params"], "embedding"),
        (["clip_g", "clip_l"], "embedding"),
        (["<cat>"], "embedding"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (
            ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
            "a ControlNet",
        ),
        (["lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k.down.0.weight"], "LLLite"),
        (["ip_adapter.1.to_k_ip.weight", "image_proj.proj.weight"], "IP-Adapter"),
        (["ip_adapter.0.to_q_lora.down.weight"], "IP-Adapter"),
        (["lora_controlnet", "input_blocks.0.0.lora.up"], "ControlNet"),
        (["768.0.linear.0.weight", "768.1.linear.0.weight"], "hypernetwork"),
        (["model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"], "upscaler"),
    ],
)
def test_other_kinds_of_files_are_named_by_their_keys(keys, name):
    with pytest.raises(UnsupportedError, match=name):
        parse_file(dict.fromkeys(keys, (4, 4)), {})


@pytest.mark.parametrize(
    "keys",
    [
        ["double_blocks.0.processor.qkv_lora1.down.weight"],
        ["bundle_emb.x.string_to_param.*", "lora_unet_a.lora_up.weight"],
        ["diffusion_model.blocks.0.self_attn.q.diff_b"],
        ["lora_unet_x.hada_w1_a"],
        ["something.nobody.knows"],
    ],
)
def test_adapters_and_unknown_files_are_not_refused_as_something_else(keys):
    unread = [key for key in keys if not is_adapters(key)]
    assert refused(keys, unread, len(keys) - len(unread)) is None


@pytest.mark.parametrize("name", CASES)
def test_no_lora_is_taken_for_something_else(name):
    assert claimed(CASES[name][0]) == {}


@pytest.mark.parametrize("name", LISTS)
def test_no_complete_lora_is_taken_for_something_else(name):
    assert claimed(tensors_of(LISTS[name])) == {}


def test_a_stray_foreign_tensor_among_many_layers_is_listed_instead_of_refusing_the_file():
    layers = lora([SD1_CANONICAL, SD1_CANONICAL.replace("to_k", "to_v")], 320, 768, up=KOHYA)
    parsed = parse_file({**layers, "base_model.model.embed.lora_embedding_A": (4, 4)}, {})
    assert parsed.unknown == ("base_model.model.embed.lora_embedding_A",)
    assert len(parsed.parts) == 2
