"""Rounding a delta to the dtype it is saved in, and what the rounding costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import OutputError
from .core import Spectrum, decompose, gram, truncate
from .dense import decompose_dense
from .types import Delta, LowRank


@dataclass(frozen=True)
class Stored:
    """The tensors of one layer as they are written.

    Attributes:
        up: (out, rank) in the output dtype; the caller reshapes convolutions.
        down: (rank, in * kh * kw) in the output dtype.
        alpha: Value of the alpha tensor (float32).
        kernel: (kh, kw) or ().
        error_sq: Squared Frobenius distance of these very tensors from the exact sum.
        exact_sq: Squared Frobenius norm of the exact sum.
    """

    up: Tensor
    down: Tensor
    alpha: float
    kernel: tuple[int, ...]
    error_sq: float
    exact_sq: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> LowRank:
        return LowRank(self.up, self.down, self.alpha, self.kernel)


def store(delta: LowRank, dtype: torch.dtype) -> Stored:
    """Round a low-rank delta's factors to ``dtype``; alpha is kept where the dtype's range allows.

    Raises:
        OutputError: The delta is too large to be stored in this dtype.
    """
    delta = fit(realize(delta), dtype)
    up, down = delta.up.to(dtype), delta.down.to(dtype)
    if not (bool(up.isfinite().all()) and bool(down.isfinite().all())):
        raise OutputError(f"A layer is too large for {str(dtype).removeprefix('torch.')}. Save as float32.")
    error_sq = rounding_error(delta, up, down)
    exact_sq = delta.scale**2 * float((gram(delta.up.mT) * gram(delta.down)).sum())
    return Stored(up, down, delta.alpha, delta.kernel, error_sq, max(0.0, exact_sq))


def store_truncated(spectrum: Spectrum, rank: int, dtype: torch.dtype) -> Stored:
    """The best approximation of this rank, rounded to ``dtype``, with its whole error against the exact sum."""
    work = torch.float64 if dtype == torch.float32 else torch.float32
    best = truncate(spectrum, rank, work)
    stored = store(best, dtype)
    return replace(stored, error_sq=stored.error_sq + spectrum.tail(rank), exact_sq=spectrum.energy)


def realize(delta: LowRank) -> LowRank:
    """The same delta with its gains multiplied into the factors: half (sqrt) each, the sign on up.

    Alpha stays, as :func:`stack` chose it. Factors come in float64.
    """
    if delta.gains is None:
        return delta
    root = delta.gains.abs().sqrt()
    up = delta.up.double() * (root * delta.gains.sign())
    return LowRank(up, delta.down.double() * root[:, None], delta.alpha, delta.kernel, delta.parts)


def fit(delta: LowRank, dtype: torch.dtype) -> LowRank:
    """Bring factors into the normal range of ``dtype`` by powers of two, which are exact; mostly nothing to do."""
    if _in_range(delta.up, dtype) and _in_range(delta.down, dtype):
        return delta
    columns = delta.up.double().norm(dim=0)
    rows = delta.down.double().norm(dim=1)
    shift = torch.exp2(
        torch.nan_to_num((rows.log2() - columns.log2()) / 2, nan=0.0, posinf=0.0, neginf=0.0).round()
    )
    up, down = delta.up.double() * shift, delta.down.double() / shift[:, None]
    largest = max(float(up.abs().max()), float(down.abs().max()))
    power = 0 if largest == 0 else -round(math.log2(largest))
    return replace(delta, up=up * 2.0**power, down=down * 2.0**power, alpha=delta.alpha * 4.0**-power)


def rounding_error(delta: LowRank, up: Tensor, down: Tensor) -> float:
    """Squared norm of ``scale * (up @ down - delta.up @ delta.down)``, without forming either product.

    The difference is ``up * d_down + d_up * delta.down``, whose terms are as small as the rounding is, so
    nothing cancels.
    """
    d_up, d_down = up.double() - delta.up.double(), down.double() - delta.down.double()
    left = torch.cat([up.double(), d_up], dim=1)
    right = torch.cat([d_down, delta.down.double()])
    return max(0.0, delta.scale**2 * float((gram(left.mT) * gram(right)).sum()))


def _in_range(factor: Tensor, dtype: torch.dtype) -> bool:
    """Whether rounding a factor to ``dtype`` overflows nowhere and loses nothing to subnormal numbers."""
    if factor.numel() == 0:
        return True
    limits = torch.finfo(dtype)
    largest = float(factor.abs().max())
    mean = float(factor.double().pow(2).mean().sqrt())
    return largest == 0 or (largest < limits.max / 2 and mean >= 8 * limits.tiny)


def write_layer(
    delta: Delta, dtype: torch.dtype, choose: Callable[[Spectrum], int] | None = None
) -> Stored | None:
    """What is written of one merged layer: the cut, the rounding, and the measured error.

    Args:
        delta: A method's result; a sum made by :func:`stack` is judged against its exact value.
        dtype: Output dtype.
        choose: Rank rule, given the spectrum; None keeps all components as they are (low-rank deltas only).

    Returns:
        None when nothing is left of the layer (weights 0, or inputs that cancel).
    """
    if choose is None and isinstance(delta, LowRank):
        return store(delta, dtype)
    spectrum = decompose(delta) if isinstance(delta, LowRank) else decompose_dense(delta)
    rank = choose(spectrum) if choose else spectrum.rank
    return store_truncated(spectrum, rank, dtype) if rank else None
