"""What merges of one run need again: layers as they were read, and what no weight changes in their sums."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .types import Delta, Dense, LayerDelta, LowRank, named

ROOM = 1 << 30  # Bytes: two LoRAs of rank 32 for SDXL take half of it.
_NARROW = (torch.float16, torch.bfloat16)

_Value = TypeVar("_Value")


class Cache:
    """Things by key, up to so many bytes. Safe to use from several threads.

    Nothing is dropped: every merge of a run asks in the same order, so what made room for something new would
    be what is asked for next. What finds no room is computed again.
    """

    def __init__(self, room: int = ROOM) -> None:
        self._left = room
        self._items: dict[Hashable, Any] = {}
        self._lock = threading.Lock()

    def given(self, key: Hashable, make: Callable[[], _Value], size: Callable[[_Value], int]) -> _Value:
        """What is kept under a key, or else what ``make`` gives, which is then kept.

        Args:
            key: Equal keys must stand for equal numbers.
            size: Its bytes.
        """
        found: _Value | None = self._items.get(key)
        if found is not None:
            return found
        made = make()
        taken = size(made)
        with self._lock:
            if key not in self._items and taken <= self._left:
                self._items[key] = made
                self._left -= taken
        return made

    def layer(self, key: Hashable, read: Callable[[], LayerDelta]) -> LayerDelta:
        """A layer as ``read`` gives it; its factors carry the key as their name, see :class:`LowRank`.

        Numbers that came from a 16-bit file are kept in 16 bits, which is exact.
        """
        found = self.given(key, lambda: _changed(read(), _narrow), _bytes)
        wide = _changed(found, _wide)
        return replace(wide, weight=named(wide.weight, key)) if isinstance(wide.weight, LowRank) else wide


def size_of(*tensors: Tensor | None) -> int:
    """Bytes of tensors."""
    return sum(one.numel() * one.element_size() for one in tensors if one is not None)


def _changed(delta: LayerDelta, change: Callable[[Tensor], Tensor]) -> LayerDelta:
    weight: Delta | None = delta.weight
    if isinstance(weight, LowRank) and weight.structure is None:
        weight = replace(weight, up=change(weight.up), down=change(weight.down))
    elif isinstance(weight, Dense):
        weight = replace(weight, weight=change(weight.weight))
    return replace(delta, weight=weight)


def _narrow(tensor: Tensor) -> Tensor:
    """In 16 bits where that changes no number, nor their order in memory, on which last digits depend."""
    if tensor.dtype == torch.float32:
        for dtype in _NARROW:
            narrow = tensor.to(dtype)
            again = _wide(narrow)
            if again.stride() == tensor.stride() and torch.equal(again, tensor):
                return narrow
    return tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32) if tensor.dtype in _NARROW else tensor


def _bytes(delta: LayerDelta) -> int:
    weight = delta.weight
    if isinstance(weight, LowRank) and weight.structure is not None:
        return weight.structure.size + size_of(delta.bias)
    if isinstance(weight, LowRank):
        return size_of(weight.up, weight.down, weight.gains, delta.bias, *weight.spectra)
    return size_of(delta.bias, *(() if weight is None else (weight.weight, weight.start)))
