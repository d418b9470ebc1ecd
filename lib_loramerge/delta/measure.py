"""Norms, inner products and distances of deltas, without forming a low-rank one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .core import gram
from .types import Delta, Dense, LowRank

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
    """Similarity of two low-rank deltas, from their factors."""
    return Overlap(
        cosine=cosine(a, b),
        inputs=_shared(a.down, b.down),
        outputs=_shared(a.up.mT, b.up.mT),
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


def _shared(a: Tensor, b: Tensor) -> float:
    """Mean squared cosine of the principal angles between the row spaces of (r, n) and (s, n)."""
    first, second = _whitener(gram(a)), _whitener(gram(b))
    least = min(first.shape[1], second.shape[1])
    if not least:
        return 0.0
    return min(1.0, float((first.mT @ cross(a, b) @ second).square().sum()) / least)


def _whitener(square: Tensor) -> Tensor:
    """(r, k) matrix that makes rows with this Gram matrix orthonormal; directions of no size are left out."""
    values, vectors = torch.linalg.eigh(square)
    kept = values > 1e-12 * values[-1:].clamp(min=0)
    return vectors[:, kept] / values[kept].sqrt()


def _rows(delta: Delta, step: int) -> Tensor:
    if isinstance(delta, Dense):
        return delta.weight[::step].double()
    return (delta.up[::step].double() * delta.component_gains().to(delta.up.device)) @ delta.down.double()
