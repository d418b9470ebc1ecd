"""The linear methods: the exact sum, kept whole or cut to a rank, and the sum of factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..delta import Delta, Dense, Kronecker, LowRank, check_same_shape, weighted_sum
from ..errors import IncompatibleError, Sentence, joined
from .registry import METHODS, LayerContext, merge_method


@merge_method(
    "svd",
    label="Exact sum, best rank",
    summary="The exact weighted sum, cut to the wanted rank with the least possible error.",
    exact=True,
    linear=True,
    source="Eckart and Young 1936, The approximation of one matrix by another of lower rank",
    formula="best rank-k approximation of sum_i w_i delta_i",
)
def svd(deltas: Sequence[Delta], weights: Sequence[float], context: LayerContext) -> Delta:
    """The exact sum ``sum_i w_i delta_i``; the rank rule cuts it afterwards.

    Args:
        deltas: Deltas of one layer, of one shape.
        weights: One strength per delta.
        context: Not used.

    Returns:
        A low-rank delta with the inputs' factors side by side, or a dense one where an input is dense.
    """
    return weighted_sum(*_each_once(deltas, weights))


@merge_method(
    "concat",
    label="Exact sum, all ranks",
    summary="The exact weighted sum with all ranks kept: lossless, and as large as the inputs together.",
    exact=True,
    linear=True,
    uses_rank=False,
    source="the original LoRA Merger; LoRA Soups (Prabhakar et al. 2024), https://arxiv.org/abs/2410.13025",
    formula="up = [sqrt(|w_i| alpha_i/r_i R/alpha_1) up_i ...], down likewise, signs on up, R = sum_i r_i",
    avoid="when file size or loading time matters; svd keeping all is smaller where the LoRAs overlap",
)
def concat(deltas: Sequence[Delta], weights: Sequence[float], context: LayerContext) -> Delta:
    """The exact sum with the inputs' factors side by side; of a LoRA taken from itself, what is left of it.

    Args:
        deltas: Deltas of one layer, of one shape.
        weights: One strength per delta.
        context: Not used.

    Returns:
        Rank ``sum_i r_i``, copies that cancel counted once; alpha that of the first delta. Dense where
        an input is dense.
    """
    # Whole matrices cancel only to the digits of the larger one, so the same delta twice is once there.
    whole = any(isinstance(delta, Dense) for delta in deltas)
    kept, strengths = _each_once(deltas, weights, opposite=not whole)
    there = [place for place, strength in enumerate(strengths) if strength or whole] or [0]
    return weighted_sum([kept[place] for place in there], [strengths[place] for place in there])


def _each_once(
    deltas: Sequence[Delta], weights: Sequence[float], *, opposite: bool = False
) -> tuple[list[Delta], list[float]]:
    """The same delta twice is once that delta, at the sum of the strengths.

    So a LoRA that is taken away from itself leaves the difference of its strengths to the last digit.

    Args:
        opposite: Only where the strengths have opposite signs; others stay side by side.
    """
    kept: list[Delta] = []
    strengths: list[list[float]] = []
    for delta, weight in zip(deltas, weights):
        for place, other in enumerate(kept):
            ratio = _times(delta, other)
            if ratio is not None and not (opposite and math.fsum(strengths[place]) * weight * ratio > 0):
                strengths[place].append(weight * ratio)
                break
        else:
            kept.append(delta)
            strengths.append([weight])
    return kept, [math.fsum(own) for own in strengths]


def _times(delta: Delta, other: Delta) -> float | None:
    """What ``delta`` is of ``other`` where both are stored as the same numbers; None for two deltas."""
    if isinstance(delta, Dense) and isinstance(other, Dense):
        return 1.0 if _same(delta.weight, other.weight) else None
    if not (isinstance(delta, LowRank) and isinstance(other, LowRank)) or not other.scale:
        return None
    if delta.gains is not None or other.gains is not None:
        return None
    one, two = delta.structure, other.structure
    if one is not None or two is not None:
        if not (isinstance(one, Kronecker) and isinstance(two, Kronecker)):
            return None
        if not (_same(one.a, two.a) and _same(one.b, two.b)):
            return None
    elif not (_same(delta.up, other.up) and _same(delta.down, other.down)):
        return None
    return 1.0 if delta.alpha == other.alpha else delta.scale / other.scale


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.numel():
        return False
    last = (-1,) * a.dim()
    return bool(a[last] == b[last]) and torch.equal(a, b)  # one number rules out most pairs at once


@merge_method(
    "add",
    label="Add factors (approximate)",
    summary="Adds the factors themselves, as the original LoRA Merger did; only alike LoRAs give their sum.",
    adds_factors=True,
    uses_rank=False,
    source="the original LoRA Merger for ComfyUI",
    formula="up = sum_i w_i sqrt(alpha_i/alpha_1) up_i, down likewise, alpha = alpha_1",
    avoid="for LoRAs of different trainings: the cross terms are as large as the result",
)
def add(deltas: Sequence[Delta], weights: Sequence[float], context: LayerContext) -> Delta:
    """Sum of the factors. Exact only when the LoRAs are the same.

    Block weights scale a LoRA first (its up); the strength then multiplies both factors. A layer of one
    LoRA alone takes ``sqrt(|w|)`` on both factors and the sign on up, so it is exact.

    Args:
        deltas: Deltas of one layer, low-rank and of equal rank.
        weights: Strength times block weight of each; used for a layer of one LoRA.
        context: Holds strengths and block weights separately.

    Raises:
        IncompatibleError: The ranks differ, or a delta is not low-rank.
    """
    check_same_shape(deltas)
    low = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(low) < len(deltas) or len({delta.rank for delta in low}) > 1:
        raise IncompatibleError(_not_addable(deltas, context.layer))
    if len(low) == 1:
        return _alone(low[0], weights[0])
    strengths = context.strengths or tuple(weights)
    blocks = context.block_weights or (1.0,) * len(low)
    alpha = next((delta.alpha for delta in low if delta.alpha), 0.0)
    up = torch.zeros(low[0].up.shape, dtype=torch.float64, device=low[0].up.device)
    down = torch.zeros(low[0].down.shape, dtype=torch.float64, device=low[0].up.device)
    for delta, strength, block in zip(low, strengths, blocks):
        ratio = delta.alpha / alpha if alpha else 0.0
        root = strength * math.sqrt(abs(ratio))
        up += math.copysign(1.0, ratio) * root * block * delta.up.double()
        down += root * delta.down.double()
    return LowRank(up, down, alpha or float(low[0].rank), low[0].kernel)


def _alone(delta: LowRank, weight: float) -> LowRank:
    root = math.sqrt(abs(weight))
    up = delta.up.double() * math.copysign(root, weight)
    return LowRank(up, delta.down.double() * root, delta.alpha, delta.kernel)


def _not_addable(deltas: Sequence[Delta], layer: str) -> str:
    whole = Sentence("none (full weights)")
    ranks = joined(", ", (str(delta.rank) if isinstance(delta, LowRank) else whole for delta in deltas))
    others = (name for name, method in METHODS.items() if not (method.adds_factors or method.experimental))
    modes = ", ".join(others)
    return Sentence(
        "Mode add needs equal ranks, but layer {layer} has ranks {ranks}. Use one of: {modes}.",
        layer or "(unnamed)",
        ranks,
        modes,
    )
