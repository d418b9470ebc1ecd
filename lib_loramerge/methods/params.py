"""The parameters that several merge methods share, each defined once."""

from __future__ import annotations

from collections.abc import Mapping

from ..recipe import Param

DENSITY = Param("density", 0.5, "Fraction of the elements of each LoRA to keep.", 0.01, 1.0)
LAMBDA = Param("lambda", 1.0, "Factor of the whole result.", 0.01, 10.0)
NORMALIZE = Param(
    "normalize", True, "Average the LoRAs that agree in an element; otherwise they are added up."
)


def factor_of_result(params: Mapping[str, float]) -> float:
    """The value of ``lambda``, which no Python argument can be called; 1 when not given.

    Raises:
        TypeError: There are other parameters.
    """
    others = ", ".join(name for name in params if name != LAMBDA.name)
    if others:
        raise TypeError(f"unexpected parameters: {others}")
    return float(params.get(LAMBDA.name, 1.0))
