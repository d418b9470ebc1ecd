"""The merge itself: read a layer, merge it, cut it to rank, round it; then write the file."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import models, ranks
from ..delta import Stored, batch_numbers, full_precision, helpful_threads, parallel_map
from ..errors import Cancelled, IncompatibleError, OutputError
from ..files import check_space, check_target, refuse_inputs, write_file
from ..report import InputReport, LayerResult, MergeReport, percent, relative, worst
from .layer import MergedLayer, Merger, open_merger
from .layout import LayerPlan, MergePlan, SourcePlan, file_costs, merged_metadata, needs_one_rank, zero_layer
from .memory import peak_memory_bytes

# Layers of a batch at most: many more are no quicker, and leave the other threads without work.
LAYERS = 16
# Layers of more numbers than this are merged on fewer threads, so that all of them together keep within the
# room (bytes); a layer takes so many bytes for each number.
HUGE, ROOM, PER_NUMBER = 20_000_000, 3e9, 30
# Share of a LoRA in the file below which the report warns.
WELL_KEPT = 0.95
# Batches on their way to an accelerator at once: more would only wait for each other, and need its memory.
FEEDERS = 2


@dataclass(frozen=True)
class Progress:
    """How far a merge is.

    Attributes:
        phase: ``"look"`` (singular values for a size rule), ``"merge"`` or ``"write"``.
        done, total: Layers; tensors while writing.
        eta: Seconds left in this phase, once that can be told.
    """

    phase: str
    done: int
    total: int
    layer: str = ""
    eta: float | None = None


@dataclass
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - before, 4)

    def all(self) -> dict[str, float]:
        return {**self.seconds, "total": round(time.perf_counter() - self.start, 4)}


def run_merge(
    plan: MergePlan,
    output: Path,
    *,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancel: Callable[[], bool] | None = None,
    workers: int | None = None,
) -> MergeReport:
    """Carry out a plan and write the merged file.

    Args:
        output: File to write; it appears under its name only when complete.
        progress: Called on the calling thread as layers are done.
        cancel: Asked often; True stops the merge with nothing written.
        workers: Threads; by default as many as help. Results do not depend on it.

    Raises:
        LoraMergeError: Anything a user can cause; nothing was written then.
    """
    clock = _Clock()
    check_target(output, overwrite)
    refuse_inputs(output, plan.files())
    check_space(output.parent, plan.predicted_bytes)
    with ExitStack() as stack:
        merger = stack.enter_context(open_merger(plan))
        stack.enter_context(_enough_memory(merger.device))
        if merger.device.type != "cpu":
            stack.enter_context(full_precision())
        hashes = stack.enter_context(_background_hashes(merger, cancel))
        allotted = None
        if plan.recipe.size is not None:
            with clock.phase("look"):
                allotted = _allot(plan, merger, output.stem, progress, cancel, workers)
        with clock.phase("merge"):
            merged = _merge_layers(plan, merger, allotted, progress, cancel, workers)
        embeddings = _embeddings(plan, merger)
        source_hashes = hashes()
        merger.check_unchanged()
    if not any(layer.tensors for layer in merged):
        raise IncompatibleError(
            "The LoRAs cancel each other in every layer, or what they change is too small for "
            f"{plan.dtype}, so there is nothing to write."
        )
    tensors = {key: tensor for layer in merged for key, tensor in layer.tensors.items()} | embeddings
    if needs_one_rank(plan):
        tensors = one_rank(tensors)
    _raise_if_cancelled(cancel)
    with clock.phase("write"):
        written = write_file(
            output,
            tensors,
            _metadata(plan, output, merged, source_hashes),
            overwrite=overwrite,
            stop=partial(_raise_if_cancelled, cancel),
            progress=progress and (lambda done, total: progress(Progress("write", done, total))),
            before_rename=partial(_raise_if_cancelled, cancel),
        )
    return _report(plan, output, merged, written, source_hashes, clock, merger.device)


def one_rank(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors of a component in one rank, the smaller ones filled up with zeros.

    Where a file states no alpha, diffusers before 0.40 takes the rank of its first layer for that of
    all, and applies the others at another strength.
    """
    largest: dict[str, int] = {}
    for key, tensor in tensors.items():
        if key.endswith(_DOWN):
            component = key.partition(".")[0]
            largest[component] = max(largest.get(component, 0), tensor.shape[0])
    return {
        key: _filled(key, tensor, largest.get(key.partition(".")[0], 0)) for key, tensor in tensors.items()
    }


_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def _filled(key: str, tensor: Tensor, rank: int) -> Tensor:
    axis = 0 if key.endswith(_DOWN) else 1 if key.endswith(_UP) else None
    if axis is None or tensor.shape[axis] >= rank:
        return tensor
    missing = list(tensor.shape)
    missing[axis] = rank - tensor.shape[axis]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim=axis)


def _embeddings(plan: MergePlan, merger: Merger) -> dict[str, Tensor]:
    """The bundled embeddings under the keys that hosts look for, in the dtype that they are stored in."""
    tensors = {}
    for name, (index, key) in plan.embeddings.items():
        reader = merger.readers[index]
        stored = {"F16": torch.float16, "BF16": torch.bfloat16}.get(reader.source.header.tensors[key].dtype)
        tensors[f"bundle_emb.{name}"] = reader.read(key).to(stored or torch.float32)
    return tensors


@contextmanager
def _enough_memory(device: torch.device) -> Iterator[None]:
    """Memory is shared with the host's models: it may be too small, and an accelerator's is given back.

    Raises:
        OutputError: It is too small.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise OutputError(
                f"The memory of {device} is too full for this merge. Choose the CPU, which needs none of it, "
                "or unload the model first. Nothing was written."
            ) from error
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            raise OutputError(
                "The memory of this machine is too full for this merge. Close what else needs memory, or "
                "unload the model first. Nothing was written."
            ) from error
        raise
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _raise_if_cancelled(cancel: Callable[[], bool] | None) -> None:
    if cancel is not None and cancel():
        raise Cancelled("Stopped. Nothing was written.")


@contextmanager
def _background_hashes(
    merger: Merger, cancel: Callable[[], bool] | None
) -> Iterator[Callable[[], list[str]]]:
    """Hash the sources while their layers are merged; hashing releases the interpreter's lock."""
    from concurrent.futures import ThreadPoolExecutor, wait

    pool = ThreadPoolExecutor(1, thread_name_prefix="loramerge-hash")
    stop = partial(_raise_if_cancelled, cancel)
    futures = [pool.submit(reader.model_hash, stop) for reader in merger.readers]

    def results() -> list[str]:
        while wait(futures, timeout=0.1).not_done:
            _raise_if_cancelled(cancel)
        return [future.result() for future in futures]

    try:
        yield results
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _allot(
    plan: MergePlan,
    merger: Merger,
    name: str,
    progress: Callable[[Progress], None] | None,
    cancel: Callable[[], bool] | None,
    workers: int | None,
) -> dict[str, int]:
    """Ranks for a file of limited size, from the singular values of all layers.

    Raises:
        OutputError: Not even the header fits.
    """
    assert plan.recipe.size is not None
    spectra = for_each_layer(plan, merger.spectrum, "look", progress, cancel, workers)
    costs = file_costs(plan, spectra, name)
    layers = list(costs.layers.values())
    budget = int(plan.recipe.size * 1_000_000) - costs.fixed
    least = ranks.least_bytes(layers)
    if budget < least:
        raise OutputError(
            f"{plan.recipe.size:g} MB is too small for any layer of this merge; "
            f"it needs at least {(costs.fixed + least) / 1e6:.3f} MB."
        )
    return dict(zip(costs.layers, ranks.allot(layers, budget, one_rank=costs.one_rank), strict=True))


def _merge_layers(
    plan: MergePlan,
    merger: Merger,
    allotted: Mapping[str, int] | None,
    progress: Callable[[Progress], None] | None,
    cancel: Callable[[], bool] | None,
    workers: int | None,
) -> list[MergedLayer]:
    ranks_allotted = allotted or {}

    def merge(batch: Sequence[LayerPlan]) -> list[MergedLayer]:
        return merger.merge_together(batch, [ranks_allotted.get(layer.layer) for layer in batch])

    batches = _batches(plan, batch_numbers(merger.device))
    if merger.device.type != "cpu":
        workers = FEEDERS
    merged = {
        entry.result.layer: entry
        for entries in _for_each(plan, batches, merge, "merge", progress, cancel, workers)
        for entry in entries
    }
    return _completed_groups(plan, merger, [merged[layer.layer] for layer in plan.layers])


def _batches(plan: MergePlan, most: int) -> list[list[LayerPlan]]:
    """Layers that are merged together: of one shape, and of at most so many numbers."""
    batches: list[list[LayerPlan]] = []
    shape, count = None, 0
    for index in _by_size(plan.layers):
        layer = plan.layers[index]
        numbers = _numbers(plan, layer)
        if (layer.out, layer.width) != shape or count + numbers > most or len(batches[-1]) == LAYERS:
            batches.append([])
            shape, count = (layer.out, layer.width), 0
        batches[-1].append(layer)
        count += numbers
    return batches


def _numbers(plan: MergePlan, layer: LayerPlan) -> int:
    """How many numbers a layer has while it is merged: whole matrices, or factors."""
    if layer.vector or layer.dense or plan.method.elementwise:
        return layer.out * max(1, layer.width)
    return sum(rank or 0 for rank in layer.ranks) * (layer.out + layer.width)


def _by_size(layers: Sequence[LayerPlan]) -> list[int]:
    """Order of work: large layers first, so that threads finish together, and one shape after another."""
    return sorted(range(len(layers)), key=lambda i: (-layers[i].out * layers[i].width, layers[i].out, i))


def _tell(
    progress: Callable[[Progress], None] | None, phase: str, done: int, total: int, layer: str, start: float
) -> None:
    if progress is not None:
        spent = time.perf_counter() - start
        eta = spent / done * (total - done) if done >= 8 else None
        progress(Progress(phase, done, total, layer, eta))


def for_each_layer(
    plan: MergePlan,
    function: Callable[[LayerPlan], Any],
    phase: str,
    progress: Callable[[Progress], None] | None = None,
    cancel: Callable[[], bool] | None = None,
    workers: int | None = None,
) -> list[Any]:
    """``function`` of every layer of a plan, in the plan's order."""
    order = _by_size(plan.layers)
    jobs = [[plan.layers[index]] for index in order]
    found = _for_each(plan, jobs, lambda batch: function(batch[0]), phase, progress, cancel, workers)
    results: list[Any] = [None] * len(order)
    for index, result in zip(order, found, strict=True):
        results[index] = result
    return results


def _for_each(
    plan: MergePlan,
    batches: Sequence[Sequence[LayerPlan]],
    function: Callable[[Sequence[LayerPlan]], Any],
    phase: str,
    progress: Callable[[Progress], None] | None,
    cancel: Callable[[], bool] | None,
    workers: int | None,
) -> Iterator[Any]:
    """``function`` of every batch, in their order."""
    total, done = len(plan.layers), 0
    if workers is None:
        numbers = [_numbers(plan, layer) for layer in plan.layers]
        workers = helpful_threads(sum(numbers) / total)
        if max(numbers) > HUGE:
            workers = max(1, min(workers, int(ROOM / (PER_NUMBER * max(numbers)))))
    start = time.perf_counter()
    for batch, result in zip(
        batches, parallel_map(function, batches, workers=workers, cancel=cancel), strict=True
    ):
        yield result
        done += len(batch)
        _tell(progress, phase, done, total, batch[-1].layer, start)


def _completed_groups(plan: MergePlan, merger: Merger, merged: list[MergedLayer]) -> list[MergedLayer]:
    """Add zero layers where a host takes q, k, v and out of an attention only together."""
    written = {entry.result.layer for entry in merged if entry.tensors}
    shapes = {layer.layer: layer for layer in plan.layers}
    added: list[MergedLayer] = []
    for name in sorted(written):
        for companion in models.companions(plan.architecture.id, name):
            if companion in written or any(entry.result.layer == companion for entry in added):
                continue
            # The four are square and of one size, so any of them tells the others' shape.
            like = shapes.get(companion, shapes[name])
            up, down = torch.zeros(like.out, 1), torch.zeros(1, like.width)
            stored = Stored(up.to(merger.dtype), down.to(merger.dtype), 1.0, (), 0.0, 0.0)
            added.append(merger.low_rank(zero_layer(like, companion), stored, None, None, ()))
    kept = [
        entry
        for entry in merged
        if entry.tensors or entry.result.layer not in {a.result.layer for a in added}
    ]
    return kept + added


def _metadata(
    plan: MergePlan, output: Path, merged: Sequence[MergedLayer], hashes: Sequence[str]
) -> dict[str, str]:
    sized = [m for m in merged if m.result.rank and m.alpha is not None]
    return merged_metadata(
        plan,
        output.stem,
        hashes,
        linear=[(m.result.rank or 0, m.alpha or 0.0) for m in sized if not m.conv],
        conv=[(m.result.rank or 0, m.alpha or 0.0) for m in sized if m.conv],
        whole=any(m.result.rank is None for m in merged),
    )


def _report(
    plan: MergePlan,
    output: Path,
    merged: Sequence[MergedLayer],
    written: Any,
    hashes: Sequence[str],
    clock: _Clock,
    device: torch.device,
) -> MergeReport:
    results = [entry.result for entry in merged]
    present = [entry for entry in merged if entry.tensors]
    error_sq = sum(result.error_sq for result in results)
    exact_sq = sum(result.exact_sq for result in results)
    histogram = Counter(entry.result.rank for entry in present if entry.result.rank)
    notes = sorted({note for entry in merged for note in entry.notes})
    inputs = [_input_report(plan, index, hashes[index], merged) for index in range(len(plan.sources))]
    return MergeReport(
        output=str(output),
        size_bytes=written.size,
        base_model=plan.architecture.label,
        mode=plan.method.name,
        params=dict(plan.params),
        dtype=plan.dtype,
        device=str(device),
        dialect=plan.dialect,
        seed=plan.recipe.seed,
        layers=len(present),
        layers_left_out=len(plan.left_out) + len(merged) - len(present),
        ranks=dict(sorted(histogram.items(), reverse=True)),
        whole_layers=sum(entry.result.rank is None for entry in present),
        error=relative(error_sq, exact_sq),
        error_against="the exact sum"
        if plan.method.exact or plan.method.name == "add"
        else f"{plan.method.name}'s own result",
        kept=min(1.0, relative(sum(entry.written_sq for entry in merged), exact_sq)),
        from_sum=_from_sum(plan, results),
        worst_layers=worst(results),
        inputs=inputs,
        warnings=[
            *plan.warnings,
            *(note for note in notes if note not in plan.warnings),
            *_cut(plan, inputs),
        ],
        skipped=list(plan.skipped),
        sshs_model_hash=written.model_hash,
        seconds=clock.all(),
        peak_memory_bytes=peak_memory_bytes(),
        by_block=_by_block(plan, merged),
    )


def _from_sum(plan: MergePlan, results: Sequence[LayerResult]) -> float | None:
    if plan.method.exact or plan.method.name == "add":
        return None
    sum_sq = sum(result.sum_sq for result in results)
    return relative(sum(result.from_sum_sq for result in results), sum_sq) if sum_sq > 0 else None


def _by_block(plan: MergePlan, merged: Sequence[MergedLayer]) -> dict[str, dict[str, float]]:
    """Norm, error and share kept of each block."""
    blocks = {layer.layer: layer.block or "other" for layer in plan.layers}
    sums: dict[str, list[float]] = {}
    for entry in merged:
        # Zero layers that only complete a group are not in the plan, and have no norm.
        row = sums.setdefault(blocks.get(entry.result.layer, "other"), [0.0, 0.0, 0.0])
        for index, value in enumerate((entry.result.exact_sq, entry.result.error_sq, entry.written_sq)):
            row[index] += value
    return {
        block: {
            "norm": exact**0.5,
            "error": relative(error, exact),
            "kept": min(1.0, relative(written, exact)),
        }
        for block, (exact, error, written) in sorted(sums.items())
        if exact > 0
    }


def _cut(plan: MergePlan, inputs: Sequence[InputReport]) -> list[str]:
    """A warning for each LoRA of which the rank left too little; other modes change them on purpose."""
    if not (plan.method.exact and plan.method.uses_rank):
        return []
    return [
        f"{entry.name}: only {percent(max(0.0, entry.kept))} of this LoRA is in the file; the rank cut off "
        "the rest. --rank full keeps all of it."
        for entry in inputs
        if entry.kept < WELL_KEPT
    ]


def _kept(plan: MergePlan, index: int, merged: Sequence[MergedLayer]) -> dict[str, float]:
    """Share of an input that is in the file, by part of the model and, under an empty name, as a whole."""
    sums: dict[str, list[float]] = {"": [0.0, 0.0]}
    for entry in merged:
        for source, lost, own in entry.lost:
            if source == index:
                for name in ("", models.component(entry.result.layer)):
                    row = sums.setdefault(name, [0.0, 0.0])
                    row[0], row[1] = row[0] + lost, row[1] + own
    return {name: 1 - lost / own if own > 0 else 1.0 for name, (lost, own) in sorted(sums.items())}


def _input_report(
    plan: MergePlan, index: int, source_hash: str, merged: Sequence[MergedLayer]
) -> InputReport:
    entry, kept = plan.sources[index], _kept(plan, index, merged)
    return InputReport(
        name=entry.input.name,
        path=str(entry.path),
        sshs_model_hash=source_hash,
        te=entry.input.te,
        unet=entry.input.unet,
        layers=len(entry.source.layers),
        dialect=entry.source.dialect,
        kinds=entry.source.kinds,
        ranks=entry.source.ranks,
        blocks=_resolved_blocks(plan, entry),
        kept=kept.pop(""),
        kept_in=kept,
    )


def _resolved_blocks(plan: MergePlan, entry: SourcePlan) -> dict[str, float]:
    """Block to what most of its layers in one input are multiplied by, 0 included.

    Text encoders with strengths of their own are told apart, ``"BASE te2"``.
    """
    own = any(getattr(entry.input, part) is not None for part in ("te1", "te2", "te3"))
    counts: dict[str, Counter[float]] = {}
    for layer in entry.source.layers:
        component = models.component(layer)
        block = models.block(plan.architecture.id, layer)
        weight = entry.input.strength(component) * entry.block_weights.weight(component, block, layer)
        name = f"{block} {component}" if own and component != "unet" else block or "other"
        counts.setdefault(name, Counter())[weight] += 1
    return {name: count.most_common(1)[0][0] for name, count in sorted(counts.items())}


__all__ = ["Progress", "for_each_layer", "run_merge"]
