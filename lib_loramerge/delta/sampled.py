"""All singular values of a large delta with structure: the first computed, the rest sampled.

The largest are found by block Krylov iteration. Of the rest, m steps of Lanczos from random vectors give the
nodes and weights of a Gauss quadrature of the density of squared singular values, and the k-th largest value
is where the counted weight reaches k. At the end they are scaled so that all squares add up to the squared
norm, which is known.

Source: Ubaru, Chen and Saad 2017, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature,
    https://doi.org/10.1137/16M1104974; Lin, Saad and Yang 2016, Approximating spectral densities of large
    matrices, https://doi.org/10.1137/130934283.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .core import Spectrum, truncate
from .dense import decompose_operator
from .kronecker import operator
from .types import LowRank

_EXACT = (64, 32, 16)  # So many of the largest values are computed, fewer where they hardly fall.
_PROBES, _STEPS = 24, 64


def sampled_values(delta: LowRank) -> Spectrum | None:
    """A structured delta's singular values; None where its parts all but cancel.

    Deterministic. The largest 16 to 64 are right to 1e-4, the others to 6 % where they are more than 3 % of
    the largest; the norm is exact, and that of what a rank leaves out right to 1 %.
    """
    whole = operator(delta)
    if whole is None:
        return None
    found = (decompose_operator(delta, whole, count) for count in _EXACT)
    first = next((one for one in found if one is not None), None)
    if first is None:
        return None
    wide, best = delta.out <= delta.in_, truncate(first, first.rank)
    known = torch.linalg.qr(best.up if wide else best.down.mT).Q.float()

    def squared(columns: Tensor) -> Tensor:
        if wide:
            return whole.times(whole.onto(columns).mT)
        return whole.onto(whole.times(columns)).mT

    side = min(delta.out, delta.in_)
    rest = _quantiles(*_quadrature(squared, known, side), side - known.shape[1])
    left = max(0.0, first.energy - float(first.values.square().sum()))
    rest = rest.clamp(max=float(first.values[-1]))
    rest = rest * (left / max(float(rest.square().sum()), 1e-300)) ** 0.5
    return Spectrum(torch.cat([first.values, rest]), first.energy, first.size)


def _quadrature(squared: Callable[[Tensor], Tensor], known: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights, (probes, steps) float64, of the density outside the columns of ``known``."""

    def outside(columns: Tensor) -> Tensor:
        return columns - known @ (known.mT @ columns)

    probes = torch.randn((side, _PROBES), generator=torch.Generator().manual_seed(0))
    vector = outside(probes)
    vector = vector / torch.linalg.vector_norm(vector, dim=0)
    basis = torch.zeros(_PROBES, side, _STEPS)
    small = torch.zeros(_PROBES, _STEPS, _STEPS, dtype=torch.float64)
    for step in range(_STEPS):
        basis[:, :, step] = vector.mT
        image = outside(squared(vector)).mT[:, :, None]
        before = basis[:, :, : step + 1]
        within = before.mT @ image
        small[:, step, step] = within[:, step, 0]
        image = image - before @ within
        image = image - before @ (before.mT @ image)
        length = torch.linalg.vector_norm(image, dim=1)[:, 0]
        if step + 1 < _STEPS:
            small[:, step, step + 1] = small[:, step + 1, step] = length
        vector = (image[:, :, 0] / length.clamp(min=1e-30)[:, None]).mT
    nodes, vectors = torch.linalg.eigh(small)
    return nodes, vectors[:, 0].square()


def _quantiles(nodes: Tensor, weights: Tensor, count: int) -> Tensor:
    """(count,) values whose squares are spread as nodes of these weights are, falling."""
    order = torch.argsort(nodes.flatten(), descending=True)
    values = nodes.flatten()[order].clamp(min=1e-300).sqrt().log().numpy()
    share = weights.flatten()[order].numpy() * count / weights.shape[0]
    places = np.cumsum(share) - share / 2
    return torch.from_numpy(np.exp(np.interp(np.arange(count) + 0.5, places, values)))
