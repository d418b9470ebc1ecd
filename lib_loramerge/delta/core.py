"""Singular values and best low-rank approximations of a sum of low-rank deltas, never formed whole.

With the sum written ``W = X diag(g) Y`` (X the ups side by side, Y the downs stacked, R components, g what
each component counts), everything is found from two R x R Gram matrices in float64::

    GX = X^T X,  GY = Y Y^T
    GY = L L^T                                   Cholesky; eigenvectors where it is singular
    C  = (g L)^T GX (g L) = Q diag(s^2) Q^T      one eigenproblem of R x R
    up = X (g L Q s^-1/2),  down = (L^-T Q s^1/2)^T Y

Scaling a component's two factors against each other by a power of two changes nothing but exponents on this
way, so badly balanced factors need no care.

Source: the singular value decomposition of a product by way of its small factors (Golub and Van Loan,
    Matrix Computations). Forming Gram matrices squares the condition, which is harmless where the sum is
    about as large as its inputs: it is done in float64. A sum of which little is left is decomposed by way
    of ``X = Q_x R_x, Y^T = Q_y R_y`` and the singular values of ``R_x diag(g) R_y^T`` instead: that keeps
    1e-15 of the inputs' size where Gram matrices keep 1e-8 of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..errors import OutputError
from .cache import Cache, size_of
from .kronecker import operator
from .small import cholesky, gram, grams, grams_of_all, joined, lost_of_parts, root_of_dependent, sizes
from .types import Grams, LowRank, Mixed

NOISE = 1e-7  # A singular value below this part of the inputs' size is the rounding noise of a cancellation.
CANCELLED = 1e-2  # A sum this much smaller than its inputs is computed by a way that keeps more digits.
_LEAST = 1e-24  # What mixes factors beyond this, or beyond its inverse, is not brought to float32.
_LOSS = 64.0  # Products whose terms are this much larger than their sum are made in float64.
_APART = 1e-9  # Part of the inputs' squared size by which two ways to the squared norm may differ.
_LAST = 1e-14  # Part of the inputs' size to which a sum multiplied out in float64 is known.

Mixing = Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A delta's singular values, and what is needed to write any truncation of it.

    Attributes:
        values: (k,) float64 on the CPU, descending; noise is left out, so k is the numerical rank.
        energy: Squared Frobenius norm of the delta.
        size: Frobenius size of the inputs, ``sum_i |w_i| * norm(delta_i)``.
        source: The delta itself; None when only the values were asked for, so that they hold no factors.
        mixing: ``mixing(k)`` gives two (R, k) float64 matrices: the best approximation of rank k has
            ``up = source.up @ left`` and ``down = right^T @ source.down``. None when only the values
            were asked for.
        beyond: Squared norm of the rest, where only the largest values were computed.
        doubt: Squared norm, at most, of what was left out as noise and stands in no other number here. Where
            it matters, the error has to be measured on the factors.
        small: The Gram matrices of a source that is a sum of parts.
        ordered: The components of the source are the singular vectors, so a cut takes the first ones.
        solved: The problems that were solved together with this one, which is their ``row``.
    """

    values: Tensor
    energy: float
    size: float
    source: LowRank | Mixed | None = None
    mixing: Mixing | None = None
    beyond: float = 0.0
    doubt: float = 0.0
    small: Grams | None = None
    ordered: bool = False
    solved: Solved | None = None
    row: int = 0

    @property
    def rank(self) -> int:
        return self.values.shape[0]

    def tail(self, rank: int) -> float:
        """Squared error of the best approximation of this rank."""
        return float(self.values[rank:].square().sum()) + self.beyond


@dataclass(frozen=True, eq=False)
class Solved:
    """The eigenproblems of n deltas of one shape; see the first lines of this file.

    Attributes:
        ups, downs: (n, out, R) and (n, R, in), on the deltas' device.
        values: (n, R) float64, falling.
        low, weighted, q: (n, R, R) float64 on the CPU: L, g L and Q.
        outer: (n, r, R) and (n, s, R), which mixed deltas put before their mixings.
    """

    ups: Tensor
    downs: Tensor
    values: Tensor
    low: Tensor
    weighted: Tensor
    q: Tensor
    outer: tuple[Tensor, Tensor] | None = None

    def mixings(self, rows: Sequence[int], rank: int) -> tuple[Tensor, Tensor]:
        """(m, R, rank) float64 each: best approximations are ``ups @ left`` and ``right^T @ downs``."""
        chosen = list(rows)
        first = self.q[chosen, :, self.q.shape[-1] - rank :].flip(-1)
        root = self.values[chosen, None, :rank].sqrt()
        left = self.weighted[chosen] @ (first / root)
        right = torch.linalg.solve_triangular(self.low[chosen].mT, first.mul_(root), upper=True)
        if self.outer is None:
            return left, right
        return self.outer[0][chosen] @ left, self.outer[1][chosen] @ right

    def mixing(self, row: int, rank: int) -> tuple[Tensor, Tensor]:
        left, right = self.mixings([row], rank)
        return left[0], right[0]


def decompose(
    delta: LowRank | Mixed, size: float | None = None, *, vectors: bool = True, small: Grams | None = None
) -> Spectrum:
    """Singular values (and vectors) of a low-rank delta.

    Args:
        delta: What ``stack`` gave, or any other low-rank delta.
        size: Size of the inputs that noise is judged against; by default that of ``delta.parts``.
        vectors: False when only the values are needed.
        small: The delta's Gram matrices where they are known already.

    Raises:
        OutputError: The delta is larger than float64 can square.
    """
    return decompose_all([delta], size, vectors=vectors, small=small)[0]


def alike(delta: LowRank | Mixed) -> tuple[object, ...]:
    """What deltas have in common that :func:`decompose_all` takes together."""
    parts: tuple[object, ...] = ()
    if isinstance(delta, LowRank):
        parts = delta.parts, tuple(part is not None for part in delta.spectra)
    return type(delta), parts, delta.rank, delta.up.shape, delta.up.dtype, delta.down.shape, delta.down.dtype


def decompose_all(
    deltas: Sequence[LowRank | Mixed],
    size: float | None = None,
    *,
    vectors: bool = True,
    small: Grams | None = None,
    cache: Cache | None = None,
) -> list[Spectrum]:
    """:func:`decompose` of several deltas that are :func:`alike`, in as many operations as one takes.

    Args:
        cache: Where what no weight changes is found, or left for the next merge, of deltas that have names.
    """
    first = deltas[0]
    if isinstance(first, LowRank):
        if len(first.spectra) == 1 and first.spectra[0] is not None:
            return [_known(one) for one in deltas if isinstance(one, LowRank)]
        if min(first.out, first.in_) < first.rank:
            return [_decompose_short(one, size, vectors) for one in deltas if isinstance(one, LowRank)]
    ups, downs = (joined([getattr(one, name) for one in deltas]) for name in ("up", "down"))
    known = _weightless(deltas, ups, downs, small, cache)
    own, lengths, low, sound = known.own, known.lengths, known.low, known.sound
    gains = torch.stack([_gains(one) for one in deltas])
    parts = first.parts if isinstance(first, LowRank) else ()
    energies, inputs = (found.tolist() for found in sizes(own, gains, parts))
    inputs = inputs if size is None else [size] * len(deltas)
    outer = None
    if isinstance(first, Mixed):
        mixed = [one for one in deltas if isinstance(one, Mixed)]
        outer = torch.stack([one.left for one in mixed]), torch.stack([one.right for one in mixed])
    alone = [cancelled(_checked(energy), input) and outer is None for energy, input in zip(energies, inputs)]
    rows = [row for row, (holds, single) in enumerate(zip(sound.tolist(), alone)) if holds and not single]
    found = [Spectrum(lengths[:0], energy, input) for energy, input in zip(energies, inputs)]
    if rows:
        chosen = slice(None) if len(rows) == len(deltas) else rows
        weighted = (gains[chosen, :, None] * low[chosen]).contiguous()  # row-major: other products crawl
        core = weighted.mT @ own.up[chosen] @ weighted
        _checked(float(core.abs().max()) if core.numel() else 0.0)
        squares, q = torch.linalg.eigh(core) if vectors else (torch.linalg.eigvalsh(core), core)
        mixed_by = outer and (outer[0][chosen], outer[1][chosen])
        solved = Solved(ups[chosen], downs[chosen], _roots(squares), low[chosen], weighted, q, mixed_by)
        for row, place in enumerate(rows):
            one = _judged(solved.values[row], energies[place], inputs[place], NOISE * inputs[place])
            found[place] = _with_vectors(one, deltas[place], solved, row) if vectors else one
    for place in set(range(len(deltas))).difference(rows):
        delta, square = deltas[place], Grams(own.up[place], own.down[place])
        if alone[place] and isinstance(delta, LowRank):
            found[place] = _decompose_by_qr(delta, inputs[place], vectors)
        else:
            found[place] = _decompose_dependent(delta, square, lengths[place], found[place], vectors)
    if not vectors or len(parts) < 2:
        return found
    return [
        replace(one, small=Grams(own.up[place], own.down[place])) if one.source is deltas[place] else one
        for place, one in enumerate(found)
    ]


@dataclass(frozen=True, eq=False)
class _Weightless:
    """What no weight changes in the sums of n deltas.

    Attributes:
        own: Gram matrices, (n, R, R).
        lengths: (n, R) of the rows of down, or of what they are sums of.
        low, sound: What :func:`cholesky` gives of them.
    """

    own: Grams
    lengths: Tensor
    low: Tensor
    sound: Tensor


def _weightless(
    deltas: Sequence[LowRank | Mixed], ups: Tensor, downs: Tensor, small: Grams | None, cache: Cache | None
) -> _Weightless:
    def make() -> _Weightless:
        own = grams_of_all(deltas, ups, downs) if small is None else Grams(small.up[None], small.down[None])
        lengths = own.down.diagonal(dim1=-2, dim2=-1).sqrt()
        mixed = [_terms(one.lengths[1], one.right) for one in deltas if isinstance(one, Mixed)]
        lengths = torch.stack(mixed) if mixed else lengths
        return _Weightless(own, lengths, *cholesky(own.down, lengths))

    names = tuple(one.name if isinstance(one, LowRank) else None for one in deltas)
    if cache is None or None in names:
        return make()
    # The same sums together: what is computed of one alone may differ in its last bits.
    key = ups.device.type, names
    return cache.given(key, make, lambda made: size_of(made.own.up, made.own.down, made.lengths, made.low))


def _gains(delta: LowRank | Mixed) -> Tensor:
    if isinstance(delta, LowRank):
        return delta.component_gains()
    return torch.ones(delta.rank, dtype=torch.float64)


def _with_vectors(found: Spectrum, delta: LowRank | Mixed, solved: Solved, row: int) -> Spectrum:
    return replace(found, source=delta, mixing=partial(solved.mixing, row), solved=solved, row=row)


def _decompose_dependent(
    delta: LowRank | Mixed, small: Grams, lengths: Tensor, like: Spectrum, vectors: bool
) -> Spectrum:
    """:func:`decompose` where rows depend on each other (the same LoRA twice, a zero row).

    Args:
        lengths: (R,) what the rows are sums of, where that is more than they are: a row that is the small
            rest of a cancellation is known only to the digits that its terms have left.
        like: Its energy and size.
    """
    low, solve = root_of_dependent(small.down, lengths)
    weighted = (_gains(delta)[:, None] * low).contiguous()  # row-major: other products crawl
    core = weighted.mT @ small.up @ weighted
    _checked(float(core.abs().max()) if core.numel() else 0.0)
    squares, q = torch.linalg.eigh(core) if vectors else (torch.linalg.eigvalsh(core), core)
    values = _roots(squares)
    found = _judged(values, like.energy, like.size, NOISE * like.size)
    if not vectors:
        return found

    def mixing(rank: int) -> tuple[Tensor, Tensor]:
        first = q[:, q.shape[1] - rank :].flip(1)
        root = values[:rank].sqrt()
        left, right = weighted @ (first / root), solve(first * root)
        return (delta.left @ left, delta.right @ right) if isinstance(delta, Mixed) else (left, right)

    return replace(found, source=delta, mixing=mixing)


def _known(delta: LowRank) -> Spectrum:
    """:func:`decompose` of a delta whose components are its singular vectors."""
    gains, (known,) = delta.component_gains(), delta.spectra
    assert known is not None
    values = known.cpu() * abs(float(gains[0]))  # of one piece: all its components count the same
    energy = _checked(float(values.square().sum()))
    kept = int((values > NOISE * energy**0.5).sum())

    def mixing(rank: int) -> tuple[Tensor, Tensor]:
        root = torch.eye(delta.rank, rank, dtype=torch.float64) * abs(float(gains[0])) ** 0.5
        return root * float(gains[0].sign()), root

    beyond = float(values[kept:].square().sum())
    return Spectrum(values[:kept], energy, energy**0.5, delta, mixing, beyond, ordered=True)


def lost_by_all(spectra: Sequence[Spectrum], mixings: tuple[Tensor, Tensor]) -> Tensor | None:
    """(n, parts, 2) ``lost_of_parts`` of several solved together; None where they lack what that takes.

    Args:
        mixings: Of their cuts, (n, R, k) each.
    """
    sums = [
        (spectrum.small, spectrum.source)
        for spectrum in spectra
        if spectrum.small is not None and isinstance(spectrum.source, LowRank)
    ]
    if not sums:
        return None
    small = Grams(torch.stack([own.up for own, _ in sums]), torch.stack([own.down for own, _ in sums]))
    gains = torch.stack([source.component_gains() for _, source in sums])
    return lost_of_parts(small, gains, sums[0][1].parts, *mixings)


def added_to_parts(spectrum: Spectrum) -> tuple[Tensor, Tensor] | None:
    """What each singular component of a sum holds of each of its parts.

    Returns:
        (parts, k) inner products of every part with every component; and (parts, 2) each part's inner
        product with the sum, and its squared norm. None where the spectrum lacks what that takes.
    """
    source, small = spectrum.source, spectrum.small
    if small is None or spectrum.mixing is None or not isinstance(source, LowRank):
        return None
    left, right = spectrum.mixing(spectrum.rank)
    gains, parts = source.component_gains(), list(source.parts)
    rows = gains[:, None] * (small.up @ left) * (small.down @ right)
    added = torch.stack([part.sum(0) for part in rows.split(parts)])
    product = gains[:, None] * small.up * small.down * gains
    whole = torch.stack([part.sum() for part in product.sum(1).split(parts)])
    return added, torch.stack([whole, lost_of_parts(small, gains, parts, None, None)[:, 1]], 1)


def cancelled(energy: float, size: float) -> bool:
    """Whether the inputs cancel so far that Gram matrices lose most digits of their sum."""
    return size > 0 and energy <= (CANCELLED * size) ** 2


def in_float32(size: float) -> bool:
    """Whether numbers of about this size, and their roundings, have squares within float32's range."""
    return 1e-15 < size < 1e24


def _checked(energy: float) -> float:
    """Raises OutputError for a squared norm beyond float64."""
    if not math.isfinite(energy):
        raise OutputError("The numbers of this layer are too large to be computed with or saved.")
    return energy


def _decompose_by_qr(delta: LowRank, size: float, vectors: bool) -> Spectrum:
    """:func:`decompose` of a sum that all but cancels; see the first lines of this file."""
    gains = delta.component_gains().to(delta.up.device)
    q_left, r_left = (part.cpu() for part in torch.linalg.qr(delta.up.double() * gains))
    q_right, r_right = (part.cpu() for part in torch.linalg.qr(delta.down.double().mT))
    inner = r_left @ r_right.mT
    _checked(float(torch.linalg.vector_norm(inner)))
    u, values, vh = torch.linalg.svd(inner)
    energy = float(values.square().sum())
    # Where no more is left than the last digits that the inputs are stored with, all of it is noise. What is
    # dropped is known, and counts in `beyond`.
    noise = NOISE * (energy**0.5 if energy > (NOISE * size) ** 2 else math.inf)
    kept = int((values > noise).sum())
    beyond = float(values[kept:].square().sum())
    values = values[:kept]
    if not vectors:
        return Spectrum(values, energy, size, beyond=beyond)
    source = LowRank(
        q_left.to(delta.up.device),
        q_right.mT.contiguous().to(delta.up.device),
        float(q_left.shape[1]),
        delta.kernel,
    )

    def mixing(rank: int) -> tuple[Tensor, Tensor]:
        root = values[:rank].sqrt()
        return u[:, :rank] * root, vh[:rank].mT * root

    return Spectrum(values, energy, size, source, mixing, beyond)


def truncate(spectrum: Spectrum, rank: int, dtype: torch.dtype = torch.float64) -> LowRank:
    """The best approximation of a rank: factors share sqrt(s), alpha = rank, components in order of s.

    Args:
        spectrum: From :func:`decompose` with vectors.
        rank: Wanted rank; one above the numerical rank gives a smaller delta, never padding.
        dtype: Precision of the large products and of the result; float64 where the terms of a mixed delta
            nearly cancel.

    Source: Eckart and Young 1936.
    """
    if spectrum.mixing is None or spectrum.source is None:
        raise ValueError("this spectrum was made without vectors")
    up, down = truncate_all([spectrum], min(rank, spectrum.rank), dtype)[:2]
    return LowRank(up[0], down[0], float(down.shape[1]), spectrum.source.kernel)


def truncate_all(
    spectra: Sequence[Spectrum], rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], bool]:
    """:func:`truncate` of several spectra that were solved together, at a rank that all have.

    Returns:
        up (n, out, rank) and down (n, rank, in); the mixings of the cut, (n, R, rank) each; and whether
        ``dtype`` was enough for all of them. Where it was not, they are float64.
    """
    first = spectra[0]
    assert first.source is not None
    assert first.mixing is not None
    if first.ordered and isinstance(first.source, LowRank):
        best = _first(first.source, rank, dtype)
        left, right = first.mixing(rank)
        return best.up[None], best.down[None], (left[None], right[None]), True
    if first.solved is not None:
        rows = [spectrum.row for spectrum in spectra]
        mixings = first.solved.mixings(rows, rank)
        every = rows == list(range(first.solved.ups.shape[0]))
        ups, downs = (all_ if every else all_[rows] for all_ in (first.solved.ups, first.solved.downs))
    else:
        left, right = first.mixing(rank)
        mixings, ups, downs = (left[None], right[None]), first.source.up[None], first.source.down[None]
    pairs = zip(spectra, *mixings)
    holds = mixings_fit(*mixings) and all(_sums_hold(spectrum, *pair) for spectrum, *pair in pairs)
    work = dtype if holds else torch.float64
    left, right = (mixing.to(work).to(ups.device) for mixing in mixings)
    return ups.to(work) @ left, right.mT.contiguous() @ downs.to(work), mixings, holds


def _first(delta: LowRank, rank: int, dtype: torch.dtype) -> LowRank:
    """The first components of a delta of one piece, its scale shared by both factors."""
    gain = delta.gain
    root = abs(gain) ** 0.5
    if delta.structure is None:
        up, down = delta.up[:, :rank], delta.down[:rank]
    else:
        up, down = (delta.structure.factor(name, rank) for name in ("up", "down"))
    up = up.to(dtype) * math.copysign(root, gain)
    return LowRank(up, down.to(dtype) * root, float(rank), delta.kernel)


def _sums_hold(spectrum: Spectrum, left: Tensor, right: Tensor) -> bool:
    """Whether products with these mixings lose no digits of float32: those of a mixed delta can cancel."""
    if not isinstance(spectrum.source, Mixed):
        return True
    wanted = _LOSS * spectrum.values[: left.shape[1]].sqrt()
    terms = map(_terms, spectrum.source.lengths, (left, right))
    return all(bool((term <= wanted).all()) for term in terms)


def mixings_fit(*mixings: Tensor) -> bool:
    """Whether float32 has room for mixing matrices, and for products of the kind they are made for."""
    return all(_LEAST < float(mixing.abs().max()) < 1 / _LEAST for mixing in mixings if mixing.numel())


def _terms(lengths: Tensor, mixing: Tensor) -> Tensor:
    """(k,) the lengths of what mixed rows or columns are sums of: more than theirs where terms cancel.

    Args:
        lengths: (R,) of the rows or columns before.
        mixing: (R, k).
    """
    return lengths @ mixing.abs()


def _roots(squares: Tensor) -> Tensor:
    """Falling singular values of rising squares."""
    return squares.clamp(min=0).sqrt().flip(-1)


def _judged(values: Tensor, energy: float, size: float, noise: float) -> Spectrum:
    """The singular values (falling) above the noise."""
    if energy <= (NOISE * size) ** 2:
        return Spectrum(values[:0], energy, size, beyond=energy)
    kept = int((values > noise).sum())
    # The values and the norm are found by different sums, so they vouch for each other.
    apart = abs(float(values.square().sum()) - energy)
    doubt = (len(values) - kept) * noise**2 + (apart if apart > _APART * size**2 else 0.0)
    return Spectrum(values[:kept], energy, size, doubt=doubt)


def _decompose_short(delta: LowRank, size: float | None, vectors: bool) -> Spectrum:
    """:func:`decompose` for more components than the shorter side has: that side takes their place."""
    gains = delta.component_gains()
    if size is None:
        structure = operator(delta)
        size = structure.size if structure else float(sizes(grams(delta), gains, delta.parts)[1])
    return decompose_whole(delta.dense(), size, delta.kernel, vectors=vectors)


def decompose_whole(
    whole: Tensor, size: float, kernel: tuple[int, ...] = (), *, vectors: bool = True
) -> Spectrum:
    """All singular values (and vectors) of a matrix (out, in), from the Gram matrix of its shorter side."""
    wide = whole.shape[0] <= whole.shape[1]
    square = gram(whole if wide else whole.mT)
    energy = _checked(float(square.diagonal().sum()))
    # The sum is exact to 1e-16 of its inputs here, and its Gram matrix to 1e-8.
    noise = max(NOISE * energy**0.5, _LAST * size)
    if not vectors:
        return _judged(_roots(torch.linalg.eigvalsh(square).cpu()), energy, size, noise)
    eye = torch.eye(square.shape[0], dtype=whole.dtype, device=whole.device)
    source = LowRank(*((eye, whole) if wide else (whole, eye)), float(square.shape[0]), kernel)
    squares, q = (part.cpu() for part in torch.linalg.eigh(square))
    found = _judged(_roots(squares), energy, size, noise)
    values = found.values

    def mixing(rank: int) -> tuple[Tensor, Tensor]:
        first = q[:, q.shape[1] - rank :].flip(1)
        root = values[:rank].sqrt()
        return (first * root, first / root) if wide else (first / root, first * root)

    return replace(found, source=source, mixing=mixing)
