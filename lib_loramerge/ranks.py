"""Rank rules: how many singular values of a layer are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import OutputError

if TYPE_CHECKING:
    from .delta import Spectrum
    from .recipe import MergeRecipe


def choose(recipe: MergeRecipe, spectrum: Spectrum, *, same: int, conv: bool = False) -> int:
    """Rank to keep in one layer by the recipe's rule. Not for ``size``, which looks at all layers at once.

    Args:
        recipe: Its rank, conv_rank and retain are read.
        spectrum: The layer's singular values.
        same: Largest rank of the inputs in this layer.
        conv: The layer is a k x k convolution, for which ``conv_rank`` counts.

    Returns:
        At most the numerical rank; 0 when nothing is left of the layer.
    """
    if conv and recipe.conv_rank is not None:
        return min(recipe.conv_rank, spectrum.rank)
    if recipe.retain is not None:
        return retaining(spectrum, recipe.retain)
    if recipe.rank == "full":
        return spectrum.rank
    wanted = same if recipe.rank == "same" else int(recipe.rank)
    return min(wanted, spectrum.rank)


def retaining(spectrum: Spectrum, fraction: float) -> int:
    """Smallest rank that keeps the fraction of the Frobenius norm, 0 < fraction <= 1."""
    squares = spectrum.values.numpy() ** 2
    if fraction >= 1 or not len(squares):
        return len(squares)
    kept = np.cumsum(squares)
    return min(len(squares), int(np.searchsorted(kept, fraction**2 * kept[-1] * (1 - 1e-12))) + 1)


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs in a file of limited size, and what its ranks are worth.

    Attributes:
        values: Singular values, descending.
        per_rank: Bytes of one rank: (out + in * kh * kw) * itemsize.
        fixed: Bytes that the layer costs as soon as it has one rank: alpha and header entries.
        least: Rank that it must have at least.
    """

    values: Sequence[float]
    per_rank: int
    fixed: int = 0
    least: int = 0


def allot(layers: Sequence[LayerCost], budget: int) -> list[int]:
    """Ranks of all layers with the least total error in at most ``budget`` bytes of tensors and entries.

    Components are taken by sigma^2 per stored byte, the largest first. A layer's first components go as one
    item where the fixed bytes make that the better bargain.

    Returns:
        One rank per layer, 0 where the layer is left out.

    Raises:
        OutputError: The budget does not hold the ranks that layers must have at least.

    Source: the greedy solution of the fractional knapsack (Dantzig 1957); singular values fall, so a layer's
        components are taken in order by themselves.
    """
    ranks = [min(layer.least, len(layer.values)) for layer in layers]
    left = budget - sum(layer.per_rank * rank + layer.fixed for layer, rank in zip(layers, ranks) if rank)
    if left < 0:
        raise OutputError(
            f"The size limit is too small by {-left / 1e6:.3f} MB for the layers that must be there."
        )
    owner, upto, cost, worth = _items(layers, ranks)
    order = np.lexsort((upto, owner, -worth))
    closed: set[int] = set()
    for item in order.tolist():
        layer = int(owner[item])
        if layer in closed:
            continue
        if cost[item] > left:
            closed.add(layer)
            continue
        ranks[layer] = int(upto[item])
        left -= int(cost[item])
    return ranks


def _items(layers: Sequence[LayerCost], ranks: Sequence[int]) -> tuple[np.ndarray, ...]:
    """All steps up in rank: (layer, rank after it, bytes, sigma^2 per byte)."""
    owners, uptos, costs, worths = [], [], [], []
    for index, (layer, rank) in enumerate(zip(layers, ranks)):
        squares = np.asarray(layer.values, dtype=np.float64)[rank:] ** 2
        if not len(squares):
            continue
        count = np.arange(1, len(squares) + 1)
        first = 1
        if not rank and layer.fixed:
            first = int(np.argmax(np.cumsum(squares) / (layer.fixed + count * layer.per_rank))) + 1
        gain = np.concatenate([[squares[:first].sum()], squares[first:]])
        byte = np.full(len(gain), layer.per_rank, dtype=np.int64)
        byte[0] = first * layer.per_rank + (0 if rank else layer.fixed)
        owners.append(np.full(len(gain), index))
        uptos.append(rank + count[first - 1 :])
        costs.append(byte)
        worths.append(gain / byte)
    if not owners:
        empty = np.zeros(0)
        return empty, empty, empty, empty
    return np.concatenate(owners), np.concatenate(uptos), np.concatenate(costs), np.concatenate(worths)
