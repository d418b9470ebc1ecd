"""DoRA: a low-rank change whose result is brought to a learned length per channel."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch

from ..delta import Dense
from ..errors import IncompatibleError, UnsupportedError
from .groups import MAGNITUDES, identify
from .kinds import AdapterKind, Layer, LayerFacts, Shape, Shapes, plain_kernel, register
from .loha import LOHA, LOHA_TUCKER
from .lokr import LOKR
from .lora import LORA, TUCKER
from .scaling import dense_product, plain_delta, wide

INNER = (LORA, TUCKER, LOHA, LOHA_TUCKER, LOKR)
HOSTS_DIFFER = (
    "DoRA is merged as its trainers compute it. Some programs compute it in another way, so the file on its "
    "own may look different there."
)


def axis(shape: Shape, out: int, in_: int, slot: str) -> Literal["out", "in"] | None:
    """The channels that a stored magnitude belongs to, or None if it fits neither.

    ``dora_scale`` shows it by its shape: (out, 1, ...) or (1, in, ...). A bare
    vector, and PEFT's (1, out, 1, 1) for convolutions, are per output. For a
    square convolution (1, n, 1, 1) is read per input, as LyCORIS and OneTrainer
    write it; the slot ``magnitude`` is for formats that are always per output.
    """
    count = math.prod(shape)
    if slot == "magnitude":
        return "out" if count == out else None
    if len(shape) > 1 and shape[1] == count and count > 1:
        return "in" if count == in_ else ("out" if count == out else None)
    if count == out:
        return "out"
    return "in" if count == in_ else None


def _inner(slots: frozenset[str], where: str) -> AdapterKind:
    kind = identify(slots - MAGNITUDES, where).kind
    if kind is None or kind not in INNER:
        name = "nothing" if kind is None else kind.label
        raise UnsupportedError("{where}: a DoRA magnitude on {kind} has no known meaning.", where, name)
    return kind


def _magnitude(slots: frozenset[str]) -> str:
    return next(iter(slots & MAGNITUDES))


def _describe(shapes: Shapes, where: str, kernel: Shape | None) -> LayerFacts:
    inner = _inner(frozenset(shapes), where)
    slot = _magnitude(frozenset(shapes))
    facts = inner.describe({name: s for name, s in shapes.items() if name != slot}, where, kernel)
    assert facts.out is not None
    assert facts.in_ is not None
    if axis(shapes[slot], facts.out, facts.in_, slot) is None:
        raise IncompatibleError(
            "{where}: {slot} has the shape {shape}, which fits neither the {outputs} outputs nor the "
            "{inputs} inputs.",
            where,
            slot,
            tuple(shapes[slot]),
            facts.out,
            facts.in_,
        )
    return replace(facts, kind="dora", rank=None, needs_base=True, notes=(*facts.notes, HOSTS_DIFFER))


def _build(layer: Layer) -> Dense:
    """``g * (W + delta) - W`` with ``g = magnitude / |W + delta|`` along the other axes.

    Written as ``(g - 1) W + g delta``, which does not lose a small change in
    the size of W.
    """
    assert layer.base is not None
    slot = _magnitude(frozenset(layer.slots))
    inner = _inner(frozenset(layer.slots), layer.where)
    rest = {name: t for name, t in layer.slots.items() if name != slot}
    low = plain_delta(inner, replace(layer, slots=rest))
    assert low is not None
    base, kernel = wide(layer.base), plain_kernel(tuple(layer.base.shape[2:]))
    delta = low.weight if isinstance(low, Dense) else dense_product(low)
    shape = (base.shape[0], base.shape[1], -1)
    base, delta = base.reshape(shape), delta.reshape(shape).to(base.dtype)
    side = axis(tuple(layer.slots[slot].shape), base.shape[0], base.shape[1], slot)
    others = (1, 2) if side == "out" else (0, 2)
    length = (base + delta).square_().sum(others, keepdim=True, dtype=torch.float64).sqrt_()
    gain = layer.slots[slot].double().reshape(length.shape) / length.clamp_min(torch.finfo(torch.float32).eps)
    weight = (delta * gain.to(base.dtype)).addcmul_(base, (gain - 1).to(base.dtype))
    return Dense(weight.flatten(1), kernel)


DORA = register(
    AdapterKind(
        name="dora",
        label="DoRA",
        forms=tuple(
            frozenset({slot}) | form for slot in sorted(MAGNITUDES) for kind in INNER for form in kind.forms
        ),
        optional=frozenset().union(*(kind.optional for kind in INNER)),
        needs_base=True,
        exact_low_rank=False,
        keys="`dora_scale` (`magnitude`, `lora_magnitude_vector`) on LoRA, LoHa, LoKr",
        does="The rescaled weight minus the base weight; full rank, cut to the rank asked for.",
        source="Liu et al. 2024, https://arxiv.org/abs/2402.09353",
        describe=_describe,
        build=_build,
        scales_itself=True,
    )
)
