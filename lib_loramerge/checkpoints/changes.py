"""What a recipe, or the difference of two checkpoints, changes in the tensors of a checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..delta import Dense, LowRank, Merged
from ..delta.products import product
from ..models import CheckpointKey
from .reading import Span

if TYPE_CHECKING:
    from ..merge.layer import Merger
    from ..merge.layout import LayerPlan
    from .reading import Checkpoint


Piece = tuple[Span, Callable[[int, int], Tensor], Callable[[int, int], Tensor]]


class Change(Protocol):
    """What is added to a tensor."""

    def rows(self, first: int, last: int, target: Tensor) -> Tensor:
        """Rows of it: (last - first, numbers of a row), dtype of ``target``, whose memory may be taken."""

    def done(self) -> None:
        """The tensor was written: nothing of it is needed any more."""


@dataclass
class LayerChange:
    """What a recipe adds to one tensor: rows of one or several merged layers.

    Attributes:
        parts: Layer, its place in the tensor, and whether its bias is meant.
        shape: Of the tensor.
        notes: What the adapters say while they are computed.
    """

    merger: Merger
    checkpoint: Checkpoint
    shape: tuple[int, ...]
    parts: Sequence[tuple[LayerPlan, CheckpointKey, bool]]
    notes: set[str]
    _factors: list[tuple[list[Span], Tensor, Tensor | None]] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def rows(self, first: int, last: int, target: Tensor) -> Tensor:
        with self._lock:
            if self._factors is None:
                self._factors = [self._prepare(*part, target.dtype) for part in self.parts]
        whole: Tensor | None = None
        for spans, left, right in self._factors:
            for span in spans:
                start, stop = max(first, span.tensor), min(last, span.tensor + span.count)
                if start >= stop:
                    continue
                rows = left[start - span.tensor + span.layer : stop - span.tensor + span.layer]
                if whole is None and stop - start == last - first:
                    whole = target.copy_(rows) if right is None else product(rows, right)
                    continue
                if whole is None:
                    whole = target.zero_()
                whole[start - first : stop - first] += rows if right is None else product(rows, right)
        return target.zero_() if whole is None else whole

    def done(self) -> None:
        self._factors = None

    def _prepare(
        self, layer: LayerPlan, place: CheckpointKey, bias: bool, wide: torch.dtype
    ) -> tuple[list[Span], Tensor, Tensor | None]:
        """Factors of a layer's change whose product's rows are those of the tensor, or the change itself."""
        with torch.no_grad():
            prepared = self.merger.prepare(layer)
            self.notes.update(prepared.notes)
            merged = Dense(prepared.bias) if bias and prepared.bias is not None else prepared.merged
            left, right = _factors(merged, layer, self.shape, place, wide)
        return self.checkpoint.spans(place), left, right


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _factors(
    merged: Merged | None, layer: LayerPlan, shape: tuple[int, ...], place: CheckpointKey, wide: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    if merged is None:
        return torch.zeros(layer.out, _product(shape[1:]), dtype=wide), None
    if isinstance(merged, Dense) or (isinstance(merged, LowRank) and merged.structure is not None):
        whole = merged.weight if isinstance(merged, Dense) else merged.dense()
        whole = whole.to(wide).reshape(whole.shape[0], -1).cpu()
        whole = whole.T.contiguous() if place.transposed else _padded(whole, layer, shape)
        return whole, None
    if isinstance(merged, LowRank):
        left, right = _scaled(merged.up, merged.component_gains(), wide), merged.down
    else:
        left = merged.up.double() @ merged.left.to(merged.up.device)
        right = merged.right.mT.to(merged.up.device) @ merged.down.double()
    left, right = left.to(wide).cpu(), right.to(wide).cpu()
    if place.transposed:
        return right.T.contiguous(), left.T.contiguous()
    return left, _padded(right, layer, shape)


def _scaled(up: Tensor, gains: Tensor, wide: torch.dtype) -> Tensor:
    """``up @ diag(gains)``; in float64 where a gain is far from 1, since float32 may not have it."""
    near = bool(((gains == 0) | ((gains.abs() > 2.0**-60) & (gains.abs() < 2.0**60))).all())
    up = up.to(wide if near else torch.float64)
    return up * gains.to(up)


def _padded(rows: Tensor, layer: LayerPlan, shape: tuple[int, ...]) -> Tensor:
    """Columns of the first channels, where the checkpoint's layer reads more (inpainting)."""
    width = _product(shape[1:])
    if rows.shape[1] == width or layer.vector or not layer.in_ or len(shape) < 2:
        return rows
    wider = rows.new_zeros(rows.shape[0], shape[1], width // shape[1])
    wider[:, : layer.in_] = rows.reshape(rows.shape[0], layer.in_, -1)
    return wider.reshape(rows.shape[0], width)


@dataclass(frozen=True)
class Difference:
    """``strength`` times what a tensor is in one checkpoint more than in another, part by part.

    Attributes:
        pieces: Rows of this tensor, and how to read the same rows of both.
    """

    pieces: Sequence[Piece]
    strength: float
    width: int

    def rows(self, first: int, last: int, target: Tensor) -> Tensor:
        target.zero_()
        for span, tuned, base in self.pieces:
            start, stop = max(first, span.tensor), min(last, span.tensor + span.count)
            if start < stop:
                at, wide = start - span.tensor + span.layer, target.dtype
                part = target[start - first : stop - first]
                torch.sub(
                    tuned(at, at + stop - start).to(wide), base(at, at + stop - start).to(wide), out=part
                )
                part *= self.strength
        return target

    def done(self) -> None:
        """Nothing is kept."""
