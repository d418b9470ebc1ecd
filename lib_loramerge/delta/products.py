"""Products of float32 matrices on the CPU.

torch takes MKL for them, which keeps to AVX2 on processors of other makers than Intel. oneDNN, which torch
has too, takes what the processor has: on AMD's with AVX-512 it is twice as fast.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_LEAST = 1 << 18  # Multiplications below which to call it takes longer than it saves.
_ROWS = 8  # The same of rows, columns and the width in between.


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, (m, k) and (k, n) of one dtype and device."""
    sizes = (*left.shape, right.shape[1])
    fast = left.dtype is torch.float32 and left.device.type == "cpu" and min(sizes) >= _ROWS
    if fast and sizes[0] * sizes[1] * sizes[2] >= _LEAST:
        linear = _linear()
        if linear is not None:
            return linear(left, right.mT)
    return left @ right


@cache
def _linear() -> Callable[[Tensor, Tensor], Tensor] | None:
    """oneDNN's ``left @ right.mT``; None where this torch lacks it."""
    try:
        operator: Any = torch.ops.mkldnn._linear_pointwise
        left, right = (torch.arange(count * 8.0).view(count, 8) for count in (16, 24))

        def linear(left: Tensor, right: Tensor) -> Tensor:
            result: Tensor = operator(left, right, None, "none", [], "")
            return result

        # Numbers that float32 holds exactly: an operator that takes its arguments otherwise is seen.
        return linear if torch.equal(linear(left, right), left @ right.mT) else None
    except (AttributeError, RuntimeError, TypeError):
        return None
