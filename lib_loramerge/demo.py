"""Two small sample LoRAs, for a newcomer to merge before owning any."""

from __future__ import annotations

from pathlib import Path

from .errors import OutputError
from .files import write_file

# Attention blocks of Stable Diffusion 1.5: diffusers name to channels.
_ATTENTION = {
    "down_blocks_0_attentions_0": 320,
    "down_blocks_1_attentions_0": 640,
    "down_blocks_2_attentions_0": 1280,
    "mid_block_attentions_0": 1280,
    "up_blocks_1_attentions_1": 1280,
    "up_blocks_2_attentions_1": 640,
    "up_blocks_3_attentions_1": 320,
}
_CONTEXT = 768
# A merge to begin with.
STRENGTHS = {"style": 0.8, "subject": 0.5}
_TEXT_LAYERS = 4


def sample_layers() -> dict[str, tuple[int, int]]:
    """kohya layer name to (out, in) of the layers that the samples change."""
    layers: dict[str, tuple[int, int]] = {}
    for block, width in _ATTENTION.items():
        stem = f"lora_unet_{block}_transformer_blocks_0"
        layers |= {f"{stem}_attn1_to_{part}": (width, width) for part in ("q", "k", "v", "out_0")}
        layers |= {f"{stem}_attn2_to_{part}": (width, _CONTEXT) for part in ("k", "v")}
        layers |= {f"{stem}_attn2_to_{part}": (width, width) for part in ("q", "out_0")}
    for number in range(_TEXT_LAYERS):
        stem = f"lora_te_text_model_encoder_layers_{number}_self_attn"
        layers |= {f"{stem}_{part}_proj": (_CONTEXT, _CONTEXT) for part in ("q", "k", "v", "out")}
    return layers


def make_samples(folder: Path) -> tuple[Path, Path]:
    """Write ``style.safetensors`` (rank 8) and ``subject.safetensors`` (rank 4) into ``folder``.

    Files of these names are replaced: the folder is the demo's own.

    Raises:
        OutputError: The folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError("The folder {folder} cannot be made: {reason}.", folder, error.strerror) from error
    return (
        _write(folder / "style.safetensors", rank=8, seed=1, tag="sample style"),
        _write(folder / "subject.safetensors", rank=4, seed=2, tag="sample subject"),
    )


def _write(path: Path, *, rank: int, seed: int, tag: str) -> Path:
    import torch

    generator = torch.Generator().manual_seed(seed)
    # Trained LoRAs have a few strong directions and a tail; 1 / j imitates that.
    spectrum = 1.0 / torch.arange(1, rank + 1)
    tensors = {}
    for layer, (out, in_) in sample_layers().items():
        up = torch.randn(out, rank, generator=generator) * spectrum * 0.05
        down = torch.randn(rank, in_, generator=generator) * 0.05
        tensors[f"{layer}.lora_up.weight"] = up.half()
        tensors[f"{layer}.lora_down.weight"] = down.half()
        tensors[f"{layer}.alpha"] = torch.tensor(float(rank) / 2).half()
    metadata = {
        "ss_output_name": path.stem,
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank / 2),
        "ss_tag_frequency": f'{{"{path.stem}": {{"{tag}": 12}}}}',
    }
    write_file(path, tensors, metadata, overwrite=True)
    return path
