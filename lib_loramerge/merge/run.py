"""The merge itself: read a layer, merge it, cut it to rank, round it; then write the file."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import architectures, dialects, ranks
from ..delta import (
    Delta,
    Dense,
    LayerDelta,
    LowRank,
    Spectrum,
    Stored,
    decompose,
    decompose_dense,
    norm,
    parallel_map,
    relative_error,
    take_rows,
    write_layer,
)
from ..errors import Cancelled, IncompatibleError, OutputError
from ..files import check_space, check_target, model_hash, write_file
from ..methods import LayerContext
from ..report import InputReport, LayerResult, MergeReport, relative, worst
from .base import BaseCheckpoint
from .device import compute_device
from .memory import peak_memory_bytes
from .plan import (
    ALPHA_BYTES,
    ITEM_BYTES,
    LayerPlan,
    MergePlan,
    entries_bytes,
    merged_metadata,
    metadata_bytes,
    output_names,
    same_rank,
)
from .read import SourceReader, total

# What is left of LoRAs that cancel each other: below this part of the inputs' size a layer is noise.
CANCELLED = 1e-7


@dataclass(frozen=True)
class Progress:
    """How far a merge is.

    Attributes:
        phase: ``"look"`` (singular values for a size rule), ``"merge"`` or ``"write"``.
        done, total: Layers.
        eta: Seconds left in this phase, once that can be told.
    """

    phase: str
    done: int
    total: int
    layer: str = ""
    eta: float | None = None


@dataclass(frozen=True)
class _Merged:
    """One layer's tensors as they will be written, by key, and how exact they are."""

    tensors: Mapping[str, Tensor]
    result: LayerResult
    alpha: float | None
    conv: bool
    notes: tuple[str, ...]
    written_sq: float


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
        workers: Threads; by default one a core. Results do not depend on it.

    Raises:
        LoraMergeError: Anything a user can cause; nothing was written then.
    """
    clock = _Clock()
    check_target(output, overwrite)
    check_space(output.parent, plan.predicted_bytes)
    with ExitStack() as stack:
        merger = stack.enter_context(open_merger(plan))
        hashes = stack.enter_context(_background_hashes(plan))
        with clock.phase("look"):
            allotted = (
                _allot(plan, merger, progress, cancel, workers) if plan.recipe.size is not None else None
            )
        with clock.phase("merge"):
            merged = _merge_layers(plan, merger, allotted, progress, cancel, workers)
        embeddings = {name: merger.readers[index].read(key) for name, (index, key) in plan.embeddings.items()}
        source_hashes = hashes()
    # The inputs are closed here: one of them may be the file that is replaced.
    if plan.recipe.size is None:
        del clock.seconds["look"]
    if not any(layer.tensors for layer in merged):
        raise IncompatibleError("The LoRAs cancel each other in every layer, so there is nothing to write.")
    tensors = {key: tensor for layer in merged for key, tensor in layer.tensors.items()} | embeddings
    _raise_if_cancelled(cancel)
    with clock.phase("write"):
        if progress is not None:
            progress(Progress("write", 0, len(merged)))
        written = write_file(
            output, tensors, _metadata(plan, output, merged, source_hashes), overwrite=overwrite
        )
    return _report(plan, output, merged, written, source_hashes, clock, merger.device)


def _raise_if_cancelled(cancel: Callable[[], bool] | None) -> None:
    if cancel is not None and cancel():
        raise Cancelled("Stopped. Nothing was written.")


@contextmanager
def open_merger(plan: MergePlan) -> Iterator[Merger]:
    """Open a plan's files; the merger reads and merges single layers while they are open."""
    with ExitStack() as stack:
        base = None
        if plan.base is not None and plan.needs_base:
            base = stack.enter_context(BaseCheckpoint(plan.base))
        readers = [stack.enter_context(SourceReader(entry.source, base)) for entry in plan.sources]
        yield Merger(plan, readers, compute_device(plan.recipe.device))


@contextmanager
def _background_hashes(plan: MergePlan) -> Iterator[Callable[[], list[str]]]:
    """Hash the sources while their layers are merged; hashing releases the interpreter's lock."""
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(1, thread_name_prefix="loramerge-hash")
    futures = [pool.submit(model_hash, entry.path) for entry in plan.sources]
    try:
        yield lambda: [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Merger:
    """Merges single layers of a plan. Safe to use from several threads."""

    def __init__(self, plan: MergePlan, readers: Sequence[SourceReader], device: torch.device):
        self.plan = plan
        self.readers = readers
        self.device = device
        self.dtype: torch.dtype = getattr(torch, plan.dtype)
        self.has_alpha = dialects.has_alpha(plan.architecture.id, plan.recipe.dialect, plan.style)

    def inputs(self, layer: LayerPlan) -> list[LayerDelta]:
        """What each contributing input changes in the layer, at strength 1."""
        return [
            self.readers[index].delta(layer.layer, dyn=self.plan.sources[index].input.dyn)
            for index, _, _ in layer.inputs
        ]

    def combine(self, layer: LayerPlan, inputs: Sequence[LayerDelta]) -> tuple[Delta | None, Delta | None]:
        """The method's delta, and the delta that its error is measured against where that is another."""
        present = [index for index, entry in enumerate(inputs) if entry.weight is not None]
        if not present:
            return None, None
        deltas = [_moved(inputs[index].weight, self.device) for index in present]
        weights = [layer.weights[index] for index in present]
        if layer.vector:
            return total(deltas, self._vector_weights(weights)), None
        context = LayerContext(
            layer=layer.layer,
            seed=self.plan.recipe.seed,
            present=tuple(layer.inputs[index][0] for index in present),
            inputs=len(self.plan.sources),
            rank_limit=layer.rank,
            strengths=tuple(layer.inputs[index][1] for index in present),
            block_weights=tuple(layer.inputs[index][2] for index in present),
        )
        method = self.plan.method
        merged = method.merge(deltas, weights, context, **self.plan.params)
        if isinstance(merged, LowRank) and not self.has_alpha:
            # Readers of such files take the scale as 1, so it has to be in the factors.
            merged = replace(merged, alpha=float(merged.rank), gains=merged.component_gains())
        return merged, total(deltas, weights) if method.name == "add" else None

    def _vector_weights(self, weights: Sequence[float]) -> list[float]:
        scale = self.plan.method.vector_weights
        return list(scale(weights)) if scale is not None else list(weights)

    def spectrum(self, layer: LayerPlan) -> Spectrum | None:
        """Singular values of the merged layer, for rules that look at all layers at once."""
        if layer.vector:
            return None
        merged, _ = self.combine(layer, self.inputs(layer))
        if merged is None:
            return None
        return decompose_dense(merged) if isinstance(merged, Dense) else decompose(merged, vectors=False)

    def merge(self, layer: LayerPlan, allotted: int | None) -> _Merged:
        """Everything about one layer of the result."""
        try:
            return self._merge(layer, allotted)
        except OutputError as error:
            raise OutputError(f"{layer.layer}: {error}") from error

    def _merge(self, layer: LayerPlan, allotted: int | None) -> _Merged:
        inputs = self.inputs(layer)
        notes = tuple(
            f"{self.plan.sources[index].path.name}: {note}"
            for (index, _, _), entry in zip(layer.inputs, inputs, strict=True)
            for note in entry.notes
        )
        merged, wanted = self.combine(layer, inputs)
        bias = self._bias(layer, inputs)
        if merged is None:
            return self._whole(layer, None, bias, notes)
        if layer.vector:
            return self._whole(layer, merged, bias, notes)
        if isinstance(merged, Dense) and layer.rank is None:
            return self._whole(layer, merged, bias, notes)
        stored = write_layer(merged, self.dtype, self._chooser(layer, merged, allotted))
        if stored is not None and not self.plan.method.uses_rank and self._cancels(inputs, layer, stored):
            stored = None
        if stored is None:
            gone = norm(wanted) ** 2 if wanted is not None else 0.0
            return self._absent(layer, gone, bias, notes)
        return self._low_rank(layer, stored, wanted, bias, notes)

    def _chooser(
        self, layer: LayerPlan, merged: Delta, allotted: int | None
    ) -> Callable[[Spectrum], int] | None:
        if not self.plan.method.uses_rank and isinstance(merged, LowRank):
            return None
        if allotted is not None:
            return lambda spectrum: min(allotted, spectrum.rank)
        same = same_rank(layer)
        return lambda spectrum: ranks.choose(
            self.plan.recipe, spectrum, same=spectrum.rank if same is None else same, conv=bool(layer.kernel)
        )

    def _cancels(self, inputs: Sequence[LayerDelta], layer: LayerPlan, stored: Stored) -> bool:
        """Whether what is left is only the rounding noise of inputs that cancel."""
        if len(inputs) < 2 or stored.exact_sq == 0:
            return stored.exact_sq == 0
        size = sum(
            abs(weight) * norm(entry.weight)
            for weight, entry in zip(layer.weights, inputs, strict=True)
            if entry.weight is not None
        )
        return stored.exact_sq <= (CANCELLED * size) ** 2

    def _bias(self, layer: LayerPlan, inputs: Sequence[LayerDelta]) -> Tensor | None:
        pairs = [
            (w, entry.bias) for w, entry in zip(layer.weights, inputs, strict=True) if entry.bias is not None
        ]
        if not pairs:
            return None
        weights = self._vector_weights([weight for weight, _ in pairs])
        return torch.stack([w * bias.double() for w, (_, bias) in zip(weights, pairs, strict=True)]).sum(0)

    def _rounded(self, layer: LayerPlan, exact: Tensor) -> tuple[Tensor, float, float]:
        """A tensor in the output dtype, its squared error and its exact squared norm."""
        rounded = exact.to(self.dtype).cpu()
        if not bool(rounded.isfinite().all()):
            raise OutputError(f"the values are too large for {self.plan.dtype}. Save as float32.")
        error = (rounded.double() - exact.double().cpu()).square().sum()
        return rounded.contiguous(), float(error), float(exact.double().square().sum())

    def _whole(
        self, layer: LayerPlan, merged: Delta | None, bias: Tensor | None, notes: tuple[str, ...]
    ) -> _Merged:
        """A layer written as plain differences: ``diff``/``diff_b``, or ``w_norm``/``b_norm``."""
        weight_slot, bias_slot = self._whole_slots(layer)
        tensors, error_sq, exact_sq = {}, 0.0, 0.0
        wanted = []
        if merged is not None:
            wanted.append((weight_slot, merged))
        if bias is not None:
            wanted.append((bias_slot, Dense(bias)))
        if weight_slot == "w_norm":
            # A1111 refuses a whole file over a norm that has only one of the two.
            have = {slot for slot, _ in wanted}
            wanted += [(s, Dense(torch.zeros(layer.out))) for s in ("w_norm", "b_norm") if s not in have]
        for slot, delta in wanted:
            for prefix, piece in self._pieces(layer, delta):
                value = piece.dense()
                tensor, error, exact = self._rounded(layer, value)
                if slot == "diff" and tensor.dim() == 2:
                    tensor = self._shaped(layer, tensor)
                error_sq, exact_sq = error_sq + error, exact_sq + exact
                tensors[self._key(prefix, slot)] = tensor
        result = LayerResult(layer.layer, None, error_sq, exact_sq)
        return _Merged(tensors, result, None, bool(layer.kernel), notes, exact_sq)

    def _whole_slots(self, layer: LayerPlan) -> tuple[str, str]:
        kinds = {
            part.facts.kind
            for index, _, _ in layer.inputs
            for part in self.readers[index].source.layers[layer.layer]
        }
        return ("w_norm", "b_norm") if kinds == {"norm"} else ("diff", "diff_b")

    def _absent(
        self, layer: LayerPlan, exact_sq: float, bias: Tensor | None, notes: tuple[str, ...]
    ) -> _Merged:
        """A layer that cancelled; its bias alone is kept where there is one."""
        if bias is not None and bool(bias.any()):
            return self._whole(layer, None, bias, notes)
        return _Merged({}, LayerResult(layer.layer, 0, exact_sq, exact_sq), None, False, notes, 0.0)

    def _low_rank(
        self,
        layer: LayerPlan,
        stored: Stored,
        wanted: Delta | None,
        bias: Tensor | None,
        notes: tuple[str, ...],
    ) -> _Merged:
        delta = stored.delta()
        error_sq, exact_sq = stored.error_sq, stored.exact_sq
        written_sq = max(0.0, exact_sq - error_sq)
        if wanted is not None:
            error_sq, exact_sq = relative_error(wanted, delta)
            written_sq = norm(delta) ** 2
        tensors = {}
        for prefix, piece in self._pieces(layer, delta):
            assert isinstance(piece, LowRank)
            tensors |= self._factors(layer, prefix, piece)
        if bias is not None:
            for prefix, piece in self._pieces(layer, Dense(bias)):
                tensor, error, exact = self._rounded(layer, piece.dense())
                error_sq, exact_sq, written_sq = error_sq + error, exact_sq + exact, written_sq + exact
                tensors[self._key(prefix, "diff_b")] = tensor
        result = LayerResult(layer.layer, stored.rank, error_sq, exact_sq)
        return _Merged(tensors, result, stored.alpha, bool(layer.kernel), notes, written_sq)

    def _factors(self, layer: LayerPlan, prefix: str, delta: LowRank) -> dict[str, Tensor]:
        """``lora_up``, ``lora_down`` and ``alpha`` of one written layer."""
        up, down = delta.up.cpu().contiguous(), delta.down.cpu().contiguous()
        if architectures.is_conv(self.plan.architecture.id, layer.layer) or layer.kernel:
            kernel = layer.kernel or (1, 1)
            up = up.reshape(*up.shape, 1, 1)
            down = down.reshape(down.shape[0], layer.in_, *kernel)
        tensors = {self._key(prefix, "up"): up, self._key(prefix, "down"): down}
        if self.has_alpha:
            tensors[self._key(prefix, "alpha")] = torch.tensor(delta.alpha, dtype=torch.float32)
        return tensors

    def _shaped(self, layer: LayerPlan, weight: Tensor) -> Tensor:
        if layer.kernel:
            return weight.reshape(weight.shape[0], layer.in_, *layer.kernel)
        if architectures.is_conv(self.plan.architecture.id, layer.layer):
            return weight.reshape(*weight.shape, 1, 1)
        return weight

    def _pieces(self, layer: LayerPlan, delta: Delta) -> Iterator[tuple[str, Delta]]:
        """The layer under each name it is written as; several where a fused layer is written split."""
        for prefix, rows in output_names(self.plan, layer.layer):
            if rows is None:
                yield prefix, delta
            else:
                yield prefix, take_rows(delta, rows.cut(layer.out))

    def _key(self, prefix: str, slot: str) -> str:
        return dialects.output_key(prefix, slot, self.plan.recipe.dialect, self.plan.style)


def _moved(delta: Delta | None, device: torch.device) -> Delta:
    assert delta is not None
    if device.type == "cpu":
        return delta
    if isinstance(delta, LowRank):
        return LowRank(
            delta.up.to(device), delta.down.to(device), delta.alpha, delta.kernel, delta.parts, delta.gains
        )
    return Dense(
        delta.weight.to(device), delta.kernel, None if delta.start is None else delta.start.to(device)
    )


def _allot(
    plan: MergePlan,
    merger: Merger,
    progress: Callable[[Progress], None] | None,
    cancel: Callable[[], bool] | None,
    workers: int | None,
) -> dict[str, int]:
    """Ranks for a file of limited size, from the singular values of all layers.

    Raises:
        OutputError: Not even the header fits.
    """
    assert plan.recipe.size is not None
    spectra = for_each_layer(plan.layers, merger.spectrum, "look", progress, cancel, workers)
    item = ITEM_BYTES[plan.dtype]
    costs, names, fixed = [], [], metadata_bytes(plan)
    for layer, spectrum in zip(plan.layers, spectra, strict=True):
        entry = entries_bytes(plan, layer)
        if spectrum is None:
            fixed += layer.bytes(item) + entry
            continue
        per_rank = (layer.out + layer.width) * item
        needed = 1 if architectures.companions(plan.architecture.id, layer.layer) else 0
        biases = layer.out * item if layer.bias else 0
        costs.append(
            ranks.LayerCost(
                spectrum.values.tolist(), per_rank, entry + ALPHA_BYTES + biases, min(needed, spectrum.rank)
            )
        )
        names.append(layer.layer)
    budget = int(plan.recipe.size * 1_000_000) - fixed
    least = min((cost.per_rank + cost.fixed for cost in costs), default=0)
    if budget < least:
        raise OutputError(
            f"{plan.recipe.size:g} MB is too small for any layer of this merge; "
            f"it needs at least {(fixed + least) / 1e6:.3f} MB."
        )
    return dict(zip(names, ranks.allot(costs, budget), strict=True))


def _merge_layers(
    plan: MergePlan,
    merger: Merger,
    allotted: Mapping[str, int] | None,
    progress: Callable[[Progress], None] | None,
    cancel: Callable[[], bool] | None,
    workers: int | None,
) -> list[_Merged]:
    def merge(layer: LayerPlan) -> _Merged:
        return merger.merge(layer, None if allotted is None else allotted.get(layer.layer))

    merged = for_each_layer(plan.layers, merge, "merge", progress, cancel, workers)
    return _completed_groups(plan, merger, merged)


def for_each_layer(
    layers: Sequence[LayerPlan],
    function: Callable[[LayerPlan], Any],
    phase: str,
    progress: Callable[[Progress], None] | None = None,
    cancel: Callable[[], bool] | None = None,
    workers: int | None = None,
) -> list[Any]:
    """``function`` of every layer, in the order of ``layers``.

    Large layers go first and layers of one shape together, so that the threads
    finish at the same time.
    """
    order = sorted(range(len(layers)), key=lambda i: (-layers[i].out * layers[i].width, layers[i].out, i))
    results: list[Any] = [None] * len(layers)
    start = time.perf_counter()
    jobs = (layers[index] for index in order)
    for done, (index, result) in enumerate(
        zip(order, parallel_map(function, jobs, workers=workers, cancel=cancel), strict=True), start=1
    ):
        results[index] = result
        if progress is not None:
            spent = time.perf_counter() - start
            eta = spent / done * (len(layers) - done) if done >= 8 else None
            progress(Progress(phase, done, len(layers), layers[index].layer, eta))
    return results


def _completed_groups(plan: MergePlan, merger: Merger, merged: list[_Merged]) -> list[_Merged]:
    """Add zero layers where a host takes q, k, v and out of an attention only together."""
    written = {entry.result.layer for entry in merged if entry.tensors}
    shapes = {layer.layer: layer for layer in plan.layers}
    added: list[_Merged] = []
    for name in sorted(written):
        for companion in architectures.companions(plan.architecture.id, name):
            if companion in written or any(entry.result.layer == companion for entry in added):
                continue
            # The four are square and of one size, so any of them tells the others' shape.
            like = shapes.get(companion, shapes[name])
            zero = LowRank(torch.zeros(like.out, 1), torch.zeros(1, like.width), 1.0, like.kernel)
            stored = Stored(zero.up.to(merger.dtype), zero.down.to(merger.dtype), 1.0, (), 0.0, 0.0)
            template = LayerPlan(
                companion, like.component, like.block, like.out, like.in_, (), (), (), 1, False, False
            )
            added.append(merger._low_rank(template, stored, None, None, ()))
    kept = [
        entry
        for entry in merged
        if entry.tensors or entry.result.layer not in {a.result.layer for a in added}
    ]
    return kept + added


def _metadata(
    plan: MergePlan, output: Path, merged: Sequence[_Merged], hashes: Sequence[str]
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
    merged: Sequence[_Merged],
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
    return MergeReport(
        output=str(output),
        size_bytes=written.size,
        base_model=plan.architecture.label,
        mode=plan.method.name,
        params=dict(plan.params),
        dtype=plan.dtype,
        device=str(device),
        dialect=plan.recipe.dialect,
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
        worst_layers=worst(results),
        inputs=[_input_report(plan, index, hashes[index]) for index in range(len(plan.sources))],
        warnings=[*plan.warnings, *(note for note in notes if note not in plan.warnings)],
        skipped=list(plan.skipped),
        sshs_model_hash=written.model_hash,
        seconds=clock.all(),
        peak_memory_bytes=peak_memory_bytes(),
    )


def _input_report(plan: MergePlan, index: int, source_hash: str) -> InputReport:
    entry = plan.sources[index]
    blocks: dict[str, float] = {}
    for layer in plan.layers:
        for source, strength, block_weight in layer.inputs:
            if source == index:
                blocks.setdefault(layer.block or "other", strength * block_weight)
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
        blocks=dict(sorted(blocks.items())),
    )


__all__ = ["Merger", "Progress", "for_each_layer", "open_merger", "run_merge"]
