"""What becomes of a layer on its way into the file, as plain data, and what of each input is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..delta import Delta, LowRank, Merged, Stored, lost_of_inputs, moved
from ..report import LayerResult
from .layout import LayerPlan

# For inputs with a part in a layer: index of the source, inner product of the input's weighted delta with
# what of the sum is not in the file, and the squared norm of that delta.
Lost = Sequence[tuple[int, float, float]]


@dataclass(frozen=True)
class MergedLayer:
    """One layer's tensors as they will be written, by key, and how exact they are.

    Attributes:
        cut: Squared error and what is lost of each input at the rank of a smaller file; None where that
            needs another look, or where the layer would be the same.
    """

    tensors: Mapping[str, Tensor]
    result: LayerResult
    alpha: float | None
    conv: bool
    notes: tuple[str, ...]
    written_sq: float
    lost: Lost = ()
    cut: tuple[float, Lost | None] | None = None


@dataclass(frozen=True)
class Given:
    """What one input changes in a layer: its place among the layer's inputs, its delta and its weight."""

    place: int
    delta: Delta
    weight: float


@dataclass(frozen=True)
class Prepared:
    """A layer merged but not yet cut to rank.

    Attributes:
        merged: The method's delta; None when only a bias changes.
        plain: The plain weighted sum, for methods that give something else.
        whole: It is written whole, without a rank.
        given: What it was made of; empty for norms.
    """

    layer: LayerPlan
    merged: Merged | None
    plain: Delta | None
    bias: Tensor | None
    notes: tuple[str, ...]
    whole: bool
    given: Sequence[Given] = ()

    @property
    def sources(self) -> list[int]:
        """The source that each of ``given`` is from."""
        return [self.layer.inputs[entry.place][0] for entry in self.given]


def lost(prepared: Prepared, written: Stored | Delta | None, exact: bool, device: torch.device) -> Lost:
    """What of each input is not in the file.

    Args:
        written: What is in it of the layer.
        exact: The method makes the exact sum.
        device: Does the arithmetic.
    """
    given, sources = prepared.given, prepared.sources
    if not given:
        return ()
    deltas, weights = [entry.delta for entry in given], [entry.weight for entry in given]
    if isinstance(written, Stored):
        if exact:
            if len(given) == 1:
                return [(sources[0], written.error_sq, written.exact_sq)]
            whole = all(isinstance(delta, LowRank) and len(delta.parts) < 2 for delta in deltas)
            # Fewer parts than inputs: the same delta came twice, and was added up first.
            if whole and written.parts is not None and len(written.parts) == len(given):
                return _rows(sources, written.parts)
        written = moved(written.delta(), device)
    return _rows(sources, lost_of_inputs(deltas, weights, written))


def lost_at_smaller(prepared: Prepared, stored: Stored, exact: bool) -> tuple[float, Lost | None] | None:
    """What a file of the smaller rank would lose of a layer: squared error, and of each input."""
    if stored.smaller is None:
        return None
    (error_sq, rows), sources = stored.smaller, prepared.sources
    if exact and len(sources) == 1:
        return error_sq, [(sources[0], error_sq, stored.exact_sq)]
    if not exact or rows is None or len(rows) != len(sources):
        return error_sq, None
    return error_sq, _rows(sources, rows)


def _rows(sources: Sequence[int], rows: Tensor) -> Lost:
    return [(source, *row) for source, row in zip(sources, rows.tolist(), strict=True)]
