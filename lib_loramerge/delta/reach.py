"""Deltas far from 1 brought there by powers of two, which are exact, so that their squares and products stay
numbers. Ordinary LoRAs are left as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import OutputError
from .types import Delta, Dense, Grams, LowRank, Merged, Mixed, scaled

NEAR = 50  # Squares of float32 numbers up to 2 to this power, and sums of them, are float32 numbers.
_SAFE_SCALE = 200  # Float64 arithmetic on factors has room for a scale of 2 to this power.
_LAST = 400  # Beyond 2 to this power not even float64 can square a delta, and no file can hold it.


def largest(tensor: Tensor) -> float:
    """Largest magnitude, without a copy of the tensor."""
    low, high = torch.aminmax(tensor) if tensor.numel() else (tensor.new_zeros(()),) * 2
    return max(-float(low), float(high))


def near_one(deltas: Sequence[Delta], weights: Sequence[float], *, exact: bool) -> tuple[list[Delta], int]:
    """Deltas divided by one power of two, such that the largest times its weight is about 1, and that power.

    Args:
        exact: They are only added up. Factors need no look then: float64 has room for them.

    Raises:
        OutputError: They are larger than any number that could be written.
    """
    if exact and all(isinstance(d, LowRank) and _scale(d, w) for d, w in zip(deltas, weights)):
        return list(deltas), 0
    powers = [_power(delta) + _log2(abs(weight)) for delta, weight in zip(deltas, weights)]
    power = max(powers, default=-math.inf)
    if math.isnan(power) or power > _LAST:
        raise OutputError("The numbers of this layer are too large to be computed with or saved.")
    if abs(power) <= NEAR or power == -math.inf:
        return list(deltas), 0
    whole = max(-2 * _LAST, round(power))
    return [times_two_to(delta, -whole) for delta in deltas], whole


_D = TypeVar("_D", Delta, Merged)


def times_two_to(delta: _D, power: int) -> _D:
    """``2 ** power * delta``; what is then too small for any file is 0."""
    if power == 0:
        return delta
    if isinstance(delta, LowRank):
        try:
            alpha = math.ldexp(delta.alpha, power)
        except OverflowError:
            alpha = math.copysign(math.inf, delta.alpha)
        if alpha == 0 or power < -_LAST:
            return replace(delta, up=torch.zeros_like(delta.up), alpha=float(delta.rank), spectra=())
        if delta.structure is not None and math.isfinite(alpha):
            return scaled(delta, 2.0**power)
        return replace(delta, alpha=alpha)
    if isinstance(delta, Mixed):
        factor = 2.0**power
        small = Grams(delta.small.up * factor**2, delta.small.down)
        return replace(delta, left=delta.left * factor, small=small)
    # In two steps: 2 to the whole power may be no number itself.
    first, second = 2.0 ** (power // 2), 2.0 ** (power - power // 2)
    return replace(delta, weight=delta.weight.double() * first * second, doubt=delta.doubt * first * second)


def _scale(delta: LowRank, weight: float) -> bool:
    scale = abs(delta.scale * weight)
    return scale == 0 or abs(_log2(scale)) < _SAFE_SCALE


def _power(delta: Delta) -> float:
    """log2 of what no element exceeds by much; -inf for a delta of zeros."""
    if isinstance(delta, Dense):
        return _log2(largest(delta.weight))
    gains = float(delta.component_gains().abs().max()) if delta.rank else 0.0
    return _log2(largest(delta.up)) + _log2(largest(delta.down)) + _log2(gains)


def _log2(value: float) -> float:
    return math.log2(value) if 0 < value < math.inf else (-math.inf if value == 0 else math.nan)
