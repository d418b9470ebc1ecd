"""LoRA, LoCon and Tucker (CP) LoCon: the kinds that are low rank as stored."""

from __future__ import annotations

import torch

from ..delta import LowRank
from .kinds import (
    AdapterKind,
    Layer,
    LayerFacts,
    Shape,
    Shapes,
    matrix,
    register,
    require,
    split_kernel,
)
from .scaling import wide


def _describe_lora(shapes: Shapes, where: str, kernel: Shape | None) -> LayerFacts:
    out, rank = matrix(shapes["up"], "up", where)
    rows, in_, stored = split_kernel(shapes["down"], "down", where, kernel)
    require(rank == rows, where, shapes, "up", "down")
    return LayerFacts("lora", out, in_, stored, rank)


def _build_lora(layer: Layer) -> LowRank:
    up, down = layer.slots["up"], layer.slots["down"]
    up, down = up.reshape(up.shape[0], -1), down.reshape(down.shape[0], -1)
    rank = down.shape[0]
    if layer.dyn is not None and layer.dyn < rank:
        # The hosts keep dividing alpha by the stored rank, so alpha shrinks with the ranks taken.
        up, down = up[:, : layer.dyn].contiguous(), down[: layer.dyn].contiguous()
    return LowRank(up, down, float(down.shape[0]), layer.facts.kernel)


def _describe_tucker(shapes: Shapes, where: str, kernel: Shape | None) -> LayerFacts:
    out, rank = matrix(shapes["up"], "up", where)
    rows, in_ = matrix(shapes["down"], "down", where)
    mid_out, mid_in, stored = split_kernel(shapes["mid"], "mid", where, kernel)
    require((mid_out, mid_in) == (rank, rows), where, shapes, "up", "mid", "down")
    return LayerFacts("tucker", out, in_, stored, rank)


def _build_tucker(layer: Layer) -> LowRank:
    """Fold the core into the down factor: down'(n, j, k) = sum_m mid(n, m, k) down(m, j)."""
    up, mid, down = (layer.slots[slot] for slot in ("up", "mid", "down"))
    up, down = up.reshape(up.shape[0], -1), down.reshape(down.shape[0], -1)
    mid = mid.reshape(mid.shape[0], mid.shape[1], -1)
    folded = torch.einsum("nmk,mj->njk", mid.double(), down.double()).to(wide(down).dtype)
    return LowRank(up, folded.reshape(mid.shape[0], -1), float(mid.shape[0]), layer.facts.kernel)


def _down_rank(shapes: Shapes) -> int:
    return shapes["down"][0]


_BIASES = frozenset({"up_bias", "down_bias"})
# As kohya, PEFT, diffusers' processors and early diffusers spell them.
_ENDINGS = {
    "up": ("lora_up.weight", "lora_B.weight", "lora_B", "lora.up.weight", "lora_linear_layer.up.weight"),
    "down": (
        "lora_down.weight",
        "lora_A.weight",
        "lora_A",
        "lora.down.weight",
        "lora_linear_layer.down.weight",
    ),
    "up_bias": ("lora_up.bias", "lora_B.bias", "lora.up.bias"),
    "down_bias": ("lora_down.bias", "lora_A.bias", "lora.down.bias"),
}

LORA = register(
    AdapterKind(
        name="lora",
        label="LoRA, LoCon",
        forms=(frozenset({"up", "down"}),),
        optional=_BIASES,
        family="LoRA",
        needs_base=False,
        exact_low_rank=True,
        keys="`lora_up` `lora_down` (`lora_B` `lora_A`), linear, 1 x 1 and k x k",
        does="Merged as it is stored.",
        source="Hu et al. 2021, https://arxiv.org/abs/2106.09685",
        describe=_describe_lora,
        build=_build_lora,
        scale_rank=_down_rank,
        endings=_ENDINGS,
    )
)

TUCKER = register(
    AdapterKind(
        name="tucker",
        label="Tucker LoCon",
        forms=(frozenset({"up", "mid", "down"}),),
        optional=_BIASES,
        family="LoRA",
        needs_base=False,
        exact_low_rank=True,
        keys="`lora_up` `lora_mid` `lora_down`",
        does="The core is folded into the down factor; the rank stays.",
        source="Yeh et al. 2023 (LyCORIS), https://arxiv.org/abs/2309.14859",
        describe=_describe_tucker,
        build=_build_tucker,
        scale_rank=_down_rank,
        endings={**_ENDINGS, "mid": ("lora_mid.weight",)},
    )
)
