"""Weights of base models: every layout gives the same layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lib_loramerge.blocks import bundled_preset_path, load_presets
from lib_loramerge.errors import FileError, IncompatibleError, LoraMergeError, UnsupportedError
from lib_loramerge.merge import plan_merge
from lib_loramerge.merge.base import BaseCheckpoint
from lib_loramerge.recipe import MergeRecipe, parse_inputs

Q = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
LDM = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
DIFFUSERS = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def read(path: Path, architecture: str, layer: str) -> Tensor:
    with BaseCheckpoint(path) as checkpoint:
        weight = checkpoint.weight(architecture, layer)
        assert checkpoint.shape(architecture, layer) == tuple(weight.shape)
    assert weight.dtype == torch.float32
    assert weight.is_contiguous()
    return weight


@pytest.mark.parametrize("key", [LDM, LDM.removeprefix("model."), DIFFUSERS, f"unet.{DIFFUSERS}"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_layer_is_found_in_every_layout_and_dtype(tmp_path, key, dtype):
    weight = numbers(6, 5).to(dtype)
    assert torch.equal(read(saved(tmp_path / "a.safetensors", {key: weight}), "sd1", Q), weight.float())


def test_a_convolution_keeps_its_kernel(tmp_path):
    weight = numbers(4, 3, 3, 3)
    path = saved(tmp_path / "a.safetensors", {"model.diffusion_model.input_blocks.0.0.weight": weight})
    assert torch.equal(read(path, "sd1", "lora_unet_input_blocks_0_0"), weight)


@pytest.mark.parametrize(("name", "place"), [("q", 0), ("k", 1), ("v", 2)])
def test_rows_of_a_fused_attention_are_taken_apart(tmp_path, name, place):
    fused = numbers(12, 4)
    key = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    path = saved(tmp_path / "a.safetensors", {key: fused})
    layer = f"lora_te2_text_model_encoder_layers_0_self_attn_{name}_proj"
    assert torch.equal(read(path, "sdxl", layer), fused[4 * place : 4 * place + 4])


def test_a_transposed_projection_is_turned(tmp_path):
    stored = numbers(3, 5)
    path = saved(tmp_path / "a.safetensors", {"conditioner.embedders.1.model.text_projection": stored})
    assert torch.equal(read(path, "sdxl", "lora_te2_text_projection"), stored.T)


def test_a_layer_that_the_checkpoint_splits_is_put_together(tmp_path):
    parts = {name: numbers(2, 3, seed=seed) for seed, name in enumerate("qkv")}
    mlp = numbers(8, 3, seed=9)
    prefix = "single_transformer_blocks.3."
    tensors = {f"{prefix}attn.to_{name}.weight": part for name, part in parts.items()}
    path = saved(tmp_path / "a.safetensors", {**tensors, f"{prefix}proj_mlp.weight": mlp})
    wanted = torch.cat([*parts.values(), mlp])
    assert torch.equal(read(path, "flux1", "lora_unet_single_blocks_3_linear1"), wanted)


def test_swapped_halves_are_put_right(tmp_path):
    stored = numbers(6, 3)
    path = saved(tmp_path / "a.safetensors", {"norm_out.linear.weight": stored})
    wanted = torch.cat([stored[3:], stored[:3]])
    assert torch.equal(read(path, "flux1", "lora_unet_final_layer_adaLN_modulation_1"), wanted)


@pytest.mark.parametrize("shapes", [(2, 2, 2, 6), (2, 3, 2, 8)])
def test_parts_that_do_not_fit_together_are_an_error(tmp_path, shapes):
    names = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
    tensors = {
        f"single_transformer_blocks.3.{name}.weight": numbers(rows, 3)
        for name, rows in zip(names, shapes, strict=True)
    }
    path = saved(tmp_path / "a.safetensors", tensors)
    with BaseCheckpoint(path) as checkpoint:
        for ask in (checkpoint.weight, checkpoint.shape):
            with pytest.raises(IncompatibleError):
                ask("flux1", "lora_unet_single_blocks_3_linear1")


def test_a_diffusers_folder_is_one_checkpoint(tmp_path):
    first, second, text = numbers(6, 5), numbers(6, 4, seed=1), numbers(7, 7, seed=2)
    saved(tmp_path / "unet/diffusion_pytorch_model-00001-of-00002.safetensors", {DIFFUSERS: first})
    saved(
        tmp_path / "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        {DIFFUSERS.replace("to_q", "to_k"): second},
    )
    saved(tmp_path / "unet/diffusion_pytorch_model.fp16.safetensors", {DIFFUSERS: first.half() * 0})
    saved(
        tmp_path / "text_encoder/model.safetensors",
        {"text_model.encoder.layers.0.self_attn.q_proj.weight": text},
    )
    assert torch.equal(read(tmp_path, "sd1", Q), first)
    assert torch.equal(read(tmp_path, "sd1", Q.replace("to_q", "to_k")), second)
    assert torch.equal(read(tmp_path, "sd1", "lora_te_text_model_encoder_layers_0_self_attn_q_proj"), text)
    assert torch.equal(read(tmp_path / "unet", "sd1", Q), first)


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="float8 came with torch 2.1")
@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
def test_a_scaled_float8_weight_is_scaled_back(tmp_path, spelling):
    weight = numbers(6, 5).to(torch.float8_e4m3fn)
    tensors = {LDM: weight, LDM.removesuffix("weight") + spelling: torch.tensor(0.25)}
    assert torch.equal(read(saved(tmp_path / "a.safetensors", tensors), "sd1", Q), weight.float() * 0.25)
    tensors[LDM.removesuffix("weight") + spelling] = torch.ones(6, 1)
    with pytest.raises(UnsupportedError, match="scale per row"):
        read(saved(tmp_path / "b.safetensors", tensors), "sd1", Q)


def test_a_missing_layer_is_named_with_the_checkpoint(tmp_path):
    path = saved(tmp_path / "anything.safetensors", {LDM: numbers(6, 5)})
    with BaseCheckpoint(path) as checkpoint:
        with pytest.raises(IncompatibleError, match=r"anything\.safetensors has no layer lora_unet_middle"):
            checkpoint.weight("sd1", "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q")
        with pytest.raises(LoraMergeError, match="no other name of it is known"):
            checkpoint.weight("unknown", "lora_unet_blocks_of_nobody")


def test_a_quantised_layer_a_pickle_and_an_empty_folder_are_refused(tmp_path):
    path = saved(tmp_path / "a.safetensors", {LDM: torch.ones(6, 5, dtype=torch.uint8)})
    with BaseCheckpoint(path) as checkpoint, pytest.raises(UnsupportedError, match="quantised"):
        checkpoint.weight("sd1", Q)
    torch.save({LDM: numbers(6, 5)}, tmp_path / "a.ckpt")
    with pytest.raises(UnsupportedError, match=r"not a \.safetensors file"):
        BaseCheckpoint(tmp_path / "a.ckpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="folder without a model"):
        BaseCheckpoint(tmp_path / "empty")
    with pytest.raises(FileError, match="does not exist"):
        BaseCheckpoint(tmp_path / "none.safetensors")


def test_nan_in_a_base_model_is_found(tmp_path):
    path = saved(tmp_path / "a.safetensors", {LDM: torch.full((2, 2), float("nan"))})
    with BaseCheckpoint(path) as checkpoint, pytest.raises(FileError, match="NaN"):
        checkpoint.weight("sd1", Q)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        pytest.param({"conv_in.weight": (4, 4, 3, 3)}, "has no layer", id="lacks the layer"),
        pytest.param({LDM: (64, 32)}, "made for a weight of", id="another shape"),
        pytest.param({LDM: torch.int8}, "quantised", id="quantised"),
    ],
)
def test_a_base_model_that_cannot_serve_is_refused_before_any_work(tmp_path, base, message):
    spelled = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    saved(tmp_path / "a.safetensors", {
        f"{spelled}.lora_up.weight": numbers(64, 2), f"{spelled}.lora_down.weight": numbers(2, 64),
        f"{spelled}.dora_scale": numbers(64, 1),
        f"{spelled.replace('attn1_to_q', 'attn2_to_k')}.lora_up.weight": numbers(64, 2),
        f"{spelled.replace('attn1_to_q', 'attn2_to_k')}.lora_down.weight": numbers(2, 768),
    })  # fmt: skip
    checkpoint = saved(tmp_path / "base.safetensors", {
        key: torch.ones(64, 64, dtype=shape) if isinstance(shape, torch.dtype) else numbers(*shape)
        for key, shape in base.items()
    })  # fmt: skip
    recipe = MergeRecipe(parse_inputs([str(tmp_path / "a.safetensors")]))
    with pytest.raises((IncompatibleError, UnsupportedError), match=message):
        plan_merge(recipe, find=Path, presets=load_presets([bundled_preset_path()]), base=checkpoint)
