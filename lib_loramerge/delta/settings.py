"""torch's process-wide settings, which the host has chosen for its pictures, as our arithmetic needs them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_ROUNDING = ("tf32", "bf16")


class _Held:
    """Settings that are changed while somebody is inside, and as they were once the last one is out.

    Args:
        take: Changes them, and returns what changes them back.
    """

    def __init__(self, take: Callable[[], Callable[[], None]]) -> None:
        self._take = take
        self._lock = threading.Lock()
        self._inside = 0
        self._restore: Callable[[], object] = bool

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._restore = self._take()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._restore()


def _take_cpu() -> Callable[[], None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    restore = _take_full_precision() if _cpu_rounds() else None

    def back() -> None:
        torch.set_num_threads(threads)
        if restore is not None:
            restore()

    return back


def _cpu_rounds() -> bool:
    """Whether the CPU may round float32 numbers to multiply them; graphics cards are left alone otherwise."""
    own: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if hasattr(own, "fp32_precision"):
        return own.fp32_precision in _ROUNDING
    return torch.get_float32_matmul_precision() == "medium"


def _take_full_precision() -> Callable[[], None]:
    # From torch 2.9 each backend has a setting of its own beside the old one for all of them, and the old one
    # cannot be read where they differ.
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    own = [(part, part.fp32_precision) for part in backends if hasattr(part, "fp32_precision")]
    try:
        shared = torch.get_float32_matmul_precision()
    except RuntimeError:
        shared = None
    if shared is not None:
        torch.set_float32_matmul_precision("highest")
    else:
        for part, _ in own:
            part.fp32_precision = "ieee"

    def back() -> None:
        if shared is not None:
            torch.set_float32_matmul_precision(shared)
        for part, before in own:
            if part.fp32_precision != before:
                part.fp32_precision = before

    return back


own_settings = _Held(_take_cpu)
"""Context for work on the CPU: one thread per operation, and float32 products that are not rounded."""

full_precision = _Held(_take_full_precision)
"""Context for work on an accelerator: float32 products without TF32."""
