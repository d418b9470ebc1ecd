"""One file of a checkpoint written again with some tensors changed, in one pass and little memory."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ..delta import available_cores, in_turn, parallel_map, raise_if
from ..errors import OutputError
from ..files import LoraFile, check_space
from ..files.place import output, to_disk
from .numbers import ITEM, all_finite
from .summing import BUFFER, Entry, Memory, Rounding, Summing, Sums, is_copy, rows_of

PAGE = 4096
# More only wait for the disk and for Python's lock; a core is left for the thread that writes and hashes.
WORKERS = min(2, max(1, available_cores() - 1))


@dataclass
class Rewritten:
    """A file that was written: its size, its hex SHA-256 where asked for, and the sums of its tensors."""

    size: int
    sha256: str | None
    sums: dict[str, Sums] = field(default_factory=dict)


class _Writer:
    """Bytes to their places in a file, from any thread, as long as its block lasts."""

    def __init__(self, file: BinaryIO) -> None:
        self._file: BinaryIO | None = file
        self._lock = threading.Lock()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:  # A thread that still computes must not write to a file that is closed meanwhile.
            self._file = None

    def put(self, place: int, data: memoryview | bytes) -> None:
        with self._lock:
            if self._file is not None:
                self._file.seek(place)
                self._file.write(data)


@dataclass(frozen=True)
class _Job:
    entry: Entry
    first: int
    last: int
    place: int  # Of its first byte in the file.
    end: int
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

    memory = Memory()
    jobs = list(_jobs(source, entries, len(head)))
    with output(target, overwrite) as file, _Writer(file) as writer:
        writer.put(0, head)

        def compute(job: _Job) -> tuple[memoryview | None, Sums | None]:
            data, sums = _compute(source, job, rounding, memory, writer)
            if digest is not None:
                return data, sums
            memory.give_back(data)  # At once: what is used again first is still near.
            return None, sums

        if digest is not None:
            digest.update(head)
        # One thread that computes and writes leaves nothing to the other but to hash.
        alone = WORKERS == 1 and digest is None
        work = (
            in_turn(compute, jobs, cancel=cancel)
            if alone
            else parallel_map(compute, jobs, workers=WORKERS, cancel=cancel)
        )
        for job, (data, sums) in zip(jobs, work, strict=True):
            if digest is not None and data is not None:
                digest.update(data)
                memory.give_back(data)
            if sums is not None:
                name = job.entry.title or job.entry.key
                done.sums.setdefault(name, Sums())
                done.sums[name] += sums
            if job.whole and job.entry.change is not None:
                job.entry.change.done()
            if progress is not None:
                progress(job.end)
        file.flush()
        to_disk(file.fileno(), lambda: raise_if(cancel))
        source.check_unchanged()
        if before_rename is not None:
            before_rename()
        raise_if(cancel)
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


def _jobs(source: LoraFile, entries: Sequence[Entry], place: int) -> Iterator[_Job]:
    """What is computed at once, in order; ``place`` is where the data part begins in the file."""
    for entry in entries:
        info = source.tensors[entry.key]
        if is_copy(source, entry):
            count, step, row = info.end - info.start, BUFFER, 1
        else:
            count = info.shape[0] if info.shape else 1
            width = math.prod(info.shape[1:])
            row = width * ITEM[entry.dtype]
            step = rows_of(width) * max(1, BUFFER // max(1, rows_of(width) * row))
        if entry.value is not None or not count:
            yield _Job(entry, 0, 0, place, place + _size(source, entry), True)
        else:
            for first in range(0, count, step):
                last = min(count, first + step)
                yield _Job(entry, first, last, place + first * row, place + last * row, last == count)
        place += _size(source, entry)


def _size(source: LoraFile, entry: Entry) -> int:
    info = source.tensors[entry.key]
    if entry.dtype == info.dtype:
        return info.end - info.start
    return math.prod(info.shape) * ITEM[entry.dtype]


def _compute(
    source: LoraFile, job: _Job, rounding: Rounding, memory: Memory, writer: _Writer
) -> tuple[memoryview, Sums | None]:
    """The bytes of a job, which are written, and what of its change is in them."""
    entry = job.entry
    if entry.value is not None:
        writer.put(job.place, entry.value)
        return memoryview(entry.value), None
    info = source.tensors[entry.key]
    if is_copy(source, entry):
        data = memory.buffer(job.last - job.first)
        source.read_at(source.header.data_start + info.start + job.first, data)
        finite = all_finite(data, info.dtype)
        writer.put(job.place, data)
        return data, Sums(finite=finite)
    summing = Summing(source, entry, rounding, memory)
    row = summing.width * ITEM[entry.dtype]
    data, sums = memory.buffer((job.last - job.first) * row), Sums()
    for first, last in summing.blocks(job.first, job.last):
        part = data[(first - job.first) * row : (last - job.first) * row]
        summing.put(first, last, part, sums)
        writer.put(job.place + (first - job.first) * row, part)  # While it is still near.
    return data, sums


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
