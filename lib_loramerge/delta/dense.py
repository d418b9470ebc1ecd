"""The best low-rank approximation of a dense delta, which elementwise merge methods give."""

from __future__ import annotations

import torch

from .core import NOISE, Spectrum
from .types import Dense, LowRank


def decompose_dense(delta: Dense, rank: int | None = None, *, depth: int = 2) -> Spectrum:
    """Largest singular values and vectors of a dense delta, from the eigenvectors of its shorter Gram matrix."""
    weight = delta.weight
    wide = delta.out <= delta.in_
    short = weight.double() if wide else weight.double().mT
    squares, q = torch.linalg.eigh(short @ short.mT)
    energy = float((short**2).sum())
    values = squares.clamp(min=0).sqrt().flip(-1)
    kept = int((values > NOISE * energy**0.5).sum())
    values, q = values[:kept], q.flip(-1)[:, :kept]
    eye = torch.eye(short.shape[0], dtype=torch.float64, device=weight.device)
    if wide:
        source = LowRank(eye, weight, float(short.shape[0]), delta.kernel)
        return Spectrum(values, energy, energy**0.5, source, q, q / values)
    source = LowRank(weight, eye, float(short.shape[0]), delta.kernel)
    return Spectrum(values, energy, energy**0.5, source, q / values, q)


def truncate_dense(delta: Dense, rank: int) -> LowRank:
    """The best approximation of a rank of a dense delta; factors share sqrt(s), alpha = rank."""
    from .core import truncate

    return truncate(decompose_dense(delta, rank), rank)
