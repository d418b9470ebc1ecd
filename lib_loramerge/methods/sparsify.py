"""What the elementwise methods are made of: the elements of a delta, and which of them to keep.

Matrices here are (out, in) float32 and contiguous, one layer at a time, and are changed in place. The work
goes in pieces that stay in the processor's cache, and choices are made by products with 0 and 1: masks and
``torch.where`` are thirty times slower where the choice is as good as random.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..delta import Delta, Dense, LowRank, decompose, norm, stack, truncate

_PIECE = 1 << 17  # Elements at a time on a processor: half a megabyte of float32. Even.
_LARGE_PIECE = 1 << 24  # On an accelerator.
_FULL = 1 << 32  # Random numbers are whole numbers below this.


def elements(delta: Delta) -> Tensor:
    """(out, in) float32 elements of a delta, in memory of their own.

    Products are made in float64: the last bits of float32 ones differ between factorisations of one delta,
    and could move an element over a threshold.
    """
    if isinstance(delta, Dense):
        return delta.weight.to(torch.float32, copy=True).contiguous()
    device = delta.up.device
    up, down = delta.up.double() * delta.component_gains().to(device), delta.down.double()
    result = torch.empty((delta.out, delta.in_), dtype=torch.float32, device=device)
    rows = max(1, _piece(device) // max(1, delta.in_))
    for start in range(0, delta.out, rows):
        result[start : start + rows] = up[start : start + rows] @ down
    return result


def pieces(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Equal flat stretches of matrices of one size, one after the other; views."""
    flat = [matrix.view(-1) for matrix in matrices]
    step = _piece(flat[0].device)
    for start in range(0, flat[0].numel(), step):
        yield tuple(vector[start : start + step] for vector in flat)


def keep_largest(matrix: Tensor, density: float) -> None:
    """Zero all but the ``floor(density * n)`` largest magnitudes, at least one.

    Elements as large as the least that is kept are kept as well, so that the choice never depends on the
    order of the elements.
    """
    if density < 1:
        keep_count(matrix, int(density * matrix.numel()))


def keep_count(matrix: Tensor, count: int) -> None:
    """Zero all but the ``count`` largest magnitudes, at least one; see :func:`keep_largest`."""
    (least,) = _order_statistics(matrix, [matrix.numel() - max(1, count)])
    below = float(np.nextafter(np.float32(least), np.float32(0)))
    for (piece,) in pieces(matrix):
        # Zeroes magnitudes up to `below`, many times faster than a mask does.
        piece.copy_(torch.nn.functional.hardshrink(piece, below))


def keep_middle(matrix: Tensor, density: float, gamma: float) -> None:
    """Zero the ``floor(gamma * n)`` largest and the smallest magnitudes until ``floor(density * n)`` stay.

    Where there is no room for both the density counts. Elements as large as one that is kept are kept, and
    where only zeros would be left nothing is dropped.
    """
    if density >= 1:
        return
    count = matrix.numel()
    keep = max(1, int(density * count))
    top = min(int(gamma * count), count - keep)
    least, most = _order_statistics(matrix, [count - keep - top, count - top - 1])
    if most > 0:
        for (piece,) in pieces(matrix):
            piece.masked_fill_(piece.abs() > most, 0.0)
            _drop_below(piece, least)


def _drop_below(piece: Tensor, least: float) -> None:
    """Zero magnitudes below a bound, in one pass: hardshrink zeroes those up to the next smaller number."""
    if least > 0:
        below = float(np.nextafter(np.float32(least), np.float32(0)))
        piece.copy_(torch.nn.functional.hardshrink(piece, below))


def _order_statistics(matrix: Tensor, places: Sequence[int]) -> list[float]:
    """The magnitudes at these places of the rising order, by selection."""
    magnitudes = matrix.abs().view(-1)
    if magnitudes.device.type == "cpu":
        values = magnitudes.numpy()
        values.partition(sorted(set(places)))
        return [float(values[place]) for place in places]
    return [float(magnitudes.kthvalue(place + 1).values) for place in places]


class Draws:
    """Random 32-bit whole numbers for the elements of one LoRA's delta in one layer.

    They come from a counter-based generator (Philox) keyed by seed, layer and stream, so they depend on
    nothing else: not on threads, devices, or what was drawn before.
    """

    def __init__(self, seed: int, layer: str, stream: int):
        key = hashlib.blake2b(f"{seed}\n{layer}\n{stream}".encode(), digest_size=16).digest()
        self._bits = np.random.Philox(key=int.from_bytes(key, "little"))

    def next(self, count: int) -> np.ndarray:
        """(count,) uint32; for several calls to go on where the last ended, count has to be even."""
        return self._bits.random_raw((count + 1) // 2).view(np.uint32)[:count]


def streams(deltas: Sequence[Delta], weights: Sequence[float]) -> list[int]:
    """A number for each input that says which random numbers it gets.

    It is the place among the inputs by size and weight, so the order in which LoRAs are named does not
    matter, nor how they are factored, nor LoRAs of weight 0.
    """

    def key(index: int) -> tuple[bool, float, float]:
        return weights[index] == 0, norm(deltas[index]), weights[index]

    order = sorted(range(len(deltas)), key=key)
    return [order.index(index) for index in range(len(deltas))]


def drop_and_rescale(matrix: Tensor, density: float, draws: Draws) -> None:
    """Keep each element with probability ``density``, then divided by it; otherwise zero it."""
    if density >= 1:
        return
    limit = np.uint32(min(round(density * _FULL), _FULL - 1))
    for (piece,) in pieces(matrix):
        kept = torch.from_numpy((draws.next(piece.numel()) < limit).view(np.uint8))
        piece.mul_(kept.to(piece.device)).mul_(1 / density)


def drop_small_and_rescale(matrix: Tensor, density: float, epsilon: float, draws: Draws) -> None:
    """Keep each element with a probability that grows with its rank in its row, then divided by it.

    It goes from ``density - epsilon`` for the smallest of the row to ``density + epsilon`` for the largest;
    epsilon is cut down where that would leave 0 to 1.
    """
    if density >= 1:
        return
    epsilon = min(epsilon, density, 1 - density)
    columns = matrix.shape[1]
    ranks = np.linspace(0.0, 1.0, columns) if columns > 1 else np.array([0.5])
    chances = density - epsilon + 2 * epsilon * ranks
    limits = np.minimum(np.round(chances * _FULL), _FULL - 1).astype(np.uint32)
    factors = (1 / np.maximum(chances, 1 / _FULL)).astype(np.float32)
    rows = 2 * max(1, _PIECE // columns // 2)
    for start in range(0, matrix.shape[0], rows):
        block = matrix[start : start + rows]
        place = _order_in_rows(block.abs().cpu().numpy())
        limit, factor = np.empty(place.shape, np.uint32), np.empty(place.shape, np.float32)
        np.put_along_axis(limit, place, np.broadcast_to(limits, place.shape), axis=1)
        np.put_along_axis(factor, place, np.broadcast_to(factors, place.shape), axis=1)
        factor *= draws.next(place.size).reshape(place.shape) < limit
        block.mul_(torch.from_numpy(factor).to(block.device))


def _order_in_rows(magnitudes: np.ndarray) -> np.ndarray:
    """(rows, columns) columns of each row in the order of their magnitudes; equals in column order.

    The bits of float32 numbers from 0 up are in their order, so bits and column in one whole number can be
    sorted at once, which is several times faster than an indirect sort.
    """
    packed = magnitudes.view(np.uint32).astype(np.uint64) << np.uint64(32)
    packed |= np.arange(magnitudes.shape[1], dtype=np.uint64)
    packed.sort(axis=1)
    return (packed & np.uint64(0xFFFFFFFF)).astype(np.int64)


def row_space(deltas: Sequence[Delta], weights: Sequence[float]) -> Tensor | None:
    """(in, c) the row space of the weighted sum, largest directions first; None where all inputs are dense.

    An elementwise result has most of its size there, which makes it a good start for truncation.
    """
    pairs = [(delta, weight) for delta, weight in zip(deltas, weights) if isinstance(delta, LowRank)]
    if not pairs:
        return None
    spectrum = decompose(stack([delta for delta, _ in pairs], [weight for _, weight in pairs]))
    return truncate(spectrum, spectrum.rank, torch.float32).down.mT if spectrum.rank else None


def _piece(device: torch.device) -> int:
    return _PIECE if device.type == "cpu" else _LARGE_PIECE
