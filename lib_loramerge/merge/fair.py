"""Ranks and directions for the LoRA of which least would be kept: ``--fair`` and ``--keep``.

For weights of the LoRAs the best directions of every layer are known (:mod:`lib_loramerge.delta.fair`), and
with them the best ranks. What is left is to find the weights with which the LoRA that is kept least is kept
most: a LoRA that is kept less than the others gets more weight, until no step helps. Each counts twice: by
what the file keeps of it, and by what the directions hold of it alone.

Source: Lagrangian relaxation of the maximum of the least share; the shares are linear in what is chosen, so
    the relaxed problem is convex in the weights, and only the steps of whole ranks keep it from being exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .. import ranks
from ..delta import (
    Dense,
    LowRank,
    Spectrum,
    added_by_components,
    decompose,
    decompose_dense,
    directions,
    lost_of_inputs,
    truncate,
)
from .layer import Merger
from .layout import FileCosts, LayerPlan, MergePlan, file_costs

_STEPS, _FIRST, _SHRINK = 32, 2.0, 0.87
_GAIN = 2e-3  # A share that is larger by less is not worth another cut than the plain one.
_SURE = 2e-6  # What float32 and rounding may take of a share.


@dataclass(frozen=True, eq=False)
class _Looked:
    """What is known of a layer.

    Attributes:
        spectrum: Its singular values; None where it is written whole.
        own: (2 n,) squared norm of each LoRA's part, twice.
        shift: (2 n,) what is to be added to the shares: all of them together make the inner product with the
            sum, and 1 is the share of a LoRA of which nothing is lacking.
        matrices: (2 n, m, m) float32, see ``Directions``; None where the layer keeps its singular vectors:
        shares: (2 n, k) what each of these adds to each LoRA.
    """

    spectrum: Spectrum | None
    own: np.ndarray
    shift: np.ndarray | float = 0.0
    matrices: Tensor | None = None
    shares: np.ndarray | None = None


@dataclass(frozen=True)
class Allotment:
    """Ranks of the layers by name, and the weights for their directions; None is the plain cut."""

    ranks: Mapping[str, int]
    weights: tuple[float, ...] | None = None


def look(merger: Merger, layer: LayerPlan) -> _Looked:
    """Read and merge a layer for :func:`allot`."""
    count = len(set(merger.loras))
    nothing = np.zeros(2 * count)
    if layer.vector:
        return _Looked(None, nothing)
    given = merger.given(layer)
    if not given:
        return _Looked(None, nothing)
    merged, _ = merger.combined(layer, given)
    assert merged is not None
    deltas, weights = [entry.delta for entry in given], [entry.weight for entry in given]
    owners = merger.owners(layer, given)
    if isinstance(merged, LowRank) and len(given) > 1 and len(merged.parts) == len(given):
        found = directions(merged, owners, count)
        if found is not None:
            spectrum = decompose(merged, small=found.small, vectors=False)
            apart = found.own - found.matrices[:count].diagonal(dim1=1, dim2=2).sum(1)
            shift = np.concatenate([apart.numpy(), np.zeros(count)])
            return _Looked(spectrum, np.tile(found.own.numpy(), 2), shift, found.matrices.float())
    whole, signed = (column.numpy() for column in lost_of_inputs(deltas, weights, None).T)
    own, apart_of = np.zeros(count), np.zeros(count)
    for owner in set(owners):
        picked = [place for place, other in enumerate(owners) if other == owner]
        own[owner] = sum(np.sign(weights[place]) * max(0.0, signed[place]) ** 0.5 for place in picked) ** 2
        apart_of[owner] = own[owner] - whole[picked].sum()
    own = np.tile(own, 2)
    if not isinstance(merged, LowRank) and layer.rank is None:
        return _Looked(None, own)
    spectrum = decompose_dense(merged) if isinstance(merged, Dense) else decompose(merged)
    shares = np.zeros((count, spectrum.rank))
    if len(given) == 1:
        shares[owners[0]] = spectrum.values.numpy() ** 2
    elif spectrum.rank:
        added = added_by_components(deltas, weights, truncate(spectrum, spectrum.rank)).numpy()
        for place, owner in enumerate(owners):
            shares[owner] += added[place]
    known = replace(spectrum, source=None, mixing=None, small=None)
    return _Looked(known, own, np.tile(apart_of, 2), None, np.tile(shares, (2, 1)))


def allot(plan: MergePlan, looked: Sequence[_Looked], name: str) -> Allotment:
    """Ranks for ``--keep``, or for ``--rank`` and ``--size`` with ``--fair``.

    Args:
        looked: Of ``plan.layers``.
        name: Stem of the file.

    Raises:
        OutputError: The size is too small.
    """
    search = _Search(plan, looked, file_costs(plan, [entry.spectrum for entry in looked], name))
    best, weights = search.best()
    return Allotment(best, None if weights is None else tuple(weights.tolist()))


class _Search:
    def __init__(self, plan: MergePlan, looked: Sequence[_Looked], costs: FileCosts) -> None:
        self.plan, self.costs = plan, costs
        self.own = np.sum([entry.own for entry in looked], axis=0)
        self.there = self.own > 0
        pairs = [(layer, entry) for layer, entry in zip(plan.layers, looked, strict=True) if entry.spectrum]
        self.layers, self.looked = [layer for layer, _ in pairs], [entry for _, entry in pairs]
        self.base = self.own - np.sum([entry.own - entry.shift for entry in self.looked], axis=0)

    def best(self) -> tuple[dict[str, int], np.ndarray | None]:
        """Ranks, and the weights for the directions; None where the plain cut is as good."""
        count = len(self.own) // 2
        there, own = self.there[:count], np.where(self.there, self.own, 1.0)[:count]
        plain_weights = np.concatenate([np.ones(count), np.zeros(count)])
        plain = self.tried(plain_weights)
        if there.sum() < 2:
            return plain[1], None
        place, step = np.tile(-np.log(own), 2), _FIRST
        best, chosen = plain, plain_weights
        for _ in range(_STEPS):
            weights = self._weights(place)
            found = self.tried(weights)
            if found[0] > best[0]:
                best, chosen = found, weights
            apart = np.where(self.there, found[2][self.there].mean() - found[2], 0.0)
            if np.abs(apart).max() < 1e-4:
                break
            place, step = place + step * apart / np.abs(apart).max(), step * _SHRINK
        if best[0] <= plain[0] + (_GAIN if self.plan.recipe.keep is None else 0):
            return plain[1], None
        return best[1], chosen

    def _weights(self, logs: np.ndarray) -> np.ndarray:
        return np.where(self.there, np.exp(logs - logs[self.there].max()), 0.0)

    def tried(self, weights: np.ndarray) -> tuple[float, dict[str, int], np.ndarray]:
        """(how good it is, ranks, share kept of each LoRA, measured both ways) with these weights."""
        gains, shares = self._gains(weights)
        costs = [
            replace(self.costs.layers[layer.layer], values=np.sqrt(gain))
            for layer, gain in zip(self.layers, gains, strict=True)
        ]
        chosen = self._ranks(costs, shares)
        kept = self.base + sum(
            (share[:, :rank].sum(1) for share, rank in zip(shares, chosen)), np.zeros_like(self.own)
        )
        kept = np.where(self.there, kept / np.where(self.there, self.own, 1.0), 1.0)
        ranked = {layer.layer: rank for layer, rank in zip(self.layers, chosen, strict=True)}
        if self.plan.recipe.keep is None:
            return float(kept.min()), ranked, kept
        total = sum(cost.bytes(rank) for cost, rank in zip(costs, chosen, strict=True))
        return -float(total), ranked, kept

    def _gains(self, weights: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """For each layer what its directions add, falling, and what they add to each LoRA."""
        gains: list[np.ndarray] = [np.zeros(0)] * len(self.looked)
        shares: list[np.ndarray] = [np.zeros(0)] * len(self.looked)
        alike: dict[int, list[int]] = {}
        for index, entry in enumerate(self.looked):
            if entry.matrices is not None:
                alike.setdefault(entry.matrices.shape[1], []).append(index)
            elif entry.shares is not None:
                gain = np.minimum.accumulate(np.maximum(weights @ entry.shares, 0.0))
                gains[index], shares[index] = gain, entry.shares
        factors = torch.tensor(weights, dtype=torch.float32)[:, None, None]
        for indices in alike.values():
            for index in indices:
                matrices = self.looked[index].matrices
                assert matrices is not None
                values, vectors = torch.linalg.eigh((factors * matrices).sum(0))
                vectors = vectors.flip(1)
                added = (vectors * (matrices @ vectors)).sum(1)
                gains[index] = values.flip(0).clamp(min=0).double().numpy()
                shares[index] = added.double().numpy()
        return gains, shares

    def _ranks(self, costs: Sequence[ranks.LayerCost], shares: Sequence[np.ndarray]) -> list[int]:
        recipe, one_rank = self.plan.recipe, self.costs.one_rank
        if recipe.size is not None:
            budget = self.costs.budget(recipe.size, ranks.least_bytes(costs, one_rank=one_rank))
            found = ranks.allot(costs, budget, one_rank=one_rank)
            return [min(rank, len(cost.values)) for rank, cost in zip(found, costs, strict=True)]
        if recipe.keep is not None:
            wanted = (recipe.keep + _SURE * (recipe.keep < 1)) * self.own - self.base
            return ranks.keeping(costs, shares, np.where(self.there, wanted, -np.inf), one_rank=one_rank)
        found = []
        for layer, cost in zip(self.layers, costs, strict=True):
            bounded = layer.bounded(self.plan.method)
            rank = ranks.asked(recipe, same=layer.same_rank, conv=bool(layer.kernel), bounded=bounded)
            found.append(len(cost.values) if rank is None else min(rank, len(cost.values)))
        return found
