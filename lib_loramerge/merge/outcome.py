"""The report of a merge, from what became of its layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from .. import models, ranks
from ..errors import Sentence
from ..files import Written
from ..report import (
    EXACT_SUM,
    WELL_KEPT,
    WHOLE,
    InputReport,
    LayerResult,
    MergeReport,
    Smaller,
    error_range,
    percent,
    relative,
    worst,
)
from .input_notes import layer_notes
from .layout import WORTH, LayerPlan, MergePlan, SourcePlan, smaller
from .memory import peak_memory_bytes
from .merged import MergedLayer

_KNOWN = 1e-3  # Part of an error up to which it may be off without being called an upper bound.


def merge_report(
    plan: MergePlan,
    merged: Sequence[MergedLayer],
    written: Written,
    hashes: Sequence[str],
    device: torch.device,
    seconds: Mapping[str, float],
) -> MergeReport:
    """What was written, how exact it is, and what of each input is in it.

    Args:
        hashes: ``sshs_model_hash`` of each source.
        seconds: Phase to the time that it took.
    """
    results = [entry.result for entry in merged]
    present = [entry for entry in merged if entry.tensors]
    least, error = error_range(results)
    exact_sq = sum(result.exact_sq for result in results)
    histogram = Counter(entry.result.rank for entry in present if entry.result.rank)
    notes = layer_notes((entry.result.layer, note) for entry in merged for note in entry.notes)
    inputs = [_input_report(plan, index, hashes[index], merged) for index in range(len(plan.sources))]
    return MergeReport(
        output=str(written.path),
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
        error=error,
        error_at_most=_apart(least, error),
        error_against=EXACT_SUM
        if plan.method.means_sum
        else Sentence("{mode}'s own result", plan.method.name),
        kept=min(1.0, relative(sum(entry.written_sq for entry in merged), exact_sq)),
        from_sum=_from_sum(plan, results),
        worst_layers=worst(results),
        inputs=inputs,
        warnings=[
            *plan.warnings,
            *(note for note in notes if note not in plan.warnings),
            *(_doubtful(results) if _apart(least, error) else []),
            *_cut(plan, inputs),
        ],
        skipped=list(plan.skipped),
        sshs_model_hash=written.model_hash,
        seconds=dict(seconds),
        peak_memory_bytes=peak_memory_bytes(),
        by_block=_by_block(plan, merged),
        smaller=_smaller(plan, merged, written.size),
    )


def _apart(least: float, most: float) -> bool:
    """Whether an error is known as an upper bound only."""
    return most - least > _KNOWN * most


def _doubtful(results: Sequence[LayerResult]) -> list[str]:
    """A warning for layers whose remainder float64 cannot resolve."""
    doubtful = [result for result in results if result.doubt]
    most = max(doubtful, key=lambda result: result.doubt)
    return [
        Sentence(
            "In {count} of {total} layers the inputs cancel to the last digits of float64, most in {layer}: "
            "what is left there is not known, and the stated error is an upper bound.",
            len(doubtful),
            len(results),
            most.layer,
        )
    ]


def _from_sum(plan: MergePlan, results: Sequence[LayerResult]) -> float | None:
    if plan.method.means_sum:
        return None
    sum_sq = sum(result.sum_sq for result in results)
    return relative(sum(result.from_sum_sq for result in results), sum_sq) if sum_sq > 0 else None


def _by_block(plan: MergePlan, merged: Sequence[MergedLayer]) -> dict[str, dict[str, float]]:
    """Norm, error and share kept of each block."""
    blocks = {layer.layer: layer.block or "other" for layer in plan.layers}
    sums: dict[str, list[float]] = {}
    results: dict[str, list[LayerResult]] = {}
    for entry in merged:
        # Zero layers that only complete a group are not in the plan, and have no norm.
        block = blocks.get(entry.result.layer, "other")
        results.setdefault(block, []).append(entry.result)
        row = sums.setdefault(block, [0.0, 0.0])
        row[0], row[1] = row[0] + entry.result.exact_sq, row[1] + entry.written_sq
    return {
        block: {
            "norm": exact**0.5,
            "error": error_range(results[block])[1],
            "kept": min(1.0, relative(written, exact)),
        }
        for block, (exact, written) in sorted(sums.items())
        if exact > 0
    }


def _cut(plan: MergePlan, inputs: Sequence[InputReport]) -> list[str]:
    """A warning for each LoRA of which the rank left too little; other modes change them on purpose."""
    if not (plan.method.exact and plan.method.uses_rank):
        return []
    texts, cuts = [], _rank_cuts(plan)
    for entry in inputs:
        if entry.kept >= WELL_KEPT or entry.worst_block is None:
            continue
        kept, block = percent(max(0.0, entry.kept)), entry.worst_block["block"]
        of_block = percent(max(0.0, entry.worst_block["kept"]))
        texts.append(
            Sentence(
                "{name}: only {kept} of this LoRA is in the file, of its block {block} {of_block}; the rank "
                "cut off the rest. --rank full keeps all of it.",
                entry.name,
                kept,
                block,
                of_block,
            )
            if cuts
            else Sentence(
                "{name}: only {kept} of this LoRA is in the file, of its block {block} {of_block}; the "
                "rest is smaller than the rounding of the other LoRAs to {dtype}. Raise its strength, "
                "or lower theirs.",
                entry.name,
                kept,
                block,
                of_block,
                plan.dtype,
            )
        )
    return list(dict.fromkeys(texts))  # one LoRA given twice is one


def _rank_cuts(plan: MergePlan) -> bool:
    """Whether the recipe's rule may have cut a layer's rank."""
    recipe, method = plan.recipe, plan.method

    def cuts(layer: LayerPlan) -> bool:
        bounded, conv = layer.bounded(method), bool(layer.kernel)
        rank = ranks.asked(recipe, same=layer.same_rank, conv=conv, bounded=bounded)
        return rank is not None and rank < layer.largest_rank(method)

    return bool(recipe.own_ranks) or any(map(cuts, plan.layers))


def _smaller(plan: MergePlan, merged: Sequence[MergedLayer], size: int) -> Smaller | None:
    """What a file of the largest input's rank would cost and lose, rounding aside, where it is known.

    Args:
        size: Bytes of the file that was written. Where the inputs have directions in common, its ranks are
            lower than the plan could know.
    """
    found = smaller(plan)
    if found is None or found["size_bytes"] >= WORTH * size:
        return None
    cuts = [
        entry.cut or ((entry.result.error_sq, entry.lost) if not entry.result.rank else None)
        for entry in merged
    ]
    known = [cut for cut in cuts if cut is not None]
    if len(known) < len(cuts):
        return found
    exact_sq = sum(entry.result.exact_sq for entry in merged)
    found["error"] = relative(sum(error for error, _ in known), exact_sq)
    lost = [rows for _, rows in known if rows is not None]
    if len(lost) == len(cuts):
        rows = [(entry.result.layer, own) for entry, own in zip(merged, lost)]
        kept = [shares_kept(plan, index, rows, models.component)[""] for index in range(len(plan.sources))]
        found["kept"] = min(kept)
        found["weakest"] = plan.sources[kept.index(min(kept))].path.stem
    return found


def shares_kept(
    plan: MergePlan,
    index: int,
    merged: Iterable[tuple[str, Iterable[tuple[int, Any, float]]]],
    part_of: Callable[[str], str],
) -> dict[str, Any]:
    """Share of an input that is in the file, by part of it and, under an empty name, as a whole.

    A LoRA that was given several times is judged as one, at the sum of its strengths.

    Args:
        merged: Layers, and what each lacks of its inputs, as in ``Lost``; arrays of several cuts give arrays.
        part_of: Part of a layer.
    """
    chosen = plan.sources[index]
    same = {
        place
        for place, entry in enumerate(plan.sources)
        if (entry.path, entry.input.dyn) == (chosen.path, chosen.input.dyn)
    }
    negative = {
        (layer.layer, source)
        for layer in plan.layers
        for (source, _, _), weight in zip(layer.inputs, layer.weights, strict=True)
        if weight < 0 and source in same
    }
    sums: dict[str, list[Any]] = {"": [0.0, 0.0]}
    for layer, rows in merged:
        own = [row for row in rows if row[0] in same]
        lost = sum(row[1] for row in own)
        root = sum(max(0.0, row[2]) ** 0.5 * (-1 if (layer, row[0]) in negative else 1) for row in own)
        for name in ("", part_of(layer)) if own else ():
            total = sums.setdefault(name, [0.0, 0.0])
            total[0], total[1] = total[0] + lost, total[1] + root**2
    return {name: 1 - lost / own if own > 0 else 1.0 for name, (lost, own) in sorted(sums.items())}


def _input_report(
    plan: MergePlan, index: int, source_hash: str, merged: Sequence[MergedLayer]
) -> InputReport:
    entry, rows = plan.sources[index], [(layer.result.layer, layer.lost) for layer in merged]
    kept = shares_kept(plan, index, rows, models.component)
    blocks = {layer.layer: layer.block or "other" for layer in plan.layers}
    by_block = shares_kept(plan, index, rows, lambda layer: blocks.get(layer, "other"))
    whole = by_block.pop("")
    worst = min(by_block, key=by_block.__getitem__, default=None) if whole < WHOLE else None
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
        worst_block=None if worst is None else {"block": worst, "kept": by_block[worst]},
    )


def _resolved_blocks(plan: MergePlan, entry: SourcePlan) -> dict[str, float]:
    """Block to what most of its layers in one input are multiplied by, 0 included.

    Text encoders with strengths of their own have an entry each, ``"BASE te2"``.
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
