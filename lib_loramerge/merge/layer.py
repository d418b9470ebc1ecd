"""One layer of the result: read, merge, cut to rank, round, measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from .. import ranks
from ..delta import (
    Cache,
    Delta,
    Dense,
    LayerDelta,
    LowRank,
    Merged,
    Mixed,
    Spectrum,
    Stored,
    all_values,
    changed,
    cut_layers,
    decompose_dense,
    directions,
    moved,
    near_one,
    norm,
    relative_error,
    times_two_to,
    weighted_sum,
)
from ..delta.device import compute_device
from ..errors import OutputError, Sentence
from ..methods import LayerContext
from ..report import LayerResult
from .base import BaseCheckpoint
from .doubt import all_doubt, doubt_of, doubted, not_written
from .layout import LayerPlan, MergePlan, smaller
from .merged import Given, Lost, MergedLayer, Prepared, lost, lost_at_smaller
from .read import SourceReader
from .tensors import LayerTensors


@contextmanager
def open_merger(plan: MergePlan, cache: Cache | None = None) -> Iterator[Merger]:
    """Open a plan's files; the merger reads and merges layers while they are open.

    Args:
        cache: What merges of one run share.
    """
    with ExitStack() as stack:
        base = None
        if plan.base is not None and plan.needs_base:
            base = stack.enter_context(BaseCheckpoint(plan.base))
        readers = [stack.enter_context(SourceReader(entry.source, base, cache)) for entry in plan.sources]
        device = compute_device(plan.recipe.device)
        if device.type != "cpu":
            # torch loads an accelerator's linear algebra at its first use, which two threads must not make.
            torch.linalg.qr(torch.ones(1, 1, device=device))
        yield Merger(plan, readers, device, cache)


@contextmanager
def _named(layer: LayerPlan) -> Iterator[None]:
    """Errors of the arithmetic say in which layer they are."""
    try:
        yield
    except OutputError as error:
        raise OutputError("{name}: {error}", layer.layer, error) from error


class Merger:
    """Merges layers of a plan. Safe to use from several threads."""

    def __init__(
        self, plan: MergePlan, readers: Sequence[SourceReader], device: torch.device, cache: Cache | None
    ) -> None:
        self.plan = plan
        self.cache = cache
        self.readers = readers
        self.device = device
        self.tensors = LayerTensors(plan)
        # Weights of the LoRAs that share what is kept, and the LoRA of a source: one given twice counts once.
        self.weights: tuple[float, ...] | None = None
        known: dict[tuple[object, ...], int] = {}
        self.loras = [known.setdefault((one.path, one.input.dyn), len(known)) for one in plan.sources]
        less = smaller(plan)
        self.smaller = None if less is None else less["rank"]

    def check_unchanged(self) -> None:
        """Refuse the work if another program wrote to any of the files meanwhile.

        Raises:
            FileError: With its name.
        """
        for reader in self.readers:
            reader.check_unchanged()
        base = self.readers[0].base if self.readers else None
        if base is not None:
            base.check_unchanged()

    def inputs(self, layer: LayerPlan) -> list[LayerDelta]:
        """What each contributing input changes in the layer, at strength 1."""
        return [
            self.readers[index].delta(layer.layer, dyn=self.plan.sources[index].input.dyn)
            for index, _, _ in layer.inputs
        ]

    def present(self, layer: LayerPlan) -> list[tuple[int, float, Delta]]:
        """Index, weight and weight delta at strength 1 of each contributing input that has the layer."""
        return [
            (index, weight, built.weight)
            for (index, _, _), weight, built in zip(
                layer.inputs, layer.weights, self.inputs(layer), strict=True
            )
            if built.weight is not None
        ]

    def _given(self, layer: LayerPlan, inputs: Sequence[LayerDelta]) -> list[Given]:
        """The weight deltas there are, on the device that works."""
        return [
            Given(place, moved(entry.weight, self.device), layer.weights[place])
            for place, entry in enumerate(inputs)
            if entry.weight is not None
        ]

    def combine(self, layer: LayerPlan, inputs: Sequence[LayerDelta]) -> tuple[Merged | None, Delta | None]:
        """The method's delta, and the plain weighted sum where that is another."""
        if layer.vector:
            weights = [entry.weight for entry in inputs]
            there = any(weight is not None for weight in weights)
            return (Dense(self._vector(layer, weights, layer.layer)) if there else None), None
        return self.combined(layer, self._given(layer, inputs))

    def combined(self, layer: LayerPlan, given: Sequence[Given]) -> tuple[Merged | None, Delta | None]:
        """:meth:`combine` of weight deltas that are read already."""
        if not given:
            return None, None
        deltas, weights = [entry.delta for entry in given], [entry.weight for entry in given]
        method = self.plan.method
        with _named(layer):
            near, power = near_one(deltas, weights, exact=method.exact)
        merged = method.merge(
            near, weights, self._context(layer, [entry.place for entry in given]), **self.plan.params
        )
        merged = times_two_to(merged, power)
        if isinstance(merged, LowRank) and not self.tensors.has_alpha:
            # Readers of such files take the scale as 1, so it has to be in the factors.
            alpha, gains = float(merged.rank), merged.component_gains()
            merged = changed(merged, alpha=alpha, gains=gains, name=merged.name)
        return merged, None if method.exact else weighted_sum(deltas, weights)

    def _context(self, layer: LayerPlan, present: Sequence[int], name: str = "") -> LayerContext:
        return LayerContext(
            layer=name or layer.layer,
            seed=self.plan.recipe.seed,
            present=tuple(layer.inputs[index][0] for index in present),
            inputs=len(self.plan.sources),
            rank_limit=layer.rank,
            strengths=tuple(layer.inputs[index][1] for index in present),
            block_weights=tuple(layer.inputs[index][2] for index in present),
        )

    def _vector(self, layer: LayerPlan, given: Sequence[Delta | Tensor | None], name: str) -> Tensor:
        """The method's merge of the inputs' norms or biases, of which at least one is not None.

        Args:
            name: Differs between a layer's vectors, so that random choices do too.
        """
        present = [index for index, entry in enumerate(given) if entry is not None]
        vectors = [
            entry if isinstance(entry, Tensor) else entry.dense() for entry in given if entry is not None
        ]
        weights = [layer.weights[index] for index in present]
        context = self._context(layer, present, name)
        return self.plan.method.merge_vectors(vectors, weights, context, **self.plan.params)

    def spectrum(self, layer: LayerPlan) -> Spectrum | None:
        """Singular values of the merged layer, for rules that look at all layers at once."""
        if layer.vector:
            return None
        merged, _ = self.combine(layer, self.inputs(layer))
        if merged is None:
            return None
        with _named(layer):
            if isinstance(merged, Dense):
                return decompose_dense(merged, vectors=False)
            return all_values(merged)

    def merge_together(
        self, layers: Sequence[LayerPlan], allotted: Sequence[int | None]
    ) -> list[MergedLayer]:
        """Everything about some layers of the result; together they are quicker where they have one shape.

        Args:
            allotted: Rank that a size rule gives each of them.
        """
        prepared = [self.prepare(layer) for layer in layers]
        cut = [index for index, entry in enumerate(prepared) if not entry.whole]
        stored = dict(
            zip(cut, self._store([prepared[i] for i in cut], [allotted[i] for i in cut]), strict=True)
        )
        return [self.finish(entry, stored.get(index)) for index, entry in enumerate(prepared)]

    def prepare(self, layer: LayerPlan) -> Prepared:
        """Read a layer of every input and merge it; nothing is cut or rounded yet."""
        inputs = self.inputs(layer)
        notes = tuple(
            Sentence("{file}: {note}", self.plan.sources[index].path.name, Sentence(note))
            for (index, _, _), entry in zip(layer.inputs, inputs, strict=True)
            for note in entry.notes
        )
        given = () if layer.vector else self._given(layer, inputs)
        merged, plain = self.combine(layer, inputs) if layer.vector else self.combined(layer, given)
        whole = merged is None or layer.vector or (isinstance(merged, Dense) and layer.rank is None)
        return Prepared(layer, merged, plain, self._bias(layer, inputs), notes, whole, given)

    def finish(self, prepared: Prepared, stored: Stored | None) -> MergedLayer:
        """The tensors of a layer, from what was stored of it; None is a layer that cancelled."""
        layer, plain = prepared.layer, prepared.plain
        with _named(layer):
            if prepared.whole and not all_doubt(prepared.merged):
                assert not isinstance(prepared.merged, Mixed)
                merged = self._whole(layer, prepared.merged, prepared.bias, prepared.notes, plain)
                merged = replace(merged, result=doubted(merged.result, doubt_of(prepared.merged)))
                return replace(merged, lost=self._lost(prepared, prepared.merged))
            if stored is None:
                return replace(self._absent(prepared), lost=self._lost(prepared, None))
            merged = self.low_rank(layer, stored, plain, prepared.bias, prepared.notes)
            merged = replace(merged, result=doubted(merged.result, doubt_of(prepared.merged)))
            return replace(
                merged,
                lost=self._lost(prepared, stored),
                cut=lost_at_smaller(prepared, stored, self.plan.method.exact),
            )

    def _lost(self, prepared: Prepared, written: Stored | Delta | None) -> Lost:
        return lost(prepared, written, self.plan.method.exact, self.device)

    def given(self, layer: LayerPlan) -> list[Given]:
        """The weight deltas of a layer, read and on the device that works."""
        return self._given(layer, self.inputs(layer))

    def _shared(self, prepared: Prepared, merged: Merged, rank: int | None) -> tuple[Merged | None, float]:
        """What a fair cut keeps of a layer, and the squared norm of what it lacks; else the layer itself."""
        given = prepared.given
        several = isinstance(merged, LowRank) and 1 < len(given) == len(merged.parts)
        if self.weights is None or rank is None or not several or not isinstance(merged, LowRank):
            return merged, 0.0
        found = directions(merged, self.owners(prepared.layer, given), len(set(self.loras)))
        return (merged, 0.0) if found is None else found.cut(self.weights, rank)

    def owners(self, layer: LayerPlan, given: Sequence[Given]) -> list[int]:
        """Which LoRA each weight delta of a layer is from."""
        return [self.loras[layer.inputs[entry.place][0]] for entry in given]

    def _store(self, prepared: Sequence[Prepared], allotted: Sequence[int | None]) -> list[Stored | None]:
        deltas = [entry.merged for entry in prepared if entry.merged is not None]
        rules = [self._chooser(p.layer, d, a) for p, d, a in zip(prepared, deltas, allotted, strict=True)]
        most = [self._most(p.layer, a) for p, a in zip(prepared, allotted, strict=True)]
        names = [entry.layer.layer for entry in prepared]
        fixed = not self.tensors.has_alpha
        if self.weights is None:
            return cut_layers(
                deltas,
                self.tensors.dtype,
                rules,
                names=names,
                most=most,
                fixed_alpha=fixed,
                smaller=self.smaller,
                cache=self.cache,
            )
        results: list[Stored | None] = [None] * len(deltas)
        for index, (entry, delta, rank) in enumerate(zip(prepared, deltas, allotted, strict=True)):
            kept, lacks = self._shared(entry, delta, rank)
            if kept is None:
                continue
            [stored] = cut_layers(
                [kept],
                self.tensors.dtype,
                [rules[index]],
                names=[names[index]],
                fixed_alpha=fixed,
                smaller=self.smaller,
            )
            if stored is not None and kept is not delta:
                stored = replace(
                    stored, error_sq=stored.error_sq + lacks, exact_sq=stored.exact_sq + lacks, parts=None
                )
            results[index] = stored
        return results

    def _chooser(
        self, layer: LayerPlan, merged: Merged, allotted: int | None
    ) -> Callable[[Spectrum], int] | None:
        """The rank rule of one layer; None where all ranks are kept."""
        if not self.plan.method.uses_rank and isinstance(merged, LowRank):
            return None
        if allotted is not None:
            return lambda spectrum: min(allotted, spectrum.rank)
        bounded = layer.bounded(self.plan.method)

        return lambda spectrum: ranks.choose(
            self.plan.recipe, spectrum, same=layer.same_rank, conv=bool(layer.kernel), bounded=bounded
        )

    def _most(self, layer: LayerPlan, allotted: int | None) -> int | None:
        """The largest rank that the rank rule can give, where that is known before the singular values."""
        if allotted is not None:
            return max(1, allotted)
        return layer.rank if self.plan.recipe.retain is None else None

    def _bias(self, layer: LayerPlan, inputs: Sequence[LayerDelta]) -> Tensor | None:
        biases = [entry.bias for entry in inputs]
        if all(bias is None for bias in biases):
            return None
        return self._vector(layer, biases, f"{layer.layer}.bias")

    def _whole(
        self,
        layer: LayerPlan,
        merged: Delta | None,
        bias: Tensor | None,
        notes: tuple[str, ...],
        plain: Delta | None = None,
    ) -> MergedLayer:
        """A layer written as plain differences: ``diff``/``diff_b``, or ``w_norm``/``b_norm``."""
        if merged is None and bias is not None and layer.in_ and not layer.vector:
            # A1111 refuses a whole file over a bias that stands alone, so it gets factors that do nothing.
            up, down = (
                torch.zeros(size, dtype=self.tensors.dtype) for size in ((layer.out, 1), (1, layer.width))
            )
            nothing = Stored(up, down, 1.0, layer.kernel, 0.0, 0.0)
            return self.low_rank(layer, nothing, None, bias, notes)
        weight_slot, bias_slot = self._whole_slots(layer)
        tensors: dict[str, Tensor] = {}
        error_sq = exact_sq = 0.0
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
            own, error, exact = self.tensors.whole(layer, slot, delta)
            tensors |= own
            error_sq, exact_sq = error_sq + error, exact_sq + exact
        away = (0.0, 0.0) if plain is None or merged is None else relative_error(plain, merged)
        result = LayerResult(layer.layer, None, error_sq, exact_sq, *away)
        return MergedLayer(tensors, result, None, bool(layer.kernel), notes, exact_sq)

    def _whole_slots(self, layer: LayerPlan) -> tuple[str, str]:
        kinds = {
            part.facts.kind
            for index, _, _ in layer.inputs
            for part in self.readers[index].source.layers[layer.layer]
        }
        return ("w_norm", "b_norm") if kinds == {"norm"} else ("diff", "diff_b")

    def _absent(self, prepared: Prepared) -> MergedLayer:
        """A layer that cancelled, or for which a file of limited size has no room.

        Its bias alone is kept where there is one; what is lost counts as error.
        """
        layer, bias, notes = prepared.layer, prepared.bias, prepared.notes
        sum_sq = 0.0 if prepared.plain is None else norm(prepared.plain) ** 2
        lost, doubt = not_written(prepared.merged)
        lost = sum_sq if self.plan.method.adds_factors else lost
        if bias is not None and bool(bias.any()):
            kept = self._whole(layer, None, bias, notes)
            error_sq, exact_sq = kept.result.error_sq + lost, kept.result.exact_sq + lost
            result = LayerResult(layer.layer, kept.result.rank, error_sq, exact_sq, sum_sq, sum_sq)
            return replace(kept, result=doubted(result, doubt))
        result = LayerResult(layer.layer, 0, lost, lost, sum_sq, sum_sq)
        return MergedLayer({}, doubted(result, doubt), None, False, notes, 0.0)

    def low_rank(
        self,
        layer: LayerPlan,
        stored: Stored,
        plain: Delta | None,
        bias: Tensor | None,
        notes: tuple[str, ...],
    ) -> MergedLayer:
        delta = stored.delta()
        error_sq, exact_sq = stored.error_sq, stored.exact_sq
        written_sq = max(0.0, exact_sq - error_sq)
        from_sum_sq = sum_sq = 0.0
        if plain is not None:
            from_sum_sq, sum_sq = relative_error(plain, moved(delta, self.device))
        if plain is not None and self.plan.method.adds_factors:
            error_sq, exact_sq, written_sq = from_sum_sq, sum_sq, norm(delta) ** 2
        tensors = self.tensors.factors(layer, delta)
        if bias is not None:
            own, error, exact = self.tensors.whole(layer, self.tensors.bias_slot, Dense(bias))
            tensors |= own
            error_sq, exact_sq, written_sq = error_sq + error, exact_sq + exact, written_sq + exact
        result = LayerResult(layer.layer, stored.rank, error_sq, exact_sq, from_sum_sq, sum_sq)
        return MergedLayer(tensors, result, stored.alpha, bool(layer.kernel), notes, written_sq)
