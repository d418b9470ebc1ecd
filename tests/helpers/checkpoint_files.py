# ruff: noqa: E501  (tables of names are easier to read one row to a line)
"""Small checkpoints with the real names and shapes of some of a model's tensors.

The names are sd-mecha's (PyPI, ``sd_mecha/extensions/builtin/model_configs``), not those of our own tables.
"""

from __future__ import annotations

import gzip
import json
import re
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

# A few layers of each kind: enough to recognise the model by, and small.
SOME = {
    "sd1-ldm": r"input_blocks\.[12]\.|time_embed|layers\.0\.|final_layer_norm|first_stage_model.decoder.conv_in"
    r"|position_ids|model_ema.*input_blocks10",
    "sdxl-sgm": r"input_blocks\.4\.|label_emb|embedders.0.*layers\.0\.|resblocks\.0\.|text_projection|logit_scale"
    r"|first_stage_model.decoder.conv_in",
    "sdxl-diffusers_unet_only": r"down_blocks\.1\.attentions\.0\.(transformer_blocks\.0\.|proj|norm)|time_embedding",
    "sd3-comfyui": r"joint_blocks\.0\.|context_embedder|clip_l.*layers\.0\.self_attn|x_embedder",
    "flux-flux": r"double_blocks\.0\.img_attn|single_blocks\.0\.modulation|clip_l.*layers\.0\.self_attn|img_in|vae.decoder.conv_in",
}


@cache
def key_list(name: str) -> dict[str, list[int]]:
    path = Path(__file__).resolve().parents[1] / "data" / "checkpoint_keys.json.gz"
    with gzip.open(path) as file:
        return json.load(file)[name]


def checkpoint_tensors(
    name: str, *, dtype: torch.dtype = torch.float16, seed: int = 0, keep: str | None = None
) -> dict[str, Tensor]:
    """Gaussian weights of std 0.03 under a model's names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in key_list(name).items():
        if re.search(keep or SOME[name], key):
            numbers = torch.randn(shape, generator=generator) * 0.03
            tensors[key] = torch.arange(77)[None] if key.endswith("position_ids") else numbers.to(dtype)
    return tensors


def make_checkpoint(
    path: Path, name: str, *, metadata: dict[str, str] | None = None, **how
) -> dict[str, Tensor]:
    tensors = checkpoint_tensors(name, **how)
    save_file(tensors, path, metadata)
    return tensors


def lora_of(
    layers: dict[str, tuple[int, ...]],
    *,
    rank: int = 4,
    alpha: float = 2.0,
    size: float = 0.02,
    seed: int = 1,
) -> dict[str, Tensor]:
    """A LoRA in kohya's names; a shape of four numbers is a convolution's."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in layers.items():
        kernel = shape[2:]
        up = torch.randn(shape[0], rank, *([1, 1] if kernel else []), generator=generator) * size
        down = torch.randn(rank, shape[1], *kernel, generator=generator) * size
        tensors |= {
            f"{name}.lora_up.weight": up,
            f"{name}.lora_down.weight": down,
            f"{name}.alpha": torch.tensor(alpha),
        }
    return tensors


def product(tensors: dict[str, Tensor], name: str) -> Tensor:
    """What a layer of a LoRA adds at strength 1, float64, in the layer's shape."""
    up, down = tensors[f"{name}.lora_up.weight"].double(), tensors[f"{name}.lora_down.weight"].double()
    scale = float(tensors[f"{name}.alpha"]) / down.shape[0]
    return scale * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
