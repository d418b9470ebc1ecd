"""The header of a safetensors file, checked before a byte of data is trusted.

A header is JSON with each tensor's dtype, shape and place. Files come from
strangers, so nothing in it is believed: lengths, offsets, shapes and names are
checked against the size of the file, and the work is bounded whatever they say.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, TypeGuard

from lib_loramerge.errors import FileError, Sentence
from lib_loramerge.files.recognise import describe_bytes, size_text

HEADER_LIMIT = 100_000_000
"""Longest header in bytes; the safetensors library has the same limit."""

TENSOR_LIMIT = 100_000
BRACKET_LIMIT = 3 * TENSOR_LIMIT + 1_000
COMMA_LIMIT = 20 * TENSOR_LIMIT
"""Outside texts. Far above any real header; beyond them parsing would cost much memory."""

WIDE_LIMIT = 25_000_000
"""Longest header with characters beyond ASCII, of which one makes Python keep four bytes for each."""

NAME_LIMIT = 2_000

DIMENSION_LIMIT = 16
ELEMENT_LIMIT = 2**60

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8,
        "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
        "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
        "C64": 64, "F64": 64, "I64": 64, "U64": 64,
    }
)  # fmt: skip
"""Bits per element of every dtype that safetensors knows, in its order."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor.

    Attributes:
        dtype: As safetensors spells it: ``"F16"``, ``"BF16"``, ``"F32"`` and so on.
        shape: As stored; ``()`` for a single number.
        start: First byte, counted from the start of the data part.
        end: One past the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself before its data.

    Attributes:
        tensors: Key to its dtype, shape and place, in the order of the data.
        metadata: The string map; empty if there is none.
        data_start: Where the data part begins in the file.
        size: Of the whole file, in bytes.
        stamp: Of the file that it was read from, see :func:`stamp_of`.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    size: int
    stamp: tuple[int, ...] = field(default=(), compare=False)


def open_regular(path: Path) -> tuple[BinaryIO, os.stat_result]:
    """Open a regular file for reading, unbuffered; every way that fails is a sentence.

    Raises:
        FileError: If the file is missing, a folder, a device or unreadable.
    """
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise FileError("{path} is a folder, not a file; give the file inside it.", path)
        if not stat.S_ISREG(status.st_mode):  # Opening a pipe would wait for ever.
            raise FileError("{path} is not an ordinary file.", path)
        file = open(path, "rb", buffering=0)  # noqa: SIM115 - the caller closes it
        return file, os.fstat(file.fileno())
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


@contextmanager
def reading(path: Path) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """:func:`open_regular` for the length of a ``with`` block.

    Raises:
        FileError: Also if reading fails inside the block.
    """
    file, status = open_regular(path)
    with file:
        try:
            yield file, status
        except OSError as error:
            raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError | ValueError) -> FileError:
    """Why a file cannot be read, for people."""
    if isinstance(error, FileNotFoundError):
        return FileError("{name} does not exist.", path)
    if isinstance(error, PermissionError):
        return FileError("{path} may not be read: permission denied.", path)
    if isinstance(error, OSError):
        return FileError("{path} cannot be read: {what}.", path, error.strerror or error)
    return FileError("{path} is not a file name: {error}.", repr(str(path)), error)  # An embedded NUL.


def read_exactly(file: BinaryIO, count: int) -> bytes:
    """Up to ``count`` bytes; fewer only at the end of the file."""
    chunks = []
    while count > 0:
        chunk = file.read(count)
        if not chunk:
            break
        chunks.append(chunk)
        count -= len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def header_bytes(file: BinaryIO, size: int, path: Path) -> bytes:
    """The JSON of a safetensors header, from a file at its start.

    Raises:
        FileError: If the file is no safetensors file; the message says what it is.
    """
    head = read_exactly(file, min(size, 512))
    if not head:
        raise FileError("{file} is empty (0 bytes); download it again.", path.name)
    length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else -1
    if length < 2 or length > HEADER_LIMIT or head[8:9] not in (b"{", b""):
        what = describe_bytes(head, size)
        if what is not None:
            raise FileError("{file} {what}", path.name, what)
        if length > HEADER_LIMIT and head[8:9] == b"{":
            raise FileError(
                "{file} claims a header of {size}; safetensors allows {most}. The file is damaged; download "
                "it again.",
                path.name,
                size_text(length),
                size_text(HEADER_LIMIT),
            )
        raise FileError(
            "{file} is not a safetensors file, or its start is damaged; download it again.", path.name
        )
    if 8 + length > size:
        raise FileError(
            "{file} is cut off inside its header: at least {missing} bytes are missing. Download it again.",
            path.name,
            f"{8 + length - size:,}",
        )
    return head[8 : 8 + length] + read_exactly(file, 8 + length - len(head))


def parse_header(raw: bytes, size: int, path: Path) -> Header:
    """Check the JSON of a header against the size of its file.

    Args:
        raw: The JSON, without the eight bytes of its length.
        size: Size of the whole file in bytes.
        path: For messages.

    Raises:
        FileError: If anything in it is not as the safetensors format demands.
    """
    if _lists_too_much(raw) or (len(raw) > WIDE_LIMIT and not (raw.isascii() and b"\\u" not in raw)):
        raise _damaged(path, "its header lists more than any adapter file holds")
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError, FileError) as error:
        reason = str(error) if isinstance(error, FileError) else _short(error)
        raise _damaged(path, "its header is not valid JSON ({error})", reason) from error
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is not a JSON object")
    if b"\\u" in raw:  # Only an escape can make text that UTF-8 cannot hold.
        _check_text(entries, path)
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its metadata holds something else than texts")
    tensors = [(key, _tensor_info(key, entry, path)) for key, entry in entries.items()]
    tensors.sort(key=lambda item: (item[1].start, item[1].end, item[0]))
    data_start = 8 + len(raw)
    _check_places(tensors, size - data_start, path)
    return Header(MappingProxyType(dict(tensors)), MappingProxyType(metadata), data_start, size)


def _lists_too_much(raw: bytes) -> bool:
    """Whether parsing would cost too much; texts may hold as many brackets as they like, as tags do."""
    if raw.count(b"[") + raw.count(b"{") <= BRACKET_LIMIT and raw.count(b",") <= COMMA_LIMIT:
        return False
    brackets = commas = place = 0
    # Counted on the way: a copy without texts would be put together of millions of pieces.
    for start, end in chain((text.span() for text in _TEXT.finditer(raw)), [(len(raw), len(raw))]):
        between = raw[place:start]
        brackets += between.count(b"[") + between.count(b"{")
        commas += between.count(b",")
        if brackets > BRACKET_LIMIT or commas > COMMA_LIMIT:
            return True
        place = end
    return False


def _tensor_info(key: str, entry: Any, path: Path) -> TensorInfo:
    """One checked entry; its bytes must be as many as dtype and shape demand."""
    if len(key) > NAME_LIMIT:
        raise _damaged(path, "tensor {name} has a name of {count} characters", _named(key), f"{len(key):,}")
    if not isinstance(entry, dict):
        raise _damaged(path, "the header entry of tensor {name} is not a description", _named(key))
    dtype, shape, place = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _damaged(path, "tensor {name} has the unknown dtype {dtype}", _named(key), _short(dtype))
    if not _is_naturals(shape) or len(shape) > DIMENSION_LIMIT or _elements(shape) > ELEMENT_LIMIT:
        raise _damaged(path, "tensor {name} has the impossible shape {shape}", _named(key), _short(shape))
    if not _is_naturals(place) or len(place) != 2 or place[0] > place[1]:
        raise _damaged(path, "tensor {name} has the impossible place {place}", _named(key), _short(place))
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or bits // 8 != place[1] - place[0]:
        raise _damaged(
            path,
            "tensor {name} of shape {shape} and dtype {dtype} needs {needed} bytes, but the header gives it "
            "{given}",
            _named(key),
            tuple(shape),
            dtype,
            f"{bits // 8:,}",
            f"{place[1] - place[0]:,}",
        )
    return TensorInfo(dtype, tuple(shape), place[0], place[1])


def _check_places(tensors: list[tuple[str, TensorInfo]], available: int, path: Path) -> None:
    """Tensors must follow one another without hole or overlap, to the last byte."""
    end = 0
    for key, info in tensors:
        if info.start < end:
            raise _damaged(path, "tensor {name} overlaps the one before it", _named(key))
        if info.start > end:
            raise _damaged(
                path, "{count} bytes before {name} belong to no tensor", f"{info.start - end:,}", _named(key)
            )
        end = info.end
    if end > available:
        raise FileError(
            "{file} is cut off: {missing} of its {total} bytes of tensors are missing. Download it again.",
            path.name,
            f"{end - available:,}",
            f"{end:,}",
        )
    if end < available:
        raise FileError(
            "{file} has {count} bytes after its last tensor, which no WebUI accepts. The file is damaged; "
            "download it again.",
            path.name,
            f"{available - end:,}",
        )


def _elements(shape: list[int]) -> int:
    """What numpy and torch count with, even where another side is 0."""
    return math.prod(side or 1 for side in shape) if 0 in shape else math.prod(shape)


def _is_naturals(value: Any) -> TypeGuard[list[int]]:
    if not isinstance(value, list):
        return False
    for item in value:  # noqa: SIM110 - called twice per tensor, where all() costs more than the checks
        if type(item) is not int or not 0 <= item < 2**63:
            return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        count = Counter(key for key, _ in pairs)
        raise FileError("the name {name} occurs twice", _named(count.most_common(1)[0][0]))
    return found


def _no_constant(text: str) -> None:
    raise FileError("{text} is not a number of JSON", text)


def _check_text(entries: dict[str, Any], path: Path) -> None:
    metadata = entries.get("__metadata__")
    texts = list(entries)
    if isinstance(metadata, dict):
        texts += [text for item in metadata.items() for text in item if isinstance(text, str)]
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _damaged(path, "its header holds the broken text {text}", _named(text)) from error


def _damaged(path: Path, key: str, *parts: object) -> FileError:
    return FileError("{file} is damaged: {what}. Download it again.", path.name, Sentence(key, *parts))


def _named(key: str) -> str:
    """A key for a message: printable, and not longer than a line."""
    return ascii(key if len(key) <= 200 else key[:200] + "...")


def _short(value: object) -> str:
    text = ascii(value)[:83] if not isinstance(value, Exception) else str(value)[:120]
    return text.encode("ascii", "backslashreplace").decode()


_TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
OUTPUT_NAME = re.compile(rb'(?<!\\)"ss_output_name"\s*:\s*("(?:[^"\\]|\\.)*")')


def stored_name(path: Path) -> str | None:
    """``ss_output_name`` of a safetensors file, or None; a hundred times faster than the whole header.

    Nothing but the length of the header is checked; a file that cannot be read has no name.
    """
    try:
        with reading(path) as (_, status):
            return _stored_name(os.path.abspath(path), *stamp_of(status))
    except FileError:
        return None


@lru_cache(maxsize=20_000)
def _stored_name(path: str, *stamp: int) -> str | None:
    with reading(Path(path)) as (file, status):
        raw = header_bytes(file, status.st_size, Path(path))
    found = OUTPUT_NAME.search(raw)  # Inside another text its quotes would have backslashes.
    try:
        return None if found is None else str(json.loads(found[1]))
    except ValueError:
        return None


@dataclass
class _Cache:
    """The headers read last, bounded by what they hold.

    A 2,000-file folder of SDXL LoRAs would fill gigabytes otherwise.
    """

    limit: int
    held: int = 0
    entries: OrderedDict[tuple[str | int, ...], Header] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, key: tuple[str | int, ...]) -> Header | None:
        with self.lock:
            header = self.entries.get(key)
            if header is not None:
                self.entries.move_to_end(key)
            return header

    def put(self, key: tuple[str | int, ...], header: Header) -> None:
        with self.lock:
            if key in self.entries:
                return
            self.entries[key] = header
            self.held += _cost(header)
            while self.held > self.limit and len(self.entries) > 1:
                self.held -= _cost(self.entries.popitem(last=False)[1])

    def clear(self) -> None:
        with self.lock:
            self.entries.clear()
            self.held = 0


def _cost(header: Header) -> int:
    """Rough size in memory, in bytes."""
    texts = sum(len(key) + len(value) for key, value in header.metadata.items())
    return 2_000 + 400 * len(header.tensors) + 2 * texts


HEADERS = _Cache(limit=64_000_000)


def stamp_of(status: os.stat_result) -> tuple[int, ...]:
    """What is another after a file was written to or replaced: size, times, number.

    Some tools set the old time again after writing; on POSIX systems the time of that is kept, too.
    """
    changed = status.st_ctime_ns if os.name == "posix" else 0
    return status.st_size, status.st_mtime_ns, changed, status.st_ino


def cache_key(path: Path, status: os.stat_result) -> tuple[str | int, ...]:
    """What must be equal for a cached header to be believed.

    The file number is in it because a file that was replaced twice within one
    tick of the clock can have the same size and time.
    """
    return os.path.abspath(path), *stamp_of(status)
