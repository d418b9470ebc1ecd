"""Rounding a delta to the dtype it is saved in, and the error of exactly what is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import OutputError
from .core import (
    NOISE,
    Spectrum,
    cancelled,
    decompose,
    gram,
    grams,
    in_float32,
    lost_by,
    lost_of_parts,
    sizes,
    truncate,
)
from .counted import all_values, is_counted
from .dense import decompose_dense, decompose_large
from .measure import squared_distance
from .types import Dense, Grams, LowRank, Merged, Mixed

_LARGE = 512  # Components from which on Gram matrices and their eigenvectors cost too much.
_SPARE = 1.02  # Ranks found beside those that counted singular values ask for, which are not exact.
_TELLS = 1e-3  # Part of the squared error from which on what may have been lost as noise is measured.
_ALPHA = 120  # Alpha is written as float32: a power of two that it has room for, either way.
_SUBNORMAL = 8  # Factors whose mean size is below this many times the least normal number are scaled up.


@dataclass(frozen=True, eq=False)
class Stored:
    """The tensors of one layer as they are written.

    Attributes:
        up: (out, rank) in the output dtype; the caller reshapes convolutions.
        down: (rank, in * kh * kw) in the output dtype.
        alpha: Value of the alpha tensor (float32).
        kernel: (kh, kw) or ().
        error_sq: Squared Frobenius distance of these very tensors from the exact delta.
        exact_sq: Squared Frobenius norm of the exact delta.
        parts: What the parts of a sum lost, as ``lost_of_parts`` tells it; None where it is not known.
    """

    up: Tensor
    down: Tensor
    alpha: float
    kernel: tuple[int, ...]
    error_sq: float
    exact_sq: float
    parts: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> LowRank:
        """The written tensors as a delta."""
        return LowRank(self.up, self.down, self.alpha, self.kernel)


def write_layer(
    delta: Merged,
    dtype: torch.dtype,
    choose: Callable[[Spectrum], int] | None = None,
    *,
    most: int | None = None,
    fixed_alpha: bool = False,
) -> Stored | None:
    """What is written of one merged layer: the cut, the rounding, and the measured error.

    Args:
        delta: A method's result; a sum made by ``stack`` is judged against its exact value.
        dtype: Output dtype.
        choose: Rank rule, given the spectrum; None keeps all components as they are (low-rank deltas only).
        most: The largest rank that ``choose`` can give, where that is known; makes dense deltas much faster.
        fixed_alpha: The file has no alpha tensors, so alpha cannot take part of the scale.

    Returns:
        None when nothing is left of the layer (weights 0, or inputs that cancel).
    """
    if choose is None and isinstance(delta, LowRank):
        return store(delta, dtype, fixed_alpha=fixed_alpha)
    if choose and most is None and isinstance(delta, LowRank) and is_counted(delta):
        # The rule needs all singular values, the file only the largest.
        most = max(1, math.ceil(_SPARE * choose(all_values(delta))))
    if isinstance(delta, LowRank) and most and _is_large(delta):
        if most >= min(delta.out, delta.in_):
            return _store_square(delta, dtype, fixed_alpha)
        spectrum = (None if len(delta.spectra) == 1 else decompose_large(delta, most)) or decompose(delta)
    else:
        spectrum = decompose_dense(delta, most) if isinstance(delta, Dense) else decompose(delta)
    rank = choose(spectrum) if choose else spectrum.rank
    return store_truncated(spectrum, rank, dtype, fixed_alpha=fixed_alpha) if rank else None


def _is_large(delta: LowRank) -> bool:
    """Whether a delta has more components than an eigenproblem of that size is worth."""
    return delta.rank >= _LARGE and bool(delta.spectra)


def _store_square(delta: LowRank, dtype: torch.dtype, fixed_alpha: bool) -> Stored | None:
    """All of a delta at its full rank: the matrix itself, and an identity on its shorter side."""
    whole = delta.dense()
    side = min(whole.shape)
    eye = torch.eye(side, dtype=torch.float64, device=whole.device)
    factors = (eye, whole) if delta.out <= delta.in_ else (whole, eye)
    energy = float(whole.square().sum())
    if energy == 0:
        return None
    fitted = fit(LowRank(*factors, float(side), delta.kernel), dtype, fixed_alpha=fixed_alpha)
    up, down = fitted.up.to(dtype), fitted.down.to(dtype)
    # The identity has powers of two in it, so a product with it is a scaling of rows or columns.
    diagonal = (up if delta.out <= delta.in_ else down).double().diagonal()
    written = diagonal[:, None] * down.double() if delta.out <= delta.in_ else up.double() * diagonal
    error_sq = float((written * fitted.scale - whole).square().sum())
    _check_finite(error_sq, fitted.alpha, dtype)
    return _unless_lost(Stored(up, down, fitted.alpha, delta.kernel, error_sq, energy))


def store_truncated(
    spectrum: Spectrum, rank: int, dtype: torch.dtype, *, fixed_alpha: bool = False
) -> Stored | None:
    """The best approximation of a rank, rounded to ``dtype``; its error against the exact delta is measured.

    None where ``dtype`` has only zeros for it.

    The error has two parts that are orthogonal to each other: what the rank leaves out, known from the
    singular values, and what the rounding does, taken from the rounded tensors.
    """
    rank = min(rank, spectrum.rank)
    values = spectrum.values[:rank]
    best = truncate(spectrum, rank, working_dtype(spectrum, dtype))
    fits = roots_in_range(values, max(best.out, best.in_), dtype)
    if not fits:
        best = fit(best, dtype, fixed_alpha=fixed_alpha)
    up, down = best.up.to(dtype), best.down.to(dtype)
    # Factors that were brought into range no longer share the singular values evenly.
    rounding = orthogonal_rounding_error(best, up, down, values) if fits else rounding_error(best, up, down)
    error_sq = spectrum.tail(rank) + rounding
    if not doubtless(spectrum, error_sq):
        error_sq = spectrum.beyond + squared_distance(
            _plain(spectrum.source), replace(best, up=up, down=down)
        )
    _check_finite(error_sq, best.alpha, dtype)
    lost = lost_by(spectrum, rank)
    return _unless_lost(Stored(up, down, best.alpha, best.kernel, error_sq, spectrum.energy, lost))


def doubtless(spectrum: Spectrum, error_sq: float) -> bool:
    """Whether the error holds without what was left out as noise."""
    return spectrum.doubt <= _TELLS * error_sq


def _plain(delta: LowRank | Mixed | None) -> LowRank:
    """A spectrum's source as a plain low-rank delta."""
    assert delta is not None
    if isinstance(delta, LowRank):
        return delta
    left, right = delta.left.to(delta.up.device), delta.right.to(delta.up.device)
    up, down = delta.up.double() @ left, right.mT @ delta.down.double()
    return LowRank(up, down, float(delta.rank), delta.kernel)


def _unless_lost(stored: Stored) -> Stored | None:
    """What was stored; None where all of it is too small for its dtype."""
    if stored.error_sq >= 0.9 * stored.exact_sq and not (stored.up.any() and stored.down.any()):
        return None
    return stored


def store(delta: LowRank, dtype: torch.dtype, *, fixed_alpha: bool = False) -> Stored | None:
    """Any low-rank delta rounded to ``dtype`` with all its components; None when its parts cancel.

    Raises:
        OutputError: The delta is too large for this dtype.
    """
    small = grams(delta)
    energy, size = sizes(small, delta.component_gains(), delta.parts)
    if cancelled(energy, size):
        energy = decompose(delta, small=small, vectors=False).energy  # to all its digits
    if energy <= (NOISE * size) ** 2:
        return None
    lengths = max(float(square.diagonal().max()) for square in (small.up, small.down))
    narrow = torch.finfo(dtype).bits < 32 and in_float32(lengths) and in_float32(energy**0.5)
    narrow = narrow and not cancelled(energy, size)
    exact = realize(delta, torch.float32 if narrow else torch.float64)
    fitted = fit(exact, dtype, fixed_alpha=fixed_alpha)
    up, down = fitted.up.to(dtype), fitted.down.to(dtype)
    if cancelled(energy, size):
        error_sq = squared_distance(fitted, replace(fitted, up=up, down=down))
    elif fitted is exact:
        error_sq = _rounding_of_parts(exact, up, down, small, delta.gains)
    else:
        error_sq = rounding_error(fitted, up, down)
    _check_finite(error_sq, fitted.alpha, dtype)
    lost = None
    if len(delta.parts) > 1:
        lost = lost_of_parts(small, delta.component_gains(), delta.parts, None, None)
    return _unless_lost(Stored(up, down, fitted.alpha, fitted.kernel, error_sq, energy, lost))


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


def rounding_error(exact: LowRank, up: Tensor, down: Tensor) -> float:
    """Squared norm of ``scale * (up @ down - exact.up @ exact.down)``, without forming either product.

    The difference is ``up @ d_down + d_up @ exact.down``: its terms are as small as the rounding, so
    nothing cancels.
    """
    d_up, d_down = up.double() - exact.up.double(), down.double() - exact.down.double()
    left = torch.cat([up.double(), d_up], dim=1)
    right = torch.cat([d_down, exact.down.double()])
    error_sq = exact.scale**2 * float((gram(left.mT) * gram(right)).sum())
    return not_negative(error_sq)


def _rounding_of_parts(exact: LowRank, up: Tensor, down: Tensor, small: Grams, gains: Tensor | None) -> float:
    """:func:`rounding_error` to first order, with the Gram matrices that are known already.

    Args:
        exact: What :func:`realize` made of a delta.
        up, down: The factors as written.
        small: The Gram matrices of the delta's own factors, and
        gains: their gains.
    """
    d_up, d_down = up.to(exact.up.dtype) - exact.up, down.to(exact.down.dtype) - exact.down
    farthest = max(_farthest(d_up, exact.up, 0), _farthest(d_down, exact.down, 1))
    if not farthest <= torch.finfo(up.dtype).eps:
        return rounding_error(exact, up, down)
    gains = torch.ones(exact.rank, dtype=torch.float64) if gains is None else gains
    root, signed = gains.abs().sqrt(), gains.abs().sqrt() * gains.sign()
    error_sq = (small.up * signed[:, None] * signed * (d_down @ d_down.mT).cpu()).sum()
    error_sq += ((d_up.mT @ d_up).cpu() * small.down * root[:, None] * root).sum()
    error_sq += 2 * ((exact.up.mT @ d_up) * (d_down @ exact.down.mT)).sum().cpu()
    return exact.scale**2 * not_negative(float(error_sq))


def _farthest(difference: Tensor, factor: Tensor, dim: int) -> float:
    """Largest relative distance of a component; 0 for components of no size."""
    ratio = difference.square().sum(dim) / factor.square().sum(dim).clamp(min=torch.finfo(factor.dtype).tiny)
    return float(ratio.max()) ** 0.5


def orthogonal_rounding_error(exact: LowRank, up: Tensor, down: Tensor, values: Tensor) -> float:
    """:func:`rounding_error` for factors with orthogonal components, as :func:`truncate` makes them.

    Where a component is off by more than rounding can be, the general formula is taken.

    Args:
        exact: The factors before rounding.
        up, down: The factors as written.
        values: (rank,) float64 singular values of the exact delta.
    """
    error_sq, farthest = rounding_of_orthogonal(exact.up, exact.down, up, down, values / exact.scale)
    if not float(farthest) <= torch.finfo(up.dtype).eps:
        return rounding_error(exact, up, down)
    return exact.scale**2 * not_negative(float(error_sq))


def rounding_of_orthogonal(
    up: Tensor, down: Tensor, written_up: Tensor, written_down: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared distance of ``written_up @ written_down`` from ``up @ down``, to first order in the rounding.

    With U^T U = V V^T = diag(s), the square of ``U dV + dU V`` is made of the lengths of the rows and columns
    of dU and dV, and of one product of two small matrices.

    Args:
        up, down: (..., out, rank) and (..., rank, in); components orthogonal, of squared length ``values``.
        written_up, written_down: The same after rounding.
        values: (..., rank) float64.

    Returns:
        (...) the squared distance, and the largest relative distance of one factor's component from its
        rounded self; float64 on the CPU.
    """
    d_up, d_down = written_up.to(up.dtype) - up, written_down.to(down.dtype) - down
    du_sq, dv_sq = _squares(d_up, -2), _squares(d_down, -1)
    both = ((up.mT @ d_up) * (d_down @ down.mT)).sum((-2, -1)).cpu().double()
    error_sq = (values * (du_sq + dv_sq)).sum(-1) + 2 * both
    return error_sq, (torch.maximum(du_sq, dv_sq) / values).amax(-1).sqrt()


def _squares(factor: Tensor, dim: int) -> Tensor:
    return factor.square().sum(dim).cpu().double()


def _check_finite(error_sq: float, alpha: float, dtype: torch.dtype) -> None:
    """Refuse an overflow: anywhere in the written tensors it makes their distance infinite or NaN."""
    if not (math.isfinite(error_sq) and abs(alpha) < torch.finfo(torch.float32).max):
        name = str(dtype).removeprefix("torch.")
        raise OutputError(
            f"A layer is too large to be saved as {name}. Save as float32, or lower the strengths."
        )


def working_dtype(spectrum: Spectrum, dtype: torch.dtype) -> torch.dtype:
    """Precision of the large products.

    Float32 is enough for a 16-bit result that did not nearly cancel, and whose squares are float32 numbers.
    """
    narrow = torch.finfo(dtype).bits < 32 and not cancelled(spectrum.energy, spectrum.size)
    return torch.float32 if narrow and in_float32(float(spectrum.values[0])) else torch.float64


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
