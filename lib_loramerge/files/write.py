"""Writing a LoRA so that it appears whole or not at all.

The file is made beside its place, flushed to disk, and only then given its name. Where
the system allows it, it has no name at all until then, so that even a killed process
leaves nothing behind. The bytes depend on the tensors and the metadata alone.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import queue
import shutil
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lib_loramerge.errors import OutputError
from lib_loramerge.files.decode import tensor_bytes
from lib_loramerge.files.header import DTYPE_BITS, header_bytes, reading
from lib_loramerge.files.pickled import torch_dtypes
from lib_loramerge.files.recognise import size_text

if TYPE_CHECKING:
    from torch import Tensor

DTYPE_ORDER = {dtype: place for place, dtype in enumerate(DTYPE_BITS)}
"""Tensors are stored by dtype, the last of these first, then by name, as safetensors does."""

LEGACY_START, LEGACY_END = 0x100000, 0x110000
"""The bytes that the legacy hash covers, counted from the start of a file."""

LARGEST = {
    "F64": (8, 0x7FEF_FFFF_FFFF_FFFF), "F32": (4, 0x7F7F_FFFF), "F16": (2, 0x7BFF), "BF16": (2, 0x7F7F),
    "F8_E4M3": (1, 0x7E), "F8_E5M2": (1, 0x7B),
}  # fmt: skip
"""dtype to its width in bytes and the bits of its largest finite number."""

CHUNK = 4_000_000
TEMPORARY_SUFFIX = ".part"
IN_PROCESS = threading.Lock()


@dataclass(frozen=True)
class Written:
    """A file that was written.

    Attributes:
        path: Where it is.
        size: In bytes.
        model_hash: ``sshs_model_hash``: hex SHA-256 of the bytes after the header.
        legacy_hash: ``sshs_legacy_hash``: eight hex digits.
    """

    path: Path
    size: int
    model_hash: str
    legacy_hash: str


@dataclass(frozen=True)
class _Entry:
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def write_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
    before_rename: Callable[[], None] | None = None,
) -> Written:
    """Write a safetensors file; the two ``sshs_`` hashes are added to its metadata.

    Args:
        path: Where to; must end in ``.safetensors``.
        tensors: Key to tensor of any shape, on any device, in the dtype to be stored. Each
            is taken from the mapping twice: for its shape, and to be written.
        metadata: Texts for the header.
        overwrite: Replace a file that is there. Without it one that appears while this one
            is written is kept as well.
        before_rename: Called when all is on disk but nothing has the name yet; what it
            raises stops the writing, and nothing is left.

    Raises:
        OutputError: If it cannot be written there, the disk is full, the name is taken, or
            a tensor holds NaN or infinity.
    """
    path = Path(path)
    check_target(path, overwrite)
    entries = _plan(tensors)
    total = entries[-1].end if entries else 0
    texts = {key: _utf8(value) for key, value in metadata.items()}
    head = header_json(entries, {**texts, "sshs_legacy_hash": "0" * 8, "sshs_model_hash": "0" * 64})
    check_space(path.parent, len(head) + total)
    with _output(path, overwrite) as file, _hashing(_legacy_head(entries, texts)) as hashes:
        file.write(head)
        for entry in entries:
            data = _bytes_of(tensors[entry.key], entry, path)
            hashes.add(data)
            file.write(data)
        model_hash, legacy_hash = hashes.results()
        file.seek(0)
        file.write(header_json(entries, {**texts, "sshs_legacy_hash": legacy_hash, "sshs_model_hash": model_hash}))
        file.flush()
        os.fsync(file.fileno())
        if before_rename is not None:
            before_rename()
    return Written(path, len(head) + total, model_hash, legacy_hash)


def _plan(tensors: Mapping[str, Tensor]) -> list[_Entry]:
    """Every tensor's place in the data part, in the canonical order."""
    names = torch_dtypes()
    kinds = {key: (names[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()}
    entries, start = [], 0
    for key in sorted(kinds, key=lambda key: (-DTYPE_ORDER[kinds[key][0]], key.encode("utf-8"))):
        dtype, shape = kinds[key]
        end = start + math.prod(shape) * DTYPE_BITS[dtype] // 8
        entries.append(_Entry(key, dtype, shape, start, end))
        start = end
    return entries


def header_json(entries: list[_Entry], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of a header, keys sorted, padded with spaces to a multiple of eight."""
    listed: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    for entry in entries:
        listed[entry.key] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (entry.start, entry.end)}
    raw = json.dumps(listed, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _bytes_of(tensor: Tensor, entry: _Entry, path: Path) -> memoryview:
    """The bytes to be stored, all of them finite numbers; no copy if the tensor is contiguous and on the CPU."""
    data = tensor_bytes(tensor.detach().cpu().contiguous())
    if not all_finite(data, entry.dtype):
        raise OutputError(
            f"{path.name} was not written: tensor {entry.key!r} holds values that are NaN or infinite in "
            f"{entry.dtype}; use a smaller strength or a wider dtype (bfloat16 or float32)."
        )
    if sys.byteorder == "big":  # Files are little-endian.
        import numpy as np

        width = DTYPE_BITS[entry.dtype] // 8
        data = memoryview(np.frombuffer(data, f"u{width}").byteswap().view(np.uint8))  # type: ignore[arg-type]
    if len(data) != entry.end - entry.start:
        raise ValueError(f"tensor {entry.key!r} changed while the file was written")
    return data


def all_finite(data: memoryview, dtype: str) -> bool:
    """True if none of the stored numbers is NaN or infinite.

    Read off the bits, where those are the largest of each sign: numpy stays in this thread,
    while a sum in torch would wait for threads that the hash has displaced.
    """
    import numpy as np

    if dtype not in LARGEST or not len(data):
        return True
    width, largest = LARGEST[dtype]
    signed = np.frombuffer(data, f"i{width}")
    sign = 1 << (8 * width - 1)
    return int(signed.max()) <= largest and int(signed.view(f"u{width}").max()) <= largest + sign


def _utf8(text: str) -> str:
    """Text without the half characters that undecodable file names bring."""
    return text.encode("utf-8", "replace").decode("utf-8")


class _Hashes:
    """Both hashes, taken in a thread of their own while the next bytes are written.

    Attributes:
        legacy_head: The header that the legacy hash imagines: only the ``ss_`` texts in it.
    """

    def __init__(self, legacy_head: bytes) -> None:
        self._model = hashlib.sha256()
        self._legacy = hashlib.sha256(legacy_head[LEGACY_START:LEGACY_END])
        self._place = len(legacy_head)
        self._error: Exception | None = None
        self._batch: list[memoryview] = []
        self._batched = 0
        self._work: queue.Queue[list[memoryview] | None] = queue.Queue(maxsize=8)
        self._thread = threading.Thread(target=self._run, name="loramerge-hash", daemon=True)
        self._thread.start()

    def add(self, data: memoryview) -> None:
        """Hash these bytes after all before them. They must not change until the end."""
        start, stop = LEGACY_START - self._place, LEGACY_END - self._place
        if stop > 0 and start < len(data):
            self._legacy.update(data[max(start, 0) : stop])
        self._place += len(data)
        self._batch.append(data)
        self._batched += len(data)
        if self._batched >= CHUNK:
            self._work.put(self._batch)
            self._batch, self._batched = [], 0

    def results(self) -> tuple[str, str]:
        """Model hash and legacy hash of everything added."""
        self._work.put(self._batch)
        self._batch = []
        self.close()
        if self._error is not None:
            raise self._error
        return self._model.hexdigest(), self._legacy.hexdigest()[:8]

    def close(self) -> None:
        """End the thread."""
        if self._thread.is_alive():
            self._work.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (batch := self._work.get()) is not None:
            try:
                # One call for many small ones: each call gives up and retakes the interpreter lock.
                for data in [b"".join(batch)] if sum(map(len, batch)) < 2 * CHUNK else batch:
                    self._model.update(data)
            except Exception as error:  # Told by results(); the queue must go on being emptied.
                self._error = error


@contextmanager
def _hashing(legacy_head: bytes) -> Iterator[_Hashes]:
    hashes = _Hashes(legacy_head)
    try:
        yield hashes
    finally:
        hashes.close()


def _legacy_head(entries: list[_Entry], metadata: Mapping[str, str]) -> bytes:
    """The header of the file that the legacy hash is defined on: only ``ss_`` texts in it.

    Source:
        kohya-ss/sd-scripts, ``library/train_util.py``, ``precalculate_safetensors_hashes``.
    """
    return header_json(entries, {key: value for key, value in metadata.items() if key.startswith("ss_")})


def model_hash(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of the bytes after the header: what ``sshs_model_hash`` should say.

    Raises:
        FileError: If the file cannot be read or is no safetensors file.
    """
    path = Path(path)
    digest = hashlib.sha256()
    with reading(path) as (file, status):
        file.seek(8 + len(header_bytes(file, status.st_size, path)))
        buffer = memoryview(bytearray(CHUNK))
        while count := file.readinto(buffer):  # type: ignore[attr-defined]
            digest.update(buffer[:count])
    return digest.hexdigest()


def check_target(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuse, before any work is done, a place where a file could not be written.

    Raises:
        OutputError: If the folder is missing or may not be written to, the name is taken,
            too long or impossible.
    """
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        raise OutputError(f"{path.name!r} must end in .safetensors, as every WebUI expects.")
    try:
        if path.is_dir():
            raise OutputError(f"{path} is a folder; give the name of a file in it.")
        if os.path.lexists(path) and not overwrite:
            raise OutputError(f"{path} exists already; choose another name, or allow it to be overwritten.")
        os.stat(path.parent)
        if not path.parent.is_dir():
            raise OutputError(f"{path.parent} is a file, so nothing can be written into it.")
        with suppress(FileNotFoundError):
            os.lstat(path)  # A name that is too long fails here.
        _remove_stale(path)
        probe = _temporary_path(path)
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        with suppress(FileNotFoundError):  # Another writer may have tidied it up already.
            os.unlink(probe)
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error


def check_space(folder: Path, needed: int) -> None:
    """Refuse if a folder's disk has fewer than ``needed`` free bytes.

    Raises:
        OutputError: With both numbers.
    """
    free = free_space(folder)
    if free is not None and free < needed:
        raise OutputError(
            f"The disk of {folder} is too full: the file needs {size_text(needed)}, {size_text(free)} are free."
        )


def free_space(folder: Path) -> int | None:
    """Free bytes on the disk of a folder, or None if the system does not tell."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _unwritable(path: Path, error: OSError | ValueError) -> OutputError:
    """Why a file cannot be written, for people."""
    number = getattr(error, "errno", None)
    if isinstance(error, FileExistsError):
        return OutputError(f"{path} exists already; choose another name, or allow it to be overwritten.")
    if number in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", -1)):
        return OutputError(f"The disk is full or a limit is reached, so {path.name} was not written; nothing was left.")
    if number == errno.ENAMETOOLONG:
        return OutputError(f"The name {path.name[:60]!r}... is too long for this disk; choose a shorter one.")
    if number == errno.EROFS or isinstance(error, PermissionError):
        return OutputError(
            f"{path} may not be written: the folder is protected, or another program (such as a WebUI that has "
            "the file loaded) holds it. Choose another folder or name."
        )
    if isinstance(error, FileNotFoundError):
        return OutputError(f"{path.parent} does not exist; make the folder first.")
    if isinstance(error, OSError):
        return OutputError(f"{path} cannot be written: {error.strerror or error}.")
    return OutputError(f"{str(path)!r} is not a file name: {error}.")


@contextmanager
def _output(path: Path, overwrite: bool) -> Iterator[BinaryIO]:
    """Yield a file to write; it gets its name only if the block ends well.

    Raises:
        OutputError: If anything goes wrong with the file; nothing is left then.
    """
    try:
        _remove_stale(path)
        with _unnamed(path.parent) as unnamed:
            if unnamed is not None:
                yield unnamed
                if _name_unnamed(unnamed, path, overwrite):
                    _flush_folder(path.parent)
                    return
                with _named(path, overwrite) as named:  # /proc is missing: copy it, the rare way.
                    unnamed.seek(0)
                    shutil.copyfileobj(unnamed, named, CHUNK)
                    named.flush()
                    os.fsync(named.fileno())
                return
        with _named(path, overwrite) as named:
            yield named
    except OSError as error:
        raise _unwritable(path, error) from error


@contextmanager
def _unnamed(folder: Path) -> Iterator[BinaryIO | None]:
    """A file that vanishes with the process, where the system has such files (Linux)."""
    number = -1
    if hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd"):
        with suppress(OSError):  # Not every file system has them.
            number = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
    if number < 0:
        yield None
        return
    with os.fdopen(number, "w+b", buffering=1 << 20) as file:
        _lock(number)  # For the moment in which it has a temporary name.
        yield file


def _name_unnamed(file: BinaryIO, path: Path, overwrite: bool) -> bool:
    """Give a finished file its name; False if this system cannot.

    A link to an existing name fails, so of two merges that race for a name one loses. To
    replace, the link gets a temporary name first, as no link replaces.
    """
    target = _temporary_path(path) if overwrite and os.path.lexists(path) else path
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # With a folder given, Python follows the link in /proc to the file itself.
        os.link(f"/proc/self/fd/{file.fileno()}", target, src_dir_fd=folder)
    except FileExistsError:
        if not overwrite:
            raise
        return _name_unnamed(file, path, overwrite)  # It appeared just now.
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EINVAL):
            return False
        raise
    finally:
        os.close(folder)
    if target != path:
        try:
            os.replace(target, path)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    return True


@contextmanager
def _named(path: Path, overwrite: bool) -> Iterator[BinaryIO]:
    """A file of a temporary name beside its place, renamed if the block ends well."""
    temporary, number = _create_locked(path)
    try:
        with os.fdopen(number, "w+b", buffering=1 << 20) as file:
            yield file
            if os.name != "nt":  # Renamed while locked, so that nobody takes it for a stale one.
                _rename(temporary, path, overwrite)
        if os.name == "nt":  # Which renames no open file.
            _rename(temporary, path, overwrite)
        _flush_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _rename(temporary: Path, path: Path, overwrite: bool) -> None:
    """Give a finished file its name, replacing another only if that was asked for."""
    if overwrite:
        _patiently(lambda: os.replace(temporary, path))
    elif os.name == "nt":
        _patiently(lambda: os.rename(temporary, path))  # Fails there if the name is taken.
    else:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # A file system without links, such as exFAT.
            with IN_PROCESS:
                if os.path.lexists(path):
                    raise FileExistsError(errno.EEXIST, "exists", str(path)) from None
                os.replace(temporary, path)


def _patiently(rename: Callable[[], None]) -> None:
    """Try again for a second: on Windows a virus scanner may hold a new file for a moment."""
    for _ in range(10 if os.name == "nt" else 0):
        try:
            rename()
            return
        except FileExistsError:
            raise
        except PermissionError:
            time.sleep(0.1)
    rename()


def _temporary_stem(path: Path) -> str:
    """Start of the temporary names of a target: short, whatever the target is called."""
    return f".loramerge-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"


def _temporary_path(path: Path) -> Path:
    """A new name that no host lists as a LoRA."""
    return path.with_name(f"{_temporary_stem(path)}{os.urandom(6).hex()}{TEMPORARY_SUFFIX}")


def _create_locked(path: Path) -> tuple[Path, int]:
    """Create a temporary file and hold a lock on it, which says that its process lives."""
    while True:
        temporary = _temporary_path(path)
        number = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)
        if os.name == "nt":
            return temporary, number  # An open file cannot be removed there.
        _lock(number)
        with suppress(OSError):  # Removed as stale before it was locked: take another.
            if os.stat(temporary).st_ino == os.fstat(number).st_ino:
                return temporary, number
        os.close(number)


def _lock(number: int) -> None:
    """Hold a lock on an open file, where the file system has locks."""
    import fcntl

    with suppress(OSError):
        fcntl.flock(number, fcntl.LOCK_EX)


def _remove_stale(path: Path) -> None:
    """Remove what killed processes left of an earlier try to write the same file."""
    stem = _temporary_stem(path)
    with suppress(OSError), os.scandir(path.parent) as found:
        for entry in found:
            if entry.name.startswith(stem) and entry.name.endswith(TEMPORARY_SUFFIX) and _is_abandoned(entry.path):
                with suppress(OSError):
                    os.unlink(entry.path)


def _is_abandoned(temporary: str) -> bool:
    """True if no living process holds the lock on a temporary file."""
    if os.name == "nt":
        return True  # Removing one that is in use fails there.
    import fcntl

    try:
        number = os.open(temporary, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:  # A file system without locks: judge by age.
        return time.time() - os.fstat(number).st_mtime > 86_400
    finally:
        os.close(number)


def _flush_folder(folder: Path) -> None:
    """Make a new name durable; Windows and some network disks have no way to."""
    if os.name == "nt":
        return
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
