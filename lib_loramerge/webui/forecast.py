"""What a merge will cost and lose, as far as headers tell. Knows no Gradio.

The time is shown where layers are formed whole; all else takes seconds. It is an estimate: it begins with the
speed of this processor, and learns from the merges of this process.
"""

from __future__ import annotations

import math
import os
import threading
import time
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from ..delta import available_cores
from ..errors import Sentence
from ..merge.layout import predicted_bytes, smaller
from ..report import percent
from .render import size_text, time_text

if TYPE_CHECKING:
    from ..analysis import AdviceReport
    from ..merge import MergePlan
    from ..merge.layout import LayerPlan
    from ..report import Smaller

# Nanoseconds of one core for a layer formed whole, measured together with _SORT: for an element of one input;
# for an element of the result, and for each rank that is kept of it; for a multiplication of its Gram matrix,
# and of that matrix' decomposition, where more than a small part of its ranks is kept.
_INPUT, _ELEMENT, _RANK, _GRAM, _DECOMPOSED = 20.0, 30.0, 0.3, 0.28, 0.55
# Seconds that sorting _SORTED random numbers took on that machine.
_SORT, _SORTED = 0.0140, 1 << 17
QUICK_RANK = 32
WORTH_TELLING = 10.0  # seconds; a shorter merge is over before it is read
LONG = 300.0


class _Pace:
    """How many times as long as expected merges take here."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._learned: float | None = None

    def factor(self) -> float:
        with self._lock:
            return self._learned if self._learned is not None else _processor() * _crowd()

    def learn(self, expected: float, took: float) -> None:
        """Remember how long a merge took whose time was foretold."""
        if expected < 1.0 or took <= 0:
            return
        with self._lock:
            self._learned = min(100.0, max(0.01, took / expected))


PACE = _Pace()


@cache
def _processor() -> float:
    """Speed of one core: the time that some work takes here, as a multiple of what it took there."""
    import torch

    numbers = torch.rand(_SORTED, generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(3):
        start = time.thread_time()
        numbers.sort()
        times.append(time.thread_time() - start)
    return min(times) / _SORT


def _crowd() -> float:
    """How many times as long as alone a merge takes beside what else keeps this machine busy."""
    try:
        busy = os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows does not tell.
        return 1.0
    return 1.0 + busy / available_cores()


def seconds(plan: MergePlan, rank: int | None = None) -> float:
    """About how long the layers take that are formed whole; 0 where none is, or where a GPU does it.

    Args:
        rank: Rank of every layer in place of the plan's.
    """
    work = _work(plan, rank)
    return work * PACE.factor() if work else 0.0


def learn(plan: MergePlan, took: float) -> None:
    """Remember how long a merge took, for the next estimate."""
    PACE.learn(_work(plan), took)


def _work(plan: MergePlan, rank: int | None = None) -> float:
    """Seconds before the pace of this machine counts."""
    if plan.recipe.device not in ("cpu", "auto"):
        return 0.0
    whole = [layer for layer in plan.layers if not layer.vector and (plan.method.elementwise or layer.dense)]
    return (
        sum(_layer(layer, layer.rank if rank is None else rank) for layer in whole) * 1e-9 / available_cores()
    )


def _layer(layer: LayerPlan, rank: int | None) -> float:
    short, long = sorted((layer.out, layer.width))
    work = short * long * (_INPUT * len(layer.inputs) + _ELEMENT)
    if rank is None:
        return work  # Written whole.
    if 2 * rank > short:
        return work + short * short * (_GRAM * long + _DECOMPOSED * short)
    return work + short * long * _RANK * rank


def less_of(plan: MergePlan, advice: AdviceReport | None = None) -> Smaller | None:
    """A smaller file than the default makes: ``rank`` and ``size_bytes``.

    Args:
        advice: What is known about the ranks; then ``error``, and what is ``kept`` of the ``weakest`` LoRA.
    """
    less = smaller(plan) if plan.recipe.rank == "auto" else None
    point = next((p for p in advice.uniform if p.rank == less["rank"]), None) if advice and less else None
    if less is None or point is None:
        return less
    from ..analysis.curves import weakest  # Loaded by now, as there is advice.

    least = weakest(point.kept_of)
    found: Smaller = {"rank": point.rank, "size_bytes": point.size_bytes, "error": point.error}
    return found if least is None else {**found, "kept": least[1], "weakest": least[0]}


def notes(plan: MergePlan, less: Smaller | None = None) -> list[str]:
    """Sentences on what the rank rule may lose, and on a time that another rule makes far shorter.

    Args:
        less: A smaller file of which it is not known what it loses.
    """
    found = [_loss(plan)]
    if less is not None:
        size = size_text(less["size_bytes"])
        found.append(
            Sentence(
                "At rank {rank} the file would have {size}. Press Analyse for what that loses.",
                less["rank"],
                size,
            )
        )
    expected = seconds(plan)
    if expected > LONG and plan.method.uses_rank:
        quick = seconds(plan, QUICK_RANK)
        if quick < expected / 3:
            found.append(
                Sentence(
                    "It takes about {time}, because all singular values of whole layers are needed; with a "
                    "number as rank, such as {rank}, about {quicker}.",
                    time_text(expected),
                    QUICK_RANK,
                    time_text(quick),
                )
            )
    return [text for text in found if text]


def _loss(plan: MergePlan) -> str:
    recipe = plan.recipe
    if not plan.method.uses_rank:
        return ""
    if recipe.retain is not None:
        if recipe.retain >= 1:
            return ""
        error = math.sqrt(1 - recipe.retain**2)
        share = percent(recipe.retain)
        return Sentence(
            "Keeping {share} of every layer's norm means an error of up to {error}.", share, percent(error)
        )
    if recipe.size is not None:
        whole = predicted_bytes(replace(plan, recipe=replace(recipe, size=None)))
        if whole <= recipe.size * 1e6:
            return ""
        return "What does not fit into the file size is lost. Press Analyse for the error."
    short = [
        (layer.rank, most)
        for layer in plan.layers
        if not layer.vector
        and layer.rank is not None
        and layer.rank < (most := layer.largest_rank(plan.method))
    ]
    if not short:
        return ""
    rank, most = max(short, key=lambda pair: pair[1])
    return Sentence(
        "Rank {rank} of up to {most}: the sum may need more. Press Analyse for the error."
        if plan.method.exact
        else "Rank {rank} of up to {most}: the result may need more. Press Analyse for the error.",
        rank,
        most,
    )
