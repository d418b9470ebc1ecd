"""Which output directions of a sum keep how much of each of its parts.

With ``W = sum_i D_i``, ``D_i = w_i d_i`` and an orthonormal U, the file holds ``U U^T W``. Of part i it
keeps ``<U U^T W, D_i> / |D_i|^2 = trace(U^T M_i U) / |D_i|^2`` with ``M_i = sym(W D_i^T)``. That can be large
because a strong part happens to look like a weak one in U, so ``trace(U^T N_i U) / |D_i|^2`` with
``N_i = D_i D_i^T``, which is what U holds of the part alone, counts beside it. What is kept of all, weighted,
is largest for the first eigenvectors of ``sum_i a_i M_i + b_i N_i``, and each eigenvalue is what its
direction adds. Equal a and no b give ``W W^T``, whose eigenvectors are the singular vectors: the plain cut.
All matrices are R x R, in an orthonormal basis of the columns of the parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .small import grams
from .types import Grams, LowRank, Mixed

_NULL = 1e-12  # Part of the largest eigenvalue below which a direction is not there.


@dataclass(frozen=True, eq=False)
class Directions:
    """The small matrices of one sum.

    Attributes:
        delta, small: The sum, and its Gram matrices.
        inverse: (R, m) ``up @ inverse`` is the basis.
        low: (R, m) ``up = basis @ low^T``.
        matrices: (2 n, m, m) all M_i, then all N_i, in that basis, float64.
        own: (n,) squared norms of the parts.
        energy: Squared norm of the sum.
    """

    delta: LowRank
    small: Grams
    inverse: Tensor
    low: Tensor
    matrices: Tensor
    own: Tensor
    energy: float

    def cut(self, weights: Sequence[float], rank: int) -> tuple[Mixed | None, float]:
        """The sum in the best directions for weights of ``matrices``, and the squared norm that it lacks."""
        together = (torch.tensor(weights, dtype=torch.float64)[:, None, None] * self.matrices).sum(0)
        values, vectors = torch.linalg.eigh(together)
        first = vectors.flip(1)[:, : min(rank, int((values > _NULL * values[-1].clamp(min=0)).sum()))]
        if not first.shape[1]:
            return None, self.energy
        gains = self.delta.component_gains()
        left, right = self.inverse @ first, gains[:, None] * (self.low @ first)
        rows = right.mT @ self.small.down @ right
        lengths = self.small.up.diagonal().sqrt(), self.small.down.diagonal().sqrt()
        made = Mixed(
            self.delta.up, self.delta.down, left, right,
            Grams(left.mT @ self.small.up @ left, rows), lengths, self.delta.kernel,
        )  # fmt: skip
        return made, max(0.0, self.energy - float(rows.diagonal().sum()))


def directions(delta: LowRank, owners: Sequence[int], count: int) -> Directions | None:
    """The directions of a sum of ``count`` inputs.

    Args:
        delta: Made by ``stack``.
        owners: The input of each of its parts, in order.

    Returns:
        None where the columns are of no size, or beyond float64.
    """
    small, gains = grams(delta), delta.component_gains()
    lengths = small.up.diagonal().sqrt()
    lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))[:, None]
    values, vectors = torch.linalg.eigh(small.up / lengths / lengths.mT)
    kept = values > _NULL * values[-1].clamp(min=0)
    root = values[kept].sqrt()
    low, inverse = lengths * vectors[:, kept] * root, vectors[:, kept] / root / lengths
    down = gains[:, None] * small.down * gains
    masks = torch.zeros(count, delta.rank, dtype=torch.float64)
    edges = itertools.pairwise(itertools.accumulate(delta.parts or (delta.rank,), initial=0))
    for owner, (start, stop) in zip(owners, edges, strict=True):
        masks[owner, start:stop] = 1.0
    columns = torch.cat([down * masks[:, None, :], down * masks[:, None, :] * masks[:, :, None]])
    one_sided = low.mT @ columns @ low
    product = small.up * down
    own = torch.stack([mask @ product @ mask for mask in masks])
    if not (bool(one_sided.isfinite().all()) and root.numel()):
        return None
    matrices = (one_sided + one_sided.mT) / 2
    return Directions(delta, small, inverse, low, matrices, own, max(0.0, float(product.sum())))
