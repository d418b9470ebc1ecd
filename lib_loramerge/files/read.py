"""Reading adapter files: the header first, then one tensor at a time.

Tensors are read from their places in the open file, not through a memory map. It is as
fast, and a file that another program shortens meanwhile is then an error, where a map
ends the whole WebUI; nor does Windows keep a file that was mapped from being replaced.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from lib_loramerge.errors import FileError, Sentence
from lib_loramerge.files.decode import decode
from lib_loramerge.files.hashes import hash_from
from lib_loramerge.files.header import (
    HEADERS,
    Header,
    TensorInfo,
    cache_key,
    header_bytes,
    open_regular,
    parse_header,
    read_exactly,
    reading,
    stamp_of,
    unreadable,
)
from lib_loramerge.files.pickled import PICKLE_SUFFIXES, Place, load_pickle, read_place

if TYPE_CHECKING:
    from torch import Tensor

TAIL_BYTES, MANY_ZEROS = 4096, 64_000_000
"""Fewer zeros at the end of a file are no sign of damage; more need not be counted."""

LORA_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
"""What the hosts list as a LoRA."""


def read_header(path: str | os.PathLike[str]) -> Header:
    """The checked header of an adapter file; from memory if the file has not changed.

    For ``.pt`` and ``.ckpt``, which have none, the file is read and one is made.

    Raises:
        FileError: If the file cannot be read or is not what its name says; the message
            names what it is.
    """
    path = Path(path)
    with reading(path) as (file, status):
        return _header_of(path, file, status)


def _header_of(path: Path, file: BinaryIO, status: os.stat_result) -> Header:
    key = cache_key(path, status)
    header = HEADERS.get(key)
    if header is None:
        if path.suffix.lower() in PICKLE_SUFFIXES:
            header = load_pickle(path, file, status.st_size)[0]
        else:
            try:
                header = parse_header(header_bytes(file, status.st_size, path), status.st_size, path)
            except OSError as error:
                raise unreadable(path, error) from error
        header = replace(header, stamp=stamp_of(status))
        HEADERS.put(key, header)
    return header


class LoraFile:
    """An open adapter file. Reading is safe from several threads at once.

    Attributes:
        path: Where it is.
        header: What it says of itself.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a file and check its header.

        Raises:
            FileError: As :func:`read_header`.
        """
        self.path = Path(path)
        self._lock = threading.Lock()
        self._places: dict[str, Place] | None = None
        self._file: BinaryIO | None
        self._file, status = open_regular(self.path)
        try:
            self.header = _header_of(self.path, self._file, status)
            if self.path.suffix.lower() in PICKLE_SUFFIXES:
                self._places = load_pickle(self.path, self._file, status.st_size)[1]
        except BaseException:
            self.close()
            raise

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Key to dtype, shape and place."""
        return self.header.tensors

    @property
    def metadata(self) -> Mapping[str, str]:
        """The string map of the header."""
        return self.header.metadata

    def read(self, key: str) -> Tensor:
        """One tensor as numbers to compute with.

        Args:
            key: The tensor's full name in the file.

        Returns:
            A copy on the CPU in its stored shape: float64 if stored so, float32 otherwise.

        Raises:
            FileError: If it holds NaN or infinity, or the file has changed meanwhile.
            UnsupportedError: If it is stored in a dtype that holds no ordinary numbers.
        """
        info = self.header.tensors[key]

        def where() -> Sentence:
            return Sentence("{file}: tensor {key}", self.path.name, repr(key))

        tensor = decode(info.dtype, info.shape, lambda target: self._fill(key, target), where)
        bad = count_not_finite(tensor)
        if bad:
            raise FileError(
                "{where} holds NaN or infinity in {count} of its {total} values; the file is broken (its "
                "training diverged) and cannot be merged.",
                where(),
                f"{bad:,}",
                f"{tensor.numel():,}",
            )
        return tensor

    def data_bytes(self, key: str) -> bytearray:
        """The stored bytes of one tensor, little-endian."""
        info = self.header.tensors[key]
        target = bytearray(info.end - info.start)
        self._fill(key, memoryview(target))
        return target

    def model_hash(self, stop: Callable[[], None] | None = None) -> str:
        """:func:`~lib_loramerge.files.hashes.model_hash` of the very file that is open.

        Raises:
            FileError: If it cannot be read.
        """
        start = self.header.data_start  # 0 in a pickle.
        size = self.header.size - start
        return hash_from(lambda place, target: self.read_at(start + place, target), size, stop)

    def check_unchanged(self) -> None:
        """Whether what was read is of one file, which is still there.

        Raises:
            FileError: If another program wrote to the file, or put another in its place.
        """
        if self._file is None:
            raise ValueError(f"{self.path} is closed")
        try:
            same = stamp_of(os.fstat(self._file.fileno())) == self.header.stamp
            if os.name == "posix":  # Windows replaces no file that is open.
                same &= stamp_of(os.stat(self.path)) == self.header.stamp
        except OSError:
            same = False
        if not same:
            raise changed_meanwhile(self.path)

    def _fill(self, key: str, target: memoryview) -> None:
        """Read the bytes of one tensor into memory."""
        info = self.header.tensors[key]
        if self._places is None:
            self.read_at(self.header.data_start + info.start, target)
        else:
            target[:] = read_place(self._places[key], info, self.read_at)

    def read_at(self, place: int, target: memoryview) -> None:
        """Fill memory with the file's bytes from a place on, counted from its start.

        Raises:
            FileError: If it cannot be read, or has become shorter.
        """
        if self._file is None:
            raise ValueError(f"{self.path} is closed")
        done = 0
        try:
            while done < len(target):
                count = self._read_some(place + done, target[done:])
                if not count:
                    raise FileError("{file} became shorter while it was read; start again.", self.path.name)
                done += count
        except OSError as error:
            raise unreadable(self.path, error) from error

    def _read_some(self, place: int, target: memoryview) -> int:
        """How many bytes one call of the system reads; threads wait for each other only where they must."""
        assert self._file is not None
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [target], place)
        with self._lock:
            self._file.seek(place)
            return self._file.readinto(target)  # type: ignore[attr-defined, no-any-return]

    def close(self) -> None:
        """Let go of the file; Windows replaces no file that is open."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> LoraFile:
        """Return the file itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()


def changed_meanwhile(path: Path) -> FileError:
    return FileError(
        "{file} was changed by another program while it was read, so nothing was written. Start again when "
        "it is complete.",
        path.name,
    )


def zero_tail(path: Path, header: Header) -> int:
    """How many bytes at the end of a safetensors file are zeros that no tool writes; 0 for a sound file.

    Programs that download reserve the whole file first: what was not fetched is zeros, mostly from the
    middle of a tensor on. The zeros of a layer that was not trained fill a tensor, and one alone.
    """
    last = list(header.tensors.values())[-1:]
    if not last or not header.data_start:
        return 0
    start = header.data_start + last[0].start
    try:
        with reading(path) as (file, _):
            zeros = 0
            while zeros < header.size - header.data_start:
                count = min(TAIL_BYTES, header.size - header.data_start - zeros)
                file.seek(header.size - zeros - count)
                chunk = read_exactly(file, count)
                kept = len(chunk.rstrip(b"\0"))
                zeros += len(chunk) - kept
                if kept or zeros >= MANY_ZEROS:
                    break
    except FileError:
        return 0
    # The last number before it may end in zero bytes, too.
    fills_the_last = abs(header.size - zeros - start) < 8
    return 0 if zeros < TAIL_BYTES or fills_the_last else zeros


def open_file(path: str | os.PathLike[str]) -> LoraFile:
    """Open a ``.safetensors``, ``.pt`` or ``.ckpt`` file; use it in a ``with`` statement."""
    return LoraFile(path)


def count_not_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite.

    The sum is finite if all values are, bar overflow, and costs one pass without memory.
    """
    import torch

    if tensor.element_size() == 1 and tensor.is_floating_point():
        tensor = tensor.to(torch.float32)  # float8 has no arithmetic.
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    if not tensor.numel() or math.isfinite(tensor.sum(dtype=wide).item()):
        return 0
    return int(tensor.numel() - torch.isfinite(tensor).sum())
