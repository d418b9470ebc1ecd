"""alpha, and whatever else multiplies a delta: applied here and only here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..delta import NEAR, Delta, Dense, Kronecker, LowRank, changed, largest
from ..errors import IncompatibleError
from .kinds import AdapterKind, Layer, Shapes, shapes_of

ALPHA_ZERO = "alpha is 0, so this layer changes nothing: the WebUIs apply the stored number."
SCALE_KEY = "`scale` replaces alpha / rank; not every program reads it."
SCALAR_IGNORED = "`scalar` is ignored, as every WebUI does; current LyCORIS has it folded into the factors."
SCALAR_FOLDED = "`scalar` was multiplied in, which no WebUI does."
ALPHA_UNUSED = "alpha is no scale in this kind and is ignored, as the WebUIs do."
RESIDUALS = {"bias", "bias_indices"}
BIASES = {"up_bias", "down_bias"}


@dataclass(frozen=True)
class Scale:
    """``numerator / denominator``, kept apart so that a stored alpha stays exact."""

    numerator: float = 1.0
    denominator: float = 1.0

    @property
    def value(self) -> float:
        return self.numerator / self.denominator


def scale_notes(shapes: Shapes) -> tuple[str, ...]:
    """What the report says of a layer's scale, from the slots present."""
    notes = {"scale": SCALE_KEY, "scalar": SCALAR_IGNORED}
    return tuple(note for slot, note in notes.items() if slot in shapes)


def read_scale(kind: AdapterKind, slots: Mapping[str, Tensor], where: str) -> Scale:
    """The scale of a layer by the hosts' rule.

    ``alpha / rank``; 1 without an alpha or where the kind has no rank; a stored
    ``scale`` instead of both.
    """
    if "scale" in slots:
        return Scale(number(slots["scale"], "scale", where))
    rank = kind.scale_rank(shapes_of(slots))
    if rank is None or "alpha" not in slots:
        return Scale()
    return Scale(number(slots["alpha"], "alpha", where), float(rank))


def number(tensor: Tensor, slot: str, where: str) -> float:
    """The value of a tensor that holds one number, 0-d or [1], of any dtype."""
    if tensor.numel() != 1:
        shape = tuple(tensor.shape)
        raise IncompatibleError(
            "{where}: {slot} has the shape {shape} where one number is needed.", where, slot, shape
        )
    value = float(tensor.reshape(-1)[0])
    if not math.isfinite(value):
        raise IncompatibleError(
            "{where}: {slot} is {value}, which is not a usable number.", where, slot, value
        )
    return value


def apply_scale(delta: Delta, scale: Scale) -> Delta:
    """``delta`` times ``scale``.

    A negative scale goes into the up factor and a scale of 0 empties it, so
    that the alpha of a low-rank delta is always positive: merge methods take
    its square root.
    """
    if isinstance(delta, Dense):
        return replace(delta, weight=delta.weight * scale.value)
    if scale.numerator == 0 or delta.alpha == 0:
        return replace(delta, up=torch.zeros_like(delta.up), alpha=float(delta.rank), spectra=())
    if delta.alpha == scale.denominator:
        alpha = abs(scale.numerator)
    else:
        alpha = abs(delta.alpha * scale.numerator / scale.denominator)
    if isinstance(delta.structure, Kronecker):
        structure = delta.structure.negated() if scale.value < 0 else delta.structure
        return changed(delta, structure=structure, alpha=alpha)
    return replace(delta, up=-delta.up if scale.value < 0 else delta.up, alpha=alpha)


def plain_delta(kind: AdapterKind, layer: Layer) -> Delta | None:
    """The delta of a layer with its scale.

    In this order: a residual is added to the product before the scale.
    """
    delta = kind.build(layer)
    if delta is None or kind.scales_itself:
        return delta
    residual = read_residual(layer)
    if residual is not None:
        delta = add_residual(delta, residual, layer)
    scale = read_scale(kind, layer.slots, layer.where)
    if layer.fold_scalar and "scalar" in layer.slots:
        factor = number(layer.slots["scalar"], "scalar", layer.where)
        delta = apply_scale(delta, Scale(factor))
    return apply_scale(delta, scale)


def near_one(kind: AdapterKind, slots: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], int]:
    """Factors far from 1 divided by powers of two, and the power of the product that was taken out.

    Only for kinds that multiply each of their slots once. Float32 factors of a plain LoRA are left as they
    are: float64, in which they are multiplied, has room for them.
    """
    if kind.needs_base or not kind.exact_low_rank or RESIDUALS & slots.keys():
        return slots, 0
    near, total = dict(slots), 0
    for slot in kind.slots & slots.keys() - BIASES:
        tensor = slots[slot]
        if kind.name == "lora" and tensor.dtype != torch.float64:
            continue
        size = largest(tensor)
        power = math.frexp(size)[1]
        if size == 0:
            return slots, 0  # and so is the product
        if abs(power) > NEAR:
            # In two steps: 2 to the whole power may be no number itself.
            near[slot] = tensor * 2.0 ** -(power // 2) * 2.0 ** -(power - power // 2)
            total += power
    return near, total


def read_residual(layer: Layer) -> Tensor | None:
    """LyCORIS's residual: what its extraction left out, dense or as coordinates."""
    slots = layer.slots
    if "bias" in slots:
        return slots["bias"]
    if "bias_indices" not in slots:
        return None
    indices, values = slots["bias_indices"].long(), slots["bias_values"].reshape(-1)
    size = [int(n) for n in slots["bias_size"].reshape(-1)]
    if min(size, default=0) < 1 or math.prod(size) != (layer.facts.out or 0) * (layer.facts.columns or 1):
        # Checked before any memory is taken; LyCORIS stores sizes as int16, which overflow.
        raise IncompatibleError(
            "{where}: bias_size {size} is not the size of this layer.", layer.where, tuple(size)
        )
    indices = indices.reshape(len(size), -1) if indices.dim() < 2 else indices
    if indices.shape != (len(size), values.numel()):
        raise IncompatibleError(
            "{where}: bias_indices {indices}, bias_values {values} and bias_size {size} do not fit each "
            "other.",
            layer.where,
            tuple(indices.shape),
            tuple(values.shape),
            tuple(size),
        )
    if values.numel() and (
        bool((indices < 0).any()) or bool((indices.amax(1).cpu() >= torch.tensor(size)).any())
    ):
        raise IncompatibleError(
            "{where}: bias_indices point outside the shape {size}.", layer.where, tuple(size)
        )
    dense = torch.zeros(size, dtype=wide(values).dtype, device=values.device)
    return dense.index_put_(tuple(indices), wide(values), accumulate=True)


def add_residual(delta: Delta, residual: Tensor, layer: Layer) -> Delta:
    """``delta + residual`` as a dense delta weight."""
    weight = delta.weight if isinstance(delta, Dense) else dense_product(delta)
    if residual.numel() != weight.numel():
        raise IncompatibleError(
            "{where}: the residual has {count} elements where the layer has {size}.",
            layer.where,
            residual.numel(),
            weight.numel(),
        )
    return Dense(weight + residual.reshape(weight.shape).to(weight.dtype), delta.kernel)


def dense_product(delta: LowRank) -> Tensor:
    """``alpha / rank * up @ down``, (out, in * kh * kw), in float32 or better."""
    up, down = wide(delta.up), wide(delta.down)
    dtype = torch.promote_types(up.dtype, down.dtype)
    return (up.to(dtype) @ down.to(dtype)) * (delta.alpha / delta.rank)


def wide(tensor: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
