"""Error and file size against the rank, of a merge as of the difference of two checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import ranks
from ..merge.layout import FileCosts
from ..report import percent, relative

TARGETS = (0.01, 0.05, 0.10)
# Points of the curve of files with ranks allotted across layers.
_SIZE_POINTS = 24
# LoRAs up to which the share kept of each is printed at every rank.
_NAMED = 4


@dataclass(frozen=True)
class RankPoint:
    """One rank for all layers: what it costs and what it loses.

    Attributes:
        error: Relative Frobenius error of the cut, rounding aside.
        kept: Part of the norm that is kept, kept^2 + error^2 = 1; in JSON only, as it reads like a share.
        kept_of: Name of each LoRA to the share of it that is kept, as the merge's report states it. Empty
            where that takes far longer than the singular values: in modes that choose single elements, and
            for whole matrices beside factors.
    """

    rank: int
    size_bytes: int
    error: float
    kept: float
    kept_of: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SizePoint:
    """A file size with the ranks allotted for the least total error; ``kept_of`` as of a rank."""

    size_bytes: int
    error: float
    kept_of: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RankCurves:
    """Error and size against the rank.

    Attributes:
        smallest_rank: Error, as a fraction, to the smallest rank for all that stays below it. Errors that no
            rank looked at stays below are not in it.
        smallest_size: The same to the smallest file in bytes, ranks allotted.
        kept_by_block: Block id to the share of its norm kept at each rank of ``uniform``.
        spectrum: For each component of the layers, the strongest first, its share of the whole norm.
        chosen_rank: The rank that is asked for of all layers, if it is one; it is among ``uniform``.
        chosen_bytes: The size that is asked for, as far as there is something to fill it with; it is among
            ``allotted``.
    """

    uniform: Sequence[RankPoint]
    allotted: Sequence[SizePoint]
    smallest_rank: Mapping[str, int]
    smallest_size: Mapping[str, int]
    kept_by_block: Mapping[str, Sequence[float]]
    spectrum: Sequence[float]
    chosen_rank: int | None
    chosen_bytes: int | None

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of the LoRAs of which it is known what is kept; () for fewer than two."""
        names = tuple(self.uniform[0].kept_of) if self.uniform else ()
        return names if len(names) > 1 else ()

    def rank_rows(self) -> list[str]:
        """The ranks as lines of a table, for a terminal."""
        return [
            f"{'rank':>6}{'size':>12}{'error':>10}{'  kept of each LoRA' if self.shared else ''}",
            *(
                f"{p.rank:>6}{p.size_bytes / 1e6:>9.2f} MB {percent(p.error):>9}{shares_text(p.kept_of)}"
                for p in self.uniform
            ),
        ]

    def target_rows(self) -> list[str]:
        """What some errors take, as lines; none where no rank stays below any of them."""
        rows = [
            f"  {percent(float(target)):>6}: rank {rank}, or {self.smallest_size[target] / 1e6:.2f} MB "
            "with ranks allotted (--size)"
            for target, rank in self.smallest_rank.items()
        ]
        return ["Smallest rank or file for an error of at most", *rows] if rows else []


def weakest(kept_of: Mapping[str, float]) -> tuple[str, float] | None:
    """The LoRA of which least is kept, and its share; None where that is not known."""
    return min(kept_of.items(), key=lambda entry: entry[1], default=None)


def shares_text(kept_of: Mapping[str, float]) -> str:
    """Shares of two LoRAs or more, to go on with after an error; of many the least alone."""
    if len(kept_of) < 2:
        return ""
    least = weakest(kept_of)
    shown = kept_of.items() if len(kept_of) <= _NAMED or least is None else [least]
    texts = [f"{Path(name).stem} {percent(max(0.0, share))}" for name, share in shown]
    return f"  {'least: ' if len(texts) < len(kept_of) else ''}{', '.join(texts)}"


def shown_ranks(top: int, *chosen: int | None) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16 ... up to the largest rank, which is always there, and the chosen ones."""
    ranks_shown = (
        {1, 3, top, *(rank or top for rank in chosen)}
        | {1 << bit for bit in range(12)}
        | {3 << bit for bit in range(11)}
    )
    return sorted(rank for rank in ranks_shown if 0 < rank <= top)


def bytes_of(costs: FileCosts, rank: int | None) -> int:
    """Bytes of all layers cut to one rank, or with all their ranks; those of no rank are left out."""
    if costs.one_rank:
        layers = [cost for cost in costs.layers.values() if len(cost.values) or cost.least]
        most = max((len(cost.values) for cost in layers), default=0)
        return sum(cost.bytes(most if rank is None else min(rank, most)) for cost in layers)
    return sum(
        cost.bytes(len(cost.values) if rank is None else min(rank, len(cost.values)))
        for cost in costs.layers.values()
    )


def allotted_ranks(costs: FileCosts, wanted: int | None) -> dict[int, list[int]]:
    """Sizes of files from small to whole, and the ranks of all layers in each."""
    layers = list(costs.layers.values())
    largest = bytes_of(costs, None)
    if not largest:
        return {}
    least = max(largest // 64, ranks.least_bytes(layers, one_rank=costs.one_rank))
    budgets = {int(size) for size in np.geomspace(least, largest, _SIZE_POINTS)}
    sizes = sorted(budgets | ({wanted - costs.fixed} if wanted else set()))
    chosen = ranks.allot_each(layers, sizes, one_rank=costs.one_rank)
    return {costs.fixed + size: own for size, own in zip(sizes, chosen, strict=True)}


def filled_bytes(costs: FileCosts, size: float | None) -> int | None:
    """Bytes of a file that may have ``size`` MB, as far as there is something to fill it with."""
    if size is None:
        return None
    least = ranks.least_bytes(list(costs.layers.values()), one_rank=costs.one_rank)
    wanted = min(int(size * 1_000_000) - costs.fixed, bytes_of(costs, None))
    return costs.fixed + max(1, least, wanted)


def tail_of(costs: FileCosts, chosen: Sequence[int]) -> float:
    """Squared error of the layers at these ranks."""
    return sum(layer.tail(rank) for layer, rank in zip(costs.layers.values(), chosen, strict=True))


def rank_point(
    rank: int, size_bytes: int, lost: float, total: float, kept_of: Mapping[str, float] | None = None
) -> RankPoint:
    """A point from squared norms of what is lost and of all there is."""
    share = lost / total if total else 0.0
    return RankPoint(rank, size_bytes, relative(lost, total), max(0.0, 1 - share) ** 0.5, kept_of or {})
