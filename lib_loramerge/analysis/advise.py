"""What each rank would cost and lose, told before merging from the singular values alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import accumulate
from time import perf_counter
from typing import Any

import numpy as np

from .. import ranks
from ..delta import Dense, Spectrum, available_cores, norm
from ..merge.layer import Merger, open_merger
from ..merge.plan import ALPHA_BYTES, ITEM_BYTES, LayerPlan, MergePlan, entries_bytes, metadata_bytes
from ..merge.run import Progress, for_each_layer
from ..methods import METHODS
from ..report import percent
from .compare import norms_by_block

TARGETS = (0.01, 0.05, 0.10)
# Points of the curve of files with ranks allotted across layers.
_SIZE_POINTS = 24
# Nanoseconds of one core for layers that are formed whole: to merge an element of one LoRA, and for a
# multiplication of the Gram matrix and of its singular values. Processors differ; this is to say minutes.
_ELEMENT, _GRAM, _VALUES = 25.0, 0.05, 0.1
# Modes whose result is another one at each --rank: the curve is that of cutting the present one further.
_MADE_FOR_RANK = ("tsv", "ctm")
# Part of the work after which the time it took tells more than the estimate does.
_TELLING = 0.02


@dataclass(frozen=True)
class RankPoint:
    """One rank for all layers: what it costs and what it loses.

    Attributes:
        error: Relative Frobenius error of the cut, rounding aside.
        kept: Share of the norm that is kept.
    """

    rank: int
    size_bytes: int
    error: float
    kept: float


@dataclass(frozen=True)
class SizePoint:
    """A file size with the ranks allotted for the least total error."""

    size_bytes: int
    error: float


@dataclass(frozen=True)
class AdviceReport:
    """Error and size against the rank for one recipe.

    Attributes:
        smallest_rank: Error, as a fraction, to the smallest rank for all that stays below it.
        smallest_size: The same to the smallest file in bytes, ranks allotted.
        numerical_rank: Largest rank any layer really has; more keeps nothing more.
        whole_bytes: Bytes that no rank changes: header, norms, layers written whole.
        kept_by_block: Block id to the share of its norm kept at each rank of ``uniform``.
        norm_by_block: Block id to the norm of what the mode makes of it, before any rank is cut.
        spectrum: For each component of the layers, the strongest first, its share of the whole norm.
        chosen_rank: The rank that the recipe gives all layers, if it is one; it is among ``uniform``.
        chosen_bytes: The size that the recipe asks for, as far as there is something to fill it with; it is
            among ``allotted``.
    """

    base_model: str
    mode: str
    dtype: str
    layers: int
    uniform: Sequence[RankPoint]
    allotted: Sequence[SizePoint]
    smallest_rank: Mapping[str, int]
    smallest_size: Mapping[str, int]
    numerical_rank: int
    mean_rank: float
    whole_bytes: int
    kept_by_block: Mapping[str, Sequence[float]]
    norm_by_block: Mapping[str, float] = field(default_factory=dict)
    spectrum: Sequence[float] = ()
    chosen_rank: int | None = None
    chosen_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        whole = "the exact sum" if METHODS[self.mode].exact else f"mode {self.mode}'s own result"
        rows = [
            f"{self.base_model}, mode {self.mode}, {self.dtype}, {self.layers} layers",
            f"error: what a rank loses of {whole}; kept: what it keeps. Both as parts of its norm.",
            "A LoRA far weaker than the others can be lost in a small error; see `loramerge compare`.",
            *(
                ["This mode makes its result for the rank that is asked for: give the wanted one as --rank."]
                if self.mode in _MADE_FOR_RANK
                else []
            ),
            f"True rank: up to {self.numerical_rank}, {self.mean_rank:.1f} on average",
            f"{'rank':>6}{'size':>12}{'error':>10}{'kept':>10}",
            *(
                f"{p.rank:>6}{p.size_bytes / 1e6:>9.2f} MB{percent(p.error):>10}{percent(p.kept):>10}"
                for p in self.uniform
            ),
            "Smallest rank or file for an error of at most",
            *(
                f"  {percent(float(target)):>6}: rank {rank}, or {self.smallest_size[target] / 1e6:.2f} MB "
                "with ranks allotted (--size)"
                for target, rank in self.smallest_rank.items()
            ),
        ]
        return "\n".join(rows)


@dataclass(frozen=True)
class _Layer:
    plan: LayerPlan
    squares: np.ndarray
    per_rank: int
    fixed: int


def expected_seconds(plan: MergePlan, cores: int | None = None) -> float:
    """About how long :func:`advise` takes where layers have to be formed whole; 0 where none has to.

    Elementwise methods give layers of full rank. All their singular values are needed for the error at
    every rank, and no faster way tells them: a sample of layers or of values would be a guess.

    Args:
        cores: By default those that this process may use.
    """
    work = sum(_work(plan, layer) for layer in plan.layers)
    return work * 1e-9 / (cores or available_cores())


def _work(plan: MergePlan, layer: LayerPlan) -> float:
    """Nanoseconds of one core; 0 for layers that stay factors, which take no time to speak of."""
    if layer.vector or not (plan.method.elementwise or layer.dense):
        return 0.0
    short, long = sorted((layer.out, layer.width))
    return short * long * (_ELEMENT * len(layer.inputs) + _GRAM * short) + _VALUES * short**3


def _timed(plan: MergePlan, progress: Callable[[Progress], None] | None) -> Callable[[Progress], None] | None:
    """Tell the time left by work and not by the number of layers: large ones come first and take long."""
    expected = expected_seconds(plan)
    if progress is None or not expected:
        return progress
    tell = progress
    # In the order of work: for_each_layer begins with the largest.
    done = list(accumulate(sorted((_work(plan, layer) for layer in plan.layers), reverse=True), initial=0.0))
    start = perf_counter()
    progress(Progress("look", 0, len(plan.layers), eta=expected))

    def told(step: Progress) -> None:
        share, spent = done[step.done] / done[-1], perf_counter() - start
        left = spent * (1 - share) / share if share > _TELLING else max(0.0, expected - spent)
        tell(replace(step, eta=left))

    return told


def advise(
    plan: MergePlan,
    *,
    progress: Callable[[Progress], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> AdviceReport:
    """Error and size at every rank, from the singular values of the merged layers.

    Args:
        cancel: Asked about every tenth of a second; True ends the work.

    Raises:
        LoraMergeError: What the merge would refuse, too.
    """
    with open_merger(plan) as merger:
        look = partial(_look, merger)
        looked = for_each_layer(plan, look, "look", _timed(plan, progress), cancel)
    spectra = [spectrum for spectrum, _ in looked]
    item = ITEM_BYTES[plan.dtype]
    layers, whole = [], metadata_bytes(plan)
    for layer, spectrum in zip(plan.layers, spectra, strict=True):
        fixed = entries_bytes(plan, layer) + (layer.out * item if layer.bias else 0)
        if spectrum is None:
            whole += layer.bytes(item) + entries_bytes(plan, layer)
        elif spectrum.rank:
            squares = spectrum.values.double().numpy() ** 2
            layers.append(_Layer(layer, squares, (layer.out + layer.width) * item, fixed + ALPHA_BYTES))
    top = max((len(layer.squares) for layer in layers), default=0)
    total = float(sum(layer.squares.sum() for layer in layers))
    tails = _tails(layers, top)
    chosen, chosen_bytes = _chosen_rank(plan, top), _chosen_bytes(plan, layers, whole)
    points = _shown_ranks(top, chosen)
    return AdviceReport(
        base_model=plan.architecture.label,
        mode=plan.method.name,
        dtype=plan.dtype,
        layers=len(plan.layers),
        uniform=[_rank_point(layers, rank, whole, float(tails[rank]), total) for rank in points],
        allotted=_allotted(layers, whole, total, chosen_bytes),
        smallest_rank={
            f"{target:g}": int(np.argmax(tails <= target**2 * total * (1 + 1e-12))) for target in TARGETS
        },
        smallest_size={
            f"{target:g}": whole + _smallest_size(layers, target**2 * total) for target in TARGETS
        },
        numerical_rank=top,
        mean_rank=sum(len(layer.squares) for layer in layers) / len(layers) if layers else 0.0,
        whole_bytes=whole,
        kept_by_block=_kept_by_block(layers, points),
        norm_by_block=norms_by_block(
            (layer, square) for layer, (_, square) in zip(plan.layers, looked, strict=True)
        ),
        spectrum=np.sqrt(np.maximum(tails[:-1] - tails[1:], 0) / total).tolist() if total else [],
        chosen_rank=chosen,
        chosen_bytes=chosen_bytes,
    )


def _look(merger: Merger, layer: LayerPlan) -> tuple[Spectrum | None, float]:
    """Singular values and squared norm of what the mode makes of a layer."""
    spectrum = merger.spectrum(layer)
    if spectrum is not None:
        return spectrum, spectrum.energy
    merged, _ = merger.combine(layer, merger.inputs(layer)) if layer.vector else (None, None)
    return None, norm(merged) ** 2 if isinstance(merged, Dense) else 0.0


def _chosen_rank(plan: MergePlan, top: int) -> int | None:
    """The one rank that all layers will get, if it is one; ranks that no layer has are the largest."""
    wanted = plan.recipe.rank
    if plan.recipe.retain is not None or plan.recipe.size is not None or not top:
        return None
    if isinstance(wanted, int):
        return min(wanted, top)
    ranks_foreseen = list(plan.rank_histogram)
    return min(ranks_foreseen[0], top) if len(ranks_foreseen) == 1 else None


def _chosen_bytes(plan: MergePlan, layers: Sequence[_Layer], whole: int) -> int | None:
    if plan.recipe.size is None:
        return None
    return max(whole + 1, min(int(plan.recipe.size * 1_000_000), whole + _largest(layers)))


def _largest(layers: Sequence[_Layer]) -> int:
    """Bytes of all ranks of all layers."""
    return sum(len(layer.squares) * layer.per_rank + layer.fixed for layer in layers)


def _shown_ranks(top: int, chosen: int | None) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16 ... up to the largest rank, which is always among them, and the chosen one."""
    ranks_shown = (
        {1, 3, top, chosen or top} | {1 << bit for bit in range(12)} | {3 << bit for bit in range(11)}
    )
    return sorted(rank for rank in ranks_shown if 0 < rank <= top)


def _tails(layers: Sequence[_Layer], top: int) -> np.ndarray:
    """(top + 1,) squared error of one rank for all, for each rank from 0."""
    tails = np.zeros(top + 1)
    for layer in layers:
        count = len(layer.squares)
        tails[: count + 1] += np.concatenate([np.cumsum(layer.squares[::-1])[::-1], [0.0]])
    return tails


def _rank_point(layers: Sequence[_Layer], rank: int, whole: int, tail: float, total: float) -> RankPoint:
    size = whole + sum(min(rank, len(layer.squares)) * layer.per_rank + layer.fixed for layer in layers)
    share = tail / total if total else 0.0
    return RankPoint(rank, size, share**0.5, max(0.0, 1 - share) ** 0.5)


def _steps(layers: Sequence[_Layer]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and squared norms of all components, the best bargain first."""
    if not layers:
        return np.zeros(0), np.zeros(0)
    gains = np.concatenate([layer.squares for layer in layers])
    costs = np.concatenate(
        [
            np.concatenate([[layer.per_rank + layer.fixed], np.full(len(layer.squares) - 1, layer.per_rank)])
            for layer in layers
        ]
    )
    # A layer's singular values fall, so its components are taken in their order by themselves.
    order = np.argsort(-gains / costs, kind="stable")
    return costs[order], gains[order]


def _smallest_size(layers: Sequence[_Layer], allowed_sq: float) -> int:
    costs, gains = _steps(layers)
    left = gains.sum() - np.cumsum(gains)
    if not len(costs):
        return 0
    return int(
        np.cumsum(costs)[min(len(costs) - 1, int(np.argmax(left <= allowed_sq + 1e-12 * gains.sum())))]
    )


def _allotted(layers: Sequence[_Layer], whole: int, total: float, wanted: int | None) -> list[SizePoint]:
    costs = [
        ranks.LayerCost(np.sqrt(layer.squares).tolist(), layer.per_rank, layer.fixed) for layer in layers
    ]
    largest = max(1, _largest(layers))
    budgets = {int(size) for size in np.geomspace(max(1, largest // 64), largest, _SIZE_POINTS)}
    points = []
    for budget in sorted(budgets | ({wanted - whole} if wanted else set())):
        chosen = ranks.allot(costs, int(budget))
        tail = sum(float(layer.squares[rank:].sum()) for layer, rank in zip(layers, chosen, strict=True))
        points.append(SizePoint(whole + int(budget), (tail / total) ** 0.5 if total else 0.0))
    return points


def _kept_by_block(layers: Sequence[_Layer], points: Sequence[int]) -> dict[str, list[float]]:
    blocks: dict[str, list[_Layer]] = {}
    for layer in layers:
        blocks.setdefault(layer.plan.block or "other", []).append(layer)
    kept = {}
    for block, members in sorted(blocks.items()):
        total = sum(float(layer.squares.sum()) for layer in members)
        kept[block] = [
            (sum(float(layer.squares[:rank].sum()) for layer in members) / total) ** 0.5 for rank in points
        ]
    return kept
