"""diffusers as the judge: its models answer with our merged file as with the originals at their weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.helpers.format_files import merge, rand, save

warnings.filterwarnings("ignore", category=FutureWarning)

from diffusers import (  # noqa: E402
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import set_weights_and_activate_adapters  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

WEIGHTS = [(0.8, 0.5), (1.0, -0.7)]
# What a trainer of each kind leaves alone: embeddings and the first and last layers are in no trainer's list.
_SKIPPED = (
    "time_embedding", "add_embedding", "conv_in", "conv_out", "time_text_embed", "x_embedder",
    "context_embedder",
)  # fmt: skip


def sd1_unet() -> UNet2DConditionModel:
    """Stable Diffusion 1's U-Net in narrow."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(16, 16, 16, 16), norm_num_groups=4, attention_head_dim=4, cross_attention_dim=768,
        sample_size=8,
    ).eval()  # fmt: skip


def sdxl_unet() -> UNet2DConditionModel:
    """SDXL's U-Net in narrow, with its depths."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(16, 16, 16), norm_num_groups=4, attention_head_dim=(2, 2, 4),
        cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=112, sample_size=8,
    ).eval()  # fmt: skip


def flux_transformer() -> FluxTransformer2DModel:
    """Flux.1's transformer with two blocks of each kind, in narrow."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()  # fmt: skip


def answer(model: nn.Module) -> Tensor:
    """What the model makes of one fixed input."""
    with torch.no_grad():
        if isinstance(model, FluxTransformer2DModel):
            return model(
                hidden_states=rand(1, 16, 4, scale=1), encoder_hidden_states=rand(1, 5, 32, seed=1, scale=1),
                pooled_projections=rand(1, 32, seed=2, scale=1), timestep=torch.tensor([0.5]),
                guidance=torch.ones(1), img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(5, 3),
            ).sample  # fmt: skip
        added = {"text_embeds": rand(1, 64, seed=3, scale=1), "time_ids": torch.arange(6.0)[None]}
        return model(
            rand(1, 4, 8, 8, scale=1), torch.tensor(300),
            encoder_hidden_states=rand(1, 5, model.config.cross_attention_dim, seed=1, scale=1),
            added_cond_kwargs=added if model.config.addition_embed_type else None,
        ).sample  # fmt: skip


def kohya_lora(
    model: nn.Module, *, rank: int, alpha: float, seed: int, every: int, prefix: str = "lora_unet_"
) -> dict[str, Tensor]:
    """A LoRA of every n-th layer, named as kohya's trainer does, and of those that tell the base model.

    Loading hundreds of layers into diffusers takes a minute, so only some are trained.
    """
    tensors: dict[str, Tensor] = {}
    for number, (name, module) in enumerate(model.named_modules()):
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or any(part in name for part in _SKIPPED):
            continue
        told_by = ("blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "samplers.0.conv")
        if number % every and not name.endswith(told_by):
            continue
        key = f"{prefix}{name.replace('.', '_')}"
        out, *inner = module.weight.shape
        tail = (1,) * (len(inner) - 1)
        tensors[f"{key}.lora_up.weight"] = rand(out, rank, *tail, seed=seed + number, scale=0.3)
        tensors[f"{key}.lora_down.weight"] = rand(rank, *inner, seed=seed - number, scale=0.3)
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def load(pipeline: type, model: nn.Module, path: Path, name: str) -> None:
    """What ``load_lora_weights`` does with the denoiser's part of a file."""
    kind = "transformer" if isinstance(model, FluxTransformer2DModel) else "unet"
    if kind == "unet":
        state, alphas = pipeline.lora_state_dict(load_file(path), unet_config=model.config)
        pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=model, adapter_name=name)
    else:
        state, alphas = pipeline.lora_state_dict(load_file(path), return_alphas=True)
        pipeline.load_lora_into_transformer(
            state, network_alphas=alphas, transformer=model, adapter_name=name
        )


def assert_same_answer(
    model: nn.Module, pipeline: type, originals: dict[str, tuple[Path, float]], merged: Path
) -> None:
    untouched = answer(model)
    for name, (path, _) in originals.items():
        load(pipeline, model, path, name)
    model.set_adapters(list(originals), [weight for _, weight in originals.values()])
    wanted = answer(model)
    load(pipeline, model, merged, "merged")
    model.set_adapters(["merged"], [1.0])
    got = answer(model)
    effect = torch.linalg.vector_norm(wanted - untouched)
    assert effect > 0.01 * torch.linalg.vector_norm(untouched)
    assert torch.linalg.vector_norm(got - wanted) < 2e-5 * effect


@pytest.mark.parametrize("dialect", ["auto", "diffusers"])
@pytest.mark.parametrize(
    ("make", "pipeline"), [(sd1_unet, StableDiffusionPipeline), (sdxl_unet, StableDiffusionXLPipeline)]
)
def test_a_unet_answers_the_same_with_the_merged_file_as_with_both(tmp_path, make, pipeline, dialect):
    model = make()
    # Strides that meet every kind of layer of a block in some block. diffusers loses the alphas of single
    # attention layers of kohya's names, so there both LoRAs have the same layers, and one alpha is for all.
    strides = (5, 7) if make is sd1_unet else (37, 41)
    if dialect == "auto":
        strides = (strides[0], strides[0])
    first = save(tmp_path / "a.safetensors", kohya_lora(model, rank=4, alpha=2, seed=1000, every=strides[0]))
    second = save(tmp_path / "b.safetensors", kohya_lora(model, rank=2, alpha=2, seed=5000, every=strides[1]))
    one, other = WEIGHTS[0] if dialect == "auto" else WEIGHTS[1]
    merge(tmp_path, f"a:{one}", f"b:{other}", dialect=dialect)
    assert_same_answer(
        model, pipeline, {"a": (first, one), "b": (second, other)}, tmp_path / "out.safetensors"
    )


def test_a_text_encoder_answers_the_same_with_the_merged_file_as_with_both(tmp_path):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=32, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    encoder, unet = CLIPTextModel(config).eval(), sd1_unet()
    words = torch.tensor([[1, 7, 9, 11, 2]])

    files = {}
    for name, seed in (("a", 1000), ("b", 5000)):
        tensors = kohya_lora(unet, rank=2, alpha=1, seed=seed, every=1000)
        tensors |= kohya_lora(encoder, rank=2, alpha=1, seed=seed, every=1, prefix="lora_te_")
        files[name] = save(tmp_path / f"{name}.safetensors", tensors)
    merge(tmp_path, "a:0.8:0", "b:-0.5:0")
    files["merged"] = tmp_path / "out.safetensors"
    with torch.no_grad():
        untouched = encoder(words).last_hidden_state
        for name, path in files.items():
            state, alphas = StableDiffusionPipeline.lora_state_dict(load_file(path))
            StableDiffusionPipeline.load_lora_into_text_encoder(
                state, network_alphas=alphas, text_encoder=encoder, prefix="text_encoder", adapter_name=name
            )
        set_weights_and_activate_adapters(encoder, ["a", "b"], [0.8, -0.5])
        wanted = encoder(words).last_hidden_state
        set_weights_and_activate_adapters(encoder, ["merged"], [1.0])
        got = encoder(words).last_hidden_state
    effect = torch.linalg.vector_norm(wanted - untouched)
    assert effect > 0.01 * torch.linalg.vector_norm(untouched)
    assert torch.linalg.vector_norm(got - wanted) < 2e-5 * effect


def flux_lora(path: Path, model: nn.Module, *, rank: int, seed: int, every: int = 1) -> Path:
    """A LoRA of the transformer as ai-toolkit writes it: split projections, no alpha."""
    tensors: dict[str, Tensor] = {}
    names = [
        (name, module) for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(part in name for part in _SKIPPED)
    ]  # fmt: skip
    for number, (name, module) in enumerate(names[::every]):
        out, in_ = module.weight.shape
        tensors[f"transformer.{name}.lora_B.weight"] = rand(out, rank, seed=seed + number, scale=0.3)
        tensors[f"transformer.{name}.lora_A.weight"] = rand(rank, in_, seed=seed - number, scale=0.3)
    save_file(tensors, str(path))
    return path


@pytest.mark.parametrize("rank", ["full", 24])
def test_a_flux_transformer_answers_the_same_with_the_merged_file_as_with_both(tmp_path, rank):
    model = flux_transformer()
    first = flux_lora(tmp_path / "a.safetensors", model, rank=2, seed=1000)
    second = flux_lora(tmp_path / "b.safetensors", model, rank=1, seed=5000, every=3)
    merge(tmp_path, "a:0.8", "b:-0.5", dialect="diffusers", rank=rank)
    originals = {"a": (first, 0.8), "b": (second, -0.5)}
    assert_same_answer(model, FluxPipeline, originals, tmp_path / "out.safetensors")


def test_diffusers_reads_our_fused_flux_file_as_the_deltas_that_were_merged(tmp_path):
    """At Flux's true width, where diffusers knows the sizes of what it splits; seen through random inputs."""
    hidden, rank = 3072, 2
    sizes = {
        **{
            f"transformer_blocks.0.attn.{n}": (hidden, hidden)
            for n in ("to_q", "to_k", "to_v", "add_k_proj", "to_out.0")
        },
        **{f"single_transformer_blocks.0.attn.to_{n}": (hidden, hidden) for n in "qkv"},
        "single_transformer_blocks.0.proj_mlp": (4 * hidden, hidden),
        "single_transformer_blocks.0.proj_out": (hidden, 5 * hidden),
    }  # fmt: skip
    factors = {
        name: (rand(out, rank, seed=n), rand(rank, in_, seed=n + 99))
        for n, (name, (out, in_)) in enumerate(sizes.items())
    }
    save_file(
        {
            f"transformer.{name}.lora_{side}.weight": t
            for name, pair in factors.items()
            for side, t in zip("BA", pair)
        },
        str(tmp_path / "a.safetensors"),
    )
    merge(tmp_path, "a:0.5")
    assert "lora_unet_double_blocks_0_img_attn_qkv.alpha" in load_file(tmp_path / "out.safetensors")
    state = FluxPipeline.lora_state_dict(load_file(tmp_path / "out.safetensors"))
    for name, (up, down) in factors.items():
        x = rand(down.shape[1], 3, seed=7, scale=1).double()
        wanted = 0.5 * up.double() @ (down.double() @ x)
        theirs = [state[f"transformer.{name}.lora_{side}.weight"].double() for side in "BA"]
        got = theirs[0] @ (theirs[1] @ x)
        assert torch.linalg.vector_norm(got - wanted) < 1e-5 * torch.linalg.vector_norm(wanted), name
