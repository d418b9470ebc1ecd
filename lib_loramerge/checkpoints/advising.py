"""What an extraction would cost and lose at each rank, from one pass over both checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median_low

import numpy as np
from torch import Tensor

from .. import models, ranks
from ..analysis.curves import (
    TARGETS,
    RankCurves,
    SizePoint,
    allotted_ranks,
    filled_bytes,
    rank_point,
    shown_ranks,
    tail_of,
)
from ..merge.layout import ITEM_BYTES, FileCosts
from ..report import count_text, percent, relative
from .differing import ExtractSettings, Found, Pair
from .fitting import costs_of, vector_bytes, zeros_cost
from .tensors import takes_zeros


@dataclass(frozen=True)
class AutoPoint:
    """What the rank ``auto`` would choose: as many components of each layer as stand out of the rounding.

    Attributes:
        least, median, most: Of the layers' ranks.
        layers: That have a rank.
        capped: Of these, those that reach the largest rank, and may need more.
    """

    least: int
    median: int
    most: int
    layers: int
    capped: int
    size_bytes: int
    error: float

    def between(self, to: str) -> str:
        """The least and the largest rank, or the one that all have."""
        return f"{self.least}{to}{self.most}" if self.most > self.least else str(self.least)


@dataclass(frozen=True)
class ExtractAdvice(RankCurves):
    """Error and size of a LoRA of two checkpoints' difference at every rank.

    ``uniform`` is what ``--rank`` gives, convolutions in the rank of their own rule; ``allotted`` is what
    ``--size`` gives. Errors are of all matrices of the parts asked for, rounding to the dtype aside.

    ``spectrum`` leaves out convolutions where fewer of their components were looked at.

    Attributes:
        largest: The largest rank that was looked at.
        rounding: Error of a LoRA that lacks the rounding of the two files and nothing else.
        auto: None where nothing stands out of the rounding.
    """

    largest: int
    rounding: float
    auto: AutoPoint | None

    def to_rows(self) -> list[str]:
        """As lines for a terminal."""
        if not self.uniform:
            return []
        rows = ["", "What each rank (--rank) would cost and lose", *self.rank_rows(), *self.target_rows()]
        found = self.auto
        if found is not None:
            rows += [
                "Rank above the rounding (--rank auto)",
                f"  {found.between(' to ')}, median {found.median}, in {count_text(found.layers, 'layer')}: "
                f"{found.size_bytes / 1e6:.2f} MB, error {percent(found.error)}",
                f"  an error of {percent(self.rounding)} is rounding alone, which no LoRA needs to hold",
            ]
            if found.capped:
                rows.append(f"  layers that reach the largest rank (--max-rank): {found.capped}")
        return rows


@dataclass(frozen=True, eq=False)
class _Layer:
    """A matrix that differs, and what its ranks cost and lose.

    Attributes:
        lost: (k + 1,) squared error at each rank.
        whole: Rank from which on the difference itself is smaller, and is written.
        whole_bytes: Bytes of that.
    """

    found: Found
    part: str
    kernel: bool
    cost: ranks.LayerCost
    lost: np.ndarray
    whole: int
    whole_bytes: int


class Survey:
    """The layers of an extraction as they were found in a dry run, to be asked about other ranks.

    Args:
        vectors: Biases and norms by layer.
        texts: Bytes that the metadata take at most.
    """

    def __init__(
        self,
        pair: Pair,
        found: Sequence[Found],
        vectors: Mapping[str, Mapping[str, Tensor] | None],
        texts: int,
    ) -> None:
        matrices = [layer for layer in found if len(pair.shape(layer.name)) > 1]
        values = {layer.name: layer.leading for layer in matrices if layer.leading is not None}
        self._pair, self._matrices = pair, matrices
        self._costs = costs_of(pair, found, values, vectors, texts)
        self._layers = [_layer(pair, x, self._costs.layers[x.name]) for x in matrices if x.name in values]
        self._total = sum(layer.exact for layer in matrices)
        # What no rank of the others changes: the difference of layers that differ by rounding.
        self._equal = sum(layer.exact for layer in matrices if layer.name not in values)
        self._zeros_costs = self._zeros(vectors)

    def size_bytes(self) -> int:
        """Bytes of the LoRA that was asked for, at most."""
        size, _ = self._point([_written_rank(layer) for layer in self._layers])
        return size

    def advice(self) -> ExtractAdvice:
        """Everything that can be said of ranks."""
        settings = self._pair.settings
        largest = settings.most_advised
        top = min(largest, max((len(layer.lost) - 1 for layer in self._layers), default=0))
        chosen = None if settings.measured or not top else min(int(settings.rank), top)
        at = {rank: self._point(self._limits(settings.at(rank))) for rank in range(1, top + 1)}
        points = shown_ranks(top, chosen)
        sized = self._sized(replace(settings.at(1), size=1.0, max_rank=settings.max_rank))
        beyond = self._total - sum(layer.tail(0) for layer in sized.layers.values())
        budget = filled_bytes(sized, settings.size) if sized.layers else None
        reached = self._reached({rank: lost for rank, (_, lost) in at.items()}, sized, beyond)
        return ExtractAdvice(
            uniform=[rank_point(rank, *at[rank], self._total) for rank in points],
            allotted=[
                SizePoint(size, relative(tail_of(sized, own) + beyond, self._total))
                for size, own in allotted_ranks(sized, budget).items()
            ],
            smallest_rank={target: rank for target, (rank, _) in reached.items()},
            smallest_size={target: size for target, (_, size) in reached.items()},
            kept_by_block=self._kept_by_block(points),
            spectrum=self._spectrum(top),
            chosen_rank=chosen,
            chosen_bytes=budget,
            largest=largest,
            rounding=relative(min(self._total, sum(x.noise for x in self._matrices if x.exact)), self._total),
            auto=self._auto(),
        )

    def _limits(self, settings: ExtractSettings) -> list[int]:
        """The largest rank of each layer by these settings."""
        limits = settings.limit(False), settings.limit(True)
        return [min(limits[layer.kernel], len(layer.lost) - 1) for layer in self._layers]

    def _zeros(self, vectors: Mapping[str, Mapping[str, Tensor] | None]) -> dict[str, ranks.LayerCost]:
        """What layers cost that are written without a change: to complete a group, or beside a bias."""
        pair, found = self._pair, {layer.found.name for layer in self._layers}
        zeros = {name: cost for name, cost in self._costs.layers.items() if name not in found}
        for layer in self._matrices:
            name = layer.name
            if name not in found and vectors.get(name) and takes_zeros(pair, name):
                cost = zeros_cost(pair, name, name)
                zeros[name] = replace(cost, fixed=cost.fixed + vector_bytes(vectors[name]))
        return zeros

    def _point(self, chosen: Sequence[int]) -> tuple[int, float]:
        """Bytes and squared error of a LoRA with these ranks of the layers."""
        most: dict[str, int] = {}
        if self._costs.one_rank:  # All layers of a component are filled up to its largest rank.
            for layer, rank in zip(self._layers, chosen, strict=True):
                most[layer.part] = max(most.get(layer.part, 0), rank)
        size, lost = self._costs.fixed, self._equal
        for name, cost in self._zeros_costs.items():
            size += cost.bytes(most.get(models.component(name), 1))
        for layer, rank in zip(self._layers, chosen, strict=True):
            lost += float(layer.lost[rank])
            if rank >= layer.whole:
                size += layer.cost.fixed + layer.whole_bytes
            elif rank:
                size += layer.cost.bytes(most.get(layer.part, rank))
        return size, lost

    def _sized(self, settings: ExtractSettings) -> FileCosts:
        """What a file of limited size allots."""
        limits = self._limits(settings)
        layers = {
            layer.found.name: replace(layer.cost, values=layer.cost.values[:limit])
            for layer, limit in zip(self._layers, limits, strict=True)
        }
        return replace(self._costs, layers={**self._costs.layers, **layers})

    def _reached(
        self, lost: Mapping[int, float], sized: FileCosts, beyond: float
    ) -> dict[str, tuple[int, int]]:
        """Error to the smallest rank and the smallest file that stay within it, where both can."""
        reached = {}
        for target in TARGETS:
            allowed = target**2 * self._total
            rank = next((rank for rank, own in lost.items() if own <= allowed), None)
            if rank and beyond <= allowed:
                layers = list(sized.layers.values())
                size = ranks.smallest(layers, allowed - beyond, one_rank=sized.one_rank)
                reached[f"{target:g}"] = rank, sized.fixed + size
        return reached

    def _kept_by_block(self, points: Sequence[int]) -> dict[str, list[float]]:
        settings, pair = self._pair.settings, self._pair
        exact: dict[str, float] = {}
        kept: dict[str, np.ndarray] = {}
        block_of = {x.name: models.block(pair.identity, x.name) or "other" for x in self._matrices}
        for matrix in self._matrices:
            exact[block_of[matrix.name]] = exact.get(block_of[matrix.name], 0.0) + matrix.exact
        limits = [self._limits(settings.at(rank)) for rank in points]
        for layer, own in zip(
            self._layers, np.array(limits, dtype=np.int64).reshape(len(points), len(self._layers)).T
        ):
            block = block_of[layer.found.name]
            kept[block] = kept.get(block, np.zeros(len(points))) + layer.found.exact - layer.lost[own]
        return {
            block: np.sqrt(np.maximum(0.0, kept[block]) / exact[block]).tolist() for block in sorted(kept)
        }

    def _spectrum(self, top: int) -> list[float]:
        squares = np.zeros(top)
        every = self._pair.settings.at(top or 1).limit(True) >= top
        for layer in self._layers:
            if layer.kernel and not every:  # Its values end at the rank of convolutions: that is no drop.
                continue
            own = np.square(np.asarray(layer.cost.values, dtype=np.float64)[:top])
            squares[: len(own)] += own
        return np.sqrt(squares / self._total).tolist() if self._total else []

    def _auto(self) -> AutoPoint | None:
        settings = replace(self._pair.settings.at(1), rank="auto", max_rank=self._pair.settings.max_rank)
        limits = self._limits(settings)
        chosen = [min(layer.found.above, limit) for layer, limit in zip(self._layers, limits, strict=True)]
        some = [rank for rank in chosen if rank]
        if not some:
            return None
        size, lost = self._point(chosen)
        return AutoPoint(
            least=min(some),
            median=median_low(some),
            most=max(some),
            layers=len(some),
            capped=sum(rank >= settings.limit(x.kernel) for rank, x in zip(chosen, self._layers) if rank),
            size_bytes=size,
            error=relative(lost, self._total),
        )


def _written_rank(layer: _Layer) -> int:
    """The rank of a layer as it was asked for; a difference that is written has none."""
    written = layer.found.lost < layer.found.exact
    return layer.found.rank or (layer.whole if written else 0)


def _layer(pair: Pair, found: Found, cost: ranks.LayerCost) -> _Layer:
    squares = np.square(np.asarray(cost.values, dtype=np.float64))
    beyond = max(0.0, found.exact - float(squares.sum()))
    lost = np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]]) + beyond
    out, *inner = pair.shape(found.name)
    numbers = out * math.prod(inner)
    whole = math.ceil(numbers / (out + math.prod(inner))) if models.layers(pair.identity) else len(lost)
    lost[whole:] = 0.0
    return _Layer(
        found=found,
        part=models.component(found.name),
        kernel=pair.has_kernel(found.name),
        cost=cost,
        lost=lost,
        whole=whole,
        whole_bytes=numbers * ITEM_BYTES[pair.settings.dtype],
    )
