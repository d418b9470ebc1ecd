"""The deltas of one LoRA file, layer by layer, as the WebUI would compute them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import adapters
from ..delta import Cache, Dense, LayerDelta, place_rows, take_rows, weighted_sum
from ..files import LoraFile, changed_meanwhile, open_file
from ..models import Rows
from .sources import Source, SourcePart

if TYPE_CHECKING:
    from .base import BaseCheckpoint


@dataclass(frozen=True)
class Shared:
    """What merges of one run need only once; the files they write are the same without it.

    Attributes:
        hashes: ``SourceReader.identity`` of files to their hashes.
        cache: Layers read and Gram matrices, up to a gigabyte.
    """

    hashes: dict[tuple[Path, object], str] = field(default_factory=dict)
    cache: Cache = field(default_factory=Cache)


class SourceReader:
    """Reads one source's tensors and builds each layer's delta at strength 1.

    A context manager: the file stays open meanwhile, and must be closed before a
    file of the same name is replaced.
    """

    def __init__(self, source: Source, base: BaseCheckpoint | None = None, cache: Cache | None = None):
        self.source = source
        self.base = base
        self._cache = cache
        self._file: LoraFile = open_file(source.path)
        if self._file.header.stamp != source.header.stamp:
            self._file.close()
            raise changed_meanwhile(source.path)
        self._reading = threading.Lock()

    def __enter__(self) -> SourceReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def model_hash(self, stop: Callable[[], None] | None = None) -> str:
        """The hash of the file that is read here, whatever has its name by now."""
        return self._file.model_hash(stop)

    @property
    def identity(self) -> tuple[Path, object]:
        """Path and stamp of the file that is read here: another one as soon as the file is another."""
        return self._file.path, self._file.header.stamp

    def check_unchanged(self) -> None:
        """Refuse what was read of a file that another program wrote to meanwhile."""
        self._file.check_unchanged()

    def read(self, key: str) -> Tensor:
        """One tensor of the file, float32 (float64 when stored so)."""
        return self._file.read(key)

    def delta(self, layer: str, *, dyn: int | None = None) -> LayerDelta:
        """All that this file changes in ``layer``, split parts put into their rows.

        Args:
            dyn: First ranks only, as the prompt's ``dyn=`` asks for.
        """
        if self._cache is None:
            return self._delta(layer, dyn)
        base = self.base.identity if self.base is not None and self.source.layer_needs_base(layer) else ()
        key = *self.identity, self.source.architecture.id, layer, dyn, base
        return self._cache.layer(key, lambda: self._delta(layer, dyn))

    def _delta(self, layer: str, dyn: int | None) -> LayerDelta:
        parts = [self._part(part, dyn) for part in self.source.layers[layer]]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _part(self, part: SourcePart, dyn: int | None) -> LayerDelta:
        # Reading is many short steps, at which threads only hinder each other.
        with self._reading:
            slots = {slot: self.read(key) for slot, key in part.part.slots.items()}
        built = adapters.build(
            slots,
            where=f"{self.source.path.name}: {part.part.spelling}",
            kernel=part.kernel,
            base=self._base_weight(part) if part.facts.needs_base else None,
            dyn=dyn,
        )
        if part.taken is not None:
            built = LayerDelta(
                None if built.weight is None else take_rows(built.weight, part.taken),
                None if built.bias is None else torch.cat([built.bias[a:b] for a, b in part.taken]),
                built.notes,
            )
        if part.spans is None or part.out is None:
            return built
        weight = None if built.weight is None else place_rows(built.weight, part.spans, part.out)
        bias = None if built.bias is None else _placed_bias(built.bias, part.spans, part.out)
        return LayerDelta(weight, bias, built.notes)

    def _base_weight(self, part: SourcePart) -> Tensor | None:
        if self.base is None:
            return None
        name = self.source.architecture.id
        if part.part.joined:
            return torch.cat([self._base_rows(name, layer, rows) for layer, rows in part.part.joined])
        return self._base_rows(name, part.part.layer, part.part.rows)

    def _base_rows(self, architecture: str, layer: str, rows: Rows | None) -> Tensor:
        assert self.base is not None
        whole = self.base.weight(architecture, layer)
        if rows is None:
            return whole
        return torch.cat([whole[start:stop] for start, stop in rows.cut(whole.shape[0])])


def _placed_bias(bias: Tensor, spans: Sequence[tuple[int, int]], total: int) -> Tensor:
    return place_rows(Dense(bias[:, None]), spans, total).dense()[:, 0]


def _joined(parts: Sequence[LayerDelta]) -> LayerDelta:
    """The sum of what several parts of one file change in one layer."""
    weights = [part.weight for part in parts if part.weight is not None]
    biases = [part.bias for part in parts if part.bias is not None]
    return LayerDelta(
        weight=weighted_sum(weights, [1.0] * len(weights)) if weights else None,
        bias=torch.stack(biases).sum(0) if biases else None,
        notes=tuple(note for part in parts for note in part.notes),
    )
