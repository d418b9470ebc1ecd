"""Kinds that store the change itself: full differences, norms, lone biases."""

from __future__ import annotations

import math

from ..delta import Dense
from ..errors import IncompatibleError
from .kinds import AdapterKind, Layer, LayerFacts, Shape, Shapes, plain_kernel, register
from .scaling import wide

FOREIGN_BIAS = "A bias without a weight: not every program loads such a file."
LONE_NORM = "A norm without b_norm: not every program loads such a file."


def _describe_full(shapes: Shapes, where: str, kernel: Shape | None) -> LayerFacts:
    shape = shapes["diff"]
    if not shape:
        raise IncompatibleError("{where}: diff is a single number where a whole weight is needed.", where)
    if len(shape) == 1:
        return LayerFacts("full", shape[0], 0)
    return LayerFacts("full", shape[0], shape[1], plain_kernel(shape[2:]))


def _build_full(layer: Layer) -> Dense:
    diff = wide(layer.slots["diff"])
    weight = diff if diff.dim() == 1 else diff.reshape(diff.shape[0], -1)
    return Dense(weight, layer.facts.kernel)


def _describe_norm(shapes: Shapes, where: str, kernel: Shape | None) -> LayerFacts:
    shape = shapes["w_norm"]
    if len(shape) != 1:
        raise IncompatibleError(
            "{where}: w_norm has the shape {shape} where a vector is needed.", where, tuple(shape)
        )
    return LayerFacts("norm", shape[0], 0, notes=() if "b_norm" in shapes else (LONE_NORM,))


def _build_norm(layer: Layer) -> Dense:
    return Dense(wide(layer.slots["w_norm"]))


def _describe_bias(shapes: Shapes, where: str, kernel: Shape | None) -> LayerFacts:
    return LayerFacts("bias", math.prod(shapes["diff_b"]), None, notes=(FOREIGN_BIAS,))


FULL = register(
    AdapterKind(
        name="full",
        label="Full difference",
        forms=(frozenset({"diff"}),),
        family="full difference",
        needs_base=False,
        exact_low_rank=False,
        keys="`diff`, with or without `diff_b`",
        does="Added as it is; the result is cut to the rank asked for, or kept as `diff` with `--rank full`.",
        source="LyCORIS, https://github.com/KohakuBlueleaf/LyCORIS",
        describe=_describe_full,
        build=_build_full,
    )
)

NORM = register(
    AdapterKind(
        name="norm",
        label="Normalisation layer",
        forms=(frozenset({"w_norm"}),),
        family="normalisation",
        optional=frozenset({"b_norm"}),
        needs_base=False,
        exact_low_rank=False,
        keys="`w_norm` `b_norm`",
        does="Summed and kept as it is.",
        source="LyCORIS, https://github.com/KohakuBlueleaf/LyCORIS",
        describe=_describe_norm,
        build=_build_norm,
    )
)

BIAS = register(
    AdapterKind(
        name="bias",
        label="Bias alone",
        forms=(frozenset({"diff_b"}),),
        needs_base=False,
        exact_low_rank=False,
        keys="`diff_b` without `diff`",
        does="Summed and kept.",
        source="LyCORIS, https://github.com/KohakuBlueleaf/LyCORIS",
        describe=_describe_bias,
        build=lambda layer: None,
    )
)
