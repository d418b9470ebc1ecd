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

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import OutputError
from .types import Grams, LowRank, Mixed

NOISE = 1e-7  # A singular value below this part of the inputs' size is the rounding noise of a cancellation.
CANCELLED = 1e-2  # A sum this much smaller than its inputs is computed by a way that keeps more digits.
_CHUNK = 1 << 19  # Numbers turned to float64 at a time: they stay in the processor's cache.
_BLOCK = 64  # Rows of a Gram matrix made by one product.
SINGULAR = 1e-5  # Least pivot, relative to the length of its row, with which Cholesky is trusted.
_LEAST = 1e-24  # What mixes factors beyond this, or beyond its inverse, is not brought to float32.
_LOSS = 64.0  # Products whose terms are this much larger than their sum are made in float64.
_LAST = 1e-14  # Part of the inputs' size to which a sum multiplied out in float64 is known.
_NULL = 1e-14  # Part of the largest eigenvalue of GY (rows of length 1) below which a direction is not there.

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
        beyond: Squared norm of what ``values`` do not tell, where only the largest were looked for.
        doubt: Squared norm, at most, of what was left out as noise and stands in no other number here. Where
            it matters, the error has to be measured on the factors.
        small: The Gram matrices of a source that is a sum of parts.
        ordered: The components of the source are the singular vectors, so a cut takes the first ones.
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

    @property
    def rank(self) -> int:
        return self.values.shape[0]

    def tail(self, rank: int) -> float:
        """Squared error of the best approximation of this rank."""
        return float(self.values[rank:].square().sum()) + self.beyond


def gram(rows: Tensor) -> Tensor:
    """``rows @ rows^T`` in float64, (..., R, R), of rows (..., R, n) in any float dtype."""
    rank, length = rows.shape[-2:]
    chunk = max(_CHUNK // max(rank, 1), 64)
    total = None
    for start in range(0, length, chunk):
        product = _lower(as_double(rows[..., start : start + chunk]))
        total = product if total is None else total.add_(product)
    if total is None:
        return rows.new_zeros((*rows.shape[:-1], rank), dtype=torch.float64)
    for top in range(_BLOCK, rank, _BLOCK):
        total[..., :top, top : top + _BLOCK] = total[..., top : top + _BLOCK, :top].mT
    return total


def _lower(piece: Tensor) -> Tensor:
    """``piece @ piece^T``, the blocks above the diagonal left as they happen to be."""
    rank = piece.shape[-2]
    if rank <= _BLOCK:
        return piece @ piece.mT
    product = piece.new_zeros((*piece.shape[:-1], rank))
    for top in range(0, rank, _BLOCK):
        end = min(top + _BLOCK, rank)
        product[..., top:end, :end] = piece[..., top:end, :] @ piece[..., :end, :].mT
    return product


def grams(delta: LowRank) -> Grams:
    """The Gram matrices of a delta's factors, without its gains."""
    if any(part is not None for part in delta.spectra):
        return Grams(_gram_of_parts(delta.up.mT, delta), _gram_of_parts(delta.down, delta))
    return Grams(gram(delta.up.mT).cpu(), gram(delta.down).cpu())


def _gram_of_parts(rows: Tensor, delta: LowRank) -> Tensor:
    """:func:`gram` of rows of which some parts are known to be orthogonal."""
    parts = delta.parts or (delta.rank,)
    edges = list(itertools.pairwise(itertools.accumulate(parts, initial=0)))
    square = torch.zeros((delta.rank, delta.rank), dtype=torch.float64)
    for place, ((start, stop), values) in enumerate(zip(edges, delta.spectra, strict=True)):
        own = rows[start:stop]
        square[start:stop, start:stop] = gram(own).cpu() if values is None else torch.diag(values.cpu())
        for other, end in edges[:place]:
            both = (as_double(own) @ as_double(rows[other:end]).mT).cpu()
            square[start:stop, other:end] = both
            square[other:end, start:stop] = both.mT
    return square


def decompose(
    delta: LowRank | Mixed, size: float | None = None, *, vectors: bool = True, small: Grams | None = None
) -> Spectrum:
    """Singular values (and vectors) of a low-rank delta.

    Args:
        delta: What ``stack`` gave, or any other low-rank delta.
        size: Size of the inputs that noise is judged against; by default that of ``delta.parts``.
        vectors: False when only the values are needed.
        small: The delta's Gram matrices where they are known already.
    """
    parts: Sequence[int] = ()
    if isinstance(delta, LowRank) and len(delta.spectra) == 1 and delta.spectra[0] is not None:
        return _known(delta, delta.spectra[0])
    if isinstance(delta, Mixed):
        small, gains = delta.small, torch.ones(delta.rank, dtype=torch.float64)
    elif min(delta.out, delta.in_) < delta.rank:
        return _decompose_short(delta, size, vectors)
    else:
        small, gains, parts = small or grams(delta), delta.component_gains(), delta.parts
    energy, inputs = sizes(small, gains, parts)
    _checked(energy)
    size = inputs if size is None else size
    if isinstance(delta, LowRank) and cancelled(energy, size):
        return _decompose_by_qr(delta, size, vectors)
    terms = _terms(delta.lengths[1], delta.right) if isinstance(delta, Mixed) else None
    low, solve = _root(small.down, terms)
    weighted = (gains[:, None] * low).contiguous()  # row-major: other products crawl
    core = weighted.mT @ small.up @ weighted
    noise = NOISE * size
    if not vectors:
        return _judged(torch.linalg.eigvalsh(core), energy, size, noise)
    squares, q = torch.linalg.eigh(core)
    found = _judged(squares, energy, size, noise)
    values = found.values

    def mixing(rank: int) -> tuple[Tensor, Tensor]:
        first = q[:, q.shape[1] - rank :].flip(1)
        root = values[:rank].sqrt()
        left = weighted @ (first / root)
        first *= root
        right = solve(first)
        return (delta.left @ left, delta.right @ right) if isinstance(delta, Mixed) else (left, right)

    return replace(found, source=delta, mixing=mixing, small=small if len(parts) > 1 else None)


def _known(delta: LowRank, values: Tensor) -> Spectrum:
    """:func:`decompose` of a delta whose components are its singular vectors."""
    gains = delta.component_gains()
    values = values.cpu() * abs(float(gains[0]))  # of one piece: all its components count the same
    energy = _checked(float(values.square().sum()))
    kept = int((values > NOISE * energy**0.5).sum())

    def mixing(rank: int) -> tuple[Tensor, Tensor]:
        root = torch.eye(delta.rank, rank, dtype=torch.float64) * abs(float(gains[0])) ** 0.5
        return root * float(gains[0].sign()), root

    beyond = float(values[kept:].square().sum())
    return Spectrum(values[:kept], energy, energy**0.5, delta, mixing, beyond, ordered=True)


def lost_of_parts(
    small: Grams, gains: Tensor, parts: Sequence[int], left: Tensor | None, right: Tensor | None
) -> Tensor:
    """What a cut of a sum takes from each of its parts.

    Args:
        small: Gram matrices of the sum's factors, (..., R, R).
        gains: (..., R) what each component counts.
        parts: Ranks of the parts, in order.
        left, right: (..., R, k) the mixings of the cut; None where nothing is cut.

    Returns:
        (..., n, 2) for each part its inner product with what is left out, and its squared norm. One minus
        their ratio is the share of the part that is kept.
    """
    product = gains[..., :, None] * small.up * small.down * gains[..., None, :]
    rest = torch.zeros_like(gains)
    if left is not None and right is not None:
        rest = product.sum(-1) - gains * ((small.up @ left) * (small.down @ right)).sum(-1)
    edges = list(itertools.pairwise(itertools.accumulate(parts, initial=0)))
    lost = [rest[..., start:stop].sum(-1) for start, stop in edges]
    own = [product[..., start:stop, start:stop].sum((-2, -1)) for start, stop in edges]
    return torch.stack([torch.stack(lost, -1), torch.stack(own, -1)], -1)


def lost_by(spectrum: Spectrum, rank: int) -> Tensor | None:
    """:func:`lost_of_parts` of the cut to a rank; None where the spectrum does not tell it."""
    source, small = spectrum.source, spectrum.small
    if spectrum.mixing is None or small is None or not isinstance(source, LowRank):
        return None
    return lost_of_parts(small, source.component_gains(), source.parts, *spectrum.mixing(rank))


def cancelled(energy: float, size: float) -> bool:
    """Whether so little of the inputs is left in their sum that Gram matrices do not tell it well."""
    return size > 0 and energy <= (CANCELLED * size) ** 2


def in_float32(size: float) -> bool:
    """Whether numbers of about this size, and their roundings, have squares that float32 can tell."""
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
    u, values, vh = torch.linalg.svd(r_left @ r_right.mT)
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
    rank = min(rank, spectrum.rank)
    if spectrum.ordered and isinstance(spectrum.source, LowRank):
        return _first(spectrum.source, rank, dtype)
    left, right = spectrum.mixing(rank)
    if not sums_hold(spectrum, left, right):
        dtype = torch.float64
    device = spectrum.source.up.device
    up = spectrum.source.up.to(dtype) @ left.to(dtype).to(device)
    down = right.mT.contiguous().to(dtype).to(device) @ spectrum.source.down.to(dtype)
    return LowRank(up, down, float(rank), spectrum.source.kernel)


def _first(delta: LowRank, rank: int, dtype: torch.dtype) -> LowRank:
    """The first components of a delta of one piece, its scale shared by both factors."""
    gain = float(delta.component_gains()[0])
    root = abs(gain) ** 0.5
    up = delta.up[:, :rank].to(dtype) * math.copysign(root, gain)
    return LowRank(up, delta.down[:rank].to(dtype) * root, float(rank), delta.kernel)


def sums_hold(spectrum: Spectrum, left: Tensor, right: Tensor) -> bool:
    """Whether products with these mixings lose no digits of float32: those of a mixed delta can cancel."""
    if not mixings_fit(left, right):
        return False
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


def as_double(tensor: Tensor) -> Tensor:
    """In float64. Half precision goes by way of float32, which torch does three times as fast."""
    return tensor.double() if tensor.element_size() >= 4 else tensor.float().double()


def sizes(small: Grams, gains: Tensor, parts: Sequence[int]) -> tuple[float, float]:
    """Squared norm of the delta, and the sum of the norms of its parts."""
    product = small.up * small.down
    energy = float(gains @ product @ gains)
    if len(parts) < 2:
        return max(0.0, energy), max(0.0, energy) ** 0.5
    size = 0.0
    for start, stop in itertools.pairwise(itertools.accumulate(parts, initial=0)):
        own = gains[start:stop]
        size += max(0.0, float(own @ product[start:stop, start:stop] @ own)) ** 0.5
    return max(0.0, energy), size


def _root(gram_down: Tensor, terms: Tensor | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """L (R, k) with ``L L^T = gram_down``, and the function ``matrix -> L^-T @ matrix``.

    Where rows depend on each other (the same LoRA twice, a zero row), L comes from the eigenvectors of the
    rows brought to length 1, and directions that no row has are left out: k < R.

    Args:
        terms: (R,) what the rows are sums of, where that is more than they are: a row that is the small
            rest of a cancellation is known only to the digits that its terms have left.
    """
    low, info = torch.linalg.cholesky_ex(gram_down)
    lengths = gram_down.diagonal().sqrt() if terms is None else terms
    if int(info) == 0 and bool((low.diagonal() >= SINGULAR * lengths).all()):
        return low, lambda matrix: torch.linalg.solve_triangular(low.mT, matrix, upper=True)
    lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))[:, None]
    values, vectors = torch.linalg.eigh(gram_down / lengths / lengths.mT)
    kept = values > _NULL * values[-1:].clamp(min=0)
    basis, root = vectors[:, kept], values[kept].sqrt()
    return lengths * basis * root, lambda matrix: (basis / root / lengths) @ matrix


def _judged(squares: Tensor, energy: float, size: float, noise: float) -> Spectrum:
    """The singular values above the noise in falling order; their squares come rising."""
    values = squares.clamp(min=0).sqrt().flip(0)
    if energy <= (NOISE * size) ** 2:
        return Spectrum(values[:0], energy, size, beyond=energy)
    kept = int((values > noise).sum())
    return Spectrum(values[:kept], energy, size, doubt=(len(values) - kept) * noise**2)


def _decompose_short(delta: LowRank, size: float | None, vectors: bool) -> Spectrum:
    """:func:`decompose` for more components than the shorter side has: that side takes their place."""
    gains = delta.component_gains()
    if size is None:
        _, size = sizes(grams(delta), gains, delta.parts)
    whole = (delta.up.double() * gains.to(delta.up.device)) @ delta.down.double()
    return decompose_whole(whole, size, delta.kernel, vectors=vectors)


def decompose_whole(
    whole: Tensor, size: float, kernel: tuple[int, ...] = (), *, vectors: bool = True
) -> Spectrum:
    """All singular values (and vectors) of a matrix (out, in), from the Gram matrix of its shorter side."""
    wide = whole.shape[0] <= whole.shape[1]
    square = gram(whole if wide else whole.mT)
    energy = _checked(float(square.diagonal().sum()))
    # The sum stands here to 1e-16 of its inputs, and its Gram matrix tells 1e-8 of it.
    noise = max(NOISE * energy**0.5, _LAST * size)
    if not vectors:
        return _judged(torch.linalg.eigvalsh(square).cpu(), energy, size, noise)
    eye = torch.eye(square.shape[0], dtype=whole.dtype, device=whole.device)
    source = LowRank(*((eye, whole) if wide else (whole, eye)), float(square.shape[0]), kernel)
    squares, q = (part.cpu() for part in torch.linalg.eigh(square))
    found = _judged(squares, energy, size, noise)
    values = found.values

    def mixing(rank: int) -> tuple[Tensor, Tensor]:
        first = q[:, q.shape[1] - rank :].flip(1)
        root = values[:rank].sqrt()
        return (first * root, first / root) if wide else (first / root, first * root)

    return replace(found, source=source, mixing=mixing)
