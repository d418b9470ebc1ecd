"""Rows of a checkpoint's tensor, changed, rounded and measured.

Memory is used again from block to block: to clear and map fresh pages costs more than this arithmetic does.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..errors import FileError, OutputError
from ..files import LoraFile
from ..files.decode import FLOATS, decode, tensor_bytes
from .numbers import FLOAT8_LARGEST, FORMATS, ITEM, decode_codes, encode

if TYPE_CHECKING:
    from .changes import Change

CHUNK = 1 << 18  # Numbers that are computed with at once; what is rounded by chance depends on it.
BUFFER = 2 << 20  # Bytes that are written at once, unless a block has more.


@dataclass
class Sums:
    """Squares of what was added to a tensor and of what of it was lost, each over all its numbers.

    Attributes:
        added: ``|D|^2`` of what was to be added.
        lost: ``|E|^2`` of the rounding ``E``: written - before - D.
        along: ``<E, D>``.
        before: ``|W|^2`` of the tensor before.
        changed: Whether a stored number is another.
    """

    added: float = 0.0
    lost: float = 0.0
    along: float = 0.0
    before: float = 0.0
    changed: bool = False

    def __iadd__(self, other: Sums) -> Sums:
        self.added += other.added
        self.lost += other.lost
        self.along += other.along
        self.before += other.before
        self.changed |= other.changed
        return self

    @property
    def survives(self) -> float:
        """Share of the change that is in the file: ``<R - W, D> / |D|^2``."""
        return 1 + self.along / self.added if self.added > 0 else 1.0

    @property
    def error(self) -> float:
        """``|(R - W) - D| / |D|``."""
        return (self.lost / self.added) ** 0.5 if self.added > 0 else 0.0


@dataclass(frozen=True)
class Entry:
    """One tensor of the file to write.

    Attributes:
        key: Its name in the file, the same in both.
        dtype: To be written.
        change: What is added to it; None for a copy.
        scale: Factor of its numbers as they are stored, before.
        new_scale: The same after.
        value: The bytes to write instead of its own.
        title: What it is called in messages.
    """

    key: str
    dtype: str
    change: Change | None = None
    scale: float = 1.0
    new_scale: float = 1.0
    value: bytes | None = None
    title: str = ""


@dataclass(frozen=True)
class Rounding:
    """How numbers are rounded: by chance with this seed where ``stochastic`` says so for a dtype."""

    mode: str = "auto"
    seed: int = 0

    def by_chance(self, dtype: str) -> bool:
        return self.mode == "stochastic" or (self.mode == "auto" and dtype in FLOAT8_LARGEST)


class Held(NamedTuple):
    """A tensor of rows, the same as one row, and its bytes."""

    rows: Tensor
    flat: Tensor
    data: memoryview


class Memory:
    """What is used again: tensors of each thread, and buffers of all threads for what is written."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._spare: list[bytearray] = []

    def held(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Held:
        """(rows, width) with any numbers; this thread's next one of that name and dtype overwrites it."""
        views: dict[tuple[object, ...], Held] = self._own.__dict__.setdefault("views", {})
        found = views.get((name, dtype, rows, width))
        if found is None:
            whole = views.get((name, dtype))
            if whole is None or whole.flat.numel() < rows * width:
                for key in [key for key in views if key[:2] == (name, dtype)]:
                    del views[key]
                whole = views[name, dtype] = _held(torch.empty(rows * width, dtype=dtype))
            found = views[name, dtype, rows, width] = _held(whole.flat[: rows * width].view(rows, width))
        return found

    def buffer(self, size: int) -> memoryview:
        """Bytes to write to, of any content."""
        if size > BUFFER:
            return memoryview(bytearray(size))
        try:
            whole = self._spare.pop()
        except IndexError:
            whole = bytearray(BUFFER)
        return memoryview(whole)[:size]

    def give_back(self, data: memoryview) -> None:
        """What :meth:`buffer` gave is not needed any more."""
        if isinstance(data.obj, bytearray) and len(data.obj) == BUFFER:
            self._spare.append(data.obj)


def _held(rows: Tensor) -> Held:
    return Held(rows, rows.view(-1), tensor_bytes(rows))


class Changed(NamedTuple):
    """Rows of a tensor with the change, and the change itself; both in their scale.

    Attributes:
        stored: What stands in the file, without its scale.
        size: Squared norm before the change.
    """

    new: Held
    delta: Held | None
    stored: Tensor
    size: float


def is_copy(source: LoraFile, entry: Entry) -> bool:
    return entry.change is None and entry.dtype == source.tensors[entry.key].dtype


def rows_of(width: int) -> int:
    """Rows that are computed with at once."""
    return max(1, CHUNK // max(1, width))


def blocks(source: LoraFile, entry: Entry, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Rows that are computed with at once, one such part of the tensor after another."""
    step = rows_of(math.prod(source.tensors[entry.key].shape[1:]))
    for start in range(first, last, step):
        yield start, min(last, start + step)


def change_sum(
    source: LoraFile, entry: Entry, first: int, last: int, wide: torch.dtype, memory: Memory
) -> Changed:
    """Rows of a tensor and their change, in ``wide``: float32 or float64."""
    info = source.tensors[entry.key]
    rows, width = last - first, math.prod(info.shape[1:])
    start = source.header.data_start + info.start + first * width * ITEM[info.dtype]
    if info.dtype in FLOATS:
        stored, _, data = memory.held("stored", rows, width, getattr(torch, FLOATS[info.dtype]))
        source.read_at(start, data)
    else:
        stored = decode(info.dtype, (rows, width), lambda target: source.read_at(start, target), entry.key)
    new = memory.held("new", rows, width, wide)
    new.rows.copy_(stored)
    if entry.scale != 1:
        new.rows.mul_(entry.scale)
    # Measured before the sum takes its place: the less memory, the more of it is near.
    size = float(torch.dot(new.flat, new.flat))
    if entry.change is None:
        return Changed(new, None, stored, size)
    delta = memory.held("delta", rows, width, wide)
    entry.change.rows(first, last, delta.rows)
    new.flat.add_(delta.flat)
    return Changed(new, delta, stored, size)


def change_rows(
    source: LoraFile,
    entry: Entry,
    first: int,
    last: int,
    rounding: Rounding,
    memory: Memory,
    place: memoryview,
    sums: Sums,
) -> None:
    """Put rows with their change into ``place`` as they are stored, and add to ``sums`` what of it is there.

    Raises:
        FileError: The checkpoint holds NaN or infinity there.
        OutputError: The sum is too large for the dtype.
    """
    if not place:
        return
    exact = ("F32", "F64")
    wide = (
        torch.float64 if source.tensors[entry.key].dtype in exact or entry.dtype in exact else torch.float32
    )
    changed = change_sum(source, entry, first, last, wide, memory)
    new = changed.new.rows
    stored = new if entry.new_scale == 1 else new / entry.new_scale
    if entry.dtype not in exact:
        stored = stored.to(torch.float32)
    error = memory.held("error", new.shape[0], new.shape[1], wide)
    by_chance = rounding.by_chance(entry.dtype) and entry.dtype in FORMATS
    if by_chance or entry.dtype not in FLOATS:
        codes = encode(stored, entry.dtype, entry.key if by_chance else None, rounding.seed, first)
        place[:] = tensor_bytes(codes)
        error.rows.copy_(decode_codes(codes, entry.dtype))
    else:
        codes = torch.frombuffer(place, dtype=getattr(torch, FLOATS[entry.dtype])).view(new.shape)
        error.rows.copy_(codes.copy_(stored))
    if entry.new_scale != 1:
        error.rows.mul_(entry.new_scale)
    if not sums.changed:
        before = changed.stored.to(wide)
        sums.changed = changed.delta is None or not torch.equal(error.rows, before * entry.scale)
    error.flat.sub_(changed.new.flat)
    sums += _measured(entry, error.flat, changed)


def _measured(entry: Entry, error: Tensor, changed: Changed) -> Sums:
    title = entry.title or entry.key
    lost = float(torch.dot(error, error))
    if not math.isfinite(changed.size):
        raise FileError(
            "{layer} holds NaN or infinity in the checkpoint, so nothing can be added to it.", title
        )
    # float8 ends at its largest number, and hosts' rounding there is no more than half a step.
    most = FLOAT8_LARGEST.get(entry.dtype)
    over = most is not None and bool((changed.new.rows.abs() > most * entry.new_scale * 1.07).any())
    if not math.isfinite(lost) or over:
        raise OutputError(
            "{layer}: the sum is too large for {dtype}. Lower the strength, or write another --dtype.",
            title,
            entry.dtype,
        )
    if changed.delta is None:
        return Sums()
    delta = changed.delta.flat
    return Sums(float(torch.dot(delta, delta)), lost, float(torch.dot(error, delta)), changed.size)
