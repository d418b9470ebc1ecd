"""What a merge method is, and the table of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..delta import Dense, Merged

if TYPE_CHECKING:
    from ..recipe import Param


class LayerContext(NamedTuple):
    """What a method may know of the layer besides the deltas.

    Attributes:
        layer: Canonical name of the layer.
        seed: The recipe's seed.
        present: For each delta, the index of the input it comes from.
        inputs: Number of inputs of the whole merge.
        rank_limit: Rank the result will be cut to, where that is known before; None otherwise.
        strengths: For each delta, the strength without block weight. Empty: all of the weight is strength.
        block_weights: For each delta, the block weight. Empty: all ones.
    """

    layer: str = ""
    seed: int = 0
    present: tuple[int, ...] = ()
    inputs: int = 0
    rank_limit: int | None = None
    strengths: tuple[float, ...] = ()
    block_weights: tuple[float, ...] = ()


class MergeMethod(NamedTuple):
    """A merge method: deltas of one layer and their weights in, one delta out.

    Attributes:
        name: What the recipe and ``--mode`` say.
        label: Name shown to people.
        summary: One plain sentence.
        merge: ``merge(deltas, weights, context, **params) -> Merged``.
        params: Its tunables.
        exact: The result before truncation is the exact weighted sum.
        adds_factors: It adds factors and not deltas: the result has the rank of one input and is meant as the
            sum, so its error is measured against that.
        linear: The result is linear in the weights.
        elementwise: It chooses single elements, so the result leaves the space that the inputs span and its
            rank can be any; all other results have at most the sum of the inputs' ranks.
        uses_rank: The rank rule applies to the result.
        random: The result depends on the seed.
        ordered: The order of the inputs matters.
        minimum, maximum: How many inputs it takes; maximum None is any number.
        experimental: Not proven on pictures.
        source: The paper or program it comes from.
        formula: The formula, in a line.
        avoid: When not to use it.
        vector_weights: ``vector_weights(weights, context, **params)``: what becomes of the weights where
            biases and norms are added up (see :meth:`merge_vectors`); None leaves them as they are.
    """

    name: str
    label: str
    summary: str
    merge: Callable[..., Merged]
    params: tuple[Param, ...] = ()
    exact: bool = False
    adds_factors: bool = False
    linear: bool = False
    elementwise: bool = False
    uses_rank: bool = True
    random: bool = False
    ordered: bool = False
    minimum: int = 1
    maximum: int | None = None
    experimental: bool = False
    source: str = ""
    formula: str = ""
    avoid: str = ""
    vector_weights: Callable[..., Sequence[float]] | None = None

    @property
    def means_sum(self) -> bool:
        """Whether the weighted sum is what the result is judged by."""
        return self.exact or self.adds_factors

    def merge_vectors(
        self, vectors: Sequence[Tensor], weights: Sequence[float], context: LayerContext, **params: Any
    ) -> Tensor:
        """Biases or norms of one layer merged, (n,) float64.

        Elementwise methods treat them as they treat every other delta. The others look at ranks, directions
        or angles of a matrix, which a vector lacks: vectors are added up.

        Args:
            vectors: (n,) each, of any float dtype.
            weights: One strength per vector.
        """
        if self.elementwise:
            rows = [Dense(vector[None]) for vector in vectors]
            return self.merge(rows, weights, context, **params).dense()[0].cpu()
        if self.vector_weights is not None:
            weights = self.vector_weights(weights, context, **params)
        return torch.stack([w * vector.double() for w, vector in zip(weights, vectors)]).sum(0)

    def to_json(self) -> dict[str, Any]:
        """The method's description for people and programs, without its functions."""
        functions = ("merge", "vector_weights")
        shown = {name: value for name, value in self._asdict().items() if name not in functions}
        return shown | {"params": [param.to_json() for param in self.params]}


METHODS: dict[str, MergeMethod] = {}

_Merge = TypeVar("_Merge", bound=Callable[..., Merged])


def merge_method(
    name: str,
    *,
    label: str,
    summary: str,
    params: Sequence[Param] = (),
    exact: bool = False,
    adds_factors: bool = False,
    linear: bool = False,
    elementwise: bool = False,
    uses_rank: bool = True,
    random: bool = False,
    ordered: bool = False,
    minimum: int = 1,
    maximum: int | None = None,
    experimental: bool = False,
    source: str = "",
    formula: str = "",
    avoid: str = "",
    vector_weights: Callable[..., Sequence[float]] | None = None,
) -> Callable[[_Merge], _Merge]:
    """Register a function as the merge method ``name``; the function itself is returned unchanged."""

    def register(merge: _Merge) -> _Merge:
        if name in METHODS:
            raise ValueError(f"merge method {name!r} is registered twice")
        METHODS[name] = MergeMethod(
            name, label, summary, merge, tuple(params), exact, adds_factors, linear, elementwise, uses_rank,
            random, ordered, minimum, maximum, experimental, source, formula, avoid, vector_weights,
        )  # fmt: skip
        return merge

    return register
