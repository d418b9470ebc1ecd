"""The best low-rank approximation of a dense delta, as the elementwise merge methods give them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .core import Spectrum, decompose, decompose_whole, gram, truncate
from .reach import NEAR, largest, times_two_to
from .types import Dense, Grams, LowRank

_WIDTH = 2  # Columns of the start block per wanted rank.
_CONVERGED = 4e-6  # Part of the squared error by which all further blocks may still lower it.
_PAYS = 0.4  # Part of the shorter side up to which the iteration is faster than the whole eigenproblem.


def decompose_dense(delta: Dense, rank: int | None = None, *, vectors: bool = True) -> Spectrum:
    """Largest singular values and vectors of a dense delta.

    Args:
        delta: A matrix; norm layers and biases have no rank and do not come here.
        rank: How many are wanted; None for all, which takes the eigenvectors of the shorter Gram matrix.
            For a small part of the shorter side a block Krylov iteration is several times faster.
        vectors: False when only the values are needed, which takes less than half the time where all are.

    Returns:
        A spectrum of ``rank`` values or more. Its truncations miss the least error by less than 1e-5 of it.

    Source: Musco and Musco 2015, Randomized block Krylov methods, https://arxiv.org/abs/1504.05477. We start
        from the inputs' joint row space (``delta.start``), which holds most of the result, and go on until
        the error stops falling; nothing is random from one run to the next.
    """
    size = largest(delta.weight)
    power = 2 * round(math.log2(size) / 2) if 0 < size < math.inf else 0
    if abs(power) > NEAR:
        near = times_two_to(delta, -power)
        assert isinstance(near, Dense)
        return _times_two_to(decompose_dense(near, rank, vectors=vectors), power)
    weight = delta.weight
    energy = float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
    basis = _krylov(weight.float(), _start_block(delta, rank), rank, energy) if rank else None
    if basis is None:
        return decompose_whole(weight.double(), energy**0.5, delta.kernel, vectors=vectors)
    inside = LowRank(basis, basis.mT @ weight.double(), float(basis.shape[1]), delta.kernel)
    small = Grams(torch.eye(basis.shape[1], dtype=torch.float64), gram(inside.down).cpu())
    spectrum = decompose(inside, energy**0.5, vectors=vectors, small=small)
    return replace(spectrum, energy=energy, beyond=max(0.0, energy - spectrum.energy))


def _times_two_to(spectrum: Spectrum, power: int) -> Spectrum:
    """The spectrum of ``2 ** power`` times the delta, for an even power."""
    factor, root = 2.0**power, 2.0 ** (power // 2)
    mixing, source = spectrum.mixing, spectrum.source

    def mixed(rank: int) -> tuple[Tensor, Tensor]:
        assert mixing is not None
        left, right = mixing(rank)
        return left * root, right / root

    return replace(
        spectrum,
        values=spectrum.values * factor,
        energy=spectrum.energy * factor**2,
        size=spectrum.size * factor,
        beyond=spectrum.beyond * factor**2,
        doubt=spectrum.doubt * factor**2,
        source=replace(source, down=source.down * factor) if isinstance(source, LowRank) else source,
        mixing=mixing and mixed,
    )


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


def _krylov(weight: Tensor, start: Tensor, rank: int, energy: float) -> Tensor | None:
    """(out, rank) float64 orthonormal columns that span the largest left singular vectors.

    None when they are not found in few enough columns.
    """
    most = int(_PAYS * min(weight.shape))
    if start.shape[1] > most // 2:
        return None
    block = torch.linalg.qr(weight @ start).Q
    basis, image = block, block.mT @ weight  # (out, c), (c, in)
    found: list[float] = []
    while basis.shape[1] <= most:
        square = gram(image)
        found.append(float(torch.linalg.eigvalsh(square)[-rank:].sum()))
        if _still_to_gain(found) <= _CONVERGED * (energy - found[-1]):
            largest = torch.linalg.eigh(square).eigenvectors[:, -rank:]
            return torch.linalg.qr((basis @ largest.to(basis)).double()).Q
        block = weight @ image[-block.shape[1] :].mT
        for _ in range(2):  # once leaves rounding errors of the size of what is taken away
            block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
        basis, image = torch.cat([basis, block], dim=1), torch.cat([image, block.mT @ weight])
    return None


def _still_to_gain(found: list[float]) -> float:
    """What further steps would add to a sequence that gains by an ever smaller factor."""
    if len(found) < 3:
        return math.inf
    last, before = found[-1] - found[-2], found[-2] - found[-3]
    return last * last / (before - last) if 0 < last < before else max(0.0, last)
