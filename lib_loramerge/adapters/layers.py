"""From the slots of a layer to what it is and to its delta."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from torch import Tensor

from ..delta import Delta, LayerDelta, LowRank, times_two_to
from ..errors import IncompatibleError, LoraMergeError, UnsupportedError
from ..models import Measured
from .biases import bias_delta, check_biases, has_bias
from .groups import Group, identify
from .kinds import ADAPTERS, ORPHAN, AdapterKind, Layer, LayerFacts, Shape, Shapes, shapes_of
from .scaling import (
    ALPHA_ZERO,
    SCALAR_FOLDED,
    SCALAR_IGNORED,
    near_one,
    plain_delta,
    read_scale,
    scale_notes,
)

DYN_IGNORED = "dyn= is applied to plain LoRA layers only, as in the WebUIs; this kind keeps all its ranks."
# A file has hundreds of layers and a dozen shapes; what is wrong with one is not kept, as it names the layer.
_DESCRIBED: dict[tuple[object, ...], LayerFacts] = {}
_MOST_DESCRIBED = 4096
RESIDUAL = "A residual is added before the scale; not every program reads it."


def describe(slots: Mapping[str, Shape], *, where: str, kernel: Shape | None = None) -> LayerFacts:
    """What one layer of one file is, from the shapes in its header.

    Args:
        slots: Slot name to shape.
        where: File and layer, for messages.
        kernel: Kernel of the base model's layer if it is known to be a
            convolution; formats that store factors flat lack it.

    Raises:
        UnsupportedError: A kind that cannot be merged.
        IncompatibleError: Parts are missing or contradict each other.
    """
    key = tuple(slots.items()), kernel
    facts = _DESCRIBED.get(key)
    if facts is None:
        facts = _describe(identify(slots, where), slots, where, kernel)
        if len(_DESCRIBED) >= _MOST_DESCRIBED:
            _DESCRIBED.clear()
        _DESCRIBED[key] = facts
    return facts


@lru_cache(maxsize=4096)
def _widths(slots: tuple[tuple[str, Shape], ...]) -> tuple[int | None, int | None]:
    try:
        facts = describe(dict(slots), where="")
    except LoraMergeError:
        return None, None
    return facts.out, facts.in_


def measured(slots: Mapping[str, Shape]) -> Measured:
    """A layer's shape as its tensors show it, before the base model is known."""
    out, in_ = _widths(tuple(sorted(slots.items())))
    down = slots.get("down", ())
    return Measured(out, in_, len(down) == 4 if len(down) > 1 else None)


def build(
    slots: Mapping[str, Tensor],
    *,
    where: str,
    kernel: Shape | None = None,
    base: Tensor | None = None,
    dyn: int | None = None,
    fold_scalar: bool = False,
) -> LayerDelta:
    """The change of one layer at strength 1, as the WebUI computes it.

    Args:
        slots: Slot name to tensor, shaped as stored.
        where: File and layer, for messages.
        kernel: Kernel of the base model's layer if it is known.
        base: Base weight (out, in[, kh, kw]), for kinds that need it.
        dyn: Use the first ``dyn`` ranks only, at an unchanged scale.
        fold_scalar: Multiply by a stored ``scalar``, which the hosts ignore.

    Raises:
        UnsupportedError: A kind that cannot be merged, or that needs a base weight.
        IncompatibleError: Parts are missing or contradict each other or the base.
    """
    shapes = shapes_of(slots)
    group = identify(slots, where)
    if not kernel and base is not None:
        kernel = tuple(base.shape[2:])
    facts = _describe(group, shapes, where, kernel)
    if group.kind is None:
        return LayerDelta(None, None, facts.notes)
    kind = ADAPTERS[facts.kind]
    if facts.needs_base:
        _check_base(kind, facts, base, where)
    layer = Layer(slots, where, facts, base, dyn, fold_scalar)
    near, power = near_one(kind, slots)
    notes = facts.notes
    if fold_scalar:
        notes = tuple(SCALAR_FOLDED if note == SCALAR_IGNORED else note for note in notes)
    if "scale" not in slots and read_scale(group.kind, slots, where).numerator == 0:
        notes += (ALPHA_ZERO,)
    if dyn is not None and group.kind.name != "lora":
        notes += (DYN_IGNORED,)
    delta = plain_delta(kind, replace(layer, slots=near))
    if delta is not None:
        delta = _in_reach(times_two_to(delta, power), where)
    return LayerDelta(delta, bias_delta(group.kind, layer), notes)


def _in_reach(delta: Delta, where: str) -> Delta:
    """The delta, unless its scale is beyond float64."""
    if isinstance(delta, LowRank) and not math.isfinite(delta.alpha):
        raise IncompatibleError(
            "{where}: the product of its factors is too large for any type of number.", where
        )
    return delta


def _describe(group: Group, shapes: Shapes, where: str, kernel: Shape | None) -> LayerFacts:
    if group.kind is None:
        return LayerFacts(ORPHAN, None, None, notes=group.notes)
    for slot, shape in shapes.items():
        if math.prod(shape) == 0 and slot not in ("bias_indices", "bias_values"):
            raise IncompatibleError(
                "{where}: {slot} is empty, its shape is {shape}.", where, slot, tuple(shape)
            )
    kind = ADAPTERS["dora"] if group.magnitude else group.kind
    facts = kind.describe(shapes, where, kernel)
    notes = facts.notes + scale_notes(shapes)
    check_biases(shapes, facts, where)
    if "bias" in shapes and facts.columns and math.prod(shapes["bias"]) != (facts.out or 0) * facts.columns:
        raise IncompatibleError(
            "{where}: bias has the shape {shape}; only LyCORIS's residual of the whole weight ({outputs}, "
            "{inputs}) is known under this name.",
            where,
            tuple(shapes["bias"]),
            facts.out,
            facts.columns,
        )
    if "bias" in shapes or "bias_indices" in shapes:
        facts, notes = replace(facts, rank=None), (*notes, RESIDUAL)
    bias = has_bias(shapes)
    return replace(facts, bias=bias, notes=notes) if bias or notes else facts


def _check_base(kind: AdapterKind, facts: LayerFacts, base: Tensor | None, where: str) -> None:
    if base is None:
        raise UnsupportedError(
            "{where}: {kind} changes the base model's own weight and cannot be merged without it; name the "
            "model it was trained on with --base CHECKPOINT.",
            where,
            kind.label,
        )
    check_base_shape(facts, tuple(base.shape), where)


def check_base_shape(facts: LayerFacts, shape: Shape, where: str) -> None:
    """Raise IncompatibleError when a layer was made for another weight than the base model has.

    Args:
        facts: What ``describe`` found.
        shape: Of the base weight, (out, in[, kh, kw]).
        where: File and layer, for messages.
    """
    in_ = shape[1] if len(shape) > 1 else 0
    same = facts.out in (None, shape[0]) and facts.in_ in (None, in_)
    if same and facts.in_ is not None:
        same = math.prod(facts.kernel) == math.prod(shape[2:])
    if not same:
        expected = (facts.out, facts.in_, *facts.kernel)
        raise IncompatibleError(
            "{where}: this {kind} layer was made for a weight of {expected} (out, in, kernel), but the base "
            "checkpoint's is {shape}.",
            where,
            ADAPTERS[facts.kind].label,
            expected,
            shape,
        )
