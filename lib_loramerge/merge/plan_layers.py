"""What becomes of each layer: its shape, the inputs that have a part in it, and the rank foreseen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import adapters, models, ranks
from ..errors import IncompatibleError, LoraMergeError
from ..recipe import MergeRecipe
from .layout import LayerPlan, SourcePlan
from .sources import LayerShape, Source, SourcePart

if TYPE_CHECKING:
    from ..methods import MergeMethod
    from .base import BaseCheckpoint


def plan_layers(
    plans: Sequence[SourcePlan],
    architecture: str,
    recipe: MergeRecipe,
    method: MergeMethod,
    base: BaseCheckpoint | None,
) -> tuple[tuple[LayerPlan, ...], tuple[str, ...]]:
    layers, left_out = [], []
    for layer in sorted({layer for plan in plans for layer in plan.source.layers}):
        holders = [(index, plan) for index, plan in enumerate(plans) if layer in plan.source.layers]
        parts = [part for _, plan in holders for part in plan.source.layers[layer]]
        bias_alone = all(part.facts.kind == "bias" for part in parts)
        shape = _one_shape(layer, [plan.source for _, plan in holders])
        if shape is None:
            shape = _shape_of_bias(parts[0], base, architecture) if bias_alone else None
        if shape is None:
            assert base is not None  # without one, adapters of unknown shape were refused
            shape = _base_shape(base, architecture, layer)
        component, block = models.component(layer), models.block(architecture, layer)
        inputs, input_ranks = [], []
        for index, plan in holders:
            strength = plan.input.strength(component)
            block_weight = plan.block_weights.weight(component, block, layer)
            if strength * block_weight != 0:
                inputs.append((index, strength, block_weight))
                input_ranks.append(_input_rank(plan, layer))
        if not inputs:
            left_out.append(layer)
            continue
        if base is not None:
            for index, _, _ in inputs:
                _check_base_weight(base, architecture, layer, plans[index].source)
        out, in_, kernel = shape
        draft = LayerPlan(
            layer=layer,
            component=component,
            block=block,
            out=out,
            in_=in_,
            kernel=kernel,
            inputs=tuple(inputs),
            ranks=tuple(input_ranks),
            rank=None,
            vector=in_ == 0 and not bias_alone,
            bias=any(part.facts.bias for part in parts),
            dense=any(plans[index].source.is_dense(layer) for index, _, _ in inputs),
        )
        layers.append(replace(draft, rank=_foreseen_rank(draft, recipe, method)))
    return tuple(layers), tuple(left_out)


def _input_rank(plan: SourcePlan, layer: str) -> int | None:
    rank = plan.source.rank(layer)
    return rank if rank is None or plan.input.dyn is None else min(rank, plan.input.dyn)


def _one_shape(layer: str, sources: Sequence[Source]) -> LayerShape | None:
    """The shape that all sources agree on; None when none of them shows it."""
    known = [(source, shape) for source in sources if (shape := source.shape(layer)) is not None]
    for source, shape in known[1:]:
        if shape != known[0][1]:
            raise IncompatibleError(
                "{layer} is {shape} in {first} and {other_shape} in {second}. They were trained on "
                "different base models (or one on a variant such as an inpainting model), so they cannot be "
                "merged. Ranks have nothing to do with it.",
                layer,
                _shape_text(known[0][1]),
                known[0][0].path.name,
                _shape_text(shape),
                source.path.name,
            )
    return known[0][1] if known else None


@contextmanager
def base_checkpoint(base: Path | None, sources: Sequence[Source]) -> Iterator[BaseCheckpoint | None]:
    """The base model, open, if there is one and some layer's weight or size has to come from it."""
    from .base import BaseCheckpoint

    wanted = any(source.needs_base for source in sources) or any(
        source.shape(layer) is None for source in sources for layer in source.layers
    )
    if base is None or not wanted:
        yield None
    else:
        with BaseCheckpoint(base) as checkpoint:
            yield checkpoint


def _check_base_weight(base: BaseCheckpoint, architecture: str, layer: str, source: Source) -> None:
    """Find out before any work whether the base model has the weight that the adapters of a layer need."""
    for part in source.layers[layer]:
        if not part.facts.needs_base:
            continue
        where = f"{source.path.name}: {part.part.spelling}"
        shape = base.check_readable(architecture, layer)
        if part.spans is None and part.taken is None:
            adapters.check_base_shape(part.facts, shape, where)
        else:
            adapters.check_base_shape(replace(part.facts, out=part.out), shape, where)


def _base_shape(base: BaseCheckpoint, architecture: str, layer: str) -> LayerShape:
    shape = base.shape(architecture, layer)
    if len(shape) == 1:
        return shape[0], 0, ()
    kernel = tuple(shape[2:])
    return shape[0], shape[1], kernel if kernel not in ((), (1, 1)) else ()


def _shape_of_bias(part: SourcePart, base: BaseCheckpoint | None, architecture: str) -> LayerShape:
    """Shape of a layer whose bias alone changes; 0 inputs when they are unknown."""
    if base is not None:
        try:
            return _base_shape(base, architecture, part.part.layer)
        except LoraMergeError:
            pass  # the bias needs no weight, so it does without
    return part.out or 0, 0, ()


def _shape_text(shape: LayerShape) -> str:
    out, in_, kernel = shape
    return " x ".join(map(str, (out, in_, *kernel)))


def _foreseen_rank(layer: LayerPlan, recipe: MergeRecipe, method: MergeMethod) -> int | None:
    if layer.vector:
        return None
    if not method.uses_rank:
        known = [rank for rank in layer.ranks if rank is not None]
        if layer.dense:
            return None
        return max(known) if method.adds_factors else sum(known)
    return ranks.foreseen(
        recipe,
        most=layer.largest_rank(method),
        same=layer.same_rank,
        conv=bool(layer.kernel),
        dense=layer.dense,
        bounded=layer.bounded(method),
    )
