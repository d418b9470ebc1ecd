"""Rules that merge the inputs element by element, for methods that bring them to common coordinates first.

They do what the elementwise methods of the same names do, with deltas that are weighted already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import sparsify
from ..registry import LayerContext
from ..votes import elected

_Prepare = Callable[[Tensor, float, sparsify.Draws], None]


def _trim(matrix: Tensor, density: float, _: sparsify.Draws) -> None:
    sparsify.keep_largest(matrix, density)


# Name: how each input is thinned out, and whether signs are voted on.
_RULES: dict[str, tuple[_Prepare | None, bool]] = {
    "linear": (None, False),
    "ties": (_trim, True),
    "dare_linear": (sparsify.drop_and_rescale, False),
    "dare_ties": (sparsify.drop_and_rescale, True),
    "magnitude_prune": (_trim, False),
}
RULES = tuple(_RULES)


def merged(rule: str, inputs: Sequence[Tensor], density: float, context: LayerContext) -> Tensor:
    """What a rule makes of the inputs.

    Args:
        rule: One of ``RULES``.
        inputs: At least one (p, q) matrix in any float dtype, all of one shape; not changed. An input's
            place by size selects its random numbers, so the order of inputs does not matter.
        density: Share of the elements that the rule keeps.
        context: Seed and layer, for the rules that draw.

    Returns:
        (p, q) in the dtype of the inputs. Thresholds and votes are float32.
    """
    prepare, votes = _RULES[rule]
    if prepare is None or (density >= 1 and not votes):
        return _sum(inputs)
    sizes = [float(torch.linalg.vector_norm(matrix)) for matrix in inputs]
    places = sorted(range(len(inputs)), key=sizes.__getitem__)
    thinned = []
    for index, given in enumerate(inputs):
        matrix = given.to(torch.float32, copy=True).contiguous()
        prepare(matrix, density, sparsify.Draws(context.seed, context.layer, places.index(index)))
        thinned.append(matrix)
    return (elected(thinned) if votes else _sum(thinned)).to(inputs[0].dtype)


def _sum(inputs: Sequence[Tensor]) -> Tensor:
    total = inputs[0].clone()
    for matrix in inputs[1:]:
        total += matrix
    return total
