"""The merge itself: read a layer, merge it, cut it to rank, round it; then write the file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .. import ranks
from ..delta import Stored, full_precision
from ..errors import IncompatibleError, OutputError
from ..files import check_space, check_target, refuse_inputs, write_file
from ..hosts import companions
from ..report import MergeReport
from . import fair
from .layer import Merger, open_merger
from .layout import LayerPlan, MergePlan, file_costs, merged_metadata, needs_one_rank, zero_layer
from .loudness import normalized
from .merged import MergedLayer
from .outcome import merge_report
from .read import Shared, SourceReader
from .work import Progress, Work


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
    shared: Shared | None = None,
) -> MergeReport:
    """Carry out a plan and write the merged file.

    Args:
        output: File to write; it appears under its name only when complete.
        progress: Called on the calling thread as layers are done.
        cancel: Asked often; True stops the merge with nothing written.
        workers: Threads; by default as many as help. Results do not depend on it.
        shared: What earlier merges of one run have read and computed; this one's is added.

    Raises:
        LoraMergeError: Anything a user can cause; nothing was written then.
    """
    clock, work = _Clock(), Work(progress, cancel, workers)
    check_target(output, overwrite)
    refuse_inputs(output, plan.files())
    plan = normalized(plan, progress=progress, cancel=cancel)
    check_space(output.parent, plan.predicted_bytes)
    with ExitStack() as stack:
        merger = stack.enter_context(open_merger(plan, shared.cache if shared else None))
        stack.enter_context(_enough_memory(merger.device))
        if merger.device.type != "cpu":
            stack.enter_context(full_precision())
        hashes = stack.enter_context(_background_hashes(merger, work, shared or Shared()))
        allotted: Mapping[str, int] = {}
        if plan.recipe.keep is not None or plan.recipe.fair:
            with clock.phase("look"):
                found = fair.allot(
                    plan, work.each_layer(plan, partial(fair.look, merger), "look"), output.stem
                )
                allotted, merger.weights = found.ranks, found.weights
        elif plan.recipe.size is not None:
            with clock.phase("look"):
                allotted = _allot(plan, merger, output.stem, work)
        with clock.phase("merge"):
            merged = _merge_layers(plan, merger, allotted, work)
        embeddings = _embeddings(plan, merger)
        source_hashes = hashes()
        merger.check_unchanged()
    if not any(layer.tensors for layer in merged):
        if len(plan.sources) == 1:
            raise IncompatibleError(
                "{file} changes nothing: its layers are zero, or too small for {dtype}. There is nothing to "
                "write.",
                plan.sources[0].path.name,
                plan.dtype,
            )
        raise IncompatibleError(
            "The LoRAs cancel each other in every layer, or what they change is too small for {dtype}, so "
            "there is nothing to write.",
            plan.dtype,
        )
    tensors = {key: tensor for layer in merged for key, tensor in layer.tensors.items()} | embeddings
    if needs_one_rank(plan):
        tensors = one_rank(tensors)
    work.check()
    with clock.phase("write"):
        written = write_file(
            output,
            tensors,
            _metadata(plan, output, merged, source_hashes),
            overwrite=overwrite,
            stop=work.check,
            progress=progress and (lambda done, total: progress(Progress("write", done, total))),
            before_rename=work.check,
        )
    return merge_report(plan, merged, written, source_hashes, merger.device, clock.all())


def one_rank(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors of a component in one rank, the smaller ones filled up with zeros.

    Where a file states no alpha, diffusers before 0.40 takes the rank of its first layer for that of
    all, and applies the others at another strength.
    """
    largest = largest_ranks({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    return {key: filled(key, tensor, largest) for key, tensor in tensors.items()}


def largest_ranks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The largest rank of each component, from the shapes of its factors by key."""
    largest: dict[str, int] = {}
    for key, shape in shapes.items():
        if key.endswith(_DOWN):
            component = key.partition(".")[0]
            largest[component] = max(largest.get(component, 0), shape[0])
    return largest


_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def filled(key: str, tensor: Tensor, ranks: Mapping[str, int]) -> Tensor:
    """A factor in its component's rank, the rest of it zeros; any other tensor as it is."""
    rank = ranks.get(key.partition(".")[0], 0)
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
                "The memory of {device} is too full for this merge. Choose the CPU, which needs none of it, "
                "or unload the model first. Nothing was written.",
                device,
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


@contextmanager
def _background_hashes(merger: Merger, work: Work, shared: Shared) -> Iterator[Callable[[], list[str]]]:
    """Hash the sources while their layers are merged; hashing releases the interpreter's lock."""
    from concurrent.futures import ThreadPoolExecutor, wait

    def hash_of(reader: SourceReader) -> str:
        if reader.identity not in shared.hashes:
            shared.hashes[reader.identity] = reader.model_hash(work.check)
        return shared.hashes[reader.identity]

    pool = ThreadPoolExecutor(1, thread_name_prefix="loramerge-hash")
    futures = [pool.submit(hash_of, reader) for reader in merger.readers]

    def results() -> list[str]:
        while wait(futures, timeout=0.1).not_done:
            work.check()
        return [future.result() for future in futures]

    try:
        yield results
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _allot(plan: MergePlan, merger: Merger, name: str, work: Work) -> dict[str, int]:
    """Ranks for a file of limited size, from the singular values of all layers.

    Raises:
        OutputError: Not even the header fits.
    """
    assert plan.recipe.size is not None
    spectra = work.each_layer(plan, merger.spectrum, "look")
    costs = file_costs(plan, spectra, name)
    layers = list(costs.layers.values())
    budget = costs.budget(plan.recipe.size, ranks.least_bytes(layers))
    return dict(zip(costs.layers, ranks.allot(layers, budget, one_rank=costs.one_rank), strict=True))


def _merge_layers(
    plan: MergePlan, merger: Merger, allotted: Mapping[str, int], work: Work
) -> list[MergedLayer]:
    def merge(batch: Sequence[LayerPlan]) -> list[MergedLayer]:
        return merger.merge_together(batch, [allotted.get(layer.layer) for layer in batch])

    merged = work.each_batch(plan, merge, "merge", merger.device)
    return _completed_groups(plan, merger, [merged[layer.layer] for layer in plan.layers])


def _completed_groups(plan: MergePlan, merger: Merger, merged: list[MergedLayer]) -> list[MergedLayer]:
    """Add zero layers where a host takes q, k, v and out of an attention only together."""
    written = {entry.result.layer for entry in merged if entry.tensors}
    shapes = {layer.layer: layer for layer in plan.layers}
    added: list[MergedLayer] = []
    for name in sorted(written):
        for companion in companions(plan.architecture.id, name):
            if companion in written or any(entry.result.layer == companion for entry in added):
                continue
            # The four are square and of one size, so any of them has the others' shape.
            like = shapes.get(companion, shapes[name])
            up, down = torch.zeros(like.out, 1), torch.zeros(1, like.width)
            stored = Stored(up.to(merger.tensors.dtype), down.to(merger.tensors.dtype), 1.0, (), 0.0, 0.0)
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
