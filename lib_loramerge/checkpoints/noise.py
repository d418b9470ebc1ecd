"""What of a difference is training and what is rounding: two files of one model differ by their rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from .numbers import FORMATS

ROUNDING_ONLY = 1.1
"""``|D|^2`` over the rounding's variance up to which a difference without a signal is rounding."""

CLEAR = 100.0
"""The same from which on nobody asks."""

_MARGIN = 1.2
_BLOCK, _STEPS = 8, 6
_CHUNK = 1 << 20


def variance(values: Tensor, dtype: str, scale: float) -> Tensor:
    """Variance of the rounding of each stored number: a twelfth of the square of its last place's unit."""
    form = FORMATS.get(dtype)
    mantissa, least = (form.mantissa, 1 - form.bias) if form is not None else (23, -126)
    bits = (values.float() / scale).contiguous().view(torch.int32) & 0x7F800000
    unit = bits.view(torch.float32).clamp(min=2.0**least) * (2.0**-mantissa * scale)
    return unit.square_().mul_(1 / 12)


def edge(variances: Tensor, seed: int) -> float:
    """A singular value that rounding alone does not reach: a margin above that of one such matrix.

    Args:
        variances: (out, in) of each number; overwritten, as a whole layer's are large.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = variances.sqrt_()
    step = max(1, _CHUNK // max(1, noise.shape[1]))
    for first in range(0, noise.shape[0], step):
        rows = noise[first : first + step]
        rows *= torch.randn(rows.shape, generator=generator)
    block = torch.randn(noise.shape[1], min(_BLOCK, *noise.shape), generator=generator)
    for _ in range(_STEPS):
        block = torch.linalg.qr(noise.mT @ (noise @ block)).Q
    return _MARGIN * float(torch.linalg.svdvals((noise @ block).double())[0])


def coarser(first: str, second: str) -> str:
    """Of two dtypes the one that holds fewer digits."""
    digits = {"F64": 52, "F32": 23, **{name: form.mantissa for name, form in FORMATS.items()}}
    return min(first, second, key=lambda name: digits[name])
