"""Stored numbers to tensors that can be computed with.

float8 is decoded by a table of its 256 values, so that it needs no float8 in torch
(2.0 has none) and no arithmetic that the CPU lacks.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from lib_loramerge.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""dtypes that torch itself converts, by their names in torch."""

INTEGERS = {
    "I8": "i1", "U8": "u1", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4",
    "I64": "<i8", "U64": "<u8",
}  # fmt: skip

FLOAT8 = {
    # dtype: (exponent bits, exponent bias, has infinities, has a negative zero)
    "F8_E4M3": (4, 7, False, True),
    "F8_E5M2": (5, 15, True, True),
    "F8_E4M3FNUZ": (4, 8, False, False),
    "F8_E5M2FNUZ": (5, 16, False, False),
}

SCRATCH_BYTES = 4_000_000
_KEPT = threading.local()


def decode(
    dtype: str, shape: tuple[int, ...], fill: Callable[[memoryview], None], where: Callable[[], str]
) -> Tensor:
    """Read one tensor and convert it.

    Args:
        dtype: As safetensors spells it.
        shape: Of the tensor; any number of dimensions.
        fill: Writes the stored bytes into the memory it is given.
        where: File and tensor, for messages.

    Returns:
        The tensor on the CPU: float64 if stored so, float32 otherwise. It owns its memory.

    Raises:
        UnsupportedError: If the dtype holds no ordinary numbers.
    """
    import torch

    if dtype in ("F32", "F64"):
        result = torch.empty(shape, dtype=getattr(torch, FLOATS[dtype]))
        fill(tensor_bytes(result))
        return result
    if dtype in FLOATS:
        stored = _scratch(2 * math.prod(shape))
        fill(tensor_bytes(stored))
        return stored.view(getattr(torch, FLOATS[dtype])).view(shape).to(torch.float32)
    if dtype not in INTEGERS and dtype not in FLOAT8 and dtype != "BOOL":
        raise UnsupportedError(
            "{where} is stored as {dtype}, which is not read; convert the file to float16 first.",
            where(),
            dtype,
        )
    return torch.from_numpy(_decode_array(dtype, shape, fill))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes."""
    import torch

    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _scratch(size: int) -> Tensor:
    """(size,) uint8 to read into, kept for the next tensor of this thread.

    Fresh memory costs more than the conversion does: the system clears every page of it.
    """
    import torch

    if size > SCRATCH_BYTES:
        return torch.empty(size, dtype=torch.uint8)
    if not hasattr(_KEPT, "scratch"):
        _KEPT.scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8)
    return _KEPT.scratch[:size]


def _decode_array(dtype: str, shape: tuple[int, ...], fill: Callable[[memoryview], None]) -> Any:
    """float32 array of integers, truth values or float8 numbers."""
    import numpy as np

    stored: Any = np.empty(shape, dtype=INTEGERS.get(dtype, "u1"))
    fill(memoryview(stored.reshape(-1).view(np.uint8)))
    if dtype in FLOAT8:
        return np.asarray(float8_table(dtype)[stored])
    if dtype == "BOOL":
        stored = stored != 0
    return np.asarray(stored.astype(np.float32))


@cache
def float8_table(dtype: str) -> Any:
    """(256,) float32: the value of each byte of a float8 dtype.

    Source:
        Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433, table 1, and for
        the FNUZ kinds https://arxiv.org/abs/2206.02915.
    """
    import numpy as np

    exponent_bits, bias, infinities, negative_zero = FLOAT8[dtype]
    mantissa_bits = 7 - exponent_bits
    byte = np.arange(256)
    exponent, mantissa = (byte >> mantissa_bits) & (2**exponent_bits - 1), byte & (2**mantissa_bits - 1)
    normal = exponent > 0
    size = (normal + mantissa / 2**mantissa_bits) * 2.0 ** (np.maximum(exponent, 1) - bias)
    value = np.where(byte < 128, size, -size)
    if infinities:
        value[exponent == 2**exponent_bits - 1] = np.nan
        value[[0x7C, 0xFC]] = np.inf, -np.inf
    elif negative_zero:
        value[[0x7F, 0xFF]] = np.nan
    else:
        value[0x80] = np.nan
    return value.astype(np.float32)
