"""Rank rules: how many singular values of a layer are kept, and how ranks are allotted to a file's bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import OutputError

if TYPE_CHECKING:
    from .delta import Spectrum
    from .recipe import MergeRecipe


def asked(recipe: MergeRecipe, *, same: int | None, conv: bool = False, bounded: bool = True) -> int | None:
    """The number that a recipe's rule states for a layer, whatever its singular values are.

    Args:
        recipe: Its rank, conv_rank and the rules beside them are read.
        same: Largest rank of the inputs in this layer; None where one of them is stored whole.
        conv: The layer is a k x k convolution, to which ``conv_rank`` applies.
        bounded: The inputs' ranks bound that of the layer's result, so that ``auto`` can keep all of it.

    Returns:
        None where all ranks are kept, or the singular values decide (``retain``, ``size``).
    """
    if conv and recipe.conv_rank is not None:
        return recipe.conv_rank
    if recipe.own_ranks or recipe.rank == "full":
        return None
    if recipe.rank == "auto":
        return None if bounded else same
    return same if recipe.rank == "same" else int(recipe.rank)


def foreseen(
    recipe: MergeRecipe, *, most: int, same: int | None, conv: bool, dense: bool, bounded: bool
) -> int | None:
    """The largest rank that :func:`choose` can give a layer; None where the layer will be written whole.

    Args:
        most: The rank that holds all of the layer's result.
        same, conv, bounded: As for :func:`asked`.
        dense: Some input is not a low-rank product.
    """
    rank = asked(recipe, same=same, conv=conv, bounded=bounded)
    if rank is not None:
        return min(rank, most)
    return None if dense and not recipe.own_ranks else most


def choose(
    recipe: MergeRecipe, spectrum: Spectrum, *, same: int | None, conv: bool = False, bounded: bool = True
) -> int:
    """Rank to keep in one layer by the recipe's rule. Not for ``size``, which looks at all layers at once.

    Args:
        spectrum: The layer's singular values.
        same, conv, bounded: As for :func:`asked`.

    Returns:
        At most the numerical rank; 0 when nothing is left of the layer.
    """
    if recipe.retain is not None:
        return retaining(spectrum, recipe.retain)
    rank = asked(recipe, same=same, conv=conv, bounded=bounded)
    return spectrum.rank if rank is None else min(rank, spectrum.rank)


def retaining(spectrum: Spectrum, fraction: float) -> int:
    """Smallest rank that keeps the fraction of the Frobenius norm, 0 < fraction <= 1."""
    squares = spectrum.values.numpy() ** 2
    if fraction >= 1 or not len(squares):
        return len(squares)
    kept = np.cumsum(squares)
    wanted = fraction**2 * (kept[-1] + spectrum.beyond)
    return min(len(squares), int(np.searchsorted(kept, wanted * (1 - 1e-12))) + 1)


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs in a file of limited size, and what its ranks are worth.

    Attributes:
        values: Singular values, descending.
        per_rank: Bytes of one rank: (out + in * kh * kw) * itemsize.
        fixed: Bytes that the layer costs as soon as it has one rank: alpha and header entries.
        least: Rank that it must have at least.
    """

    values: Sequence[float] | np.ndarray
    per_rank: int
    fixed: int = 0
    least: int = 0

    def bytes(self, rank: int) -> int:
        """Bytes of the layer with this many ranks, none of them more than it has."""
        return self.fixed + rank * self.per_rank if rank else 0

    def tail(self, rank: int) -> float:
        """Squared error of keeping this many ranks."""
        return float(np.square(np.asarray(self.values[rank:], dtype=np.float64)).sum())


def allot(layers: Sequence[LayerCost], budget: int, *, one_rank: bool = False) -> list[int]:
    """Ranks of all layers with the least total error in at most ``budget`` bytes of tensors and entries.

    Components are taken by sigma^2 per stored byte, the largest first. A layer's first components go as one
    item where the fixed bytes make that the better bargain.

    Args:
        one_rank: All layers are stored in one rank, the smaller ones filled up with zeros.

    Returns:
        One rank per layer, 0 where the layer is left out.

    Raises:
        OutputError: The budget does not hold the ranks that layers must have at least.

    Source: the greedy solution of the fractional knapsack (Dantzig 1957); singular values fall, so a layer's
        components are taken in order by themselves.
    """
    return allot_each(layers, [budget], one_rank=one_rank)[0]


def allot_each(
    layers: Sequence[LayerCost], budgets: Sequence[int], *, one_rank: bool = False
) -> list[list[int]]:
    """:func:`allot` for several budgets; what each step costs and is worth is found once."""
    if one_rank:
        return [[_one_rank_within(layers, budget)] * len(layers) for budget in budgets]
    ranks = _least_ranks(layers)
    spent = sum(layer.bytes(rank) for layer, rank in zip(layers, ranks))
    owner, upto, cost, _ = _items(layers, ranks)
    return [_within(ranks, budget - spent, owner, upto, cost) for budget in budgets]


def _within(
    ranks: Sequence[int], left: int, owner: np.ndarray, upto: np.ndarray, cost: np.ndarray
) -> list[int]:
    """Ranks after the steps of :func:`_items` that ``left`` bytes hold; a step too large ends its layer's."""
    if left < 0:
        raise OutputError(
            "The size limit is too small by {missing} MB for the layers that must be there.",
            f"{-left / 1e6:.3f}",
        )
    chosen, spent = np.array(ranks, dtype=np.int64), np.cumsum(cost)
    fit = int(np.searchsorted(spent, left, side="right"))  # the steps before the first that is too large
    np.maximum.at(chosen, owner[:fit], upto[:fit])
    left -= int(spent[fit - 1]) if fit else 0
    least = int(cost[fit:].min(initial=left + 1))
    closed: set[int] = set()
    for layer, rank, bytes_ in zip(owner[fit:].tolist(), upto[fit:].tolist(), cost[fit:].tolist()):
        if left < least:
            break
        if bytes_ > left:
            closed.add(layer)
        elif layer not in closed:
            chosen[layer] = rank
            left -= bytes_
    return chosen.tolist()


def smallest(layers: Sequence[LayerCost], error_sq: float, *, one_rank: bool = False) -> int:
    """Bytes with which :func:`allot` stays within a total squared error."""
    total = sum(layer.tail(0) for layer in layers)
    allowed = error_sq + 1e-12 * total
    if one_rank:
        top = max((len(layer.values) for layer in layers), default=0)
        rank = next(r for r in range(1, top + 2) if sum(layer.tail(r) for layer in layers) <= allowed)
        return sum(layer.bytes(rank) for layer in layers)
    ranks = _least_ranks(layers)
    _, _, cost, gain = _items(layers, ranks)
    spent = sum(layer.bytes(rank) for layer, rank in zip(layers, ranks)) + np.cumsum([0, *cost])
    left = sum(layer.tail(rank) for layer, rank in zip(layers, ranks)) - np.cumsum([0.0, *gain])
    return int(spent[min(int((left > allowed).sum()), len(cost))])


def keeping(
    layers: Sequence[LayerCost], shares: Sequence[np.ndarray], wanted: np.ndarray, *, one_rank: bool = False
) -> list[int]:
    """Ranks with the fewest bytes, steps taken as in :func:`allot`, that add enough to each LoRA.

    Args:
        shares: For each layer, (n, k) what its components add to each LoRA.
        wanted: (n,) what they have to add up to; all ranks are taken where that is more than there is.
    """
    sums = [np.cumsum(np.pad(share, ((0, 0), (1, 0))), axis=1) for share in shares]
    if one_rank:
        top = max((len(layer.values) for layer in layers), default=0)
        for rank in range(1, top + 1):
            have = np.sum([own[:, min(rank, own.shape[1] - 1)] for own in sums], axis=0)
            if (have >= wanted).all():
                return [min(rank, len(layer.values)) for layer in layers]
        return [len(layer.values) for layer in layers]
    ranks = _least_ranks(layers)
    have = np.sum([own[:, rank] for own, rank in zip(sums, ranks)], axis=0)
    owner, upto, _, _ = _items(layers, ranks)
    for layer, rank in zip(owner.tolist(), upto.tolist()):
        if (have >= wanted).all():
            break
        have = have + sums[layer][:, rank] - sums[layer][:, ranks[layer]]
        ranks[layer] = rank
    return ranks


def least_bytes(layers: Sequence[LayerCost], *, one_rank: bool = False) -> int:
    """The smallest budget with which :func:`allot` keeps anything; 0 when there is nothing to keep."""
    if one_rank:
        return sum(layer.bytes(1) for layer in layers)
    required = sum(layer.bytes(rank) for layer, rank in zip(layers, _least_ranks(layers)))
    return required or min((layer.bytes(1) for layer in layers if len(layer.values)), default=0)


def _least_ranks(layers: Sequence[LayerCost]) -> list[int]:
    return [min(layer.least, len(layer.values)) for layer in layers]


def _one_rank_within(layers: Sequence[LayerCost], budget: int) -> int:
    """The largest rank that all layers can have."""
    fixed, per_rank = sum(layer.fixed for layer in layers), sum(layer.per_rank for layer in layers)
    most = (budget - fixed) // per_rank if per_rank else 0
    if most < 1:
        raise OutputError(
            "This spelling stores all layers in one rank; rank 1 takes {least} MB. Allow a larger file, or "
            "use the kohya dialect.",
            f"{(fixed + per_rank) / 1e6:.3f}",
        )
    return int(most)


def _items(layers: Sequence[LayerCost], ranks: Sequence[int]) -> tuple[np.ndarray, ...]:
    """All steps up in rank, the best bargain first: (layer, rank after it, bytes, sum of sigma^2)."""
    owners, uptos, costs, gains = [], [], [], []
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
        gains.append(gain)
    if not owners:
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty, empty, np.zeros(0)
    owner, upto, cost, gain = map(np.concatenate, (owners, uptos, costs, gains))
    order = np.lexsort((upto, owner, -gain / cost))
    return owner[order], upto[order], cost[order], gain[order]
