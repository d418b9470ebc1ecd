"""One file of a checkpoint written again with some tensors changed, in one pass and little memory."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..delta import parallel_map
from ..errors import Cancelled, FileError, OutputError
from ..files import LoraFile, check_space
from ..files.decode import decode, tensor_bytes
from ..files.place import output, to_disk
from .numbers import FLOAT8_LARGEST, ITEM, decode_codes, encode

if TYPE_CHECKING:
    from .changes import Change

CHUNK = 1 << 18  # Numbers that are computed with at once.
COPY = 4 << 20  # Bytes that are copied at once.
PAGE = 4096
WORKERS = 2  # More only wait for the disk, and each has its chunks in memory.


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


@dataclass
class Rewritten:
    """A file that was written: its size, its hex SHA-256 where asked for, and the sums of changed tensors."""

    size: int
    sha256: str | None
    sums: dict[str, Sums] = field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    entry: Entry
    first: int
    last: int
    whole: bool  # The last one of its tensor.


def written_bytes(source: LoraFile, entries: Sequence[Entry]) -> int:
    """Bytes of the data part that these make."""
    return sum(_size(source, entry) for entry in entries)


def rewrite(
    source: LoraFile,
    target: Path,
    entries: Sequence[Entry],
    metadata: Mapping[str, str],
    rounding: Rounding,
    *,
    overwrite: bool = False,
    hashed: bool = True,
    progress: Callable[[int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
    before_rename: Callable[[], None] | None = None,
) -> Rewritten:
    """Write a file in the order of another, some tensors changed, all others byte for byte.

    Args:
        entries: In the order of the source's data; tensors that are not among them are left out.
        progress: Called with the bytes written so far.
        before_rename: Called when all is on disk; what it raises stops the writing, and nothing is left.

    Raises:
        OutputError: It cannot be written, or a sum is too large for its dtype.
        FileError: The source cannot be read, or holds NaN in a tensor that changes.
    """
    head = _header(source, entries, metadata)
    total = len(head) + written_bytes(source, entries)
    check_room(target, total)
    done = Rewritten(total, None)
    digest = hashlib.sha256() if hashed else None

    def stop() -> None:
        if cancel is not None and cancel():
            raise Cancelled("Stopped. Nothing was written.")

    def compute(job: _Job) -> tuple[memoryview, Sums | None]:
        return _compute(source, job, rounding)

    jobs = list(_jobs(source, entries))
    place = len(head)
    with output(target, overwrite) as file:
        file.write(head)
        if digest is not None:
            digest.update(head)
        for job, (data, sums) in zip(
            jobs, parallel_map(compute, jobs, workers=WORKERS, cancel=cancel), strict=True
        ):
            file.write(data)
            if digest is not None:
                digest.update(data)
            place += len(data)
            if sums is not None:
                done.sums.setdefault(job.entry.key, Sums())
                done.sums[job.entry.key] += sums
            if job.whole and job.entry.change is not None:
                job.entry.change.done()
            if progress is not None:
                progress(place)
        file.flush()
        to_disk(file.fileno(), stop)
        source.check_unchanged()
        if before_rename is not None:
            before_rename()
        stop()
    done.sha256 = digest.hexdigest() if digest is not None else None
    return done


def check_room(target: Path, size: int) -> None:
    """Refuse a file that its disk has no room for.

    Raises:
        OutputError: With both numbers; the file that is replaced stays until the new one is complete.
    """
    try:
        check_space(target.parent, size)
    except OutputError as error:
        if not target.exists():
            raise
        raise OutputError(
            "{error} The old {file} stays until the new one is complete.", error, target.name
        ) from error


def largest(source: LoraFile, entry: Entry) -> float:
    """Largest size of a changed tensor's numbers, scale included, before they are rounded."""
    most = 0.0
    for job in _jobs(source, [entry]):
        new, _, _ = _sum(source, job, torch.float32)
        most = max(most, float(new.abs().max()) if new.numel() else 0.0)
    if entry.change is not None:
        entry.change.done()
    return most


def _jobs(source: LoraFile, entries: Sequence[Entry]) -> Iterator[_Job]:
    for entry in entries:
        info = source.tensors[entry.key]
        if _is_copy(source, entry):
            count, step = info.end - info.start, COPY
        else:
            count = info.shape[0] if info.shape else 1
            step = max(1, CHUNK // max(1, math.prod(info.shape[1:])))
        if entry.value is not None or not count:
            yield _Job(entry, 0, 0, True)
            continue
        for first in range(0, count, step):
            yield _Job(entry, first, min(count, first + step), first + step >= count)


def _is_copy(source: LoraFile, entry: Entry) -> bool:
    return entry.change is None and entry.dtype == source.tensors[entry.key].dtype


def _size(source: LoraFile, entry: Entry) -> int:
    info = source.tensors[entry.key]
    if entry.dtype == info.dtype:
        return info.end - info.start
    return math.prod(info.shape) * ITEM[entry.dtype]


def _compute(source: LoraFile, job: _Job, rounding: Rounding) -> tuple[memoryview, Sums | None]:
    entry = job.entry
    if entry.value is not None:
        return memoryview(entry.value), None
    info = source.tensors[entry.key]
    start = source.header.data_start + info.start
    if _is_copy(source, entry):
        data = memoryview(bytearray(job.last - job.first))
        source.read_at(start + job.first, data)
        return data, None
    wide = torch.float64 if info.dtype in ("F32", "F64") or entry.dtype in ("F32", "F64") else torch.float32
    new, before, delta = _sum(source, job, wide)
    key = entry.key if rounding.by_chance(entry.dtype) else None
    stored = new if entry.new_scale == 1 else new / entry.new_scale
    chunked = stored if entry.dtype in ("F32", "F64") else stored.to(torch.float32)
    codes = encode(chunked, entry.dtype, key, rounding.seed, job.first)
    written = decode_codes(codes, entry.dtype)
    if entry.new_scale != 1:
        written = written * entry.new_scale
    return memoryview(tensor_bytes(codes.contiguous())), _measured(entry, written, new, before, delta)


def _sum(source: LoraFile, job: _Job, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of a tensor with its change, without it, and the change itself."""
    entry, info = job.entry, source.tensors[job.entry.key]
    width = math.prod(info.shape[1:])
    start = source.header.data_start + info.start + job.first * width * ITEM[info.dtype]
    before = decode(
        info.dtype, (job.last - job.first, width), lambda target: source.read_at(start, target), entry.key
    ).to(wide)
    if entry.scale != 1:
        before *= entry.scale
    if entry.change is None:
        return before, before, None
    delta = entry.change.rows(job.first, job.last, wide)
    return before + delta, before, delta


def _measured(entry: Entry, written: Tensor, new: Tensor, before: Tensor, delta: Tensor | None) -> Sums:
    title = entry.title or entry.key
    changed = delta is None or not torch.equal(written.to(before.dtype), before)
    # In its own memory, unless that is the one to be written.
    error = written.to(new.dtype)
    error = (error - new if entry.dtype in ("F32", "F64") else error.sub_(new)).reshape(-1)
    flat = before.reshape(-1)
    size = float(torch.dot(flat, flat))
    lost = float(torch.dot(error, error))
    if not math.isfinite(size):
        raise FileError(
            "{layer} holds NaN or infinity in the checkpoint, so nothing can be added to it.", title
        )
    # float8 ends at its largest number, and hosts' rounding there is no more than half a step.
    most = FLOAT8_LARGEST.get(entry.dtype)
    over = most is not None and bool((new.abs() > most * entry.new_scale * 1.07).any())
    if not math.isfinite(lost) or over:
        raise OutputError(
            "{layer}: the sum is too large for {dtype}. Lower the strength, or write another --dtype.",
            title,
            entry.dtype,
        )
    if delta is None:
        return Sums(changed=changed)
    change = delta.reshape(-1)
    return Sums(
        float(torch.dot(change, change)),
        lost,
        float(torch.dot(error, change)),
        size,
        changed,
    )


def _header(source: LoraFile, entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON: names in the source's order, and data that begin where in a page they did."""
    places: dict[str, list[int]] = {}
    start = 0
    for entry in entries:
        end = start + _size(source, entry)
        places[entry.key] = [start, end]
        start = end
    dtypes = {entry.key: entry.dtype for entry in entries}
    raw = bytearray(source.header.data_start - 8)
    source.read_at(8, memoryview(raw))
    content: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for key in json.loads(bytes(raw)):
        if key in places:
            shape = list(source.tensors[key].shape)
            content[key] = {"dtype": dtypes[key], "shape": shape, "data_offsets": places[key]}
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    step = PAGE if source.header.data_start % 8 == 0 else 8
    wanted = source.header.data_start % PAGE if step == PAGE else 0
    text += b" " * ((wanted - 8 - len(text)) % step)
    return struct.pack("<Q", len(text)) + text
