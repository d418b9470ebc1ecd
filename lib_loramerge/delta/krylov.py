"""The largest singular values of a matrix that nothing is known of, as the difference of two models is."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .core import Spectrum, decompose, decompose_whole
from .products import product
from .small import gram
from .types import Grams, LowRank

_STEPS, _MOST_STEPS = 5, 11
_GAINS = 1e-4  # Part of what is left that further steps have to find to be worth it.
_ROUNDING = torch.finfo(torch.float32).eps  # Part of the energy that sums of float32 products do not resolve.
_EXACT = 1e-3  # Part of the energy that is left below which float32 products do not tell how much it is.
_PASSES = 5
_KEPT = 0.5  # Part of a direction that has to be left by the last pass.
_PAYS = 0.45  # Part of the shorter side from which on the whole eigenproblem is the quicker one.
_CHUNK = 1 << 20  # Numbers that are turned to float64 at once.
# The same in rows; a multiple of what libraries take at once gives the bits of the whole product.
_ROWS = 1024


def leading(
    weight: Tensor, rank: int, name: str, kernel: tuple[int, ...] = (), *, energy: float | None = None
) -> Spectrum:
    """The ``rank`` largest singular values and vectors of a matrix.

    Args:
        weight: (out, in) float32, not zero.
        rank: How many.
        name: The layer's; it seeds the random start, so that the result does not depend on the order of work.
        energy: The matrix' squared norm, where it is known.

    Returns:
        Truncations of its spectrum miss the least error by 1e-6 to 2e-5 of it where the singular values fall
        as 1/j, by 2e-3 where they hardly fall. ``energy`` and ``beyond`` are exact in any case.

    Source: Musco and Musco 2015, Randomized block Krylov methods, https://arxiv.org/abs/1504.05477. Blocks
        are half as wide as the rank: that takes a quarter fewer products for the same accuracy, see Meyer,
        Musco and Musco 2024, https://arxiv.org/abs/2305.02535.
    """
    if energy is None:
        energy = float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
    rank = min(rank, *weight.shape)
    width = (rank + 1) // 2
    if (_STEPS + 1) * width > _PAYS * min(weight.shape):
        return decompose_whole(weight.double(), energy**0.5, kernel)
    seed = int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:7], "big")
    start = torch.randn(weight.shape[1], width, generator=torch.Generator().manual_seed(seed))
    block = torch.linalg.qr(product(weight, start)).Q
    # Room for all steps; what none of them reaches takes no memory.
    images = weight.new_empty((_MOST_STEPS + 1) * width, weight.shape[1])
    basis, image = block, images[:width]  # (out, c), (c, in)
    image.copy_(product(block.mT, weight))
    square = gram(image)
    found: list[float] = []
    largest = square
    for step in range(1, _MOST_STEPS + 1):
        block = outside(basis, product(weight, image[-width:].mT))
        basis, image = torch.cat([basis, block], dim=1), images[: (step + 1) * width]
        image[-width:] = product(block.mT, weight)
        square = _grown(square, image)
        if step < _STEPS - 2:
            continue
        if step < _STEPS:
            found.append(float(torch.linalg.eigvalsh(square)[-rank:].sum()))
            continue
        values, vectors = torch.linalg.eigh(square)
        largest = vectors[:, -rank:]
        found.append(float(values[-rank:].sum()))
        left = max(0.0, energy - found[-1])
        if to_come(found, math.inf) <= _GAINS * left + _ROUNDING * energy:
            break
    basis, turned = torch.linalg.qr(_turned(basis, largest))
    if energy - found[-1] > _EXACT * energy:
        down = torch.linalg.solve_triangular(turned.mT, largest.mT @ image.double(), upper=False)
    else:
        down = _product(basis, weight)
    inside = LowRank(basis, down, float(rank), kernel)
    small = Grams(torch.eye(rank, dtype=torch.float64), gram(down))
    spectrum = decompose(inside, energy**0.5, small=small)
    return replace(spectrum, energy=energy, beyond=max(0.0, energy - spectrum.energy))


def _turned(basis: Tensor, largest: Tensor) -> Tensor:
    """``basis @ largest`` in float64, the basis turned to it a few rows at a time."""
    return torch.cat([rows.double() @ largest for rows in basis.split(_ROWS)])


def _grown(square: Tensor, rows: Tensor) -> Tensor:
    """The Gram matrix of rows whose first ones have ``square`` already."""
    known, count = square.shape[0], rows.shape[0]
    result = square.new_empty(count, count)
    result[:known, :known] = square
    result[known:] = rows[known:].double() @ rows.double().mT
    result[:known, known:] = result[known:, :known].mT
    return result


def to_come(found: Sequence[float], not_falling: float) -> float:
    """What all further steps will find, if each finds as much less than the one before as the last did.

    Args:
        found: After each step so far, three at least.
        not_falling: The answer where the last one found no less than the one before.
    """
    before, last = found[-2] - found[-3], found[-1] - found[-2]
    if last <= 0:
        return 0.0
    return last * last / (before - last) if last < before else not_falling


def _product(basis: Tensor, weight: Tensor) -> Tensor:
    """``basis^T weight`` in float64, the weight turned to it a few rows at a time."""
    result = basis.new_zeros(basis.shape[1], weight.shape[1])
    step = max(1, _CHUNK // weight.shape[1])
    for first in range(0, weight.shape[0], step):
        result += basis[first : first + step].mT @ weight[first : first + step].double()
    return result


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
