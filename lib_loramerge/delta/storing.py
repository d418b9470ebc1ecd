"""Rounding a delta to the dtype it is saved in, and the error of exactly what is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import OutputError
from .cache import Cache
from .core import (
    NOISE,
    Spectrum,
    alike,
    cancelled,
    decompose,
    decompose_all,
    in_float32,
    lost_by_all,
    truncate_all,
)
from .counted import all_values, is_counted
from .dense import decompose_dense, decompose_large
from .measure import squared_distance
from .rounding import (
    check_finite,
    first_order_error,
    fit,
    grams_with_gains,
    not_negative,
    realize,
    roots_in_range,
    rounding_error,
)
from .settings import own_settings
from .small import grams, lost_of_parts, sizes
from .types import Dense, Grams, LowRank, Merged, Mixed

Choose = Callable[[Spectrum], int]

_LARGE = 512  # Components from which on Gram matrices and their eigenvectors cost too much.
_SPARE = 1.02  # Ranks found beside those that counted singular values ask for, which are not exact.
_TELLS = 1e-3  # Part of the squared error from which on what may have been lost as noise is measured.


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
        parts: What the parts of a sum lost, from ``lost_of_parts``; None where it is not known.
        smaller: Squared error, rounding aside, and ``parts`` at a smaller rank that was asked about.
    """

    up: Tensor
    down: Tensor
    alpha: float
    kernel: tuple[int, ...]
    error_sq: float
    exact_sq: float
    parts: Tensor | None = None
    smaller: tuple[float, Tensor | None] | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> LowRank:
        """The written tensors as a delta."""
        return LowRank(self.up, self.down, self.alpha, self.kernel)


def cut_layer(
    delta: Merged,
    dtype: torch.dtype,
    choose: Choose | None = None,
    *,
    most: int | None = None,
    fixed_alpha: bool = False,
) -> Stored | None:
    """:func:`cut_layers` of one layer."""
    return cut_layers([delta], dtype, [choose], most=[most], fixed_alpha=fixed_alpha)[0]


def cut_layers(
    deltas: Sequence[Merged],
    dtype: torch.dtype,
    choose: Sequence[Choose | None],
    *,
    names: Sequence[str] = (),
    most: Sequence[int | None] = (),
    fixed_alpha: bool = False,
    smaller: int | None = None,
    cache: Cache | None = None,
) -> list[Stored | None]:
    """What is to be written of merged layers: the cut, the rounding, and the measured error.

    A layer asks for hundreds of short operations, and between them Python's threads wait for each other: done
    for several layers at once they leave the cores, or the accelerator, to the arithmetic. The R x R problems
    are solved on the CPU in any case, where LAPACK is faster than an accelerator.

    Args:
        deltas: A method's results, on one device; a sum made by ``stack`` is judged against its exact value.
            Those that are :func:`~lib_loramerge.delta.core.alike` go together.
        dtype: Output dtype.
        choose: For each, its rank rule, given the spectrum; None keeps all components as they are (low-rank
            deltas only).
        names: Of the layers, for messages.
        most: For each, the largest rank that its rule can give, where that is known; makes dense deltas much
            faster.
        fixed_alpha: The file has no alpha tensors, so alpha cannot take part of the scale.
        smaller: A rank whose loss is computed as well; see ``Stored.smaller``.
        cache: What merges of one run share.

    Returns:
        Tensors on the CPU; None when nothing is left of a layer (weights 0, or inputs that cancel).

    Raises:
        OutputError: A layer is too large for this dtype.
    """
    most = most or [None] * len(deltas)
    results: dict[int, Stored | None] = {}
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, delta in enumerate(deltas):
        groups.setdefault(_group(delta, choose[index], index), []).append(index)

    # Neither function calls itself: one that does is a cycle, which would hold the factors of a batch until
    # Python's collector comes by.
    def cut(members: Sequence[int]) -> list[Stored | None]:
        chosen = [deltas[index] for index in members], [choose[index] for index in members]
        return _cut_alike(*chosen, most[members[0]], dtype, fixed_alpha, smaller, cache)

    def cut_alone(index: int) -> Stored | None:
        try:
            return cut([index])[0]
        except OutputError as error:
            if not names:
                raise
            raise OutputError("{name}: {error}", names[index], error) from error

    with own_settings():
        for members in groups.values():
            try:
                found = cut(members)
            except OutputError:
                found = [cut_alone(index) for index in members]  # which says in which layer it is
            results.update(zip(members, found, strict=True))
    return [results[index] for index in range(len(deltas))]


def _group(delta: Merged, choose: Choose | None, index: int) -> tuple[object, ...]:
    """The same for deltas that are cut together; the others go alone."""
    if isinstance(delta, Dense) or choose is None or not 0 < delta.rank <= min(delta.out, delta.in_):
        return (index,)
    return (index,) if isinstance(delta, LowRank) and _is_large(delta) else alike(delta)


def _cut_alike(
    deltas: Sequence[Merged],
    rules: Sequence[Choose | None],
    most: int | None,
    dtype: torch.dtype,
    fixed_alpha: bool,
    smaller: int | None,
    cache: Cache | None,
) -> list[Stored | None]:
    first, rule = deltas[0], rules[0]
    if rule and most is None and isinstance(first, LowRank) and is_counted(first):
        # The rule needs all singular values, the file only the largest.
        most = max(1, math.ceil(_SPARE * rule(all_values(first))))
    if isinstance(first, Dense):
        spectra = [decompose_dense(first, most)]
        if spectra[0].energy ** 0.5 <= first.doubt:
            return [None]  # nothing but rounding is left of the inputs
    elif rules[0] is None and isinstance(first, LowRank):
        return [round_uncut(first, dtype, fixed_alpha=fixed_alpha)]
    elif isinstance(first, LowRank) and most and _is_large(first) and most >= min(first.out, first.in_):
        return [_store_square(first, dtype, fixed_alpha)]
    else:
        large = isinstance(first, LowRank) and most and _is_large(first) and len(first.spectra) != 1
        found = decompose_large(first, most) if large and isinstance(first, LowRank) and most else None
        low = [delta for delta in deltas if not isinstance(delta, Dense)]
        spectra = decompose_all(low, cache=cache) if found is None else [found]
    ranks: dict[tuple[int, torch.dtype, int], list[int]] = {}
    for place, (spectrum, rule) in enumerate(zip(spectra, rules, strict=True)):
        rank = min(rule(spectrum) if rule else spectrum.rank, spectrum.rank)
        if rank:
            # Deltas that were solved together are cut together; the others are few.
            batch = place if spectrum.solved is None else id(spectrum.solved)
            ranks.setdefault((rank, working_dtype(spectrum, dtype), batch), []).append(place)
    results: list[Stored | None] = [None] * len(deltas)
    for (rank, _, _), places in ranks.items():
        chosen = [spectra[place] for place in places]
        cuts = round_cuts(chosen, rank, dtype, fixed_alpha=fixed_alpha, smaller=smaller)
        for place, stored in zip(places, cuts, strict=True):
            results[place] = stored
    return results


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
    check_finite(error_sq, fitted.alpha, dtype)
    return _unless_lost(Stored(up, down, fitted.alpha, delta.kernel, error_sq, energy))


def round_cut(
    spectrum: Spectrum, rank: int, dtype: torch.dtype, *, fixed_alpha: bool = False
) -> Stored | None:
    """:func:`round_cuts` of one delta, at most at the rank that it has."""
    return round_cuts([spectrum], min(rank, spectrum.rank), dtype, fixed_alpha=fixed_alpha)[0]


def round_cuts(
    spectra: Sequence[Spectrum],
    rank: int,
    dtype: torch.dtype,
    *,
    fixed_alpha: bool = False,
    smaller: int | None = None,
) -> list[Stored | None]:
    """The best approximations of a rank, rounded to ``dtype``; their errors against the exact deltas.

    None where ``dtype`` has only zeros for one.

    The error has two parts that are orthogonal to each other: what the rank leaves out, known from the
    singular values, and what the rounding does, taken from the rounded tensors.

    Args:
        spectra: One, or several that were solved together, of one :func:`working_dtype`.
        smaller: See :func:`cut_layers`.
    """

    def one_by_one() -> list[Stored | None]:
        return [
            round_cuts([one], rank, dtype, fixed_alpha=fixed_alpha, smaller=smaller)[0] for one in spectra
        ]

    up, down, mixings, holds = truncate_all(spectra, rank, working_dtype(spectra[0], dtype))
    values = torch.stack([spectrum.values[:rank] for spectrum in spectra])
    fits = all(roots_in_range(own, max(up.shape[-2], down.shape[-1]), dtype) for own in values)
    if len(spectra) > 1 and not (fits and holds):
        return one_by_one()
    kernel, alpha = spectra[0].source.kernel if spectra[0].source else (), float(rank)
    written_up, written_down = up.to(dtype), down.to(dtype)
    errors, farthest = first_order_error(up, down, written_up, written_down, Grams(values, values))
    if not fits or not float(farthest.max()) <= torch.finfo(dtype).eps:
        if len(spectra) > 1:
            return one_by_one()
        best = LowRank(up[0], down[0], alpha, kernel)
        if not fits:  # Factors brought into range no longer share the singular values evenly.
            best = fit(best, dtype, fixed_alpha=fixed_alpha)
            written_up, written_down = best.up.to(dtype)[None], best.down.to(dtype)[None]
        alpha = best.alpha
        errors = torch.tensor([rounding_error(best, written_up[0], written_down[0])], dtype=torch.float64)
    lost = lost_by_all(spectra, mixings)
    # The cut to a smaller rank takes the first of the same columns; a layer of fewer ranks keeps them.
    least = rank if smaller is None else min(smaller, rank)
    left, right = mixings
    lost_smaller = lost if least == rank else lost_by_all(spectra, (left[..., :least], right[..., :least]))
    results = []
    pairs = zip(spectra, written_up, written_down, errors.tolist())
    for row, (spectrum, own_up, own_down, rounding) in enumerate(pairs):
        error_sq = spectrum.tail(rank) + not_negative(rounding)
        if not doubtless(spectrum, error_sq):
            written = LowRank(own_up, own_down, alpha, kernel)
            error_sq = spectrum.beyond + squared_distance(_plain(spectrum.source), written)
        check_finite(error_sq, alpha, dtype)
        own_lost = None if lost is None else lost[row]
        stored = Stored(own_up, own_down, alpha, kernel, error_sq, spectrum.energy, own_lost)
        if smaller is not None:
            at_smaller = None if lost_smaller is None else lost_smaller[row]
            stored = replace(stored, smaller=(spectrum.tail(least), at_smaller))
        results.append(_unless_lost(stored))
    return results


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


def round_uncut(delta: LowRank, dtype: torch.dtype, *, fixed_alpha: bool = False) -> Stored | None:
    """Any low-rank delta rounded to ``dtype`` with all its components; None when its parts cancel.

    Raises:
        OutputError: The delta is too large for this dtype.
    """
    small = grams(delta)
    energy, size = (float(found) for found in sizes(small, delta.component_gains(), delta.parts))
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
    else:
        known = grams_with_gains(small, delta.gains) if fitted is exact else None
        error_sq = rounding_error(fitted, up, down, known)
    check_finite(error_sq, fitted.alpha, dtype)
    lost = None
    if len(delta.parts) > 1:
        lost = lost_of_parts(small, delta.component_gains(), delta.parts, None, None)
    return _unless_lost(Stored(up, down, fitted.alpha, fitted.kernel, error_sq, energy, lost))


def working_dtype(spectrum: Spectrum, dtype: torch.dtype) -> torch.dtype:
    """Precision of the large products.

    Float32 is enough for a 16-bit result that did not nearly cancel, and whose squares are float32 numbers.
    """
    narrow = torch.finfo(dtype).bits < 32 and not cancelled(spectrum.energy, spectrum.size)
    return torch.float32 if narrow and in_float32(float(spectrum.values[0])) else torch.float64
