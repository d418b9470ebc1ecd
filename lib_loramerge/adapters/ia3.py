"""(IA)^3: one factor per input or output channel of the base weight."""

from __future__ import annotations

import math

from ..delta import Dense
from ..errors import IncompatibleError
from .kinds import AdapterKind, Layer, LayerFacts, Shape, Shapes, plain_kernel, register
from .scaling import number, wide


def _describe(shapes: Shapes, where: str, kernel: Shape | None) -> LayerFacts:
    shape = shapes["ia3_weight"]
    if math.prod(shape) != max(shape, default=1):
        raise IncompatibleError(
            "{where}: ia3_weight has the shape {shape} where a vector is needed.", where, tuple(shape)
        )
    # A stored value says which side the vector belongs to, so only the base weight has the other size.
    return LayerFacts("ia3", None, None, plain_kernel(kernel or ()), needs_base=True)


def _build(layer: Layer) -> Dense:
    """``W * w`` along the input channels, or along the output channels."""
    assert layer.base is not None
    base, w = wide(layer.base), wide(layer.slots["ia3_weight"]).reshape(-1)
    on_input = bool(number(layer.slots["on_input"], "on_input", layer.where))
    side = 1 if on_input else 0
    if w.numel() != base.shape[side]:
        raise IncompatibleError(
            "{where}: ia3_weight has {count} numbers, but the base weight {shape} has {size} inputs."
            if on_input
            else "{where}: ia3_weight has {count} numbers, but the base weight {shape} has {size} outputs.",
            layer.where,
            w.numel(),
            tuple(base.shape),
            base.shape[side],
        )
    shape = [1] * base.dim()
    shape[side] = -1
    return Dense((base * w.reshape(shape)).flatten(1), plain_kernel(tuple(base.shape[2:])))


IA3 = register(
    AdapterKind(
        name="ia3",
        label="(IA)^3",
        forms=(frozenset({"ia3_weight", "on_input"}),),
        family="(IA)^3",
        needs_base=True,
        exact_low_rank=False,
        keys="`weight` `on_input`",
        does="The base weight times one factor per channel; full rank, cut to the rank asked for.",
        source="Liu et al. 2022, https://arxiv.org/abs/2205.05638",
        describe=_describe,
        build=_build,
        endings={"ia3_weight": ("weight",)},
    )
)
