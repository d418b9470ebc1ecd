"""Rounding factors to the dtype they are saved in: into its range first, and how far off they are then."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import OutputError
from .small import gram
from .types import Grams, LowRank

_ALPHA = 120  # Alpha is written as float32: a power of two that it has room for, either way.
_SUBNORMAL = 8  # Factors whose mean size is below this many times the least normal number are scaled up.


def realize(delta: LowRank, dtype: torch.dtype = torch.float64) -> LowRank:
    """The same delta without gains: the root of each multiplied into both factors, its sign into up.

    Alpha stays as ``stack`` chose it.
    """
    if delta.gains is None:
        return replace(delta, up=delta.up.to(dtype), down=delta.down.to(dtype))
    gains = delta.gains.to(delta.up.device)
    root = gains.abs().sqrt()
    up = delta.up.to(dtype) * (root * gains.sign()).to(dtype)
    down = delta.down.to(dtype) * root.to(dtype)[:, None]
    return LowRank(up, down, delta.alpha, delta.kernel, delta.parts)


def fit(delta: LowRank, dtype: torch.dtype, *, fixed_alpha: bool = False) -> LowRank:
    """Bring factors into the normal range of ``dtype`` by powers of two, which are exact.

    Mostly there is nothing to do, and ``delta`` itself is returned. Otherwise each component is balanced
    between up and down first; what is left to do goes into alpha.
    """
    if _in_range(delta.up, dtype) and _in_range(delta.down, dtype) and _alpha_fits(delta.alpha):
        return delta
    up, down = delta.up.double(), delta.down.double()
    columns, rows = up.abs().amax(0), down.abs().amax(1)
    shift = torch.nan_to_num((rows.log2() - columns.log2()) / 2, nan=0.0, posinf=0.0, neginf=0.0)
    shift = torch.exp2(shift.round())
    up, down = up * shift, down / shift[:, None]
    largest = max(float(up.abs().max()), float(down.abs().max()))
    if fixed_alpha or largest == 0:
        return replace(delta, up=up, down=down)
    if not math.isfinite(largest):
        raise OutputError("The numbers of this layer are too large to be computed with or saved.")
    power = max(-1000, min(1000, -round(math.log2(largest))))
    alpha = math.log2(abs(delta.alpha) or 1.0)
    # What alpha has no room for stays in the factors.
    power = max(math.ceil((alpha - _ALPHA) / 2), min(math.floor((alpha + _ALPHA) / 2), power))
    factor = 2.0**power
    return replace(delta, up=up * factor, down=down * factor, alpha=math.ldexp(delta.alpha, -2 * power))


def _alpha_fits(alpha: float) -> bool:
    """Whether float32 has room for alpha."""
    return alpha == 0 or abs(math.log2(abs(alpha))) <= _ALPHA


def not_negative(value: float) -> float:
    """0 for a small negative sum of roundings; NaN stays, where ``max`` would make it 0."""
    return 0.0 if value < 0 else value


def rounding_error(exact: LowRank, up: Tensor, down: Tensor, small: Grams | None = None) -> float:
    """Squared norm of ``scale * (up @ down - exact.up @ exact.down)``, without forming either product.

    The difference is ``up @ d_down + d_up @ exact.down``: its terms are as small as the rounding, so
    nothing cancels.

    Args:
        exact: The factors before rounding.
        up, down: The factors as written.
        small: Gram matrices of ``exact`` as :func:`first_order_error` takes them, where they are known; its
            formula is taken unless a component is off by more than rounding can be.
    """
    if small is not None:
        error_sq, farthest = (float(one) for one in first_order_error(exact.up, exact.down, up, down, small))
        if farthest <= torch.finfo(up.dtype).eps:
            return exact.scale**2 * not_negative(error_sq)
    d_up, d_down = up.double() - exact.up.double(), down.double() - exact.down.double()
    left = torch.cat([up.double(), d_up], dim=1)
    right = torch.cat([d_down, exact.down.double()])
    error_sq = exact.scale**2 * float((gram(left.mT) * gram(right)).sum())
    return not_negative(error_sq)


def grams_with_gains(small: Grams, gains: Tensor | None) -> Grams:
    """Gram matrices of the factors that :func:`realize` makes, from those of the delta's own."""
    if gains is None:
        return small
    root, signed = gains.abs().sqrt(), gains.abs().sqrt() * gains.sign()
    return Grams(small.up * signed[:, None] * signed, small.down * root[:, None] * root)


def first_order_error(
    up: Tensor, down: Tensor, written_up: Tensor, written_down: Tensor, small: Grams
) -> tuple[Tensor, Tensor]:
    """:func:`rounding_error` at scale 1, to first order in the rounding: the square of ``U dV + dU V``.

    It takes the Gram matrices of the factors, which are known, and products of small matrices. Where a
    component is off by more than rounding can be, the general formula has to be taken.

    Args:
        up, down: (..., out, rank) and (..., rank, in) before rounding.
        written_up, written_down: The same after.
        small: The Gram matrices of up and down, (..., rank, rank); or their diagonals, (..., rank), where the
            components are orthogonal, as :func:`truncate` makes them: both are the singular values then.

    Returns:
        (...) the squared distance, and the largest relative distance of one factor's component from its
        rounded self; float64 on the CPU.
    """
    d_up, d_down = written_up.to(up.dtype) - up, written_down.to(down.dtype) - down
    du_sq, dv_sq = _squares(d_up, -2), _squares(d_down, -1)
    both = ((up.mT @ d_up) * (d_down @ down.mT)).sum((-2, -1)).cpu().double()
    if small.up.dim() < up.dim():
        up_sq, down_sq = small.up, small.down
        own = (up_sq * dv_sq + down_sq * du_sq).sum(-1)
    else:
        up_sq, down_sq = (square.diagonal(dim1=-2, dim2=-1) for square in (small.up, small.down))
        own = (small.up * (d_down @ d_down.mT).cpu() + (d_up.mT @ d_up).cpu() * small.down).sum((-2, -1))
    least = torch.finfo(torch.float64).tiny
    farthest = torch.maximum(du_sq / up_sq.clamp(min=least), dv_sq / down_sq.clamp(min=least))
    return own + 2 * both, farthest.amax(-1).sqrt()


def _squares(factor: Tensor, dim: int) -> Tensor:
    return factor.square().sum(dim).cpu().double()


def check_finite(error_sq: float, alpha: float, dtype: torch.dtype) -> None:
    """Refuse an overflow: anywhere in the written tensors it makes their distance infinite or NaN."""
    if not (math.isfinite(error_sq) and abs(alpha) < torch.finfo(torch.float32).max):
        name = str(dtype).removeprefix("torch.")
        raise OutputError(
            "A layer is too large to be saved as {name}. Save as float32, or lower the strengths.", name
        )


def roots_in_range(values: Tensor, side: int, dtype: torch.dtype) -> bool:
    """:func:`_in_range` for balanced factors, whose columns are sqrt(s) long, without looking at them."""
    limits = torch.finfo(dtype)
    largest, mean = float(values[0]) ** 0.5, (float(values.mean()) / side) ** 0.5
    return largest < limits.max / 2 and mean >= _SUBNORMAL * limits.tiny


def _in_range(factor: Tensor, dtype: torch.dtype) -> bool:
    """Whether rounding a factor to ``dtype`` overflows nowhere and loses nothing to subnormal numbers."""
    if factor.numel() == 0:
        return True
    limits = torch.finfo(dtype)
    largest = float(factor.abs().max())
    mean = float(torch.linalg.vector_norm(factor)) / math.sqrt(factor.numel())
    return largest == 0 or (largest < limits.max / 2 and mean >= _SUBNORMAL * limits.tiny)
