"""``.pt`` and ``.ckpt`` files: tensors out of a pickle, without running what is in it."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

from lib_loramerge.errors import FileError, UnsupportedError
from lib_loramerge.files.header import Header, TensorInfo, header_bytes, read_exactly, reading
from lib_loramerge.files.recognise import RENAME, describe_bytes

if TYPE_CHECKING:
    from torch import Tensor

PICKLE_SUFFIXES = (".pt", ".ckpt")
WRAPPERS = ("state_dict", "module", "model", "lora", "params", "params_ema")
"""Names under which tools put the tensors when they save other things beside them."""


def load_pickle(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """Read a whole ``.pt`` or ``.ckpt``, refusing everything but tensors and plain values.

    The file is opened here and handed over open: Forge wraps ``torch.load`` and renames
    the path of any file that it fails on. For the same reason the function is taken from
    ``torch.serialization``, which hosts leave alone.

    Returns:
        The header, as a safetensors file of the same tensors would have it, and the
        tensors as stored, by key.

    Raises:
        FileError: If it is damaged, holds code, or is not a PyTorch file.
    """
    import torch

    with reading(path) as (file, status):
        _check_start(path, file, status.st_size)
        file.seek(0)
        try:
            loaded = torch.serialization.load(file, map_location=torch.device("cpu"), weights_only=True)
        except Exception as error:  # On damaged files torch raises nearly any class.
            raise FileError(f"{path.name} {_reason(error)}") from error
        size = status.st_size
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for key, value in _flatten(_unwrap(loaded, path), ""):
        if isinstance(value, torch.Tensor):
            tensors[key] = value.detach()
        elif isinstance(value, (int, float)):
            tensors[key] = torch.tensor(float(value))  # alpha, in files of some scripts.
        elif value is not None:
            metadata[key] = str(value)
    return _header(tensors, metadata, size, path), dict(sorted(tensors.items()))


def _check_start(path: Path, file: BinaryIO, size: int) -> None:
    head = read_exactly(file, min(size, 512))
    if not head:
        raise FileError(f"{path.name} is empty (0 bytes); download it again.")
    what = describe_bytes(head, size)
    if what is None and head[8:9] == b"{":
        file.seek(0)
        header_bytes(file, size, path)  # A damaged one is told as such.
        raise FileError(f"{path.name} is a safetensors file with the wrong name; rename it to .safetensors.")
    if what is not None and not what.endswith(RENAME):
        raise FileError(f"{path.name} {what}")
    if what is None:
        raise FileError(f"{path.name} is not a PyTorch file, or its start is damaged; download it again.")
    if head.startswith(b"PK"):
        file.seek(0)
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise FileError(f"{path.name} is cut off or damaged ({error}); download it again.") from error
        # torch stores without compression, so a small file cannot become a huge one.
        compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if compressed or sum(entry.file_size for entry in entries) > size:
            raise FileError(f"{path.name} is a compressed zip archive, not a file that PyTorch wrote.")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "nsupported" in text or "weights_only" in text or "Weights only" in text or "WeightsUnpickler" in text:
        return "holds more than tensors, perhaps harmful code, and was not opened; use a .safetensors file."
    return f"is damaged or not a PyTorch file ({text[:120]}); download it again."


def _unwrap(loaded: Any, path: Path) -> Mapping[Any, Any]:
    """The dictionary that holds the tensors."""
    import torch

    while isinstance(loaded, Mapping):
        inside = [loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), Mapping)]
        if len(inside) != 1 or any(isinstance(value, torch.Tensor) for value in loaded.values()):
            return loaded
        loaded = inside[0]
    is_list = isinstance(loaded, (list, tuple)) and bool(loaded)
    if is_list and all(isinstance(value, torch.Tensor) for value in loaded):
        return _numbered(loaded, path)
    raise UnsupportedError(
        f"{path.name} holds a {type(loaded).__name__}, not a dictionary of tensors; it is no LoRA."
    )


def _numbered(pairs: list[Any] | tuple[Any, ...], path: Path) -> Mapping[str, Any]:
    """Names for the bare list up, down, up, down ... of the first LoRA tool (cloneofsimo/lora).

    They are the names that its own safetensors files have.
    """
    if len(pairs) % 2:
        raise FileError(
            f"{path.name} holds a list of {len(pairs)} tensors, which do not pair up as up and down."
        )
    component = "text_encoder" if path.stem.endswith(".text_encoder") else "unet"
    return {f"{component}:{i // 2}:{'down' if i % 2 else 'up'}": value for i, value in enumerate(pairs)}


def _flatten(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Nested dictionaries and lists as dotted names, as they occur in embeddings and hypernetworks."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _flatten(item, f"{name}.{index}" if name else str(index))
    else:
        yield name, value


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], size: int, path: Path) -> Header:
    infos, start = {}, 0
    for key in sorted(tensors):
        dtype = torch_dtypes().get(tensors[key].dtype)
        if dtype is None or tensors[key].is_sparse or tensors[key].is_meta:
            raise UnsupportedError(
                f"{path.name}: tensor {key!r} is a {tensors[key].dtype}, which is not read."
            )
        end = start + tensors[key].numel() * tensors[key].element_size()
        infos[key] = TensorInfo(dtype, tuple(tensors[key].shape), start, end)
        start = end
    return Header(MappingProxyType(infos), MappingProxyType(dict(metadata)), 0, size)


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
