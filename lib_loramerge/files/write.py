"""Writing a LoRA so that it appears whole or not at all.

One tensor at a time, in the order of the safetensors library, with a header of our own
making whose keys are sorted: the bytes depend on the tensors and the metadata alone.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_loramerge.errors import OutputError
from lib_loramerge.files.decode import tensor_bytes
from lib_loramerge.files.hashes import hashing
from lib_loramerge.files.header import DTYPE_BITS
from lib_loramerge.files.pickled import torch_dtypes
from lib_loramerge.files.place import check_space, check_target, output, to_disk

if TYPE_CHECKING:
    from torch import Tensor

    from lib_loramerge.files.read import LoraFile

DTYPE_ORDER = {dtype: place for place, dtype in enumerate(DTYPE_BITS)}
"""Tensors are stored by dtype, the last of these first, then by name, as safetensors does."""

LARGEST = {
    "F64": (8, 0x7FEF_FFFF_FFFF_FFFF), "F32": (4, 0x7F7F_FFFF), "F16": (2, 0x7BFF), "BF16": (2, 0x7F7F),
    "F8_E4M3": (1, 0x7E), "F8_E5M2": (1, 0x7B),
}  # fmt: skip
"""dtype to its width in bytes and the bits of its largest finite number."""


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
    stop: Callable[[], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    before_rename: Callable[[], None] | None = None,
) -> Written:
    """Write a safetensors file; the two ``sshs_`` hashes are added to its metadata.

    Args:
        path: Where to, as :func:`~lib_loramerge.files.check_target` accepted it before the work.
        tensors: Key to tensor of any shape, on any device, in the dtype to be stored. Each
            is taken from the mapping twice: for its shape, and to be written.
        metadata: Texts for the header.
        overwrite: Replace an existing file. Without it one that appears while this one
            is written is kept as well.
        stop: Called before each tensor, and often while the disk is waited for; what it raises stops the
            writing, and nothing is left.
        progress: Called before each tensor with how many are written, and how many there are.
        before_rename: Called when all is on disk but nothing has the name yet; what it
            raises stops the writing, and nothing is left.

    Raises:
        OutputError: If it cannot be written there, the disk is full, the name is taken, or
            a tensor holds NaN or infinity.
    """
    path, names = Path(path), torch_dtypes()
    entries = _plan({key: (names[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()})

    def data(entry: _Entry) -> memoryview:
        return _bytes_of(tensors[entry.key], entry, path)

    return _write(path, entries, data, metadata, overwrite, stop, progress, before_rename)


def write_again(
    path: str | os.PathLike[str],
    source: LoraFile,
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
    stop: Callable[[], None] | None = None,
) -> Written:
    """Write the tensors of another file, byte for byte, under other metadata.

    Args:
        path: As for :func:`write_file`, like ``metadata``, ``overwrite`` and ``stop``.
        source: An open safetensors file that was written here before.

    Raises:
        OutputError: As :func:`write_file`.
        FileError: If the source cannot be read any more.
    """
    check_target(path, overwrite)
    entries = _plan({key: (info.dtype, info.shape) for key, info in source.tensors.items()})

    def data(entry: _Entry) -> memoryview:
        return memoryview(source.data_bytes(entry.key))

    return _write(Path(path), entries, data, metadata, overwrite, stop, None, stop)


def _write(
    path: Path,
    entries: list[_Entry],
    data_of: Callable[[_Entry], memoryview],
    metadata: Mapping[str, str],
    overwrite: bool,
    stop: Callable[[], None] | None,
    progress: Callable[[int, int], None] | None,
    before_rename: Callable[[], None] | None,
) -> Written:
    """Header, data in the order of ``entries``, then the header again with the hashes."""
    total = entries[-1].end if entries else 0
    texts = {key: _utf8(value) for key, value in metadata.items()}
    head = header_json(entries, {**texts, "sshs_legacy_hash": "0" * 8, "sshs_model_hash": "0" * 64})
    check_space(path.parent, len(head) + total)
    with output(path, overwrite) as file, hashing(_legacy_head(entries, texts)) as hashes:
        file.write(head)
        for done, entry in enumerate(entries):
            if stop is not None:
                stop()
            if progress is not None:
                progress(done, len(entries))
            data = data_of(entry)
            hashes.add(data)
            file.write(data)
        model_hash, legacy_hash = hashes.results()
        file.seek(0)
        texts |= {"sshs_legacy_hash": legacy_hash, "sshs_model_hash": model_hash}
        file.write(header_json(entries, texts))
        file.flush()
        to_disk(file.fileno(), stop)
        if before_rename is not None:
            before_rename()
    return Written(path, len(head) + total, model_hash, legacy_hash)


def _plan(kinds: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[_Entry]:
    """Every tensor's place in the data part, in the canonical order, from its dtype and shape."""
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
        place = (entry.start, entry.end)
        listed[entry.key] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": place}
    raw = json.dumps(listed, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _bytes_of(tensor: Tensor, entry: _Entry, path: Path) -> memoryview:
    """The bytes to be stored, all finite; no copy if the tensor is contiguous and on the CPU."""
    data = tensor_bytes(tensor.detach().cpu().contiguous())
    if not all_finite(data, entry.dtype):
        raise OutputError(
            "{file} was not written: tensor {key} holds values that are NaN or infinite in {dtype}; use a "
            "smaller strength or a wider dtype (bfloat16 or float32).",
            path.name,
            repr(entry.key),
            entry.dtype,
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


def _legacy_head(entries: list[_Entry], metadata: Mapping[str, str]) -> bytes:
    """The header of the file that the legacy hash is defined on: only ``ss_`` texts in it.

    Source:
        kohya-ss/sd-scripts, ``library/train_util.py``, ``precalculate_safetensors_hashes``.
    """
    return header_json(entries, {key: value for key, value in metadata.items() if key.startswith("ss_")})
