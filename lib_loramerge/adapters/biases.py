"""What an adapter adds to the bias of its layer."""

from __future__ import annotations

import math

from torch import Tensor

from ..errors import IncompatibleError
from .kinds import AdapterKind, Layer, LayerFacts, Shapes
from .scaling import number, read_scale, wide

# up_bias and down_bias belong to a LoRA's own two layers and share its scale; the rest is stored ready.
_READY = ("diff_b", "b_norm")
_SLOTS = (*_READY, "up_bias", "down_bias")


def has_bias(shapes: Shapes) -> bool:
    """Whether any slot changes the bias."""
    return any(slot in shapes for slot in _SLOTS)


def check_biases(shapes: Shapes, facts: LayerFacts, where: str) -> None:
    """Raise IncompatibleError when a bias does not have one number per channel."""
    for slot in _SLOTS:
        if slot not in shapes:
            continue
        size = math.prod(shapes[slot])
        wanted = shapes["down"][0] if slot == "down_bias" else facts.out
        if wanted is not None and size != wanted:
            raise IncompatibleError(
                "{where}: {slot} has {size} numbers where {wanted} are needed.", where, slot, size, wanted
            )


def bias_delta(kind: AdapterKind, layer: Layer) -> Tensor | None:
    """The change of the bias, (out,), or None.

    A LoRA with biases of its own computes ``s (up (down x + b_down) + b_up)``,
    whose constant part is ``s (up b_down + b_up)``, for convolutions too: their
    up is 1 x 1.
    """
    slots = layer.slots
    total: Tensor | None = None
    for slot in _READY:
        if slot in slots:
            total = _plus(total, wide(slots[slot]).reshape(-1))
    own: Tensor | None = None
    if "up_bias" in slots:
        own = wide(slots["up_bias"]).reshape(-1)
    if "down_bias" in slots:
        up = wide(slots["up"])
        down_bias = wide(slots["down_bias"]).reshape(-1)
        if "mid" in slots:
            raise IncompatibleError("{where}: down_bias has no exact form in a Tucker layer.", layer.where)
        own = _plus(own, (up.reshape(up.shape[0], -1).double() @ down_bias.double()).to(up.dtype))
    if own is not None:
        scale = read_scale(kind, slots, layer.where).value
        if layer.fold_scalar and "scalar" in slots:
            scale *= number(slots["scalar"], "scalar", layer.where)
        total = _plus(total, own * scale)
    return total


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part.to(total.dtype)
