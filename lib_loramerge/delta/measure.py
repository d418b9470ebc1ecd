"""Norms, inner products and distances of deltas, without forming a low-rank one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .core import grams
from .types import Delta, Dense, LowRank, stack

_EXACT_BELOW = 1e-8  # Squared relative distance under which the Gram form would lose digits to cancellation.


def norm(delta: Delta) -> float:
    """Frobenius norm of a delta weight."""
    return math.sqrt(max(0.0, inner(delta, delta)))


def inner(a: Delta, b: Delta) -> float:
    """Frobenius inner product ``sum(a * b)``, in float64."""
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        left = a.component_gains()[:, None] * b.component_gains()
        return float((cross(a.up.mT, b.up.mT) * cross(a.down, b.down) * left.to(a.up.device)).sum())
    if isinstance(a, LowRank):
        return inner(b, a)
    weight = a.weight.double()
    if isinstance(b, Dense):
        return float((weight * b.weight.double()).sum())
    gains = b.component_gains().to(weight.device)
    return float((((weight @ b.down.double().mT) * b.up.double()).sum(0) * gains).sum())


def cross(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b^T`` in float64 of rows (r, n) and (s, n)."""
    return a.double() @ b.double().mT


def cosine(a: Delta, b: Delta) -> float:
    """Cosine of the angle between two deltas; 0 when one of them is zero."""
    size = norm(a) * norm(b)
    return inner(a, b) / size if size > 0 else 0.0


@dataclass(frozen=True)
class Overlap:
    """How much two deltas of one layer have to do with each other.

    Attributes:
        cosine: Of the angle between them, -1 to 1.
        inputs: Mean squared cosine of the principal angles of their row spaces, 0 (they look at different
            features) to 1 (at the same).
        outputs: The same of their column spaces: whether they write to the same features.
    """

    cosine: float
    inputs: float
    outputs: float


def overlap(a: LowRank, b: LowRank) -> Overlap:
    """Similarity of two low-rank deltas of one shape, from one pass over their factors."""
    both = stack([a, b], [1.0, 1.0])
    small, gains, rank = grams(both), both.component_gains(), a.rank
    product = small.up * small.down * gains[:, None] * gains
    inner, first, second = (
        product[:rank, rank:].sum(),
        product[:rank, :rank].sum(),
        product[rank:, rank:].sum(),
    )
    size = float(first.clamp(min=0).sqrt() * second.clamp(min=0).sqrt())
    return Overlap(
        cosine=float(inner) / size if size > 0 else 0.0,
        inputs=_shared(small.down, rank),
        outputs=_shared(small.up, rank),
    )


def sign_conflict(a: Delta, b: Delta, rows: int = 64) -> float:
    """Share of elements, weighted by ``|a b|``, where two deltas pull in opposite directions.

    0.5 is what unrelated deltas give. Counted on about ``rows`` rows, evenly spread, formed for it.
    """
    step = max(1, a.out // rows)
    first, second = _rows(a, step), _rows(b, step)
    product = first * second
    total = float(product.abs().sum())
    return float(product.clamp(max=0).abs().sum()) / total if total > 0 else 0.0


def relative_error(exact: Delta, written: Delta) -> tuple[float, float]:
    """Squared distance of ``written`` from ``exact``, and the squared norm of ``exact``.

    Squares, so that they can be added over the layers of a file. Low-rank deltas that nearly agree go
    through orthogonal factors, so that a distance of 1e-12 is still told right.
    """
    if isinstance(exact, Dense) or isinstance(written, Dense):
        difference = exact.dense() - written.dense()
        return float((difference**2).sum()), inner(exact, exact)
    exact_sq, written_sq = inner(exact, exact), inner(written, written)
    error_sq = exact_sq - 2 * inner(exact, written) + written_sq
    if error_sq < _EXACT_BELOW * max(exact_sq, written_sq):
        error_sq = _distance_by_qr(exact, written)
    return max(0.0, error_sq), max(0.0, exact_sq)


def _distance_by_qr(a: LowRank, b: LowRank) -> float:
    left = torch.cat([a.up.double() * a.component_gains(), -b.up.double() * b.component_gains()], dim=1)
    right = torch.cat([a.down.double(), b.down.double()])
    r_left, r_right = torch.linalg.qr(left, mode="r").R, torch.linalg.qr(right.mT, mode="r").R
    return float(((r_left @ r_right.mT) ** 2).sum())


def _shared(square: Tensor, rank: int) -> float:
    """Mean squared cosine of the principal angles between two row spaces.

    Args:
        square: (r + s, r + s) Gram matrix of the rows of both.
        rank: r, the number of rows of the first.
    """
    first, second = _whitener(square[:rank, :rank]), _whitener(square[rank:, rank:])
    least = min(first.shape[1], second.shape[1])
    if not least:
        return 0.0
    return min(1.0, float((first.mT @ square[:rank, rank:] @ second).square().sum()) / least)


def _whitener(square: Tensor) -> Tensor:
    """(r, k) matrix that makes rows with this Gram matrix orthonormal; directions of no size are left out."""
    low, info = torch.linalg.cholesky_ex(square)
    if int(info) == 0 and bool((low.diagonal() > 1e-5 * square.diagonal().sqrt()).all()):
        eye = torch.eye(square.shape[0], dtype=square.dtype)
        return torch.linalg.solve_triangular(low.mT, eye, upper=True)
    values, vectors = torch.linalg.eigh(square)
    kept = values > 1e-12 * values[-1:].clamp(min=0)
    return vectors[:, kept] / values[kept].sqrt()


def _rows(delta: Delta, step: int) -> Tensor:
    if isinstance(delta, Dense):
        return delta.weight[::step].double()
    return (delta.up[::step].double() * delta.component_gains().to(delta.up.device)) @ delta.down.double()
