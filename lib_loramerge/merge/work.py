"""How the layers of a plan are worked through: in batches of one shape, over threads, until cancelled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..delta import helpful_threads, parallel_map, raise_if
from .layout import LayerPlan, MergePlan

# Layers of a batch at most: many more are no quicker, and leave the other threads without work.
LAYERS = 16
# Largest number of elements in a batch: a CPU's cache is small, an accelerator needs work.
NUMBERS, NUMBERS_ON_DEVICE = 1 << 20, 1 << 22
# Layers of more numbers than this are merged on fewer threads, so that all of them together keep within the
# room (bytes); a layer takes so many bytes for each number.
HUGE, ROOM, PER_NUMBER = 20_000_000, 3e9, 30
# Batches on their way to an accelerator at once: more would only wait for each other, and need its memory.
FEEDERS = 2
# Layers after which the time spent predicts that of the others.
_TELLING = 8

_Result = TypeVar("_Result")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Progress:
    """How far a merge is.

    Attributes:
        phase: ``"look"`` (singular values for a size rule), ``"merge"`` or ``"write"``; ``"hash"``,
            ``"write"`` or ``"extract"`` of checkpoints.
        done, total: Layers; tensors while writing; bytes in all phases of checkpoints.
        eta: Seconds left in this phase, once they can be predicted.
    """

    phase: str
    done: int
    total: int
    layer: str = ""
    eta: float | None = None


@dataclass(frozen=True)
class Work:
    """Who hears of the progress of some work, what stops it, and how many threads do it.

    Attributes:
        progress: Called on the calling thread as layers are done.
        cancel: Asked often; True ends the work with nothing written.
        workers: Threads; by default as many as help. Results do not depend on it.
    """

    progress: Callable[[Progress], None] | None = None
    cancel: Callable[[], bool] | None = None
    workers: int | None = None

    def check(self) -> None:
        """Raise Cancelled where the work is to stop."""
        raise_if(self.cancel)

    def each_layer(
        self, plan: MergePlan, function: Callable[[LayerPlan], _Result], phase: str
    ) -> list[_Result]:
        """``function`` of every layer of a plan, in the plan's order."""
        found = self.each_batch(plan, lambda batch: [function(layer) for layer in batch], phase)
        return [found[layer.layer] for layer in plan.layers]

    def each_batch(
        self,
        plan: MergePlan,
        function: Callable[[Sequence[LayerPlan]], Sequence[_Result]],
        phase: str,
        device: torch.device = _CPU,
    ) -> dict[str, _Result]:
        """``function`` of every batch of a plan's layers, as one result for each layer by name."""
        on_device = device.type != "cpu"
        batches = list(_batches(plan, NUMBERS_ON_DEVICE if on_device else NUMBERS))
        workers = FEEDERS if on_device else self.workers or _helpful(plan)
        results: dict[str, _Result] = {}
        start = time.perf_counter()
        for batch, found in zip(
            batches, parallel_map(function, batches, workers=workers, cancel=self.cancel), strict=True
        ):
            results |= zip((layer.layer for layer in batch), found, strict=True)
            if self.progress is not None:
                done, total = len(results), len(plan.layers)
                eta = (time.perf_counter() - start) / done * (total - done) if done >= _TELLING else None
                self.progress(Progress(phase, done, total, batch[-1].layer, eta))
        return results


def _helpful(plan: MergePlan) -> int:
    numbers = [layer_numbers(plan, layer) for layer in plan.layers]
    workers = helpful_threads(sum(numbers) / len(numbers))
    return max(1, min(workers, int(ROOM / (PER_NUMBER * max(numbers))))) if max(numbers) > HUGE else workers


def _batches(plan: MergePlan, most: int) -> Iterator[list[LayerPlan]]:
    """Layers that are merged together: alike in shape and ranks, and of at most so many numbers.

    Large ones come first, so that threads finish together.
    """
    batch: list[LayerPlan] = []
    count = 0
    for layer in sorted(plan.layers, key=lambda layer: (-layer.out * layer.width, *_kind(layer))):
        numbers = layer_numbers(plan, layer)
        full = count + numbers > most or len(batch) == LAYERS
        if batch and (full or _kind(layer) != _kind(batch[0])):
            yield batch
            batch, count = [], 0
        batch.append(layer)
        count += numbers
    if batch:
        yield batch


def _kind(layer: LayerPlan) -> tuple[int, int, tuple[int, ...]]:
    return layer.out, layer.width, tuple(rank or 0 for rank in layer.ranks)


def layer_numbers(plan: MergePlan, layer: LayerPlan) -> int:
    """How many numbers a layer has while it is merged: whole matrices, or factors."""
    if layer.vector or layer.dense or plan.method.elementwise:
        return layer.out * max(1, layer.width)
    return sum(rank or 0 for rank in layer.ranks) * (layer.out + layer.width)
