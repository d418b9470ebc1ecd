"""Singular values and best low-rank approximations of a sum of low-rank deltas, never formed whole.

With the sum written ``W = X diag(c) Y`` (X the ups side by side, Y the downs stacked, R components),
everything is found from the two R x R Gram matrices in float64::

    GX = X^T X,  GY = Y Y^T              both scaled by what each component counts
    GY = L L^T                           Cholesky; eigenvectors where it is singular
    C  = L^T GX L = Q diag(s^2) Q^T      one eigenproblem of R x R
    up = X (L Q s^-1/2),  down = (L^-T Q s^1/2)^T Y

Tensors may carry leading batch dimensions: on an accelerator the layers of one shape go through the
large products together.

Source: the Gram form of the factored SVD (thin QR of both factors and an SVD of the small middle), which
Golub and Van Loan describe for products; the squared condition is harmless here because singular values
are judged against the size of the inputs, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .types import LowRank

NOISE = 1e-7  # A singular value below this part of the inputs' size is rounding noise of a cancellation.
_CHUNK = 1024  # Rows turned to float64 at a time: a chunk of 256 columns stays in the processor's cache.
_SINGULAR = 1e-6  # Smallest ratio of pivots for which Cholesky is trusted.
_NULL = 1e-14  # Part of the largest eigenvalue of GY below which a direction is not there.


@dataclass(frozen=True)
class Spectrum:
    """A delta's singular values, and what is needed to write any truncation of it.

    Attributes:
        values: (k,) float64, descending; those that are noise are left out, so k is the numerical rank.
        energy: Squared Frobenius norm of the delta.
        size: Frobenius size of the inputs, ``sum_i |w_i| * norm(delta_i)``.
        source: The delta itself.
        left, right: (R, k) float64: ``up = source.up @ left * sqrt(values)``,
            ``down = sqrt(values) * right^T @ source.down``. None when only the values were asked for.
    """

    values: Tensor
    energy: float
    size: float
    source: LowRank
    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.values.shape[0]

    def tail(self, rank: int) -> float:
        """Squared error of the best approximation of this rank."""
        return max(0.0, float((self.values[rank:] ** 2).sum()))


def decompose(delta: LowRank, size: float | None = None, *, vectors: bool = True) -> Spectrum:
    """Singular values (and vectors) of a low-rank delta.

    Args:
        delta: What :func:`stack` gave, or any low-rank delta.
        size: Size of the inputs that noise is judged against; by default taken from ``delta.parts``.
        vectors: False when only the values are needed.
    """
    if min(delta.out, delta.in_) < delta.rank:
        return _decompose_small(delta, size, vectors)
    gram_up, gram_down = gram(delta.up.mT), gram(delta.down)
    gains = delta.component_gains()
    balance = _balance(gram_up, gram_down, gains)
    outer = balance * gains
    gram_up = gram_up * outer[:, None] * outer
    gram_down = gram_down / balance[:, None] / balance
    size = _inputs_size(gram_up, gram_down, delta.parts) if size is None else size
    energy = float((gram_up * gram_down).sum().clamp(min=0))
    low, inverse = _root(gram_down)
    core = low.mT @ gram_up @ low
    values, q = _eigen(core, size, vectors)
    if not vectors:
        return Spectrum(values, energy, size, delta)
    left = outer[:, None] * (low @ q) / values
    right = (inverse @ q) / balance[:, None]
    return Spectrum(values, energy, size, delta, left, right)


def truncate(spectrum: Spectrum, rank: int, dtype: torch.dtype = torch.float64) -> LowRank:
    """The best approximation of a rank: factors share sqrt(s), alpha = rank, components in order of s.

    Args:
        spectrum: From :func:`decompose` with vectors.
        rank: Wanted rank; a rank above the numerical one gives a smaller delta, never padding.
        dtype: Precision of the large products.

    Source: Eckart and Young 1936.
    """
    assert spectrum.left is not None and spectrum.right is not None
    rank = min(rank, spectrum.rank)
    root = spectrum.values[:rank].sqrt()
    source = spectrum.source
    up = source.up.to(dtype) @ (spectrum.left[:, :rank] * root).to(dtype)
    down = (spectrum.right[:, :rank] * root).mT.contiguous().to(dtype) @ source.down.to(dtype)
    return LowRank(up, down, float(rank), source.kernel)


def gram(rows: Tensor) -> Tensor:
    """``rows @ rows^T`` in float64, (..., R, R), of rows (..., R, n) in any float dtype."""
    total = torch.zeros((*rows.shape[:-1], rows.shape[-2]), dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[-1], _CHUNK):
        piece = rows[..., start : start + _CHUNK].double()
        total += piece @ piece.mT
    return total


def _balance(gram_up: Tensor, gram_down: Tensor, gains: Tensor) -> Tensor:
    """(R,) powers of two that make a component's two factors about equally large, which is exact."""
    up = gram_up.diagonal(dim1=-2, dim2=-1) * gains**2
    down = gram_down.diagonal(dim1=-2, dim2=-1)
    exponent = (down.log2() - up.log2()) / 4
    return torch.exp2(torch.nan_to_num(exponent, nan=0.0, posinf=0.0, neginf=0.0).round())


def _inputs_size(gram_up: Tensor, gram_down: Tensor, parts: Sequence[int]) -> float:
    """``sum_i norm(part_i)`` from the diagonal blocks of the Gram matrices."""
    product = gram_up * gram_down
    start, size = 0, 0.0
    for part in parts or (product.shape[-1],):
        block = product[start : start + part, start : start + part]
        size += float(block.sum().clamp(min=0).sqrt())
        start += part
    return size


def _root(gram_down: Tensor) -> tuple[Tensor, Tensor]:
    """L (R, k) with ``L L^T = gram_down`` and the transpose of its (pseudo)inverse."""
    low, info = torch.linalg.cholesky_ex(gram_down)
    pivots = low.diagonal()
    if int(info) == 0 and bool(pivots.min() >= _SINGULAR * pivots.max()):
        eye = torch.eye(low.shape[-1], dtype=low.dtype, device=low.device)
        return low, torch.linalg.solve_triangular(low, eye, upper=False).mT
    values, vectors = torch.linalg.eigh(gram_down)
    kept = values > _NULL * values.max().clamp(min=0)
    root, basis = values[kept].sqrt(), vectors[:, kept]
    return basis * root, basis / root


def _eigen(core: Tensor, size: float, vectors: bool) -> tuple[Tensor, Tensor]:
    """Singular values above the noise, descending, and the eigenvectors that belong to them."""
    if vectors:
        squares, q = torch.linalg.eigh(core)
    else:
        squares, q = torch.linalg.eigvalsh(core), core
    values = squares.clamp(min=0).sqrt()
    kept = int((values > NOISE * size).sum())
    values = values.flip(-1)[:kept]
    return values, q.flip(-1)[:, :kept] if vectors else q


def _decompose_small(delta: LowRank, size: float | None, vectors: bool) -> Spectrum:
    """Like :func:`decompose` for more components than the shorter side holds: the short side takes their place."""
    gains = delta.component_gains().to(delta.up.device)
    if size is None:
        edges = [0]
        for part in delta.parts or (delta.rank,):
            edges.append(edges[-1] + part)
        size = sum(
            float(
                (gram(delta.up[:, a:b].mT) * gram(delta.down[a:b]) * gains[a:b, None] * gains[a:b])
                .sum()
                .clamp(min=0)
                .sqrt()
            )
            for a, b in zip(edges, edges[1:])
        )
    whole = (delta.up.double() * gains) @ delta.down.double()
    side = min(delta.out, delta.in_)
    eye = torch.eye(side, dtype=torch.float64, device=whole.device)
    up, down = (eye, whole) if delta.out == side else (whole, eye)
    return decompose(LowRank(up, down, float(side), delta.kernel), size, vectors=vectors)
