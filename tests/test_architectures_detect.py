# ruff: noqa: E501  (tables of names are easier to read one row to a line)
"""The base model of a file from names and shapes, whatever the adapter kind, and from metadata last."""

from __future__ import annotations

import pytest

from lib_loramerge.architectures import detect, in_features, out_features

K = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
K_DIFFUSERS = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


def slots(kind: str, out: int, in_: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one linear layer's tensors in each adapter kind that tells its width."""
    return {
        "lora": {"up": (out, 4), "down": (4, in_), "alpha": ()},
        "lora stored 4-D": {"up": (out, 4, 1, 1), "down": (4, in_, 1, 1)},
        "loha": {"hada_w1_a": (out, 4), "hada_w1_b": (4, in_), "hada_w2_a": (out, 4), "hada_w2_b": (4, in_)},
        "lokr whole": {"lokr_w1": (8, 8), "lokr_w2": (out // 8, in_ // 8)},
        "lokr half": {"lokr_w1": (8, 8), "lokr_w2_a": (out // 8, 4), "lokr_w2_b": (4, in_ // 8)},
        "lokr factored": {
            "lokr_w1_a": (8, 2), "lokr_w1_b": (2, 8), "lokr_w2_a": (out // 8, 4), "lokr_w2_b": (4, in_ // 8),
        },
        "diff": {"diff": (out, in_), "diff_b": (out,)},
        "glora": {"a1": (in_, 4), "a2": (4, in_), "b1": (out, 4), "b2": (4, in_)},
        "glora old": {"a1": (4, in_), "a2": (in_, 4), "b1": (4, in_), "b2": (out, 4)},
    }[kind]  # fmt: skip


KINDS = (
    "lora", "lora stored 4-D", "loha", "lokr whole", "lokr half", "lokr factored", "diff", "glora", "glora old",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_widths_are_read_from_every_adapter_kind(kind):
    assert in_features(slots(kind, 640, 2048)) == 2048
    assert out_features(slots(kind, 640, 2048)) == 640


def test_oft_tells_the_output_width_only():
    assert (in_features({"oft_blocks": (10, 32, 32)}), out_features({"oft_blocks": (10, 32, 32)})) == (
        None,
        320,
    )
    assert out_features({"oft_blocks": (3, 10, 32, 32)}) == 320


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("context", "expected"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (1280, "sdxl_refiner")]
)
@pytest.mark.parametrize("name", [K, K_DIFFUSERS])
def test_the_context_width_of_cross_attention_tells_the_unet(kind, context, expected, name):
    found = detect({name: slots(kind, 640, context)}, {})
    assert found.architecture.id == expected
    assert found.reason == f"cross-attention keys read {context} channels"


def test_shapes_win_over_metadata():
    metadata = {"ss_base_model_version": "sdxl_base_v1-0"}
    assert detect({K: slots("lora", 640, 768)}, metadata).architecture.id == "sd1"


def square(*names: str, width: int = 640) -> dict[str, dict[str, tuple[int, ...]]]:
    return {f"lora_unet_{name}": slots("lora", width, width) for name in names}


@pytest.mark.parametrize(
    ("names", "metadata", "expected"),
    [
        (["input_blocks_7_1_transformer_blocks_9_attn1_to_q"], {}, "sdxl"),
        (["middle_block_1_transformer_blocks_2_attn1_to_q"], {}, "sdxl"),
        (["middle_block_1_transformer_blocks_2_attn1_to_q", "input_blocks_10_0_emb_layers_1"], {}, "sdxl_refiner"),
        (["label_emb_0_0"], {}, "unknown"),
        (["label_emb_0_0", "input_blocks_1_0_emb_layers_1"], {}, "sdxl"),
        (["up_blocks_0_attentions_0_proj_in"], {}, "sdxl"),
        (["output_blocks_0_1_proj_in"], {}, "sdxl"),
        (["down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"], {}, "sd1"),
        (["output_blocks_9_1_transformer_blocks_0_attn1_to_q"], {}, "sd1"),
        (["output_blocks_9_1_transformer_blocks_0_attn1_to_q"], {"ss_v2": "True"}, "sd2"),
        (["down_blocks_0_attentions_0_proj_in"], {}, "sd2"),
        (["down_blocks_3_resnets_0_time_emb_proj"], {}, "sd1"),
        (["down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"], {}, "unknown"),
        (["down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"], {"ss_base_model_version": "sd_v1"}, "sd1"),
        (
            ["down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"],
            {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl",
        ),
        (["time_embed_0"], {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        (["something_else"], {"ss_base_model_version": "sdxl_base_v1-0"}, "unknown"),
    ],
)  # fmt: skip
def test_a_unet_without_cross_attention_is_told_by_its_levels_and_depth(names, metadata, expected):
    assert detect(square(*names), metadata).architecture.id == expected


def test_a_convolution_in_proj_in_tells_version_1_from_2():
    names = {"lora_unet_down_blocks_0_attentions_0_proj_in": slots("lora stored 4-D", 320, 320)}
    assert detect(names, {}).architecture.id == "sd1"


def encoder(prefix: str, layer: int, width: int) -> dict[str, dict[str, tuple[int, ...]]]:
    return {f"{prefix}text_model_encoder_layers_{layer}_self_attn_q_proj": slots("lora", width, width)}


@pytest.mark.parametrize(
    ("layers", "metadata", "expected"),
    [
        (encoder("lora_te_", 3, 768), {}, "sd1"),
        (encoder("lora_te1_", 3, 768), {}, "sd1"),
        (encoder("lora_te1_", 3, 768), {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        (encoder("lora_te1_", 3, 768), {"ss_base_model_version": "flux1"}, "flux1"),
        (encoder("lora_te_", 3, 768), {"ss_base_model_version": "sd_v2"}, "sd1"),
        (encoder("lora_te_", 22, 1024), {}, "sd2"),
        (encoder("lora_te_", 3, 1024), {}, "sd2"),
        (encoder("lora_te_", 30, 1280), {}, "sdxl_refiner"),
        (encoder("lora_te1_", 3, 768) | encoder("lora_te2_", 30, 1280), {}, "sdxl"),
        (
            encoder("lora_te1_", 3, 768) | encoder("lora_te2_", 30, 1280),
            {"ss_base_model_version": "sd3_medium"},
            "sd3",
        ),
        ({"lora_te3_encoder_block_0_layer_0_SelfAttention_q": slots("lora", 4096, 4096)}, {}, "flux1"),
        ({"lora_te_layers_0_self_attn_q_proj": slots("lora", 2048, 1024)}, {}, "anima"),
        ({"lora_te_layers_0_self_attn_q_proj": slots("lora", 2048, 2304)}, {}, "lumina2"),
        ({}, {}, "unknown"),
        ({}, {"ss_base_model_version": "sd_v1"}, "sd1"),
    ],
)
def test_text_encoders_alone_tell_what_they_can(layers, metadata, expected):
    assert detect(layers, metadata).architecture.id == expected


@pytest.mark.parametrize(
    ("names", "width", "metadata", "expected"),
    [
        (["double_blocks_0_img_attn_proj"], 3072, {}, "flux1"),
        (["double_blocks_0_img_attn_proj"], 3072, {"ss_base_model_version": "chroma"}, "chroma"),
        (
            ["double_blocks_0_img_attn_proj", "double_blocks_0_img_mod_lin"],
            3072,
            {"ss_base_model_version": "chroma"},
            "flux1",
        ),
        (["double_blocks_0_img_attn_proj"], 6144, {}, "flux2"),
        (["double_blocks_0_img_attn_proj"], 4096, {}, "flux2"),
        (["double_blocks_0_img_attn_qkv"], 3584, {}, "hunyuan_image"),
        (["double_blocks_19_img_attn_qkv"], 3072, {}, "hunyuan_video"),
        (
            ["transformer_blocks_19_attn_to_q", "single_transformer_blocks_0_attn_to_q"],
            3072,
            {},
            "hunyuan_video",
        ),
        (["transformer_blocks_3_attn_add_q_proj"], 3072, {}, "flux1"),
        (
            ["transformer_blocks_3_attn_add_q_proj"],
            3072,
            {"modelspec.architecture": "qwen-image/lora"},
            "qwen_image",
        ),
        (["transformer_blocks_30_attn_add_q_proj"], 3072, {}, "qwen_image"),
        (["transformer_blocks_3_attn_to_q"], 1536, {}, "sd3"),
        (["transformer_blocks_3_attn_to_q"], 2432, {}, "sd3_large"),
        (["joint_blocks_3_x_block_attn_proj"], 1536, {"ss_base_model_version": "flux1"}, "sd3"),
        (["joint_blocks_30_x_block_attn_proj"], 2432, {}, "sd3_large"),
        (["layers_0_attention_out"], 2304, {}, "lumina2"),
        (["layers_0_attention_out"], 3840, {}, "zimage"),
        (["blocks_0_attn1_to_q"], 1408, {}, "hunyuan_dit"),
        (["blocks_0_attn1_to_q"], 1536, {}, "wan"),
        (["transformer_blocks_0_attn1_to_q"], 1152, {}, "unknown"),
        (["double_stream_blocks_0_block_attn1_to_q"], 2560, {}, "hidream"),
    ],
)
def test_transformers_that_share_names_are_told_by_width_depth_and_then_metadata(
    names, width, metadata, expected
):
    assert detect(square(*names, width=width), metadata).architecture.id == expected


def test_linear1_tells_flux_2_of_the_same_width_from_flux_1():
    name = "lora_unet_single_blocks_0_linear1"
    assert detect({name: slots("lora", 9 * 3072, 3072)}, {}).architecture.id == "flux2"
    assert detect({name: slots("lora", 7 * 3072, 3072)}, {}).architecture.id == "flux1"


@pytest.mark.parametrize(
    ("said", "expected"),
    [("flux-1-dev/lora", "flux1"), ("qwen-image/lora", "qwen_image"), ("wan2.1/lora", "unknown")],
)
def test_metadata_choose_among_models_that_have_every_layer_of_a_small_file(said, expected):
    layers = {"lora_unet_transformer_blocks_3_attn_to_out_0": {"up": (3072, 2), "down": (2, 3072)}}
    assert detect(layers).architecture.id == "unknown"
    assert detect(layers, {"modelspec.architecture": said}).architecture.id == expected
