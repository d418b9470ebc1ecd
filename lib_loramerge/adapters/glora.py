"""GLoRA: a low-rank change of the weight plus one that passes through the weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..delta import Delta, Dense, LowRank
from .kinds import AdapterKind, Layer, LayerFacts, Shape, Shapes, matrix, register, require, split_kernel
from .scaling import wide

ALPHA_DIFFERS = "The scale of GLoRA is alpha / rank; not every program reads its alpha."
TUCKER_DIFFERS = "The Tucker core of GLoRA is applied as LyCORIS trains it; the WebUIs ignore it."

GLORA_SLOTS = ("a1", "a2", "b1", "b2")


def is_old_glora(slots: Shapes) -> bool:
    """Whether the factors of a GLoRA layer lie in the order of LyCORIS before version 2.

    Old: a1, b1 (rank, in), a2 (in, rank), b2 (out, rank). New: a1 (in, rank),
    b1 (out, rank), a2, b2 (rank, in). For a square layer both readings fit, and
    the rank is the smaller number, which is what Forge's rule amounts to.
    """
    a1, a2, b1, b2 = (slots[slot] for slot in GLORA_SLOTS)
    old = b2[1] == b1[0] == a1[0] == a2[1]
    new = b2[0] == b1[1] == a1[1] == a2[0]
    return old and (not new or a2[0] >= a2[1])


def _describe(shapes: Shapes, where: str, kernel: Shape | None) -> LayerFacts:
    notes: tuple[str, ...] = (ALPHA_DIFFERS,) if "alpha" in shapes else ()
    for slot in GLORA_SLOTS:
        split_kernel(shapes[slot], slot, where, None)
    if is_old_glora(shapes):
        return _describe_old(shapes, where, kernel, notes)
    if "bm" in shapes:
        notes += (TUCKER_DIFFERS,)
    in_, rank = matrix(shapes["a1"], "a1", where)
    rank_a, in_a = matrix(shapes["a2"], "a2", where)
    out, rank_b1 = matrix(shapes["b1"], "b1", where)
    if "bm" in shapes:
        rank_b, in_b = matrix(shapes["b2"], "b2", where)
        rows, columns, stored = split_kernel(shapes["bm"], "bm", where, kernel)
        require((rows, columns) == (rank_b1, rank_b), where, shapes, "b1", "bm", "b2")
    else:
        rank_b, in_b, stored = split_kernel(shapes["b2"], "b2", where, kernel)
        require(rank_b == rank_b1, where, shapes, "b1", "b2")
    require((rank, in_, in_) == (rank_a, in_a, in_b), where, shapes, *GLORA_SLOTS)
    total, limit = rank_b1 + rank * math.prod(stored), min(out, in_ * math.prod(stored))
    fits = not stored or total <= limit
    return LayerFacts("glora", out, in_, stored, total if fits else None, needs_base=True, notes=notes)


def _describe_old(shapes: Shapes, where: str, kernel: Shape | None, notes: tuple[str, ...]) -> LayerFacts:
    out, rank = matrix(shapes["b2"], "b2", where)
    rows, in_, stored = split_kernel(shapes["b1"], "b1", where, kernel)
    require("bm" not in shapes, where, shapes, *GLORA_SLOTS, "bm")
    unfolded = in_ * math.prod(stored)
    sizes = (math.prod(shapes["a1"][1:]), math.prod(shapes["a2"]) // max(rank, 1))
    require(rows == rank and sizes == (unfolded, unfolded), where, shapes, *GLORA_SLOTS)
    return LayerFacts("glora", out, in_, stored, 2 * rank, needs_base=True, notes=notes)


def _build(layer: Layer) -> Delta:
    assert layer.base is not None
    factors = [wide(layer.slots[slot]) for slot in GLORA_SLOTS]
    if is_old_glora({slot: tuple(t.shape) for slot, t in zip(GLORA_SLOTS, factors)}):
        a1, a2, b1, b2 = (t.flatten(1) for t in factors)
        return _joined(b2, b1, _times(layer.base.flatten(1), a2), a1, layer.facts.kernel)
    a1, a2, b1, b2 = (t.flatten(1) for t in factors)
    if "bm" in layer.slots:
        core = wide(layer.slots["bm"])
        core = core.reshape(core.shape[0], core.shape[1], -1)
        b2 = torch.einsum("nmk,mj->njk", core.double(), b2.double()).to(b1.dtype).flatten(1)
    base = layer.base.reshape(layer.base.shape[0], layer.base.shape[1], -1)
    through = torch.einsum("oik,ir->okr", base.double(), a1.double())  # (out, kh * kw, rank)
    if layer.facts.rank is None:
        passed = torch.einsum("okr,ri->oik", through, a2.double()).flatten(1)
        return Dense((passed + b1.double() @ b2.double()).to(b1.dtype), layer.facts.kernel)
    # Each kernel position has its own (out, rank) block and meets only its own columns of the input.
    eye = torch.eye(through.shape[1], dtype=a2.dtype, device=a2.device)
    spread = torch.einsum("ri,kl->kril", a2, eye).flatten(2).flatten(0, 1)
    return _joined(b1, b2, through.to(b1.dtype).flatten(1), spread, layer.facts.kernel)


def _times(weight: Tensor, a: Tensor) -> Tensor:
    return (weight.double() @ a.double()).to(a.dtype)


def _joined(up1: Tensor, down1: Tensor, up2: Tensor, down2: Tensor, kernel: Shape) -> LowRank:
    """``up1 down1 + up2 down2`` as one product."""
    up, down = torch.cat([up1, up2], dim=1), torch.cat([down1, down2], dim=0)
    return LowRank(up, down, float(down.shape[0]), kernel)


def _scale_rank(shapes: Shapes) -> int:
    return shapes["a1"][0] if is_old_glora(shapes) else shapes["a2"][0]


GLORA = register(
    AdapterKind(
        name="glora",
        label="GLoRA",
        forms=(frozenset(GLORA_SLOTS),),
        optional=frozenset({"bm"}),
        family="GLoRA",
        needs_base=True,
        exact_low_rank=True,
        keys="`a1` `a2` `b1` `b2`, in the old and the new order",
        does="Written as one product of twice the rank; k x k layers of small size become dense.",
        source="Chavan et al. 2023, https://arxiv.org/abs/2306.07967, as LyCORIS and Forge compute it",
        describe=_describe,
        build=_build,
        scale_rank=_scale_rank,
        endings={slot: (f"{slot}.weight",) for slot in (*GLORA_SLOTS, "bm")},
    )
)
