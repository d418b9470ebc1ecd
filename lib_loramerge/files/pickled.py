"""``.pt`` and ``.ckpt`` files: tensors out of a pickle, without running what is in it."""

from __future__ import annotations

import errno
import io
import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from lib_loramerge.errors import FileError, LoraMergeError, UnsupportedError
from lib_loramerge.files.header import (
    DTYPE_BITS,
    Header,
    TensorInfo,
    header_bytes,
    read_exactly,
    unreadable,
)
from lib_loramerge.files.pickling import (
    INSTRUCTIONS,
    Excessive,
    Harmful,
    Name,
    Storage,
    StoredTensor,
    Unread,
    read_pickle,
)
from lib_loramerge.files.recognise import RENAME, describe_bytes

PICKLE_SUFFIXES = (".pt", ".ckpt")
WRAPPERS = ("state_dict", "module", "model", "lora", "params", "params_ema")
"""Names under which tools put the tensors when they save other things beside them."""


@dataclass(frozen=True)
class Place:
    """Where a tensor's numbers are.

    Attributes:
        start: First byte of its storage in the file; -1 for a number that the pickle itself holds.
        tensor: Its view of the storage; None for a number.
        number: The number as the four bytes of a float32.
    """

    start: int
    tensor: StoredTensor | None = None
    number: bytes = b""


OLD_MAGIC, OLD_VERSION = 0x1950A86A20F9469CFC6C, 1001
WIDTHS = {dtype: bits // 8 for dtype, bits in DTYPE_BITS.items() if bits >= 8}
DEEPEST, LONGEST_NAME = 30, 2_000
MOST_VIEWS = 4
"""Tensors that share numbers may be so many times as large as the file."""


def load_pickle(path: Path, file: BinaryIO, size: int) -> tuple[Header, dict[str, Place]]:
    """Understand a ``.pt`` or ``.ckpt``, whatever it asks for: no code is run and no tensor is read.

    Returns:
        The header, as a safetensors file of the same tensors would have it, and the place of each tensor.

    Raises:
        FileError: If it is damaged, holds code, exceeds our bounds or is not a PyTorch file.
        UnsupportedError: If it holds something else than tensors, or tensors of a kind that is not read.
    """
    file.seek(0)
    _check_start(path, file, size)
    file.seek(0)
    buffered: Any = io.BufferedReader(_Kept(file))
    try:
        loaded, starts = _from_zip(path, buffered, size) if _is_zip(file) else _from_old(buffered, size)
        _check_storages(path, starts, size)
        return _described(path, loaded, {key: start for key, (_, start, _) in starts.items()}, size)
    except LoraMergeError:
        raise
    except Harmful as error:
        raise FileError(
            "{file} holds more than tensors, perhaps harmful code, and was not opened; use a .safetensors "
            "file.",
            path.name,
        ) from error
    except Excessive as error:
        raise FileError(
            "{file} asks for more than any adapter file holds and was not opened; use a .safetensors file.",
            path.name,
        ) from error
    except Unread as error:
        raise UnsupportedError(
            "{file} holds {kind}, a kind of tensor that is not read.", path.name, error
        ) from error
    except Exception as error:  # A damaged pickle fails in nearly any way; EINVAL is a place that is none.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise unreadable(path, error) from error
        text = " ".join(str(error).split())[:120]
        raise FileError(
            "{file} is damaged or not a PyTorch file ({reason}); download it again.", path.name, text
        ) from error


Starts = dict[str, tuple[Storage, int, int]]
"""Storage, first byte, and how many bytes there are."""


class _Kept(io.RawIOBase):
    """A file that a buffer around it may close without closing it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = 0) -> int:
        return self._file.seek(place, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, target: Any) -> int | None:
        return self._file.readinto(target)  # type: ignore[attr-defined, no-any-return]


def _is_zip(file: BinaryIO) -> bool:
    file.seek(0)
    start = read_exactly(file, 2)
    file.seek(0)
    return start == b"PK"


def _from_zip(path: Path, file: BinaryIO, size: int) -> tuple[Any, Starts]:
    """What ``torch.save`` writes since 1.6: a zip archive of the pickle and a file for each storage."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        names = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
        if len(names) != 1:
            raise ValueError("it has no data.pkl")
        folder = names[0].rpartition("/")[0]
        if f"{folder}/constants.pkl" in entries:
            raise Harmful("TorchScript")
        order = entries.get(f"{folder}/byteorder")
        if order is not None and archive.read(order).strip() != b"little":
            raise Unread("big-endian")
        file.seek(_data_start(file, entries[names[0]], size))
        loaded, storages = read_pickle(file)
        starts = {}
        for key, storage in storages.items():
            entry = entries.get(f"{folder}/data/{key}")
            if entry is None:
                raise ValueError(f"the tensor data {key[:20]!r} are missing")
            starts[key] = (storage, _data_start(file, entry, size), entry.file_size)
    return loaded, starts


def _data_start(file: BinaryIO, entry: zipfile.ZipInfo, size: int) -> int:
    """First byte of a stored entry, behind its own header, whose length is not in the directory."""
    file.seek(entry.header_offset)
    head = read_exactly(file, 30)
    if len(head) < 30 or head[:4] != b"PK\3\4":
        raise ValueError("an entry of the archive is missing")
    name, more = struct.unpack("<HH", head[26:30])
    start = entry.header_offset + 30 + int(name) + int(more)
    if start + entry.file_size > size:
        raise ValueError("it is cut off")
    return start


def _from_old(file: BinaryIO, size: int) -> tuple[Any, Starts]:
    """What ``torch.save`` wrote before: five pickles, and the storages behind them."""
    if read_pickle(file)[0] != OLD_MAGIC or read_pickle(file)[0] != OLD_VERSION:
        raise ValueError("it is a pickle of something else")
    system = read_pickle(file)[0]
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise Unread("big-endian")
    loaded, storages = read_pickle(file)
    keys = read_pickle(file)[0]
    if not isinstance(keys, list):
        raise ValueError("the list of tensor data is missing")
    starts: Starts = {}
    for key in keys:
        storage = storages[str(key)]
        head = read_exactly(file, 8)
        if len(head) < 8:
            raise ValueError("it is cut off")
        held = struct.unpack("<q", head)[0] * WIDTHS.get(storage.dtype, 1)
        starts[str(key)] = (storage, file.tell(), held)
        if held < 0 or file.tell() + held > size:
            break  # Told by who looks at what is declared.
        file.seek(held, 1)
    missing = set(storages) - set(starts)
    if missing and len(starts) == len(keys):
        raise ValueError(f"the tensor data {sorted(missing)[0][:20]!r} are missing")
    return loaded, starts


def _check_storages(path: Path, starts: Starts, size: int) -> None:
    """Nothing is larger than the file, whatever is declared."""
    for storage, start, held in starts.values():
        declared = storage.count * WIDTHS.get(storage.dtype, 1)
        if declared > held or held < 0 or start + held > size:
            raise FileError(
                "{file} is damaged: it declares {declared} bytes for a tensor and holds {held}. Download it "
                "again.",
                path.name,
                f"{declared:,}",
                f"{max(0, min(held, size - start)):,}",
            )


def _described(
    path: Path, loaded: Any, starts: Mapping[str, int], size: int
) -> tuple[Header, dict[str, Place]]:
    places: dict[str, Place] = {}
    infos: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    declared = 0
    seen: set[str] = set()
    for key, value in _flatten(_unwrap(loaded, path)):
        if key in seen:
            raise FileError(
                "{file} has two tensors of one name: {key}. They are spelled apart in its nested "
                "dictionaries, and one would hide the other. Remove one of them.",
                path.name,
                key[:200],
            )
        seen.add(key)
        if isinstance(value, StoredTensor):
            width = WIDTHS[value.dtype]
            end = value.offset + 1 + sum((n - 1) * step for n, step in zip(value.shape, value.strides))
            held = value.storage.count * WIDTHS.get(value.storage.dtype, 1) // width
            count = math.prod(value.shape)
            declared += count * width
            beyond = 0 not in value.shape and (end > held or count > held)
            if beyond or declared > MOST_VIEWS * size:
                raise Excessive
            places[key] = Place(starts[value.storage.key], value)
            infos[key] = TensorInfo(value.dtype, value.shape, 0, count * width)
        elif isinstance(value, (int, float)):
            places[key] = Place(-1, number=struct.pack("<f", float(value)))  # alpha, in files of some scripts
            infos[key] = TensorInfo("F32", (), 0, 4)
        elif isinstance(value, (str, bytes, Name)):
            metadata[key] = value if isinstance(value, str) else repr(value)[:1000]
    ordered, start = {}, 0
    for key in sorted(infos):
        info = infos[key]
        ordered[key] = TensorInfo(info.dtype, info.shape, start, start + info.end)
        start += info.end
    return Header(MappingProxyType(ordered), MappingProxyType(metadata), 0, size), places


def read_place(place: Place, info: TensorInfo, read_at: Callable[[int, memoryview], None]) -> bytearray:
    """The bytes of one tensor, in the order of its shape, little-endian."""
    if place.tensor is None:
        return bytearray(place.number)
    target = bytearray(info.end - info.start)
    if not target:
        return target
    tensor, width = place.tensor, WIDTHS[info.dtype]
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides))
    if span * width == len(target) and _in_order(tensor):
        read_at(place.start + tensor.offset * width, memoryview(target))
        return target
    import numpy as np

    stored = bytearray(span * width)
    read_at(place.start + tensor.offset * width, memoryview(stored))
    numbers = np.frombuffer(stored, f"u{width}")
    steps = tuple(step * width for step in tensor.strides)
    return bytearray(np.lib.stride_tricks.as_strided(numbers, tensor.shape, steps).tobytes())


def _in_order(tensor: StoredTensor) -> bool:
    step = 1
    for side, stride in zip(reversed(tensor.shape), reversed(tensor.strides)):
        if side != 1 and stride != step:
            return False
        step *= side
    return True


def _check_start(path: Path, file: BinaryIO, size: int) -> None:
    head = read_exactly(file, min(size, 512))
    if not head:
        raise FileError("{file} is empty (0 bytes); download it again.", path.name)
    what = describe_bytes(head, size)
    if what is None and head[8:9] == b"{":
        file.seek(0)
        header_bytes(file, size, path)  # A damaged one is reported as such.
        raise FileError(
            "{file} is a safetensors file with the wrong name; rename it to .safetensors.", path.name
        )
    if what is not None and not what.endswith(RENAME):
        raise FileError("{file} {what}", path.name, what)
    if what is None:
        raise FileError(
            "{file} is not a PyTorch file, or its start is damaged; download it again.", path.name
        )
    if head.startswith(b"PK"):
        file.seek(0)
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise FileError(
                "{file} is cut off or damaged ({error}); download it again.", path.name, error
            ) from error
        # torch stores without compression, so a small file cannot become a huge one.
        compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if compressed or sum(entry.file_size for entry in entries) > size:
            raise FileError("{file} is a compressed zip archive, not a file that PyTorch wrote.", path.name)


def _unwrap(loaded: Any, path: Path) -> Mapping[Any, Any]:
    """The dictionary that holds the tensors."""
    for _ in range(DEEPEST):
        if not isinstance(loaded, dict):
            break
        inside = [loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), dict)]
        if len(inside) != 1 or any(isinstance(value, StoredTensor) for value in loaded.values()):
            return loaded
        loaded = inside[0]
    else:
        raise Excessive
    is_list = isinstance(loaded, (list, tuple)) and bool(loaded)
    if is_list and all(isinstance(value, StoredTensor) for value in loaded):
        return _numbered(loaded, path)
    kind = {StoredTensor: "Tensor", Name: "class"}.get(type(loaded), type(loaded).__name__)
    raise UnsupportedError(
        "{file} holds a {kind}, not a dictionary of tensors; it is no LoRA.", path.name, kind
    )


def _numbered(pairs: list[Any] | tuple[Any, ...], path: Path) -> dict[str, Any]:
    """Names for the bare list up, down, up, down ... of the first LoRA tool (cloneofsimo/lora).

    They are the names that its own safetensors files have.
    """
    if len(pairs) % 2:
        raise FileError(
            "{file} holds a list of tensors ({count}) that cannot be paired as up and down.",
            path.name,
            len(pairs),
        )
    component = "text_encoder" if path.stem.endswith(".text_encoder") else "unet"
    return {f"{component}:{i // 2}:{'down' if i % 2 else 'up'}": value for i, value in enumerate(pairs)}


def _flatten(loaded: Any) -> Iterator[tuple[str, Any]]:
    """Nested dictionaries and lists as dotted names, as they occur in embeddings and hypernetworks."""
    waiting = [("", loaded, 0)]
    seen = 0
    while waiting:
        name, value, depth = waiting.pop()
        if depth > DEEPEST or len(name) > LONGEST_NAME:
            raise Excessive
        if not isinstance(value, (dict, list, tuple)):
            yield name, value
            continue
        seen += len(value)
        if seen > INSTRUCTIONS:
            raise Excessive
        items = value.items() if isinstance(value, dict) else enumerate(value)
        found = [(f"{name}.{key}" if name else str(key), item, depth + 1) for key, item in items]
        waiting += reversed(found)


def torch_dtypes() -> dict[Any, str]:
    """torch's dtypes to the names that safetensors gives them, as far as this torch has them."""
    import torch

    names = {
        "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
        "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
        "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
        "uint16": "U16", "uint32": "U32", "uint64": "U64",
    }  # fmt: skip
    return {getattr(torch, name): dtype for name, dtype in names.items() if hasattr(torch, name)}
