"""The U-Nets of Stable Diffusion 1, 2, XL and the XL refiner, both spellings of every layer.

The lists are built from the few numbers in which these U-Nets differ: which
level has attention and how deep, and where the width changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from .base import UNet
from .records import ARCHITECTURES

UNETS: dict[str, UNet] = {
    record.id: record.unet for record in ARCHITECTURES.values() if record.unet is not None
}


@dataclass(frozen=True)
class UNetLayer:
    """One layer under both of its names.

    Attributes:
        ldm: Dotted path in a checkpoint, after ``model.diffusion_model.``.
        diffusers: Dotted path in a diffusers U-Net.
        block: Block id of the 26 list, or None for layers that are in no block.
        kernel: (3, 3) or (1, 1) for convolutions, else None.
    """

    ldm: str
    diffusers: str
    block: str | None
    kernel: tuple[int, int] | None = None

    @property
    def ldm_flat(self) -> str:
        return self.ldm.replace(".", "_")

    @property
    def diffusers_flat(self) -> str:
        return self.diffusers.replace(".", "_")


_3X3, _1X1 = (3, 3), (1, 1)

# diffusers leaf, ldm leaf, kernel
_RESNET = (
    ("norm1", "in_layers.0", None),
    ("conv1", "in_layers.2", _3X3),
    ("time_emb_proj", "emb_layers.1", None),
    ("norm2", "out_layers.0", None),
    ("conv2", "out_layers.3", _3X3),
)
_SHORTCUT = ("conv_shortcut", "skip_connection", _1X1)
_TRANSFORMER = (
    "norm1", "norm2", "norm3",
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
    "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
    "ff.net.0.proj", "ff.net.2",
)  # fmt: skip
_EDGES = (
    ("input_blocks.0.0", "conv_in", "IN00", _3X3),
    ("out.0", "conv_norm_out", None, None),
    ("out.2", "conv_out", None, _3X3),
    ("time_embed.0", "time_embedding.linear_1", None, None),
    ("time_embed.2", "time_embedding.linear_2", None, None),
)
_LABELS = (
    ("label_emb.0.0", "add_embedding.linear_1", None, None),
    ("label_emb.0.2", "add_embedding.linear_2", None, None),
)


def _resnet(ldm: str, diffusers: str, block: str, shortcut: bool) -> Iterator[UNetLayer]:
    for theirs, ours, kernel in (*_RESNET, _SHORTCUT) if shortcut else _RESNET:
        yield UNetLayer(f"{ldm}.{ours}", f"{diffusers}.{theirs}", block, kernel)


def _attention(ldm: str, diffusers: str, block: str, depth: int, convolution: bool) -> Iterator[UNetLayer]:
    yield UNetLayer(f"{ldm}.norm", f"{diffusers}.norm", block)
    for leaf in ("proj_in", "proj_out"):
        yield UNetLayer(f"{ldm}.{leaf}", f"{diffusers}.{leaf}", block, _1X1 if convolution else None)
    for number in range(depth):
        for leaf in _TRANSFORMER:
            tail = f"transformer_blocks.{number}.{leaf}"
            yield UNetLayer(f"{ldm}.{tail}", f"{diffusers}.{tail}", block)


def _down(unet: UNet) -> Iterator[UNetLayer]:
    last = len(unet.widths) - 1
    for level, depth in enumerate(unet.depths):
        for j in range(2):
            n = 1 + 3 * level + j
            wider = j == 0 and level > 0 and unet.widths[level] != unet.widths[level - 1]
            yield from _resnet(f"input_blocks.{n}.0", f"down_blocks.{level}.resnets.{j}", f"IN{n:02}", wider)
            if depth:
                names = f"input_blocks.{n}.1", f"down_blocks.{level}.attentions.{j}"
                yield from _attention(*names, f"IN{n:02}", depth, unet.convolution)
        if level < last:
            n = 3 * level + 3
            yield UNetLayer(
                f"input_blocks.{n}.0.op", f"down_blocks.{level}.downsamplers.0.conv", f"IN{n:02}", _3X3
            )


def _mid(unet: UNet) -> Iterator[UNetLayer]:
    yield from _resnet("middle_block.0", "mid_block.resnets.0", "M00", False)
    yield from _attention("middle_block.1", "mid_block.attentions.0", "M00", unet.middle, unet.convolution)
    yield from _resnet("middle_block.2", "mid_block.resnets.1", "M00", False)


def _up(unet: UNet) -> Iterator[UNetLayer]:
    last = len(unet.widths) - 1
    for level, depth in enumerate(reversed(unet.depths)):
        for j in range(3):
            n = 3 * level + j
            # Each of these reads a skip connection too, so its width always changes.
            yield from _resnet(f"output_blocks.{n}.0", f"up_blocks.{level}.resnets.{j}", f"OUT{n:02}", True)
            if depth:
                names = f"output_blocks.{n}.1", f"up_blocks.{level}.attentions.{j}"
                yield from _attention(*names, f"OUT{n:02}", depth, unet.convolution)
        if level < last:
            n = 3 * level + 2
            # The upsampler is the next module after the resnet and, if there is one, the attention.
            ldm = f"output_blocks.{n}.{2 if depth else 1}.conv"
            yield UNetLayer(ldm, f"up_blocks.{level}.upsamplers.0.conv", f"OUT{n:02}", _3X3)


@cache
def unet_layers(architecture_id: str) -> tuple[UNetLayer, ...]:
    """Every layer of a U-Net, norms included; () for base models that have none."""
    unet = UNETS.get(architecture_id)
    if unet is None:
        return ()
    edges = (UNetLayer(*row) for row in (_EDGES + _LABELS if unet.labels else _EDGES))
    return (*edges, *_down(unet), *_mid(unet), *_up(unet))


@cache
def by_ldm(architecture_id: str) -> Mapping[str, UNetLayer]:
    """Flattened ldm path to layer."""
    return {layer.ldm_flat: layer for layer in unet_layers(architecture_id)}


@cache
def by_any_name(architecture_id: str) -> Mapping[str, UNetLayer]:
    """Flattened path of either spelling to layer."""
    table = {layer.diffusers_flat: layer for layer in unet_layers(architecture_id)}
    table.update(by_ldm(architecture_id))
    for layer in unet_layers(architecture_id):
        # Attention processors of early diffusers say `to_out` for `to_out.0`.
        if layer.ldm.endswith("to_out.0"):
            table[layer.diffusers_flat[:-2]] = layer
            table[layer.ldm_flat[:-2]] = layer
    if UNETS[architecture_id].labels:
        for number in (1, 2):
            table[f"class_embedding_linear_{number}"] = table[f"add_embedding_linear_{number}"]
    return table


@cache
def widths(unet: UNet, layer: UNetLayer) -> tuple[int | None, int | None]:
    """(out, in) channels of a layer of a U-Net; None for those that need more than its level."""
    where, _, rest = layer.diffusers.partition(".")
    if where not in ("down_blocks", "mid_block", "up_blocks"):
        return (4 * unet.channels, None) if where.endswith("embedding") else (None, None)
    number, _, leaf = rest.partition(".")
    levels = unet.widths if where == "down_blocks" else unet.widths[::-1]
    wide = unet.channels * (unet.widths[-1] if where == "mid_block" else levels[int(number)])
    reads: dict[str, tuple[int, int | None]] = {
        "time_emb_proj": (wide, 4 * unet.channels), "conv1": (wide, None), "conv_shortcut": (wide, None),
        "attn2.to_k": (wide, unet.context), "attn2.to_v": (wide, unet.context),
        "ff.net.0.proj": (8 * wide, wide), "ff.net.2": (wide, 4 * wide),
    }  # fmt: skip
    if ".norm" in leaf:
        return None, None
    return next((reads[end] for end in reads if leaf.endswith(end)), (wide, wide))
