"""The 986 linear layers of an SDXL LoRA: kohya names and (out, in)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

# Attention blocks of the U-Net: name, width, number of transformer blocks.
_ATTENTIONS = (
    *((f"input_blocks_{i}_1", 640, 2) for i in (4, 5)),
    *((f"input_blocks_{i}_1", 1280, 10) for i in (7, 8)),
    ("middle_block_1", 1280, 10),
    *((f"output_blocks_{i}_1", 1280, 10) for i in (0, 1, 2)),
    *((f"output_blocks_{i}_1", 640, 2) for i in (3, 4, 5)),
)
_CONTEXT = 2048
_ENCODERS = (("te1", 768, 12), ("te2", 1280, 32))


def sdxl_layers() -> dict[str, tuple[int, int]]:
    """Name to (out, in) of every linear layer that a kohya SDXL LoRA usually trains."""
    return dict([*_unet(), *_encoders()])


def shape_counts() -> Counter[tuple[int, int]]:
    """How many layers there are of each shape."""
    return Counter(sdxl_layers().values())


def _unet() -> Iterator[tuple[str, tuple[int, int]]]:
    for block, width, depth in _ATTENTIONS:
        prefix = f"lora_unet_{block}"
        yield f"{prefix}_proj_in", (width, width)
        yield f"{prefix}_proj_out", (width, width)
        for i in range(depth):
            inner = f"{prefix}_transformer_blocks_{i}"
            for attention, width_in in (("attn1", width), ("attn2", _CONTEXT)):
                yield f"{inner}_{attention}_to_q", (width, width)
                yield f"{inner}_{attention}_to_k", (width, width_in)
                yield f"{inner}_{attention}_to_v", (width, width_in)
                yield f"{inner}_{attention}_to_out_0", (width, width)
            yield f"{inner}_ff_net_0_proj", (8 * width, width)
            yield f"{inner}_ff_net_2", (width, 4 * width)


def _encoders() -> Iterator[tuple[str, tuple[int, int]]]:
    for encoder, width, depth in _ENCODERS:
        for i in range(depth):
            inner = f"lora_{encoder}_text_model_encoder_layers_{i}"
            for part in ("q", "k", "v", "out"):
                yield f"{inner}_self_attn_{part}_proj", (width, width)
            yield f"{inner}_mlp_fc1", (4 * width, width)
            yield f"{inner}_mlp_fc2", (width, 4 * width)
