"""Norms, inner products and distances of deltas, without forming a low-rank one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
