"""Small LoRA files for tests, and deltas computed without our own code.

Nothing here imports ``lib_loramerge``: what these functions say of a file is
an independent opinion.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

Shape = tuple[int, ...]

# A few layers of each base model, enough to be recognised as such.
SD1_LAYERS: dict[str, Shape] = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (320, 320),
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (320, 768),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2": (128, 512),
    "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn1_to_v": (64, 64),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (768, 768),
    "lora_te_text_model_encoder_layers_3_mlp_fc1": (128, 768),
}
SDXL_LAYERS: dict[str, Shape] = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (64, 64),
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": (64, 2048),
    "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj": (256, 128),
    "lora_unet_output_blocks_1_1_transformer_blocks_9_attn2_to_out_0": (128, 128),
    "lora_te1_text_model_encoder_layers_0_mlp_fc2": (768, 96),
    **{
        f"lora_te2_text_model_encoder_layers_0_self_attn_{part}_proj": (1280, 1280)
        for part in ("q", "k", "v", "out")
    },
}


def sample_data() -> Path | None:
    """Folder of real LoRAs beside the checkout, where there is one."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data"
    return folder if folder.is_dir() else None


def lora_tensors(
    layers: Mapping[str, Shape],
    *,
    rank: int | Mapping[str, int] = 4,
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scale: float = 0.05,
) -> dict[str, Tensor]:
    """Random kohya tensors; ``shape`` is the layer's weight shape, 2-D or 4-D.

    Args:
        alpha: None leaves the alpha tensors out.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in layers.items():
        r = rank[name] if isinstance(rank, Mapping) else rank
        tail = [1] * (len(shape) - 2)
        up = torch.randn(shape[0], r, *tail, generator=generator) * scale
        down = torch.randn(r, *shape[1:], generator=generator) * scale
        tensors[f"{name}.lora_up.weight"] = up.to(dtype)
        tensors[f"{name}.lora_down.weight"] = down.to(dtype)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha), dtype=dtype)
    return tensors


def make_lora(
    path: Path, layers: Mapping[str, Shape], *, metadata: Mapping[str, str] | None = None, **options
) -> Path:
    """Write :func:`lora_tensors` to ``path`` and return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(lora_tensors(layers, **options), str(path), dict(metadata) if metadata else None)
    return path


_KOHYA = re.compile(r"(?P<layer>.+)\.(?:lora_(?P<side>up|down|mid)\.weight|(?P<alpha>alpha))")


def make_loras(folder: Path, names: Iterable[str], layers: Mapping[str, Shape], **options) -> Path:
    """A LoRA of each name, all different; ``options`` as of :func:`make_lora`."""
    for seed, name in enumerate(names):
        make_lora(folder / f"{name}.safetensors", layers, seed=seed, **options)
    return folder


def dense_deltas(path: Path, *, every: int = 1) -> dict[str, Tensor]:
    """float64 delta weight of each layer of a kohya file, by the plain formula.

    ``alpha / rank * up @ down`` with convolutions unfolded; a missing alpha
    means a scale of 1. Layers keep the names the file gives them.

    Args:
        every: Take only every n-th layer, by name; large files are slow in dense float64.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(str(path)).items():
        match = _KOHYA.fullmatch(key)
        if match is None:
            raise AssertionError(f"not a plain kohya tensor: {key}")
        groups.setdefault(match["layer"], {})[match["side"] or "alpha"] = tensor.double()
    return {layer: _dense(groups[layer]) for layer in sorted(groups)[::every]}


def _dense(slots: Mapping[str, Tensor]) -> Tensor:
    up, down = slots["up"].flatten(1), slots["down"]
    rank = down.shape[0]
    if "mid" in slots:
        down = torch.einsum("nmkl,mi->nikl", slots["mid"], down.flatten(1))
    scale = float(slots["alpha"].reshape(-1)[0]) / rank if "alpha" in slots else 1.0
    return scale * up @ down.flatten(1)


def weighted_sum(files: Sequence[tuple[Path, float]], *, every: int = 1) -> dict[str, Tensor]:
    """``sum_i w_i * delta_i`` per layer in float64, over files of one spelling."""
    total: dict[str, Tensor] = {}
    for path, weight in files:
        for layer, delta in dense_deltas(path, every=every).items():
            total[layer] = total.get(layer, torch.zeros_like(delta)) + weight * delta
    return total


def relative_error(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Relative Frobenius error over whole files; a layer absent from one side is zero there."""
    wrong = norm = 0.0
    for layer in got.keys() | wanted.keys():
        a, b = got.get(layer), wanted.get(layer)
        difference = a - b if a is not None and b is not None else a if b is None else b
        wrong += float(difference.square().sum())
        norm += float(b.square().sum()) if b is not None else 0.0
    return (wrong / norm) ** 0.5 if norm else wrong**0.5


def metadata_of(path: Path) -> dict[str, str]:
    """The string map in a safetensors header, as the safetensors library reads it."""
    with safe_open(str(path), "pt") as file:
        return file.metadata() or {}
