"""Rounding to the dtypes of checkpoints: to the nearest number, or up and down by chance, without bias.

Nearest rounding into float8 loses a change that is smaller than half the distance of two numbers: of a LoRA
that is 1 % of the weights, 3 % arrive. Rounded by chance, each number is right on average, and all of it
arrives.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..files.decode import FLOATS, float8_table

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A float dtype: mantissa's bits, exponent's bias, and the code of the largest finite number."""

    mantissa: int
    bias: int
    largest: int


FORMATS = {
    "F16": Format(10, 15, 0x7BFF),
    "BF16": Format(7, 127, 0x7F7F),
    "F8_E4M3": Format(3, 7, 0x7E),
    "F8_E5M2": Format(2, 15, 0x7B),
}
FLOAT8_LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}
ITEM = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
"""dtypes that are baked into, and their bytes a number."""


_LARGEST = {
    "F64": 0x7FEFFFFFFFFFFFFF,
    "F32": 0x7F7FFFFF,
    **{name: form.largest for name, form in FORMATS.items()},
}


def all_finite(data: memoryview, dtype: str) -> bool:
    """Whether no stored number is NaN or infinity; dtypes of no floats have none.

    Read as whole numbers, those two are beyond the largest number, with a sign and without: two passes at
    the speed of memory.
    """
    import numpy as np

    most = _LARGEST.get(dtype)
    if most is None or not data:
        return True
    signed, unsigned = (np.frombuffer(data, f"<{kind}{ITEM[dtype]}").max() for kind in "iu")
    return bool(signed <= most and unsigned <= most | 1 << 8 * ITEM[dtype] - 1)


def encode(values: Tensor, dtype: str, key: str | None = None, seed: int = 0, row: int = 0) -> Tensor:
    """Numbers as they are stored.

    Args:
        values: Float32, or float64 for F32 and F64; finite.
        dtype: As safetensors spells it, of ``ITEM``.
        key: Rounds by chance; with ``seed`` and ``row`` it tells the random numbers, so that the result does
            not depend on threads. None rounds to the nearest number, ties to even.

    Returns:
        The shape of ``values``, in torch's dtype; uint8 for float8. Beyond the largest number float8 holds
        the largest, the others infinity.
    """
    import torch

    if dtype in FLOATS and (key is None or dtype not in FORMATS):
        return values.to(getattr(torch, FLOATS[dtype]))
    form = FORMATS[dtype]
    shift = 23 - form.mantissa
    bits = values.contiguous().view(torch.int32)
    size = bits & 0x7FFFFFFF
    # Below the least normal number the steps no longer shrink: moved up by that number they are the same.
    least = (128 - form.bias) << 23
    small = size < least
    moved = (values.abs() + 2.0 ** (1 - form.bias)).view(torch.int32)
    size = torch.where(small, moved, size)
    if key is None:
        size += (1 << (shift - 1)) - 1 + ((size >> shift) & 1)
    else:
        size += _noise(values.numel(), shift, key, seed, row).view(values.shape)
    codes = (size >> shift) - ((127 - form.bias) << form.mantissa) - (small.to(torch.int32) << form.mantissa)
    codes.clamp_(max=form.largest)
    if dtype in FLOAT8_LARGEST:
        return (codes | ((bits >> 31) & 0x80)).to(torch.uint8)
    codes |= (bits >> 31) & -0x8000  # The sign of 16 bits, where int16 has it.
    return codes.to(torch.int16).view(getattr(torch, FLOATS[dtype]))


def decode_codes(codes: Tensor, dtype: str) -> Tensor:
    """What :func:`encode` gave, as float32; float64 stays."""
    import torch

    if dtype in FLOAT8_LARGEST:
        table = torch.from_numpy(float8_table(dtype))
        return table[codes.to(torch.int64)] if codes.numel() < 4096 else table.take(codes.long())
    return codes if dtype in ("F32", "F64") else codes.to(torch.float32)


def _noise(count: int, shift: int, key: str, seed: int, row: int) -> Tensor:
    """(count,) int32, even over the bits that are cut off; 16 bits of chance are enough."""
    import numpy as np
    import torch

    digest = hashlib.sha256(f"{seed}\0{key}\0{row}".encode("utf-8", "replace")).digest()
    source = np.random.SFC64(np.frombuffer(digest, "<u4").tolist())
    words = source.random_raw((count + 3) // 4).astype("<u8", copy=False).view("<u2")[:count]
    noise = torch.from_numpy(words.astype(np.int32))
    return noise << (shift - 16) if shift >= 16 else noise >> (16 - shift)
