"""The best low-rank approximation of a dense delta, as the elementwise merge methods give them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .core import Spectrum, cancelled, decompose, decompose_whole, in_float32
from .kronecker import Operator, operator
from .krylov import outside, to_come
from .reach import NEAR, largest, times_two_to
from .small import gram, grams, sizes
from .types import Dense, Grams, LowRank

_WIDTH = 2  # Columns of the start block per wanted rank.
_CONVERGED = 4e-6  # Part of the squared error by which all further blocks may still lower it.
_PAYS = 0.4  # Part of the shorter side up to which the iteration is faster than the whole eigenproblem.
_RESOLVED = 1e-10  # Part of the energy, from which on a difference of energies says what is left.


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
    basis = None
    if rank:
        narrow = weight.float()
        start = _start_block(delta.start, delta.in_, rank).to(weight.device)
        basis = _krylov(
            narrow.__matmul__, lambda left: left.mT @ narrow, start, rank, energy, min(weight.shape)
        )
    if basis is None:
        return decompose_whole(weight.double(), energy**0.5, delta.kernel, vectors=vectors)
    basis, image, beyond = _projected(weight.double(), basis, energy)
    spectrum = _inside(basis, image, delta.kernel, energy, vectors=vectors)
    return spectrum if beyond is None else replace(spectrum, beyond=beyond)


def _inside(
    basis: Tensor, image: Tensor, kernel: tuple[int, ...], energy: float, *, vectors: bool = True
) -> Spectrum:
    """Spectrum of ``basis @ image``, (out, c) orthonormal and (c, in) float64, as part of a delta.

    Args:
        energy: Squared norm of the whole delta.
    """
    inside = LowRank(basis, image, float(basis.shape[1]), kernel)
    small = Grams(torch.eye(basis.shape[1], dtype=torch.float64), gram(image).cpu())
    spectrum = decompose(inside, energy**0.5, vectors=vectors, small=small)
    return replace(spectrum, energy=energy, beyond=max(0.0, energy - spectrum.energy))


def _projected(weight: Tensor, basis: Tensor, energy: float) -> tuple[Tensor, Tensor, float | None]:
    """A basis, its product with a matrix, and what lies outside if a difference of energies does not say.

    There the matrix has no higher rank than the basis, which was found in float32: one more step makes it
    exact to float64.

    Args:
        weight: (out, in) float64.
        basis: (out, c) float64, orthonormal.

    Returns:
        (out, c), (c, in) float64, and a squared norm or None.
    """
    image = basis.mT @ weight
    if energy - float(image.square().sum()) > _RESOLVED * energy:
        return basis, image, None
    basis = torch.linalg.qr(weight @ image.mT).Q
    image = basis.mT @ weight
    return basis, image, float((weight - basis @ image).square().sum())


def decompose_large(delta: LowRank, rank: int) -> Spectrum | None:
    """Largest singular values and vectors of a sum with too many components for Gram matrices.

    As :func:`decompose_dense`, with products by the factors: the matrix itself is never formed.

    Args:
        rank: How many are wanted.

    Returns:
        None where too many are wanted, or where the sum all but cancels.
    """
    if 2 * _WIDTH * rank > _PAYS * min(delta.out, delta.in_):
        return None
    whole = operator(delta)
    if whole is not None:
        return decompose_operator(delta, whole, rank)
    small, gains = grams(delta), delta.component_gains()
    energy, size = (float(found) for found in sizes(small, gains, delta.parts))
    del small
    if not math.isfinite(energy) or cancelled(energy, size) or not in_float32(size):
        return None
    up, down, own = delta.up.float(), delta.down.float(), gains.to(delta.up.device)
    narrow = own.float()

    def times(right: Tensor) -> Tensor:
        return up @ (narrow[:, None] * (down @ right))

    start = _start_block(_first_rows(delta, rank), delta.in_, rank).to(delta.up.device)
    basis = _krylov(
        times, lambda left: ((left.mT @ up) * narrow) @ down, start, rank, energy, min(delta.out, delta.in_)
    )
    if basis is None:
        return None
    image = ((basis.mT @ delta.up.double()) * own) @ delta.down.double()
    return replace(_inside(basis, image, delta.kernel, energy), size=size)


def decompose_operator(delta: LowRank, whole: Operator, rank: int) -> Spectrum | None:
    """:func:`decompose_large` of a delta that has structure."""
    energy, size = whole.energy, whole.size
    if not math.isfinite(energy) or cancelled(energy, size) or not in_float32(size):
        return None
    start = _start_block(None, delta.in_, rank)
    basis = _krylov(whole.times, whole.onto, start, rank, energy, min(delta.out, delta.in_))
    if basis is None:
        return None
    return replace(_inside(basis, whole.onto(basis), delta.kernel, energy), size=size)


def _first_rows(delta: LowRank, rank: int) -> Tensor:
    """(in, c) the first rows of each part, as many of each."""
    parts = delta.parts or (delta.rank,)
    each = max(1, _WIDTH * rank // len(parts))
    edges = itertools.pairwise(itertools.accumulate(parts, initial=0))
    return torch.cat([delta.down[start : min(stop, start + each)] for start, stop in edges]).mT


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
        solved=None,
    )


def _start_block(start: Tensor | None, in_: int, rank: int) -> Tensor:
    """(in, 2 rank) columns to start from: the inputs' row space, made up to the number by fixed noise."""
    columns = _WIDTH * rank
    block = torch.empty((in_, 0))
    if start is not None:
        block = start[:, :columns].float().cpu()
        block = block / torch.linalg.vector_norm(block, dim=0).clamp(min=1e-30)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((in_, columns - block.shape[1]), generator=generator)
    return torch.cat([block, noise], dim=1)


def _krylov(
    times: Callable[[Tensor], Tensor],
    onto: Callable[[Tensor], Tensor],
    start: Tensor,
    rank: int,
    energy: float,
    side: int,
) -> Tensor | None:
    """(out, rank) float64 orthonormal columns that span the largest left singular vectors of a matrix.

    Args:
        times: ``matrix @ x`` of x (in, c).
        onto: ``x^T @ matrix`` of x (out, c).
        start: (in, c) columns to start from.
        energy: Squared norm of the matrix.
        side: Its shorter side.

    Returns:
        None when they are not found in few enough columns.
    """
    most = int(_PAYS * side)
    if start.shape[1] > most // 2:
        return None
    block = torch.linalg.qr(times(start)).Q
    basis, image = block, onto(block)  # (out, c), (c, in)
    found: list[float] = []
    while basis.shape[1] <= most:
        square = gram(image)
        found.append(float(torch.linalg.eigvalsh(square)[-rank:].sum()))
        # Gains that do not fall: another step like the last one.
        if len(found) > 2 and to_come(found, found[-1] - found[-2]) <= _CONVERGED * (energy - found[-1]):
            largest = torch.linalg.eigh(square).eigenvectors[:, -rank:]
            return torch.linalg.qr((basis @ largest.to(basis)).double()).Q
        block = outside(basis, times(image[-block.shape[1] :].mT))
        basis, image = torch.cat([basis, block], dim=1), torch.cat([image, onto(block)])
    return None
