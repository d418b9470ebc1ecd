"""What each rank would cost and lose, from the singular values alone, before merging."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from time import perf_counter
from typing import Any

import numpy as np

from .. import models, ranks
from ..delta import Dense, Spectrum, available_cores, norm
from ..merge.components import Components, components
from ..merge.layer import Merger, open_merger
from ..merge.layout import FileCosts, LayerPlan, MergePlan, file_costs, smaller
from ..merge.loudness import normalized
from ..merge.outcome import shares_kept
from ..merge.work import Progress, Work
from ..methods import METHODS
from ..report import count_text, relative
from .compare import norms_by_block
from .curves import (
    TARGETS,
    RankCurves,
    SizePoint,
    allotted_ranks,
    bytes_of,
    filled_bytes,
    rank_point,
    shown_ranks,
    tail_of,
)

# Nanoseconds of one core for layers that are formed whole: to merge an element of one LoRA, and for a
# multiplication of the Gram matrix and of its singular values. Processors differ; this is to say minutes.
_ELEMENT, _GRAM, _VALUES = 25.0, 0.05, 0.1
# Modes whose result is another one at each --rank: the curve is that of cutting the present one further.
_MADE_FOR_RANK = ("tsv", "ctm")
# Part of the work after which the time spent predicts better than the estimate.
_TELLING = 0.02


@dataclass(frozen=True)
class AdviceReport(RankCurves):
    """Error and size against the rank for one recipe.

    Attributes:
        numerical_rank: Largest rank any layer really has; more keeps nothing more.
        whole_bytes: Bytes that no rank changes: header, norms, layers written whole.
        norm_by_block: Block id to the norm of what the mode makes of it, before any rank is cut.
    """

    base_model: str
    mode: str
    dtype: str
    layers: int
    numerical_rank: int
    mean_rank: float
    whole_bytes: int
    norm_by_block: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        whole = "the exact sum" if METHODS[self.mode].exact else f"mode {self.mode}'s own result"
        rows = [
            f"{self.base_model}, mode {self.mode}, {self.dtype}, {count_text(self.layers, 'layer')}",
            f"error: what a rank loses of {whole}, as a part of its norm",
            (
                "kept of each LoRA: 1 less the part of it, at its strength, that the file lacks"
                if self.shared
                else "A LoRA far weaker than others can be lost in a small error; see `loramerge compare`."
            ),
            *(
                ["This mode makes its result for the rank that is asked for: give the wanted one as --rank."]
                if self.mode in _MADE_FOR_RANK
                else []
            ),
            f"True rank: up to {self.numerical_rank}, {self.mean_rank:.1f} on average",
            *self.rank_rows(),
            *self.target_rows(),
        ]
        return "\n".join(rows)


def expected_seconds(plan: MergePlan, cores: int | None = None) -> float:
    """About how long :func:`advise` takes where layers have to be formed whole; 0 where none has to.

    Elementwise methods give layers of full rank. All their singular values are needed for the error at
    every rank, and no faster way gives them: a sample of layers or of values would be a guess.

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
    """Progress with the time left by work, not by number of layers: large ones come first and take long."""
    expected = expected_seconds(plan)
    if progress is None or not expected:
        return progress
    report = progress
    # In the order of work: each_layer begins with the largest.
    done = list(accumulate(sorted((_work(plan, layer) for layer in plan.layers), reverse=True), initial=0.0))
    start = perf_counter()
    progress(Progress("look", 0, len(plan.layers), eta=expected))

    def timed(step: Progress) -> None:
        share, spent = done[step.done] / done[-1], perf_counter() - start
        left = spent * (1 - share) / share if share > _TELLING else max(0.0, expected - spent)
        report(replace(step, eta=left))

    return timed


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
    plan = normalized(plan, progress=progress, cancel=cancel)
    with open_merger(plan) as merger:
        look = partial(_look, merger)
        looked = Work(_timed(plan, progress), cancel).each_layer(plan, look, "look")
    spectra = [entry.spectrum for entry in looked]
    costs = file_costs(plan, spectra)
    squares = {name: np.asarray(cost.values) ** 2 for name, cost in costs.layers.items() if len(cost.values)}
    top = max(map(len, squares.values()), default=0)
    tails = _tails(squares.values(), top)
    total = float(tails[0])
    chosen, chosen_bytes = _chosen_rank(plan, top), filled_bytes(costs, plan.recipe.size)
    less = smaller(plan)
    points = shown_ranks(top, chosen, None if less is None else less["rank"])
    allotted = allotted_ranks(costs, chosen_bytes)
    kept_of = _kept_of(
        plan, looked, costs, [*([rank] * len(costs.layers) for rank in points), *allotted.values()]
    )
    smallest = partial(ranks.smallest, list(costs.layers.values()), one_rank=costs.one_rank)
    return AdviceReport(
        base_model=plan.architecture.label,
        mode=plan.method.name,
        dtype=plan.dtype,
        layers=len(plan.layers),
        uniform=[
            rank_point(rank, costs.fixed + bytes_of(costs, rank), float(tails[rank]), total, shares)
            for rank, shares in zip(points, kept_of)
        ],
        allotted=[
            SizePoint(size, relative(tail_of(costs, ranks_there), total), shares)
            for (size, ranks_there), shares in zip(allotted.items(), kept_of[len(points) :], strict=True)
        ],
        smallest_rank={
            f"{target:g}": int(np.argmax(tails <= target**2 * total * (1 + 1e-12))) for target in TARGETS
        },
        smallest_size={f"{target:g}": costs.fixed + smallest(target**2 * total) for target in TARGETS},
        numerical_rank=top,
        mean_rank=sum(map(len, squares.values())) / len(squares) if squares else 0.0,
        whole_bytes=costs.fixed,
        kept_by_block=_kept_by_block(plan, squares, points),
        norm_by_block=norms_by_block(
            (layer, entry.square) for layer, entry in zip(plan.layers, looked, strict=True)
        ),
        spectrum=np.sqrt(np.maximum(tails[:-1] - tails[1:], 0) / total).tolist() if total else [],
        chosen_rank=chosen,
        chosen_bytes=chosen_bytes,
    )


@dataclass(frozen=True, eq=False)
class _Looked:
    """Singular values and squared norm of what the mode makes of a layer, and what it has of each LoRA.

    Attributes:
        shares: None where that is not known.
    """

    spectrum: Spectrum | None
    square: float
    shares: Components | None = None


def _look(merger: Merger, layer: LayerPlan) -> _Looked:
    found = components(merger, layer)
    if found is not None:
        return _Looked(found.spectrum, found.spectrum.energy, found)
    spectrum = merger.spectrum(layer)
    if spectrum is not None:
        return _Looked(spectrum, spectrum.energy)
    merged, _ = merger.combine(layer, merger.inputs(layer)) if layer.vector else (None, None)
    return _Looked(None, norm(merged) ** 2 if isinstance(merged, Dense) else 0.0)


def _kept_of(
    plan: MergePlan, looked: Sequence[_Looked], costs: FileCosts, choices: Sequence[Sequence[int]]
) -> list[dict[str, float]]:
    """Share kept of each LoRA for choices of the ranks of ``costs.layers``; empty where it is not known."""
    if any(entry.spectrum is not None and entry.shares is None for entry in looked):
        return [{}] * len(choices)
    chosen = dict(zip(costs.layers, np.array(choices, dtype=np.int64).reshape(len(choices), -1).T))
    rows = [
        (layer.layer, entry.shares.lost(chosen[layer.layer]))
        for layer, entry in zip(plan.layers, looked, strict=True)
        if entry.shares is not None
    ]
    found = {
        source.input.name: np.broadcast_to(shares_kept(plan, index, rows, models.component)[""], len(choices))
        for index, source in enumerate(plan.sources)
    }
    return [{name: float(shares[place]) for name, shares in found.items()} for place in range(len(choices))]


def _chosen_rank(plan: MergePlan, top: int) -> int | None:
    """The one rank that all layers will get, if it is one; ranks that no layer has are the largest."""
    wanted = plan.recipe.rank
    if plan.recipe.retain is not None or plan.recipe.size is not None or not top:
        return None
    if isinstance(wanted, int):
        return min(wanted, top)
    ranks_foreseen = list(plan.rank_histogram)
    return min(ranks_foreseen[0], top) if len(ranks_foreseen) == 1 else None


def _tails(squares: Iterable[np.ndarray], top: int) -> np.ndarray:
    """(top + 1,) squared error of one rank for all, for each rank from 0."""
    tails = np.zeros(top + 1)
    for own in squares:
        tails[: len(own) + 1] += np.concatenate([np.cumsum(own[::-1])[::-1], [0.0]])
    return tails


def _kept_by_block(
    plan: MergePlan, squares: Mapping[str, np.ndarray], points: Sequence[int]
) -> dict[str, list[float]]:
    blocks: dict[str, list[np.ndarray]] = {}
    for layer in plan.layers:
        if layer.layer in squares:
            blocks.setdefault(layer.block or "other", []).append(squares[layer.layer])
    kept = {}
    for block, members in sorted(blocks.items()):
        total = sum(float(own.sum()) for own in members)
        kept[block] = [(sum(float(own[:rank].sum()) for own in members) / total) ** 0.5 for rank in points]
    return kept
