"""The R x R Gram matrices of low-rank deltas, and what is read off them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .kronecker import Kronecker, terms_of
from .types import Grams, LowRank, Mixed

_CHUNK = 1 << 19  # Numbers turned to float64 at a time: they stay in the processor's cache.
_MANY = 512  # Rows that are looked at for being orthogonal already, as those of a whole-matrix LoKr are.
_BLOCK = 64  # Rows of a Gram matrix made by one product.
SINGULAR = 1e-5  # Least pivot, relative to the length of its row, with which Cholesky is trusted.
_NULL = 1e-14  # Part of the largest eigenvalue of GY (rows of length 1) below which a direction is not there.


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
    if delta.structure is not None:
        return Grams(*(_gram_of_terms(name, terms_of(delta)) for name in ("up", "down")))
    if any(part is not None for part in delta.spectra):
        return Grams(_gram_of_parts(delta.up.mT, delta), _gram_of_parts(delta.down, delta))
    return Grams(gram(delta.up.mT).cpu(), gram(delta.down).cpu())


def grams_of_all(deltas: Sequence[LowRank | Mixed], ups: Tensor, downs: Tensor) -> Grams:
    """(n, R, R) the Gram matrices of deltas of one shape, whose factors are put together as well."""
    known = [
        delta.small if isinstance(delta, Mixed) else grams(delta)
        for delta in deltas
        if isinstance(delta, Mixed) or any(part is not None for part in delta.spectra)
    ]
    if known:
        return Grams(torch.stack([one.up for one in known]), torch.stack([one.down for one in known]))
    return Grams(gram(ups.mT).cpu(), gram(downs).cpu())


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


def _gram_of_terms(name: str, terms: Sequence[LowRank]) -> Tensor:
    """:func:`gram` of one of the factors of a sum with structure."""
    edges = list(itertools.pairwise(itertools.accumulate((term.rank for term in terms), initial=0)))
    square = torch.zeros((edges[-1][1],) * 2, dtype=torch.float64)
    for place, (term, (start, stop)) in enumerate(zip(terms, edges)):
        if isinstance(term.structure, Kronecker):
            square[start:stop, start:stop] = torch.diag(term.structure.values)
        else:
            small = grams(term)
            square[start:stop, start:stop] = small.up if name == "up" else small.down
        for other, (first, last) in zip(terms[:place], edges):
            square[start:stop, first:last] = _across(name, term, other)
            square[first:last, start:stop] = square[start:stop, first:last].mT
    return square


def _across(name: str, term: LowRank, other: LowRank) -> Tensor:
    one, two = term.structure, other.structure
    if isinstance(one, Kronecker) and isinstance(two, Kronecker) and one.a.shape == two.a.shape:
        return one.across(name, two)
    if isinstance(two, Kronecker) and not isinstance(one, Kronecker):
        return _across(name, other, term).mT
    columns = other.up if name == "up" else other.down.mT
    if isinstance(one, Kronecker):
        return one.coordinates(name, columns)
    return (term.up.mT if name == "up" else term.down).double() @ columns.double()


def joined(factors: Sequence[Tensor]) -> Tensor:
    return factors[0][None] if len(factors) == 1 else torch.stack(list(factors))


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


def as_double(tensor: Tensor) -> Tensor:
    """In float64. Half precision goes by way of float32, which torch does three times as fast."""
    return tensor.double() if tensor.element_size() >= 4 else tensor.float().double()


def sizes(small: Grams, gains: Tensor, parts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Squared norms of deltas, and the sums of the norms of their parts: (...) float64 each.

    Args:
        small: Gram matrices (..., R, R).
        gains: (..., R) what each component counts.
        parts: Ranks of the parts, in order.
    """
    product = gains[..., :, None] * small.up * small.down * gains[..., None, :]
    energy = product.sum((-2, -1)).clamp(min=0)
    if len(parts) < 2:
        return energy, energy.sqrt()
    edges = itertools.pairwise(itertools.accumulate(parts, initial=0))
    own = [product[..., start:stop, start:stop].sum((-2, -1)).clamp(min=0).sqrt() for start, stop in edges]
    return energy, torch.stack(own).sum(0)


def cholesky(square: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """L (..., R, R) with ``L L^T = square``, and where it is to be trusted, (...) bool.

    Args:
        lengths: (..., R) of the rows whose Gram matrix it is.
    """
    low, info = torch.linalg.cholesky_ex(square)
    return low, (info == 0) & (low.diagonal(dim1=-2, dim2=-1) >= SINGULAR * lengths).all(-1)


def root_of_dependent(square: Tensor, lengths: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """L (R, k) with ``L L^T = square``, and the function ``matrix -> L^-T @ matrix``.

    L comes from the eigenvectors of the rows brought to length 1, and directions that no row has are left
    out: k < R.
    """
    there = (lengths > 0)[:, None]
    lengths = torch.where(there, lengths[:, None], 1.0)
    values, vectors = torch.linalg.eigh(square / lengths / lengths.mT)
    kept = values > _NULL * values[-1:].clamp(min=0)
    # Rows of zeros stay zeros: a last digit here would count as much as their gain, which may be 1e30.
    basis, root = vectors[:, kept] * there, values[kept].sqrt()
    return lengths * basis * root, lambda matrix: (basis / root / lengths) @ matrix


def whitener(square: Tensor) -> Tensor:
    """(R, k) matrix that makes rows with this Gram matrix orthonormal; those of no length are left out."""
    if square.shape[0] >= _MANY and not bool(square.triu(1).any()):
        return torch.diag(square.diagonal().clamp(min=1e-300).rsqrt())
    lengths = square.diagonal().sqrt()
    low, sound = cholesky(square, lengths)
    if not bool(sound):
        low, solve = root_of_dependent(square, lengths)
        return solve(torch.eye(low.shape[1], dtype=square.dtype))
    eye = torch.eye(square.shape[0], dtype=square.dtype)
    return torch.linalg.solve_triangular(low.mT, eye, upper=True)
