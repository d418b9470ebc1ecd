"""Block ids of Flux and the other transformers, and components of layer names."""

from __future__ import annotations

import pytest

from lib_loramerge.models import ARCHITECTURES, block, component, layers
from lib_loramerge.models.dit import NAMES

IDS_61 = ("CLIP", "T5", "IN", *(f"D{n:02}" for n in range(19)), *(f"S{n:02}" for n in range(38)), "OUT")


@pytest.mark.parametrize("architecture", ["flux1", "chroma"])
def test_every_flux_layer_is_in_the_block_its_name_says(architecture):
    seen = set()
    for template in NAMES[architecture].layers:
        root = template.split(".")[0]
        for number in range({"double_blocks": 19, "single_blocks": 38}.get(root, 1)):
            layer = f"lora_unet_{template.format(number)}".replace(".", "_")
            found = block(architecture, layer)
            if root in ("double_blocks", "single_blocks"):
                assert found == f"{root[0].upper()}{number:02}"
            elif root == "distilled_guidance_layer":
                assert found is None
            else:
                assert found == ("OUT" if root == "final_layer" else "IN")
            seen.add(found)
    seen |= {block(architecture, "lora_te1_text_model_encoder_layers_0_mlp_fc1")}
    seen |= {block(architecture, "lora_te3_encoder_block_0_layer_0_SelfAttention_q")}
    assert seen - {None} == set(IDS_61)


@pytest.mark.parametrize("architecture", ["sd1", "sd2", "sdxl", "sdxl_refiner"])
def test_text_encoder_layers_of_unet_models_are_the_base_block(architecture):
    encoders = [layer for layer in layers(architecture) if component(layer) != "unet"]
    assert encoders
    assert {block(architecture, layer) for layer in encoders} == {"BASE"}


def test_the_xl_unet_uses_only_the_ids_that_its_levels_have():
    used = {block("sdxl", layer) for layer in layers("sdxl")} - {None, "BASE"}
    assert used == {f"IN{n:02}" for n in range(9)} | {"M00"} | {f"OUT{n:02}" for n in range(9)}
    used = {block("sd1", layer) for layer in layers("sd1")} - {None, "BASE"}
    assert used == {f"IN{n:02}" for n in range(12)} | {"M00"} | {f"OUT{n:02}" for n in range(12)}


@pytest.mark.parametrize(
    ("architecture", "path", "expected"),
    [
        ("sd3", "joint_blocks_7_x_block_attn_qkv", "B07"),
        ("sd3", "context_embedder", "IN"),
        ("sd3", "final_layer_linear", "OUT"),
        ("qwen_image", "transformer_blocks_59_attn_to_q", "B59"),
        ("qwen_image", "proj_out", "OUT"),
        ("wan", "blocks_39_self_attn_q", "B39"),
        ("wan", "head_head", "OUT"),
        ("wan", "time_projection_1", "IN"),
        ("lumina2", "layers_25_attention_qkv", "B25"),
        ("lumina2", "noise_refiner_1_attention_qkv", "NR01"),
        ("anima", "blocks_27_mlp_layer1", "B27"),
        ("anima", "llm_adapter_blocks_0_self_attn_q_proj", "IN"),
    ],
)
def test_other_transformers_have_numbered_blocks_and_in_and_out(architecture, path, expected):
    assert block(architecture, f"lora_unet_{path}") == expected


def test_components_are_read_from_canonical_and_from_verbatim_names():
    assert component("lora_unet_middle_block_1_proj_in") == "unet"
    assert component("lora_te_text_model_encoder_layers_0_mlp_fc1") == "te"
    assert component("lora_te2_text_projection") == "te2"
    assert component("lora_te3_encoder_block_0_layer_0_SelfAttention_q") == "te3"
    assert component("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q") == "te2"
    assert component("transformer.caption_projection.linear_1") == "unet"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_base_model_has_a_label_and_what_metadata_needs(architecture):
    entry = ARCHITECTURES[architecture]
    assert entry.id == architecture
    assert entry.label
    if architecture != "unknown":
        assert entry.base_model_version
        assert entry.modelspec
    assert entry.v2 == (architecture == "sd2")


def test_a_unet_that_is_not_distinguished_still_has_its_blocks_in_both_spellings():
    import gzip
    import json
    from pathlib import Path

    own = json.loads(gzip.decompress((Path(__file__).parent / "data" / "unet_layers.json.gz").read_bytes()))
    for architecture in ("sd1", "sdxl"):
        for diffusers_name, (ldm, expected) in own[architecture].items():
            for name in (diffusers_name, ldm):
                assert block("unknown", f"lora_unet_{name}") == expected or expected is None
