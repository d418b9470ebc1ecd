"""Random deltas of all sorts for tests, and what linear algebra on dense float64 matrices says of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lib_loramerge.delta import LowRank


def low_rank(
    out: int,
    in_: int,
    rank: int,
    *,
    seed: int = 0,
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
    scale: float = 0.1,
    decay: float = 0.0,
) -> LowRank:
    """Gaussian factors; ``decay`` lets component j fall as ``(j + 1) ** -decay``."""
    generator = torch.Generator().manual_seed(seed)
    fall = torch.arange(1, rank + 1, dtype=torch.float32) ** -decay
    up = torch.randn(out, rank, generator=generator) * fall * scale
    down = torch.randn(rank, in_, generator=generator) * scale
    return LowRank(up.to(dtype), down.to(dtype), float(rank) if alpha is None else alpha)


def dense(delta: LowRank) -> Tensor:
    """float64 delta weight by the plain formula; only for deltas without gains."""
    assert delta.gains is None
    return delta.alpha / delta.down.shape[0] * (delta.up.double() @ delta.down.double())


def dense_sum(deltas: Sequence[LowRank], weights: Sequence[float]) -> Tensor:
    return torch.stack([weight * dense(delta) for delta, weight in zip(deltas, weights)]).sum(0)


def optimum(whole: Tensor, rank: int) -> tuple[Tensor, float]:
    """Best approximation of a rank by a dense float64 SVD, and its error (Frobenius)."""
    u, s, vh = torch.linalg.svd(whole.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank], float(s[rank:].norm())


def size(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double()))


def with_gauge(delta: LowRank, seed: int = 0) -> LowRank:
    """The same delta in other factors: ``up G`` and ``G^-1 down`` with a random well-conditioned G."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(delta.rank, delta.rank, generator=generator, dtype=torch.float64)
    gauge = torch.eye(delta.rank, dtype=torch.float64) + 0.3 * noise / delta.rank**0.5
    return LowRank(
        delta.up.double() @ gauge,
        torch.linalg.solve(gauge, delta.down.double()),
        delta.alpha,
        delta.kernel,
    )
