"""The elementwise methods: they look at every element of the deltas, so each layer is formed whole.

Their results are of full rank, so a LoRA holds only a part of them. Strengths multiply a LoRA's elements
before anything is voted on, and never change which of its elements are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..delta import Delta, Dense, check_same_shape, norm
from ..recipe import Param
from . import sparsify, votes
from .linear import svd as weighted_sum
from .params import DENSITY, LAMBDA, NORMALIZE, factor_of_result
from .registry import LayerContext, merge_method

GAMMA = Param("gamma", 0.01, "Fraction of the largest elements of each LoRA to drop.", 0.0, 0.5)
EPSILON = Param(
    "epsilon",
    0.15,
    "How much likelier than density the largest element of a row is kept, and the smallest dropped.",
    0.0,
    0.5,
)
SELECT_TOPK = Param(
    "select_topk", 1.0, "Fraction of the elements to keep: those in which the LoRAs differ most.", 0.01, 1.0
)

# A variance below this part of the squared mean is the rounding of float32 and not a difference.
SAME = 1e-12

LOSSY = "at small ranks: the result is of full rank, so storing it as a LoRA always loses a part"

Sparsify = Callable[[Tensor, int], None]


@merge_method(
    "ties",
    label="TIES",
    summary="Keeps each LoRA's largest elements, lets them vote on each sign, and averages the winners.",
    elementwise=True,
    params=(DENSITY, NORMALIZE, LAMBDA),
    source="Yadav et al. 2023, TIES-Merging, https://arxiv.org/abs/2306.01708",
    formula="t_i = top_density(delta_i), s = sgn(sum_i w_i t_i), mean of the w_i t_i of sign s",
    avoid=LOSSY,
)
def ties(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    context: LayerContext,
    *,
    density: float,
    normalize: bool = True,
    **factor: float,
) -> Delta:
    """Trim, elect signs, disjoint mean; equal to PEFT's on dense deltas at strengths of 1.

    Trimming is per layer, as in PEFT and mergekit (in the paper: over the whole model). The vote is cast by
    weighted deltas as in mergekit, so that a stronger LoRA has a louder vote and one at a negative strength
    votes the other way. The mean divides by the number of winners as in PEFT: mergekit divides by the sum
    of their strengths, after which a strength would not matter where a LoRA is alone.

    Args:
        deltas: Deltas of one layer, of one shape.
        weights: One strength per delta.
        context: Not used.
        density: Fraction of the elements kept of each delta.
        normalize: Divide by the number of winners; the default of PEFT and mergekit.
        factor: ``lambda``, a factor of the result.

    Returns:
        A dense delta; the delta itself where there is one only and all of it is kept.

    Source: Yadav et al. 2023, Algorithm 1.
    """

    def trim(matrix: Tensor, _: int) -> None:
        sparsify.keep_largest(matrix, density)

    return _elected(deltas, weights, trim, density >= 1, normalize, factor_of_result(factor))


@merge_method(
    "dare_linear",
    label="DARE, summed",
    summary="Drops random elements of each LoRA, scales up the rest, and adds up.",
    elementwise=True,
    params=(DENSITY, LAMBDA),
    random=True,
    source="Yu et al. 2023, Language Models are Super Mario, https://arxiv.org/abs/2311.03099",
    formula="sum_i w_i m_i delta_i / density, m_i = 1 with probability density, else 0",
    avoid=(
        "as a rule: its mean over seeds is the exact sum, so svd, which is that sum, is strictly better in "
        "Frobenius norm at every rank. It is here for recipes made elsewhere"
    ),
)
def dare_linear(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    context: LayerContext,
    *,
    density: float,
    **factor: float,
) -> Delta:
    """Drop and rescale, then the weighted sum.

    What is kept is divided by density, as in the paper and PEFT, so that the mean over seeds is the exact
    sum. mergekit brings each delta back to its old L1 norm instead.

    Args:
        deltas: Deltas of one layer, of one shape.
        weights: One strength per delta.
        context: Seed and layer choose the random numbers.
        density: Probability that an element is kept.
        factor: ``lambda``, a factor of the result.

    Returns:
        A dense delta; the exact sum at density 1.

    Source: Yu et al. 2023, section 3.
    """
    drop = _dare(deltas, weights, context, density)
    return _summed(deltas, weights, drop, density >= 1, factor_of_result(factor))


@merge_method(
    "dare_ties",
    label="DARE, then TIES",
    summary="Drops random elements of each LoRA, scales up the rest, and merges them by the votes of TIES.",
    elementwise=True,
    params=(DENSITY, NORMALIZE, LAMBDA),
    random=True,
    source="Yu et al. 2023, Language Models are Super Mario, https://arxiv.org/abs/2311.03099",
    formula="t_i = m_i delta_i / density, s = sgn(sum_i w_i t_i), mean of the w_i t_i of sign s",
    avoid=LOSSY + "; the dropped elements come back as noise, so ties keeps more at the same density",
)
def dare_ties(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    context: LayerContext,
    *,
    density: float,
    normalize: bool = True,
    **factor: float,
) -> Delta:
    """Drop and rescale as :func:`dare_linear`, then the vote of :func:`ties`.

    Args:
        deltas: Deltas of one layer, of one shape.
        weights: One strength per delta.
        context: Seed and layer choose the random numbers.
        density: Probability that an element is kept.
        normalize: Divide by the number of winners, as PEFT does; mergekit adds them up.
        factor: ``lambda``, a factor of the result.

    Returns:
        A dense delta; the delta itself where there is one only and density is 1.

    Source: Yu et al. 2023, section 3; Yadav et al. 2023, Algorithm 1.
    """
    drop = _dare(deltas, weights, context, density)
    return _elected(deltas, weights, drop, density >= 1, normalize, factor_of_result(factor))


@merge_method(
    "della",
    label="DELLA",
    summary="Like DARE with TIES, but small elements of a row are likelier to be dropped than large ones.",
    elementwise=True,
    params=(DENSITY, EPSILON, NORMALIZE, LAMBDA),
    random=True,
    source="Deep et al. 2024, DELLA-Merging, https://arxiv.org/abs/2406.11617",
    formula="q = density - epsilon .. density + epsilon by rank in the row, t_i = m_i delta_i / q, then TIES",
    avoid=LOSSY + "; it is random, too, so two seeds differ",
)
def della(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    context: LayerContext,
    *,
    density: float,
    epsilon: float,
    normalize: bool = True,
    **factor: float,
) -> Delta:
    """MagPrune, then the vote of :func:`ties`.

    The probabilities span density plus and minus epsilon, as in mergekit (the paper's epsilon is the whole
    span). What is kept is divided by its probability, as in the paper, so that the mean over seeds is the
    delta; mergekit brings each delta back to its old L1 norm instead. An epsilon for which there is no room
    beside density is cut down, where mergekit refuses it. With epsilon 0 this is :func:`dare_ties`.

    Args:
        deltas: Deltas of one layer, of one shape.
        weights: One strength per delta.
        context: Seed and layer choose the random numbers.
        density: Mean probability that an element is kept.
        epsilon: How far the probabilities go from density, either way.
        normalize: Divide by the number of winners.
        factor: ``lambda``, a factor of the result.

    Returns:
        A dense delta; the delta itself where there is one only and density is 1.

    Source: Deep et al. 2024, section 3.
    """
    draws = _draws(deltas, weights, context)

    def drop(matrix: Tensor, index: int) -> None:
        sparsify.drop_small_and_rescale(matrix, density, epsilon, draws(index))

    return _elected(deltas, weights, drop, density >= 1, normalize, factor_of_result(factor))


@merge_method(
    "breadcrumbs",
    label="Model Breadcrumbs",
    summary="Drops each LoRA's very largest and its small elements, and adds up what is left.",
    elementwise=True,
    params=(DENSITY, GAMMA, LAMBDA),
    source="Davari and Belilovsky 2023, Model Breadcrumbs, https://arxiv.org/abs/2312.06795",
    formula="sum_i w_i t_i, t_i = delta_i without its gamma largest elements and all but the next density",
    avoid=LOSSY + "; and when the largest elements are what a LoRA is about",
)
def breadcrumbs(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    context: LayerContext,
    *,
    density: float,
    gamma: float,
    **factor: float,
) -> Delta:
    """Mask outliers and small elements, then the weighted sum.

    Per layer, as in the paper. Where density and gamma have no room for both, density counts, as in
    mergekit; so nothing is dropped at density 1.

    Args:
        deltas: Deltas of one layer, of one shape.
        weights: One strength per delta.
        context: Not used.
        density: Fraction of the elements kept of each delta.
        gamma: Fraction of the largest elements dropped.
        factor: ``lambda``, a factor of the result.

    Returns:
        A dense delta; the exact sum at density 1.

    Source: Davari and Belilovsky 2023, section 3.
    """

    def mask(matrix: Tensor, _: int) -> None:
        sparsify.keep_middle(matrix, density, gamma)

    return _summed(deltas, weights, mask, density >= 1, factor_of_result(factor))


@merge_method(
    "magnitude_prune",
    label="Magnitude pruning",
    summary="Keeps each LoRA's largest elements and adds them up.",
    elementwise=True,
    params=(DENSITY,),
    source="Han et al. 2015, Learning both Weights and Connections, https://arxiv.org/abs/1506.02626; PEFT",
    formula="sum_i w_i top_density(delta_i)",
    avoid=LOSSY + "; svd keeps more of the sum at every rank (Frobenius norm)",
)
def magnitude_prune(
    deltas: Sequence[Delta], weights: Sequence[float], context: LayerContext, *, density: float
) -> Delta:
    """Trim, then the weighted sum; equal to PEFT's on dense deltas at any strengths.

    Args:
        deltas: Deltas of one layer, of one shape.
        weights: One strength per delta.
        context: Not used.
        density: Fraction of the elements kept of each delta.

    Returns:
        A dense delta; the exact sum at density 1.

    Source: Han et al. 2015; ``magnitude_prune`` of PEFT.
    """

    def trim(matrix: Tensor, _: int) -> None:
        sparsify.keep_largest(matrix, density)

    return _summed(deltas, weights, trim, density >= 1, 1.0)


@merge_method(
    "sce",
    label="SCE",
    summary="Keeps the elements in which the LoRAs differ most, and averages the winning signs by size.",
    elementwise=True,
    params=(SELECT_TOPK,),
    source="Wan et al. 2024, FuseChat, https://arxiv.org/abs/2408.07990",
    formula="t_i = w_i delta_i at the largest variances, c_i = |t_i|^2, winners' sum c_i t_i / sum c_i",
    avoid=LOSSY + "; and when LoRAs differ much in size: the larger one takes nearly all",
)
def sce(
    deltas: Sequence[Delta], weights: Sequence[float], context: LayerContext, *, select_topk: float
) -> Delta:
    """Select, calculate, erase: variance chooses elements, energy weights the LoRAs, minority signs go.

    The field gives strengths no part in it. Here they multiply the deltas at the start, so a LoRA's share
    grows with the square of its strength and the result as a whole with the strengths themselves. One LoRA
    alone has no variance; all of it is kept.

    Args:
        deltas: Deltas of one layer, of one shape.
        weights: One strength per delta.
        context: Not used.
        select_topk: Fraction kept of the elements whose variance is not 0.

    Returns:
        A dense delta; the delta itself where there is one only.

    Source: Wan et al. 2024, section 3.3.
    """
    present = [index for index, weight in enumerate(weights) if weight]
    if len(present) < 2:
        return weighted_sum(deltas, weights, context)
    check_same_shape(deltas)
    voters = [(deltas[index], weights[index]) for index in present]
    kept = _large_variance(voters, select_topk) if select_topk < 1 else None
    largest = max(abs(weight) * norm(delta) for delta, weight in voters) or 1.0
    election: votes.Election | None = None
    for delta, weight in voters:
        matrix = sparsify.elements(delta)
        if kept is not None:
            matrix.mul_(kept)
        energy = (abs(weight) * float(torch.linalg.vector_norm(matrix)) / largest) ** 2
        election = election or votes.Election(matrix, weighted=True)
        election.cast(matrix, weight, energy)
    assert election is not None
    return Dense(election.result(), deltas[0].kernel, sparsify.row_space(deltas, weights))


def _large_variance(voters: Sequence[tuple[Delta, float]], fraction: float) -> Tensor | None:
    """(out, in) uint8: 1 at the fraction of elements with the largest variance; None where all agree."""
    # Welford's way: the difference of two sums of squares would have lost small variances to rounding.
    mean = sparsify.elements(voters[0][0]).mul_(voters[0][1])
    variance = torch.zeros_like(mean)
    for count, (delta, weight) in enumerate(voters[1:], start=2):
        step = sparsify.elements(delta).mul_(weight).sub_(mean)
        mean.add_(step, alpha=1 / count)
        variance.add_(step.square_(), alpha=(count - 1) / count)
    variance.masked_fill_(variance <= mean.square_().mul_(SAME), 0.0)
    differing = int(variance.count_nonzero())
    if not differing:
        return None
    sparsify.keep_count(variance, int(fraction * differing))
    return variance.sign_().to(torch.uint8)


def _dare(
    deltas: Sequence[Delta], weights: Sequence[float], context: LayerContext, density: float
) -> Sparsify:
    draws = _draws(deltas, weights, context)

    def drop(matrix: Tensor, index: int) -> None:
        sparsify.drop_and_rescale(matrix, density, draws(index))

    return drop


def _draws(
    deltas: Sequence[Delta], weights: Sequence[float], context: LayerContext
) -> Callable[[int], sparsify.Draws]:
    """The random numbers of each input, by its place among the deltas."""
    places = sparsify.streams(deltas, weights)
    return lambda index: sparsify.Draws(context.seed, context.layer, places[index])


def _summed(
    deltas: Sequence[Delta], weights: Sequence[float], prepare: Sparsify, whole: bool, factor: float
) -> Delta:
    """The weighted sum of prepared deltas; exact and of low rank when ``whole``, nothing being dropped."""
    check_same_shape(deltas)
    weights = [weight * factor for weight in weights]
    if whole:
        return weighted_sum(deltas, weights, LayerContext())
    prepared = _prepared(deltas, prepare)
    total = next(prepared).mul_(weights[0])
    for matrix, weight in zip(prepared, weights[1:]):
        total.add_(matrix, alpha=weight)
    return Dense(total, deltas[0].kernel, sparsify.row_space(deltas, weights))


def _elected(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    prepare: Sparsify,
    whole: bool,
    normalize: bool,
    factor: float,
) -> Delta:
    """The election of prepared deltas; ``whole``: nothing is dropped, so one LoRA alone wins everywhere."""
    check_same_shape(deltas)
    if whole and len(deltas) == 1:
        return weighted_sum(deltas, [weights[0] * factor], LayerContext())
    prepared = _prepared(deltas, prepare)
    result = votes.elect(prepared, weights, factor, normalize=normalize)
    return Dense(result, deltas[0].kernel, sparsify.row_space(deltas, weights))


def _prepared(deltas: Sequence[Delta], prepare: Sparsify) -> Iterator[Tensor]:
    """The elements of one delta after the other, (out, in) float32, those dropped that are to be."""
    for index, delta in enumerate(deltas):
        matrix = sparsify.elements(delta)
        prepare(matrix, index)
        yield matrix
