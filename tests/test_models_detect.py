# ruff: noqa: E501  (tables of names are easier to read one row to a line)
"""The base model of a file from names and shapes, whatever the adapter kind, and from metadata last."""

from __future__ import annotations

import pytest

from lib_loramerge import models
from lib_loramerge.adapters import measured


def detect(layers, metadata, base_model=None):
    return models.detect({name: measured(slots) for name, slots in layers.items()}, metadata, base_model)


def in_features(slots):
    return measured(slots).in_


def out_features(slots):
    return measured(slots).out


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


def test_oft_shows_the_output_width_only():
    assert (in_features({"oft_blocks": (10, 32, 32)}), out_features({"oft_blocks": (10, 32, 32)})) == (
        None,
        320,
    )
    assert out_features({"oft_blocks": (3, 12, 32, 32)}) == 384


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("context", "expected"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (1280, "sdxl_refiner")]
)
@pytest.mark.parametrize("name", [K, K_DIFFUSERS])
def test_the_context_width_of_cross_attention_shows_the_unet(kind, context, expected, name):
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
        (["label_emb_0_0"], {}, "sdxl"),
        (["label_emb_0_0", "input_blocks_1_0_emb_layers_1"], {}, "sdxl"),
        (["up_blocks_0_attentions_0_proj_in"], {}, "sdxl"),
        (["output_blocks_0_1_proj_in"], {}, "sdxl"),
        (["down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"], {}, "sd1"),
        (["output_blocks_9_1_transformer_blocks_0_attn1_to_q"], {}, "sd1"),
        (["output_blocks_9_1_transformer_blocks_0_attn1_to_q"], {"ss_v2": "True"}, "sd2"),
        (["down_blocks_0_attentions_0_proj_in"], {}, "sd2"),
        (["down_blocks_3_resnets_0_time_emb_proj"], {}, "sd1"),
        (["down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"], {}, "sd1"),
        (["down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"], {"ss_base_model_version": "sd_v1"}, "sd1"),
        (
            ["down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"],
            {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl",
        ),
        (["time_embed_0"], {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        (["something_else"], {"ss_base_model_version": "sdxl_base_v1-0"}, "unknown"),
    ],
)  # fmt: skip
def test_a_unet_without_cross_attention_is_reported_by_its_levels_and_depth(names, metadata, expected):
    assert detect(square(*names), metadata).architecture.id == expected


@pytest.mark.parametrize(
    ("name", "width", "candidates"),
    [
        ("down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", 640, ["sd1", "sd2", "sdxl"]),
        ("input_blocks_4_1_transformer_blocks_0_attn1_to_q", 768, ["sdxl_refiner"]),
        ("input_blocks_4_1_transformer_blocks_1_attn1_to_q", 640, ["sdxl"]),
        ("middle_block_1_transformer_blocks_0_attn1_to_q", 1280, ["sd1", "sd2", "sdxl"]),
        ("up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", 1280, ["sd1", "sd2"]),
        ("up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", 640, ["sdxl"]),
        ("time_embedding_linear_1", 1280, ["sd1", "sd2", "sdxl"]),
    ],
)
def test_a_small_file_fits_every_unet_that_has_its_layers_in_their_widths(name, width, candidates):
    found = detect(square(name, width=width), {})
    assert [model for model, _ in found.candidates] == candidates
    assert found.reason.endswith("alike") == (len(candidates) > 1)


def test_a_convolution_in_proj_in_distinguishes_version_1_from_2():
    names = {"lora_unet_down_blocks_0_attentions_0_proj_in": slots("lora stored 4-D", 320, 320)}
    assert detect(names, {}).architecture.id == "sd1"


def encoder(prefix: str, layer: int, width: int) -> dict[str, dict[str, tuple[int, ...]]]:
    return {f"{prefix}text_model_encoder_layers_{layer}_self_attn_q_proj": slots("lora", width, width)}


@pytest.mark.parametrize(
    ("layers", "metadata", "expected"),
    [
        (encoder("lora_te_", 3, 768), {}, "sd1"),
        (encoder("lora_te1_", 3, 768), {}, "sdxl"),
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
        (encoder("lora_te1_", 3, 768) | {"lora_te1_text_projection": slots("lora", 768, 768)}, {}, "sdxl"),
        (encoder("lora_te_", 23, 1024), {}, "sd2"),
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc2": slots("lora", 1280, 5120)}, {}, "sdxl_refiner"),
        ({"lora_te_layers_39_self_attn_q_proj": slots("lora", 4096, 5120)}, {}, "flux2"),
        (
            {"lora_te_norm": {"w_norm": (2560,)}, "lora_te_layers_0_mlp_up_proj": slots("lora", 9, 2560)},
            {},
            "zimage",
        ),
        ({}, {}, "unknown"),
        ({}, {"ss_base_model_version": "sd_v1"}, "sd1"),
    ],
)
def test_text_encoders_alone_show_what_they_can(layers, metadata, expected):
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
        (["transformer_blocks_0_attn1_to_q"], 1152, {}, "pixart"),
        (["double_stream_blocks_0_block_attn1_to_q"], 2560, {}, "hidream"),
    ],
)
def test_transformers_that_share_names_are_reported_by_width_depth_and_then_metadata(
    names, width, metadata, expected
):
    assert detect(square(*names, width=width), metadata).architecture.id == expected


def test_linear1_distinguishes_flux_2_of_the_same_width_from_flux_1():
    name = "lora_unet_single_blocks_0_linear1"
    assert detect({name: slots("lora", 9 * 3072, 3072)}, {}).architecture.id == "flux2"
    assert detect({name: slots("lora", 7 * 3072, 3072)}, {}).architecture.id == "flux1"


@pytest.mark.parametrize(
    ("said", "expected", "candidates"),
    [
        ("flux-1-dev/lora", "flux1", 1),
        ("qwen-image/lora", "qwen_image", 1),
        ("wan2.1/lora", "flux1", 6),
        ("", "flux1", 6),
    ],
)
def test_metadata_choose_among_models_that_have_every_layer_of_a_small_file(said, expected, candidates):
    layers = {"lora_unet_transformer_blocks_3_attn_to_out_0": {"up": (3072, 2), "down": (2, 3072)}}
    found = detect(layers, {"modelspec.architecture": said})
    assert found.architecture.id == expected
    assert len({name for name, _ in found.candidates}) == candidates
    if candidates > 1:
        assert {"flux1", "qwen_image", "flux2", "chroma"} < {name for name, _ in found.candidates}
        assert found.reason.endswith("alike")


CHROMA = {"lora_unet_double_blocks_3_img_attn_qkv": slots("lora", 9216, 3072)}
COSMOS = {"lora_unet_blocks_3_self_attn_q_proj": slots("lora", 2048, 2048)}


@pytest.mark.parametrize(
    ("layers", "name", "expected"),
    [
        (CHROMA, "/models/Chroma1-HD-Flash.safetensors", "chroma"),
        (CHROMA, "C:\\models\\flux\\chroma-unlocked-v48.safetensors", "chroma"),
        (CHROMA, "flux1-dev.safetensors", "flux1"),
        (CHROMA, "monochroma-flux.safetensors", "flux1"),
        (CHROMA, "flux-chroma-mix.safetensors", None),
        (CHROMA, "my_own_model.safetensors", None),
        (COSMOS, "cosmos_predict2_2B_t2i.safetensors", "cosmos_predict2"),
        (COSMOS, "anima-preview.safetensors", "anima"),
        (COSMOS, "wanda.safetensors", None),
    ],
)
def test_the_name_of_the_checkpoint_chooses_where_the_layers_do_not(layers, name, expected):
    found = detect(layers, {"ss_sd_model_name": name})
    several = {model for model, _ in found.candidates}
    if expected is None:
        assert len(several) > 1
        assert found.reason.endswith("alike")
    else:
        assert several == {expected}
        assert repr(name) in found.reason


def test_the_name_of_the_checkpoint_does_not_overrule_layers_or_a_stated_base_model():
    modulation = {**CHROMA, "lora_unet_double_blocks_3_img_mod_lin": slots("lora", 18432, 3072)}
    named = {"ss_sd_model_name": "Chroma1-HD.safetensors"}
    assert detect(modulation, named).architecture.id == "flux1"
    assert detect(CHROMA, {**named, "ss_base_model_version": "flux1"}).architecture.id == "flux1"


def linear(name: str, out: int, in_: int) -> dict[str, dict[str, tuple[int, ...]]]:
    return {f"lora_unet_{name}": slots("lora", out, in_)}


@pytest.mark.parametrize(
    ("layers", "metadata", "model", "size"),
    [
        # A few layers of a model are enough where their number or a width is its own.
        (linear("single_blocks_7_linear2", 3072, 12288), {}, "flux2", "Klein 4B"),
        (linear("single_blocks_7_linear2", 4096, 16384), {}, "flux2", "Klein 9B"),
        (linear("single_blocks_40_linear2", 6144, 24576), {}, "flux2", "dev"),
        (linear("transformer_blocks_2_attn_add_q_proj", 6144, 6144), {}, "flux2", "dev"),
        (linear("transformer_blocks_2_attn_to_k", 4096, 4096), {}, "flux2", "Klein 9B"),
        (
            linear("double_blocks_2_img_attn_proj", 3072, 3072),
            {"ss_base_model_version": "flux2_klein_4b"},
            "flux2",
            "Klein 4B",
        ),
        (linear("transformer_blocks_59_attn_to_q", 3072, 3072), {}, "qwen_image", ""),
        (linear("transformer_blocks_0_img_mlp_gate_layer", 12288, 4096), {}, "qwen_image21", ""),
        (
            linear("transformer_blocks_40_attn1_to_q", 4096, 4096)
            | linear("transformer_blocks_0_audio_attn1_to_q", 2048, 2048),
            {},
            "ltx2",
            "",
        ),
        (
            linear("adaln_single_linear", 6 * 4096, 4096)
            | linear("audio_adaln_single_linear", 6 * 2048, 2048),
            {},
            "ltx2",
            "",
        ),
        (
            linear("transformer_blocks_0_attn1_to_q", 2048, 2048)
            | linear("adaln_single_linear", 6 * 2048, 2048),
            {},
            "ltx_video",
            "2B",
        ),
        # Names of Flux.1 that hosts look for in Flux.2 as well.
        (linear("single_blocks_7_linear1_qkv", 3 * 6144, 6144), {}, "flux2", "dev"),
        (linear("time_text_embed_guidance_embedder_linear_1", 6144, 256), {}, "flux2", "dev"),
        (linear("time_embedding_linear_1", 4096, 4096), {}, "ernie_image", "4096 wide"),
        (linear("layers_0_attention_o", 4608, 4608), {}, "ideogram4", ""),
        (linear("layers_3_attention_to_q", 4608, 4608), {}, "ideogram4", ""),
        (linear("layers_3_attention_to_q", 3840, 3840), {}, "zimage", ""),
        (linear("layers_3_self_attention_to_q", 4096, 4096), {}, "ernie_image", "4096 wide"),
        (linear("layers_3_self_attn_q_proj", 2048, 2048), {}, "ace_step15", ""),
        (linear("blocks_3_attn_wk", 1536, 6144), {}, "krea2", ""),
        (linear("transformer_blocks_3_attn_to_k", 1536, 6144), {}, "krea2", ""),
        (linear("double_layers_1_attn_w1q", 3072, 3072), {}, "auraflow", ""),
        (linear("joint_transformer_blocks_1_attn_to_q", 3072, 3072), {}, "auraflow", ""),
        (linear("blocks_1_cross_attn_kv_linear", 2304, 1152), {}, "pixart", ""),
        (linear("transformer_blocks_1_cross_attn_to_q", 2560, 2560), {}, "ace_step", ""),
        (linear("blocks_1_attn_qkv_y", 9216, 1536), {}, "mochi", ""),
        (linear("visual_transformer_blocks_1_self_attention_to_query", 4096, 4096), {}, "kandinsky5", "Pro"),
        (linear("double_blocks_53_img_attn_qkv", 6144, 2048), {}, "hunyuan_video15", ""),
        (linear("layers_1_feed_forward_linear_1", 10240, 2520), {}, "omnigen2", ""),
        (linear("blocks_35_self_attn_q_proj", 5120, 5120), {}, "cosmos_predict2", "14B"),
        (linear("llm_adapter_blocks_1_self_attn_q_proj", 1024, 1024), {}, "anima", ""),
        (linear("vace_blocks_1_after_proj", 5120, 5120), {}, "wan", "14B"),
        (linear("face_adapter_fuser_blocks_1_linear1_kv", 10240, 5120), {}, "wan", "14B"),
        (linear("audio_injector_injector_1_q", 5120, 5120), {}, "wan", "14B"),
        (linear("blocks_1_self_attn_q", 3072, 3072), {}, "wan", "5B"),
        (
            linear("transformer_blocks_1_attn_to_q", 3072, 3072),
            {"modelspec.architecture": "longcat-image/lora"},
            "longcat",
            "",
        ),
        # Metadata that contradict the layers do not count.
        (
            linear("single_blocks_7_linear1", 27648, 3072),
            {"ss_base_model_version": "flux1"},
            "flux2",
            "Klein 4B",
        ),
    ],
)
def test_a_part_of_a_model_is_recognised_and_its_size(layers, metadata, model, size):
    found = detect(layers, metadata)
    assert (found.architecture.id, found.size and found.size.label) == (model, size), found


@pytest.mark.parametrize("kind", ["glora", "glora old"])
def test_a_square_glora_layer_shows_its_width_in_both_orders(kind):
    assert (in_features(slots(kind, 3072, 3072)), out_features(slots(kind, 3072, 3072))) == (3072, 3072)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (encoder("lora_te1_", 3, 768), {"sdxl", "flux1", "sd3", "sd1"}),
        (
            {"lora_te3_encoder_block_0_layer_0_SelfAttention_q": slots("lora", 4096, 4096)},
            {"flux1", "sd3", "chroma"},
        ),
        ({"lora_te_layers_0_self_attn_q_proj": slots("lora", 4096, 2560)}, {"zimage", "flux2", "krea2"}),
    ],
)
def test_text_encoders_that_several_models_have_fit_all_of_them(layers, expected):
    assert expected <= {name for name, _ in detect(layers, {}).candidates}


def test_the_users_word_overrules_everything():
    found = detect(
        square("double_blocks_0_img_attn_proj", width=3072), {"ss_base_model_version": "flux1"}, "chroma"
    )
    assert (found.architecture.id, found.reason) == ("chroma", "as you chose")
