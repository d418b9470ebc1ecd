"""Means of LoRAs: the arithmetic one and those on the sphere.

All are sums of the deltas with other coefficients, and the coefficients follow from the strengths and the
inner products of the deltas. Those are known from the factors, so no delta is ever formed whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..delta import Delta, inner_products
from ..recipe import Param
from .linear import svd as weighted_sum
from .registry import LayerContext, merge_method

T = Param("t", 0.5, "Way from the first LoRA (0) to the second (1), at equal strengths.", 0.0, 1.0)

_OPPOSITE = -0.9995  # Cosine below which two deltas have no way between them on the sphere.
_MOST_STEPS = 200
_CONVERGED = 1e-12
_NO_DIRECTION = 1e-6  # A mean of unit vectors shorter than this points nowhere.


def shares(weights: Sequence[float], context: LayerContext | None = None) -> list[float]:
    """``w_i / sum_j |w_j|``: what each strength is of all of them; zeros when all are 0."""
    total = math.fsum(abs(weight) for weight in weights)
    return [weight / total if total else 0.0 for weight in weights]


def shares_at(weights: Sequence[float], context: LayerContext, *, t: float) -> list[float]:
    """:func:`shares` of two LoRAs, the first counting ``1 - t`` and the second ``t``.

    A layer that one of two has alone is whole on the way between them and not there at the other's end.
    """
    if len(weights) == 1 and context.inputs < 2:
        return shares(weights)
    counts = (1 - t, t)
    present = context.present or range(len(weights))
    return shares([weight * counts[index] for weight, index in zip(weights, present)])


@merge_method(
    "average",
    label="Average",
    summary="The mean of the LoRAs; strengths are their shares, so only their proportions count.",
    source="the usual weighted mean; Model soups (Wortsman et al. 2022), https://arxiv.org/abs/2203.05482",
    formula="sum_i w_i delta_i / sum_i |w_i|",
    avoid="for LoRAs of different subjects or styles: each is weakened to its share",
    vector_weights=shares,
)
def average(deltas: Sequence[Delta], weights: Sequence[float], context: LayerContext) -> Delta:
    """The weighted mean. A layer that only one LoRA has comes out whole.

    The sum of strengths is taken without their signs: it is then never 0, and a LoRA at a negative strength
    still points the other way.

    Args:
        deltas: Deltas of one layer, of one shape.
        weights: One strength per delta.
        context: Not used.

    Returns:
        A low-rank delta with the inputs' factors side by side, or a dense one where an input is dense.
    """
    return weighted_sum(deltas, shares(weights), context)


@merge_method(
    "slerp",
    label="Slerp",
    summary="Goes from one LoRA to another along the sphere, so that the middle does not get weaker.",
    params=(T,),
    ordered=True,
    maximum=2,
    source="Shoemake 1985, Animating rotation with quaternion curves, https://doi.org/10.1145/325334.325242",
    formula="sin((1-t) a)/sin(a) delta_1 + sin(t a)/sin(a) delta_2, a = angle between the deltas",
    avoid=(
        "where both LoRAs are needed in full: halfway between unrelated LoRAs each is at 0.71, more than in "
        "an average and less than in a sum"
    ),
    vector_weights=shares_at,
)
def slerp(
    deltas: Sequence[Delta], weights: Sequence[float], context: LayerContext, *, t: float = 0.5
) -> Delta:
    """Spherical interpolation of two deltas, each layer as one vector.

    Strengths are shares, as in :func:`average`: the way gone is ``t |w_2| / ((1 - t) |w_1| + t |w_2|)``,
    which is t at equal strengths. A negative strength turns its delta round. Between opposite deltas and
    next to a zero one there is no way on the sphere; the straight one is taken, as mergekit does. Where the
    deltas nearly agree mergekit takes it too, and here the formula itself is good enough.

    Args:
        deltas: One or two deltas of one layer; one alone is kept.
        weights: One strength per delta.
        context: Which of the two LoRAs a layer of only one is from: at the end of the other it is not there.
        t: Way gone from the first to the second.

    Returns:
        A low-rank delta with the inputs' factors side by side, or a dense one where an input is dense.
    """
    parts = shares_at(weights, context, t=t)
    if len(deltas) == 2:
        parts = _along_the_sphere(parts, inner_products(deltas))
    return weighted_sum(deltas, parts, context)


@merge_method(
    "karcher",
    label="Karcher mean",
    summary="The mean of any number of LoRAs on the sphere, so that the result does not get weaker.",
    source="Karcher 1977, Riemannian center of mass, https://doi.org/10.1002/cpa.3160300502",
    formula="(sum_i a_i |delta_i|) argmin_u sum_i a_i angle(u, delta_i)^2, a_i = |w_i| / sum_j |w_j|",
    avoid="where all LoRAs are needed in full, and for opposite LoRAs, which have no middle",
    vector_weights=shares,
)
def karcher(deltas: Sequence[Delta], weights: Sequence[float], context: LayerContext) -> Delta:
    """The Riemannian mean of the deltas' directions, as long as the deltas on average.

    Strengths are shares and a negative one turns its delta round. The mean lies in the span of the deltas,
    so the iteration runs on one coefficient per delta, to the end. Deltas that cancel in the mean of their
    directions have none; their average is given then.

    Args:
        deltas: Deltas of one layer, of one shape.
        weights: One strength per delta.
        context: Not used.

    Returns:
        A low-rank delta with the inputs' factors side by side, or a dense one where an input is dense.
    """
    parts = shares(weights)
    if len(deltas) > 1:
        parts = _mean_on_the_sphere(parts, inner_products(deltas))
    return weighted_sum(deltas, parts, context)


def _along_the_sphere(parts: Sequence[float], products: Tensor) -> list[float]:
    """Coefficients of two deltas, from their signed shares and their inner products."""
    size = math.sqrt(max(0.0, float(products[0, 0])) * max(0.0, float(products[1, 1])))
    turned = math.copysign(1.0, parts[0]) * math.copysign(1.0, parts[1])
    if size == 0.0:
        return list(parts)
    cosine = max(-1.0, min(1.0, turned * float(products[0, 1]) / size))
    # Half the angle from the chords: the arc cosine has few digits near 1.
    angle = 2 * math.atan2(math.sqrt(1 - cosine), math.sqrt(1 + cosine))
    if cosine < _OPPOSITE or angle == 0.0:
        return list(parts)
    return [math.copysign(math.sin(abs(part) * angle) / math.sin(angle), part) for part in parts]


def _mean_on_the_sphere(parts: Sequence[float], products: Tensor) -> list[float]:
    """Coefficients of the deltas in their Karcher mean, from signed shares and inner products."""
    signed = torch.tensor(parts, dtype=torch.float64)
    lengths = products.diagonal().clamp(min=0).sqrt()
    there = (lengths > 0) & (signed != 0)
    if not bool(there.any()):
        return list(parts)
    units = (signed.sign() / lengths)[there]  # the signed unit vector of a delta is this times the delta
    cosines = (products[there][:, there] * units[:, None] * units).clamp(-1, 1)
    share = signed[there].abs() / signed[there].abs().sum()
    mean = _direction(share, cosines)
    if mean is None:
        return list(parts)
    result = torch.zeros_like(signed)
    result[there] = float((signed.abs() * lengths).sum()) * mean * units
    return result.tolist()


def _direction(share: Tensor, cosines: Tensor) -> Tensor | None:
    """Coefficients (n,) of unit vectors in their Karcher mean, a unit vector; None when there is none."""

    def length(coefficients: Tensor) -> float:
        return math.sqrt(max(0.0, float(coefficients @ cosines @ coefficients)))

    if length(share) < _NO_DIRECTION:
        return None
    mean = share / length(share)
    for _ in range(_MOST_STEPS):
        towards = (cosines @ mean).clamp(-1, 1)
        angles = 2 * torch.atan2((1 - towards).sqrt(), (1 + towards).sqrt())
        pull = share / torch.sinc(angles / math.pi).clamp(min=_NO_DIRECTION)  # a_i angle / sin(angle)
        step = pull - (pull @ towards) * mean
        far = length(step)
        if far < _CONVERGED:
            break
        mean = math.cos(far) * mean + math.sin(far) / far * step
        mean = mean / length(mean)
    return mean
