"""The largest singular values of a matrix that nothing is known of, as the difference of two models is."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from .core import Spectrum, decompose, decompose_whole
from .small import gram
from .types import Grams, LowRank

_DEPTH, _DEEPEST = 3, 6
_GAINS = 1e-4  # Part of what is left that one more step has to find to be worth it.
_ROUNDING = torch.finfo(torch.float32).eps  # Part of the energy that sums of float32 products do not resolve.
_PASSES = 5
_KEPT = 0.5  # Part of a direction that has to be left by the last pass.
_PAYS = 0.6  # Part of the shorter side from which on the whole eigenproblem is the quicker one.


def leading(weight: Tensor, rank: int, name: str, kernel: tuple[int, ...] = ()) -> Spectrum:
    """The ``rank`` largest singular values and vectors of a matrix.

    Args:
        weight: (out, in) float32, not zero.
        rank: How many.
        name: The layer's; it seeds the random start, so that the result does not depend on the order of work.

    Returns:
        Truncations of its spectrum miss the least error by 1e-6 to 2e-5 of it where the singular values fall
        as 1/j, by 2e-3 where they hardly fall. ``energy`` and ``beyond`` are exact in any case.

    Source: Musco and Musco 2015, Randomized block Krylov methods, https://arxiv.org/abs/1504.05477, with a
        block as wide as the rank.
    """
    energy = float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
    rank = min(rank, *weight.shape)
    if (_DEPTH + 1) * rank > _PAYS * min(weight.shape):
        return decompose_whole(weight.double(), energy**0.5, kernel)
    seed = int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:7], "big")
    start = torch.randn(weight.shape[1], rank, generator=torch.Generator().manual_seed(seed))
    block = torch.linalg.qr(weight @ start).Q
    basis, image = block, block.mT @ weight  # (out, c), (c, in)
    before = 0.0
    for depth in range(1, _DEEPEST + 1):
        block = outside(basis, weight @ image[-rank:].mT)
        basis, image = torch.cat([basis, block], dim=1), torch.cat([image, block.mT @ weight])
        if depth < _DEPTH - 1:
            continue
        found = float(torch.linalg.eigvalsh(gram(image))[-rank:].sum())
        if depth >= _DEPTH and found - before <= _GAINS * max(0.0, energy - found) + _ROUNDING * energy:
            break
        before = found
    largest = torch.linalg.eigh(gram(image)).eigenvectors[:, -rank:]
    basis = torch.linalg.qr((basis @ largest.to(basis)).double()).Q
    inside = LowRank(basis, basis.mT @ weight.double(), float(rank), kernel)
    small = Grams(torch.eye(rank, dtype=torch.float64), gram(inside.down))
    spectrum = decompose(inside, energy**0.5, small=small)
    return replace(spectrum, energy=energy, beyond=max(0.0, energy - spectrum.energy))


def outside(basis: Tensor, block: Tensor) -> Tensor:
    """Orthonormal columns, orthogonal to ``basis`` too, that with it span what ``block`` does.

    Where the matrix has a lower rank than the block, what a pass leaves is rounding that lies in ``basis`` to
    a large part: so many passes are made until the last one took little away.

    Source: Giraud, Langou and Rozloznik 2005, On the loss of orthogonality in the Gram-Schmidt
        orthogonalization process, https://doi.org/10.1016/j.camwa.2005.08.009.
    """
    for passed in range(_PASSES):
        found = torch.linalg.qr(block - basis @ (basis.mT @ block))
        block = found.Q
        if passed and float(found.R.diagonal().abs().min()) > _KEPT:
            break
    return block
