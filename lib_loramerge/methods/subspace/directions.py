"""Methods that turn or weigh whole singular directions: tsv, iso, np, ssr."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...delta import Delta, LowRank, Merged, decompose, grams
from ...recipe import Param
from ..registry import LayerContext, merge_method
from .joint import (
    RELATIVE,
    JointSpace,
    exact_sum,
    falling_eigh,
    join,
    nothing,
    numerical_rank,
    with_values,
)

BETA = Param("beta", 0.3, "How far singular values move towards their mean; 0 is the plain sum.", 0.0, 1.0)
NORM = Param(
    "norm",
    "mean",
    "What singular values move towards: their mean, or the value that keeps the layer's norm (fro).",
    choices=("mean", "fro"),
)
MU = Param(
    "mu",
    1.0,
    "How far later LoRAs give way where an earlier one reads; 0 is the plain sum, 1 halves the overlap.",
    0.0,
    1e6,
)
ENERGY = Param(
    "energy", 1.0, "Share of each earlier LoRA's energy whose input directions are protected.", 0.0, 1.0
)
RIDGE = Param(
    "ridge", 0.01, "Holds back directions that the LoRAs nearly share; 0 solves without it.", 0.0, 1.0
)


@merge_method(
    "tsv",
    label="Task singular vectors (TSV-M)",
    summary="Turns the LoRAs' main directions just enough that none overlap, then adds them up.",
    source="Gargiulo et al. 2025, Task Singular Vectors, https://arxiv.org/abs/2412.00081",
    formula="polar([U_1 .. U_N]) diag(w_1 S_1 .. w_N S_N) polar([V_1 .. V_N])^T, each cut to its share",
    avoid="for LoRAs of one training run: directions that they share count once, so they are averaged",
)
def tsv(deltas: Sequence[Delta], weights: Sequence[float], context: LayerContext) -> Merged:
    """Each delta's leading singular directions, made orthogonal to those of the others, and added.

    Args:
        deltas: Deltas of one layer, of one shape.
        weights: One strength per delta; they multiply the singular values, their signs the left vectors.
        context: ``rank_limit`` is what the inputs share out among them, so that no truncation follows.

    Returns:
        A low-rank delta; mutually orthogonal inputs give their sum, equal ones their average.

    Source:
        Gargiulo et al. 2025, https://arxiv.org/abs/2412.00081, with ``polar(U) = U (U^T U)^(-1/2)``.
        Directions that only one combination of nearly equal vectors spans are left out of the root.
    """
    space = join(deltas, weights)
    kept = _shares(space, context.rank_limit)
    root = space.values[kept].sqrt()
    left, right = space.values.new_zeros((2, space.rank, len(kept)))
    left[kept] = _inverse_root(space.gram_up[kept][:, kept]) * root
    right[kept] = _inverse_root(space.gram_down[kept][:, kept]) * root
    return space.delta(left, right)


def _shares(space: JointSpace, limit: int | None) -> list[int]:
    """Places of the singular values kept: equal numbers of each input, leading ones first.

    What an input cannot use goes to the others; what cannot be shared equally goes to the largest values,
    so the order of the inputs does not matter.
    """
    limit = space.rank if limit is None else min(limit, space.rank)
    turns = [(step, -float(space.values[i]), i) for span in space.spans for step, i in _numbered(span)]
    return sorted(place for _, _, place in sorted(turns)[:limit])


def _numbered(span: slice) -> list[tuple[int, int]]:
    return list(enumerate(range(span.start, span.stop)))


def _inverse_root(square: Tensor) -> Tensor:
    """Inverse square root of a Gram matrix of unit vectors; directions of no length are left out."""
    values, vectors = falling_eigh(square, RELATIVE)
    return (vectors / values.sqrt()) @ vectors.mT


@merge_method(
    "iso",
    label="Isotropic (Iso-C)",
    summary="Adds the LoRAs, then evens out the strengths of the directions, so that none drowns the others.",
    params=(BETA, NORM),
    source="Marczak et al. 2025, No Task Left Behind, https://arxiv.org/abs/2502.04959 (beta is ours)",
    formula="U diag((1 - beta) s + beta mean(s)) V^T of the exact sum U diag(s) V^T",
    avoid="at ranks of 64 and more with a large beta: weak directions are mostly noise, and they are raised",
)
def iso(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    context: LayerContext,
    *,
    beta: float = 0.3,
    norm: str = "mean",
) -> Merged:
    """The exact sum with its singular values moved towards their mean.

    Args:
        deltas: Deltas of one layer, of one shape.
        weights: One strength per delta.
        context: Not used.
        beta: 0 leaves the sum as it is, 1 makes all singular values equal.
        norm: ``"mean"`` of the singular values, or ``"fro"``, the root of their mean square.

    Returns:
        A low-rank delta with the singular vectors of the sum.

    Source:
        Marczak et al. 2025, https://arxiv.org/abs/2502.04959, where beta is 1. The paper's mean runs over all
        min(out, in) singular values; most of a LoRA's are zero, so ours runs over the numerical rank.
    """
    total = exact_sum(deltas, weights)
    small = grams(total)
    spectrum = decompose(total, small=small)
    rank = numerical_rank(spectrum.values)
    if not rank or not isinstance(spectrum.source, LowRank):
        return nothing(total)
    values = spectrum.values[:rank]
    level = values.mean() if norm == "mean" else values.square().mean().sqrt()
    # A layer with more components than rows or columns comes back in other factors.
    small = small if spectrum.source is total else grams(spectrum.source)
    return with_values(spectrum, (1 - beta) * values + beta * level, small)


@merge_method(
    "np",
    label="Null-space priority (NP-LoRA)",
    summary="The first LoRA keeps its say; later ones give way where they read the same input features.",
    params=(MU, ENERGY),
    ordered=True,
    source="Chen et al. 2025, NP-LoRA, https://arxiv.org/abs/2511.11051",
    formula="sum_i w_i delta_i (I - mu/(1+mu) P_i), P_i projects on the input spaces of all before",
    avoid="when no LoRA is more important than the others; put the style or the weaker LoRA first otherwise",
)
def null_space_priority(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    context: LayerContext,
    *,
    mu: float = 1.0,
    energy: float = 1.0,
) -> Merged:
    """The sum, with each delta softly projected away from the input spaces of those before it.

    Args:
        deltas: Deltas of one layer, of one shape, the most important first.
        weights: One strength per delta.
        context: Not used.
        mu: Weight of the projection; the overlap is divided by ``1 + mu``.
        energy: The fewest leading right singular vectors with this share of the squared norm are protected.

    Returns:
        A low-rank delta; inputs that read different features give their sum.

    Source:
        Chen et al. 2025, https://arxiv.org/abs/2511.11051: soft projection
        ``(I + mu V V^T)^-1 = I - mu/(1+mu) V V^T``. More than two inputs are ours: V then spans the protected
        directions of all earlier inputs.
    """
    space = join(deltas, weights)
    gives_way = torch.eye(space.rank, dtype=torch.float64)
    protected: list[int] = []
    for span in space.spans:
        overlap = space.gram_down[span][:, protected]
        inverse = _pseudo_inverse(space.gram_down[protected][:, protected])
        gives_way[span, protected] -= mu / (1 + mu) * (overlap @ inverse)
        protected += range(span.start, span.start + _leading(space.values[span], energy))
    root = space.values.sqrt()
    return space.delta(torch.diag(root), (root[:, None] * gives_way).mT)


def _leading(values: Tensor, energy: float) -> int:
    """Fewest singular values with a share of the squared norm."""
    if energy >= 1:
        return values.shape[0]
    squares = values.square().cumsum(0)
    return int((squares < energy * squares[-1] * (1 - 1e-12)).sum()) + 1 if energy > 0 else 0


def _pseudo_inverse(square: Tensor) -> Tensor:
    """Inverse of a Gram matrix of unit vectors; directions of no length are left out."""
    values, vectors = falling_eigh(square, RELATIVE)
    return (vectors / values) @ vectors.mT


@merge_method(
    "ssr",
    label="Subspace routing without data (SSR)",
    summary="Every LoRA keeps its effect on the inputs it reads: strangers add up, near copies average out.",
    params=(RIDGE,),
    experimental=True,
    source="Wei et al. 2026, SSR-Merge, https://arxiv.org/abs/2606.10617 (without calibration data: ours)",
    formula="(sum_i w_i delta_i P_i) (sum_i P_i)^+ with a ridge, P_i the projector on LoRA i's input space",
    avoid="for strengthening an effect with two LoRAs of one kind: what they share is averaged, not added",
)
def ssr(
    deltas: Sequence[Delta], weights: Sequence[float], context: LayerContext, *, ridge: float = 0.01
) -> Merged:
    """The delta that comes closest to every input on that input's own input space.

    The router of the paper learns from tokens which LoRA an input belongs to. Here LoRA i's tokens are
    taken to be spread evenly over its row space, so that their covariance is the projector ``V_i V_i^T``.

    Args:
        deltas: Deltas of one layer, of one shape.
        weights: One strength per delta.
        context: Not used.
        ridge: Added to the routing matrix, relative to its mean diagonal. Without it nearly equal input
            spaces blow the result up.

    Returns:
        A low-rank delta. Inputs with orthogonal row spaces give their sum, with equal ones their average.

    Source:
        Wei et al. 2026, https://arxiv.org/abs/2606.10617. With ``G = V^T V`` of all right singular vectors:
        ``U S G (G^2 + ridge mean(diag G^2) I)^-1 V^T``, scaled so that the direction shared most is not
        shrunk by the ridge (ours, so that a LoRA without neighbours is not changed).
    """
    space = join(deltas, weights)
    shared, vectors = falling_eigh(space.gram_down)
    held = ridge * shared.square().sum() / max(1, space.rank)
    router = (vectors * _routing(shared, held)) @ vectors.mT
    root = space.values.sqrt()
    return space.delta(torch.diag(root), (root[:, None] * router).mT)


def _routing(shared: Tensor, held: Tensor) -> Tensor:
    """What becomes of each eigenvector of G: ``g / (g^2 + held)``, scaled to ``1 / g`` for the largest g."""
    first = shared[:1]
    return shared / (shared.square() + held) * (1 + held / first.square())
