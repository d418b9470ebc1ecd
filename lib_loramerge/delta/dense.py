"""The best low-rank approximation of a dense delta, as the elementwise merge methods give them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .core import Spectrum, decompose, decompose_whole, truncate
from .types import Dense, LowRank

_DEPTH = 2  # Times the start block is multiplied by W W^T.
_WIDTH = 2  # Columns of the start block per wanted rank.
_EXACT_PART = 4  # The iteration pays while its subspace is below 1/4 of the shorter side.


def decompose_dense(delta: Dense, rank: int | None = None) -> Spectrum:
    """Largest singular values and vectors of a dense delta.

    Args:
        delta: A matrix; norm layers and biases have no rank and do not come here.
        rank: How many are wanted; None for all, which takes the eigenvectors of the shorter Gram matrix.
            For a small part of the shorter side a block Krylov iteration is several times faster.

    Returns:
        A spectrum of ``rank`` values or more. Its truncations miss the least error by less than 1e-5
        of it.

    Source: Musco and Musco 2015, Randomized block Krylov methods, https://arxiv.org/abs/1504.05477. We start
        from the inputs' joint row space (``delta.start``), which holds most of the result; nothing is random
        from one run to the next.
    """
    weight = delta.weight
    side = min(delta.out, delta.in_)
    if rank is None or rank * _WIDTH * (_DEPTH + 1) * _EXACT_PART > side * 2:
        whole = weight.double()
        return decompose_whole(whole, float(torch.linalg.vector_norm(whole)), delta.kernel)
    basis = _krylov(weight.float(), _start_block(delta, rank))
    inside = LowRank(basis, basis.mT @ weight.to(basis.dtype), float(basis.shape[1]), delta.kernel)
    energy = float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
    spectrum = decompose(inside, energy**0.5)
    return replace(spectrum, energy=energy, beyond=max(0.0, energy - spectrum.energy))


def truncate_dense(delta: Dense, rank: int) -> LowRank:
    """The best approximation of a rank of a dense delta; factors share sqrt(s), alpha = rank."""
    return truncate(decompose_dense(delta, rank), rank)


def _start_block(delta: Dense, rank: int) -> Tensor:
    """(in, 2 rank) columns to start from: the inputs' row space, made up to the number by fixed noise."""
    columns = _WIDTH * rank
    block = torch.empty((delta.in_, 0))
    if delta.start is not None:
        block = delta.start[:, :columns].float().cpu()
        block = block / torch.linalg.vector_norm(block, dim=0).clamp(min=1e-30)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((delta.in_, columns - block.shape[1]), generator=generator)
    return torch.cat([block, noise], dim=1).to(delta.weight.device)


def _krylov(weight: Tensor, start: Tensor) -> Tensor:
    """(out, (depth + 1) c) float64 orthonormal basis of the block Krylov space of ``weight weight^T``."""
    block = torch.linalg.qr(weight @ start).Q
    blocks = [block]
    for _ in range(_DEPTH):
        block = torch.linalg.qr(weight @ (weight.mT @ block)).Q
        blocks.append(block)
    return torch.linalg.qr(torch.cat(blocks, dim=1).double()).Q
