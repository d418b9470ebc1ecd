"""The numbered files of cloneofsimo's lora: no names, only an order.

The order is that of the modules of the U-Net of diffusers at that time: down
blocks, up blocks, then the middle; in a transformer block the first attention,
the feed-forward projection, the second attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..adapters import measured
from ..errors import UnsupportedError
from .registry import RawLayer

Shape = tuple[int, ...]

_ATTENTION = ("to_q", "to_k", "to_v", "to_out_0")
_BLOCK = (
    *(f"attn1_{name}" for name in _ATTENTION),
    "ff_net_0_proj",
    *(f"attn2_{name}" for name in _ATTENTION),
)
_RESNET = ("conv1", "time_emb_proj", "conv2", "conv_shortcut")
_WIDTHS = (320, 640, 1280, 1280)
# Hugging Face declares the projections of its CLIP attention in this order.
_CLIP = ("k_proj", "v_proj", "q_proj", "out_proj")
_SIZES = {"unet": 144, "te": 48}


def _stages() -> Iterator[tuple[str, int, int, int, int]]:
    """Name, attentions, resnets, width and depth order of each stage in module order."""
    for level in range(4):
        yield f"down_blocks_{level}", 2 if level < 3 else 0, 2, _WIDTHS[level], level
    for level in range(4):
        yield f"up_blocks_{level}", 3 if level > 0 else 0, 3, _WIDTHS[3 - level], level
    yield "mid_block", 1, 2, 1280, 0


def unet_order() -> tuple[tuple[str, int], ...]:
    """Flattened diffusers paths of the 144 layers of a U-Net file in order, with the width of their block."""
    return tuple(
        (f"{stage}_attentions_{number}_transformer_blocks_0_{leaf}", width)
        for stage, attentions, _, width, _ in _stages()
        for number in range(attentions)
        for leaf in _BLOCK
    )


def text_encoder_order() -> tuple[tuple[str, int], ...]:
    """Flattened paths of the 48 layers of a text encoder file in order, with their width."""
    return tuple(
        (f"text_model_encoder_layers_{number}_self_attn_{name}", 768)
        for number in range(12)
        for name in _CLIP
    )


def _fits(path: str, width: int, out: int | None, in_: int | None) -> bool:
    if path.endswith("ff_net_0_proj"):
        return (out, in_) == (8 * width, width)
    if path.endswith(("attn2_to_k", "attn2_to_v")):
        return out == width and in_ in (768, 1024)
    # SD2's text encoder is 1024 wide.
    return (out, in_) == (width, width) or (width == 768 and (out, in_) == (1024, 1024))


def number_layers(
    numbered: Mapping[str, Mapping[str, str]], tensors: Mapping[str, Shape], start: str
) -> dict[str, RawLayer]:
    """Name the layers of a numbered file by their order, every shape checked.

    Args:
        numbered: ``unet:12`` to its slots and keys.
        tensors: Key to shape.
        start: Beginning of a message, naming the file.

    Raises:
        UnsupportedError: The numbers or shapes are not those of the layers that we know the order of.
    """
    layers: dict[str, RawLayer] = {}
    for prefix, part, order in (("unet", "unet", unet_order()), ("text_encoder", "te", text_encoder_order())):
        numbers = sorted(int(name.partition(":")[2]) for name in numbered if name.startswith(f"{prefix}:"))
        if not numbers:
            continue
        if numbers != list(range(len(order))):
            raise UnsupportedError(
                "{start}{count} numbered layers for the {encoder}; only files with {counts}, trained on "
                "attention alone, say by their order which layer each of them is.",
                start,
                len(numbers),
                prefix.replace("_", " "),
                len(order),
            )
        for number, (path, width) in enumerate(order):
            spelling = f"{prefix}:{number}"
            slots = dict(numbered[spelling])
            shapes = {slot: tensors[key] for slot, key in slots.items()}
            if not _fits(path, width, *measured(shapes)[:2]):
                raise UnsupportedError(
                    "{start}{spelling} should be {layer} by its number, but its shapes are {shapes}.",
                    start,
                    spelling,
                    path,
                    ", ".join((f"{slot} {shape}" for slot, shape in sorted(shapes.items()))),
                )
            layers[spelling] = RawLayer("cloneofsimo", part, path, slots)
    return layers
