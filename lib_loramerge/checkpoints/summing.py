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
_EXACT = ("F32", "F64")


@dataclass
class Sums:
    """Squares of what was added to a tensor and of what of it was lost, each over all its numbers.

    Attributes:
        added: ``|D|^2`` of what was to be added.
        lost: ``|E|^2`` of the rounding ``E``: written - before - D.
        along: ``<E, D>``.
        before: ``|W|^2`` of the tensor before.
        changed: Whether a stored number is another.
        finite: Of a copy: whether it holds neither NaN nor infinity.
    """

    added: float = 0.0
    lost: float = 0.0
    along: float = 0.0
    before: float = 0.0
    changed: bool = False
    finite: bool = True

    def __iadd__(self, other: Sums) -> Sums:
        self.added += other.added
        self.lost += other.lost
        self.along += other.along
        self.before += other.before
        self.changed |= other.changed
        self.finite &= other.finite
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


class Block(NamedTuple):
    """Memory for some rows of a tensor, in one shape: what is read, and what is computed of it.

    Attributes:
        stored: As the checkpoint's dtype has them; None where torch has no such dtype.
        data: Its bytes.
        new, delta, error: For sum, change and rounding, float32 or float64; ``*_flat`` is one row of all.
    """

    stored: Tensor | None
    data: memoryview | None
    new: Tensor
    delta: Tensor
    error: Tensor
    new_flat: Tensor
    error_flat: Tensor


class Added(NamedTuple):
    """Rows of a tensor to which their change was added.

    Attributes:
        block: The sum is its ``new``.
        before: What stands in the file, without its scale.
        delta: The change, as ``block.new``.
        size: Squared norm of the rows before, in their scale.
    """

    block: Block
    before: Tensor
    delta: Tensor | None
    size: float


class Memory:
    """What is used again: blocks of each thread, and buffers of all threads for what is written."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._spare: list[bytearray] = []

    def block(self, rows: int, width: int, dtype: str, wide: torch.dtype) -> Block:
        """Any numbers; this thread's next block of these dtypes overwrites them."""
        blocks: dict[tuple[object, ...], Block] = self._own.__dict__.setdefault("blocks", {})
        found = blocks.get((dtype, wide, rows, width))
        if found is None:
            found = blocks[dtype, wide, rows, width] = self._block(rows, width, dtype, wide)
        return found

    def _block(self, rows: int, width: int, dtype: str, wide: torch.dtype) -> Block:
        size, own = rows * width, self._own.__dict__
        whole: dict[tuple[object, ...], list[Tensor]] = own.setdefault("whole", {})
        held = whole.get((dtype, wide))
        if held is None or held[0].numel() < size:
            for key in [key for key in own["blocks"] if key[:2] == (dtype, wide)]:
                del own["blocks"][key]
            held = whole[dtype, wide] = [torch.empty(size, dtype=wide) for _ in range(3)]
            if dtype in FLOATS:
                held.append(torch.empty(size, dtype=getattr(torch, FLOATS[dtype])))
        new, delta, error, *rest = (one[:size] for one in held)
        stored = rest[0].view(rows, width) if rest else None
        data = tensor_bytes(rest[0]) if rest else None
        shape = (rows, width)
        return Block(stored, data, new.view(shape), delta.view(shape), error.view(shape), new, error)

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


def is_copy(source: LoraFile, entry: Entry) -> bool:
    return entry.change is None and entry.dtype == source.tensors[entry.key].dtype


def rows_of(width: int) -> int:
    """Rows that are computed with at once."""
    return max(1, CHUNK // max(1, width))


def largest(source: LoraFile, entry: Entry) -> float:
    """Largest size of a changed tensor's numbers, scale included, before they are rounded."""
    summing, most = Summing(source, entry, Rounding(), Memory(), torch.float32), 0.0
    for first, last in summing.blocks(0, summing.rows):
        new = summing.add(first, last).block.new
        most = max(most, float(new.abs().max()) if new.numel() else 0.0)
    if entry.change is not None:
        entry.change.done()
    return most


class Summing:
    """Rows of one tensor with their change, rounded and measured. What is the same for all rows stands here.

    Attributes:
        wide: What is computed in: float64 where the file has float32 or float64.
        rows, width: Of the tensor as a matrix.
    """

    def __init__(
        self,
        source: LoraFile,
        entry: Entry,
        rounding: Rounding,
        memory: Memory,
        wide: torch.dtype | None = None,
    ) -> None:
        info = source.tensors[entry.key]
        self.source, self.entry, self.memory, self.seed = source, entry, memory, rounding.seed
        self.dtype = info.dtype
        self.rows, self.width = info.shape[0] if info.shape else 1, math.prod(info.shape[1:])
        self.start = source.header.data_start + info.start
        self.exact = entry.dtype in _EXACT
        self.wide = wide or (torch.float64 if self.exact or info.dtype in _EXACT else torch.float32)
        self.by_chance = rounding.by_chance(entry.dtype) and entry.dtype in FORMATS
        self.codes = None if self.by_chance else FLOATS.get(entry.dtype)
        self.title = entry.title or entry.key

    def blocks(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Rows that are computed with at once, one such part after another."""
        step = rows_of(self.width)
        for start in range(first, last, step):
            yield start, min(last, start + step)

    def add(self, first: int, last: int) -> Added:
        """Rows and their change, in their scale."""
        entry, rows = self.entry, last - first
        block = self.memory.block(rows, self.width, self.dtype, self.wide)
        stored, start = block.stored, self.start + first * self.width * ITEM[self.dtype]
        if stored is None or block.data is None:
            stored = decode(
                self.dtype,
                (rows, self.width),
                lambda target: self.source.read_at(start, target),
                lambda: entry.key,
            )
        else:
            self.source.read_at(start, block.data)
        block.new.copy_(stored)
        if entry.scale != 1:
            block.new.mul_(entry.scale)
        # Measured before the sum takes its place: the less memory, the more of it is near.
        size = float(torch.dot(block.new_flat, block.new_flat))
        delta = None
        if entry.change is not None:
            delta = entry.change.rows(first, last, block.delta)
            block.new.add_(delta)
        return Added(block, stored, delta, size)

    def put(self, first: int, last: int, place: memoryview, sums: Sums) -> None:
        """Put rows with their change into ``place`` as they are stored; what of it is there adds to ``sums``.

        Raises:
            FileError: The checkpoint holds NaN or infinity there.
            OutputError: The sum is too large for the dtype.
        """
        if not place:
            return
        entry = self.entry
        added = self.add(first, last)
        block, before = added.block, added.before
        new, error = block.new, block.error
        stored = new if entry.new_scale == 1 else new / entry.new_scale
        if not self.exact:
            stored = stored.to(torch.float32)
        if self.codes is None:
            key = entry.key if self.by_chance else None
            codes = encode(stored, entry.dtype, key, self.seed, first)
            place[:] = tensor_bytes(codes)
            error.copy_(decode_codes(codes, entry.dtype))
        else:
            codes = torch.frombuffer(place, dtype=getattr(torch, self.codes)).view(new.shape)
            error.copy_(codes.copy_(stored))
        if entry.new_scale != 1:
            error.mul_(entry.new_scale)
        if not sums.changed:
            # Of one dtype they are compared as stored: it ends at the first numbers that differ.
            alike = codes.dtype == before.dtype and entry.scale == entry.new_scale
            was, now = (before, codes) if alike else (before.to(self.wide) * entry.scale, error)
            sums.changed = entry.change is None or not torch.equal(now, was)
        block.error_flat.sub_(block.new_flat)
        self._measure(added, sums)

    def _measure(self, added: Added, sums: Sums) -> None:
        entry, (block, _, delta, size) = self.entry, added
        lost = float(torch.dot(block.error_flat, block.error_flat))
        if not math.isfinite(size):
            raise FileError(
                "{layer} holds NaN or infinity in the checkpoint, so nothing can be added to it.", self.title
            )
        # float8 ends at its largest number, and hosts' rounding there is no more than half a step.
        most = FLOAT8_LARGEST.get(entry.dtype)
        over = most is not None and bool((block.new.abs() > most * entry.new_scale * 1.07).any())
        if not math.isfinite(lost) or over:
            raise OutputError(
                "{layer}: the sum is too large for {dtype}. Lower the strength, or write another --dtype.",
                self.title,
                entry.dtype,
            )
        if delta is not None:
            delta = delta.view(-1)
            sums.added += float(torch.dot(delta, delta))
            sums.along += float(torch.dot(block.error_flat, delta))
            sums.lost += lost
            sums.before += size
