"""The U-Nets' layer lists against complete lists and against diffusers' own models."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lib_loramerge.hosts import companions
from lib_loramerge.models import (
    block,
    canonical_path,
    diffusers_layers,
    is_conv,
    kernel,
    layers,
)
from tests.helpers.fixtures import sample_data

OWN = json.loads(gzip.decompress((Path(__file__).parent / "data" / "unet_layers.json.gz").read_bytes()))
SIZES = {"sd1": 391, "sd2": 391, "sdxl": 1050}


def unet_part(architecture: str) -> list[str]:
    return [layer for layer in layers(architecture) if layer.startswith("lora_unet_")]


@pytest.mark.parametrize("architecture", SIZES)
def test_the_list_has_every_layer_of_the_unet_and_no_other(architecture):
    truth = OWN[architecture]
    assert len(truth) == SIZES[architecture]
    assert sorted(unet_part(architecture)) == sorted(f"lora_unet_{ldm}" for ldm, _ in truth.values())


@pytest.mark.parametrize("architecture", SIZES)
def test_every_layer_is_found_by_both_spellings_and_given_back_by_its_diffusers_name(architecture):
    for diffusers_name, (ldm, _) in OWN[architecture].items():
        assert canonical_path(architecture, "unet", diffusers_name) == (ldm, None)
        assert canonical_path(architecture, "unet", ldm) == (ldm, None)
        ((dotted, rows),) = diffusers_layers(architecture, f"lora_unet_{ldm}")
        assert (dotted.replace(".", "_"), rows) == (diffusers_name, None)


@pytest.mark.parametrize("architecture", SIZES)
def test_every_layer_lands_in_its_block_and_the_unclassified_ones_in_none(architecture):
    for ldm, expected in OWN[architecture].values():
        assert block(architecture, f"lora_unet_{ldm}") == expected
    outside = [ldm for ldm, expected in OWN[architecture].values() if expected is None]
    assert {"time_embed_0", "time_embed_2", "out_0", "out_2"} <= set(outside)


@pytest.mark.parametrize("architecture", SIZES)
def test_the_sample_lists_beside_the_checkout_say_the_same_as_our_copy(architecture):
    folder = sample_data()
    if folder is None:
        return
    beside = json.loads((folder / "unet" / f"{architecture}.json").read_text("utf-8"))
    assert {name: [entry["ldm"], entry["lbw26"]] for name, entry in beside.items()} == OWN[architecture]


MODELS = {
    "sd1": {"cross_attention_dim": 768},
    "sd2": {
        "cross_attention_dim": 1024, "use_linear_projection": True, "attention_head_dim": (5, 10, 20, 20),
    },
    "sdxl": {
        "cross_attention_dim": 2048, "use_linear_projection": True, "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "sdxl_refiner": {
        "cross_attention_dim": 1280, "use_linear_projection": True, "attention_head_dim": (6, 12, 24, 24),
        "block_out_channels": (384, 768, 1536, 1536), "transformer_layers_per_block": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2560,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def models():
    from diffusers import UNet2DConditionModel

    built = {}
    for architecture, config in MODELS.items():
        with torch.device("meta"):
            built[architecture] = UNet2DConditionModel(**config)
    return built


@pytest.mark.parametrize("architecture", MODELS)
def test_the_diffusers_model_has_the_same_layers_and_kernels(models, architecture):
    known = {}
    for layer in unet_part(architecture):
        ((dotted, _),) = diffusers_layers(architecture, layer)
        known[dotted] = layer
    with_weight = {
        path: module
        for path, module in models[architecture].named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm))
    }
    assert sorted(known) == sorted(with_weight)
    for path, module in with_weight.items():
        shape = tuple(module.weight.shape[2:]) or None
        assert kernel(architecture, known[path]) == shape, path
        assert is_conv(architecture, known[path]) == isinstance(module, nn.Conv2d)


@pytest.mark.parametrize("architecture", MODELS)
def test_ldm_names_become_the_diffusers_names_that_its_converter_makes(models, architecture):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    truth = {
        layer: dotted
        for layer in unet_part(architecture)
        for dotted, _ in diffusers_layers(architecture, layer)
    }
    number = {layer: n for n, layer in enumerate(truth)}
    from lib_loramerge.models.unet import by_ldm

    checkpoint = {
        f"model.diffusion_model.{by_ldm(architecture)[layer[10:]].ldm}.weight": torch.tensor([float(n)])
        for layer, n in number.items()
    }
    bias = {key.replace(".weight", ".bias"): value for key, value in checkpoint.items()}
    config = dict(models[architecture].config)
    converted = convert_ldm_unet_checkpoint({**checkpoint, **bias}, config)
    theirs = {
        key.removesuffix(".weight"): int(value) for key, value in converted.items() if key.endswith(".weight")
    }
    assert theirs == {dotted: number[layer] for layer, dotted in truth.items()}


def test_attention_of_the_open_clip_encoders_is_written_as_four():
    stem = "text_model_encoder_layers_5_self_attn_"
    four = tuple(f"lora_te2_{stem}{name}_proj" for name in ("q", "k", "v", "out"))
    for layer in four:
        assert companions("sdxl", layer) == four
    assert companions("sd2", f"lora_te_{stem}out_proj") == tuple(name.replace("te2", "te") for name in four)
    assert companions("sdxl", f"lora_te1_{stem}q_proj") == ()
    assert companions("sdxl", "lora_te2_text_model_encoder_layers_5_mlp_fc1") == ()
    assert companions("sd1", f"lora_te_{stem}q_proj") == ()
    assert companions("sdxl", "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q") == ()
