"""Methods that apply an inner rule to the deltas in common coordinates: knots, core, ctm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...delta import Delta, Merged
from ...recipe import Param
from ..params import DENSITY
from ..registry import LayerContext, merge_method
from .inner_rules import RULES, merged
from .joint import JointSpace, exact_sum, falling_eigh, join

BALANCE = Param(
    "balance", 0.0, "0: louder LoRAs shape the common space more; 1: all of them alike.", 0.0, 1.0
)

_MOST_STEPS = 50
_CONVERGED = 1e-4  # Part of the energy by which a step must raise it for another one to follow.


def _rule(default: str) -> Param:
    return Param("rule", default, "Inner rule, applied in the common coordinates.", choices=RULES)


@merge_method(
    "knots",
    label="KnOTS",
    summary="Merges the LoRAs element by element in output directions that they share.",
    params=(_rule("ties"), DENSITY),
    random=True,
    source="Stoica et al. 2025, Model merging with SVD to tie the Knots, https://arxiv.org/abs/2410.19735",
    formula="U S rule(V_1^T, .., V_N^T) with [w_1 delta_1 .. w_N delta_N] = U S [V_1^T .. V_N^T]",
    avoid="when the plain sum is good already: ties averages what agrees, so the result is softer",
)
def knots(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    context: LayerContext,
    *,
    rule: str = "ties",
    density: float = 0.5,
) -> Merged:
    """An inner rule on the rows ``V_i^T`` that the deltas have on one common set of left vectors.

    Args:
        deltas: Deltas of one layer, of one shape.
        weights: One strength per delta; they scale the deltas before the rule, so they weigh its votes.
        context: Seed and layer for the rules that draw.
        rule: One of ``RULES``.
        density: Share of the elements that the rule keeps.

    Returns:
        A low-rank delta of at most the inputs' ranks together; with the linear rule, the exact sum.

    Source:
        Stoica et al. 2025, https://arxiv.org/abs/2410.19735. The paper leaves out singular values below 1e-5;
        ours are judged by the largest one, as LoRAs come in all sizes. With ``diag(s) U^T U diag(s) =
        Q diag(S^2) Q^T`` of the inputs' own left vectors and singular values, V_i is simply ``V_i Q_i``.
    """
    if rule == "linear":
        return exact_sum(deltas, weights)
    space = join(deltas, weights)
    weighted = space.values[:, None] * space.gram_up * space.values
    _, mixing = falling_eigh(weighted)
    rows = space.rows_of_inputs(mixing)
    common = merged(rule, rows, density, context) if rows else mixing.mT
    return space.delta_of_rows(space.values[:, None] * mixing, common)


@merge_method(
    "core",
    label="Core space",
    summary="Merges the LoRAs element by element in the small space that all their factors span.",
    params=(_rule("ties"), DENSITY),
    random=True,
    source="Panariello et al. 2025, Core Space, https://arxiv.org/abs/2509.17786",
    formula="U rule(U^T w_1 delta_1 V, .., U^T w_N delta_N V) V^T, U and V the spaces of all ups and downs",
    avoid="when the plain sum is good already: ties averages what agrees, so the result is softer",
)
def core(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    context: LayerContext,
    *,
    rule: str = "ties",
    density: float = 0.5,
) -> Merged:
    """An inner rule on the deltas' small matrices in the joint row and column spaces.

    Args:
        deltas: Deltas of one layer, of one shape.
        weights: One strength per delta; they scale the deltas before the rule.
        context: Seed and layer for the rules that draw.
        rule: One of ``RULES``.
        density: Share of the elements that the rule keeps.

    Returns:
        A low-rank delta of at most the inputs' ranks together; with the linear rule, the exact sum.

    Source:
        Panariello et al. 2025, https://arxiv.org/abs/2509.17786. The paper's bases depend on how a delta is
        split into its factors; every input is brought to balanced factors ``U sqrt(S), sqrt(S) V^T`` first.
    """
    if rule == "linear":
        return exact_sum(deltas, weights)
    space = join(deltas, weights)
    left, right, cores = _cores(space)
    if not cores:
        return space.delta(left, right)
    return space.delta(left @ merged(rule, cores, density, context), right)


@merge_method(
    "ctm",
    label="Compress, then merge (CtM)",
    summary="Finds the one space of the wanted rank that holds each LoRA best, and adds them up there.",
    params=(_rule("linear"), DENSITY, BALANCE),
    random=True,
    source="He et al. 2026, Compress-then-Merge, https://arxiv.org/abs/2606.03723",
    formula="P rule(P^T w_1 delta_1 Q, ..) Q^T with orthonormal P, Q of rank r that maximise "
    "sum_i |P^T w_i delta_i Q|^2",
    avoid="for the least error of the sum, which svd has: this one shares the error out among the LoRAs",
)
def ctm(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    context: LayerContext,
    *,
    rule: str = "linear",
    density: float = 0.5,
    balance: float = 0.0,
) -> Merged:
    """The deltas in the pair of subspaces that keeps most of each of them.

    Args:
        deltas: Deltas of one layer, of one shape.
        weights: One strength per delta.
        context: ``rank_limit`` is the rank of the subspaces; by default the largest rank of an input.
        rule: One of ``RULES``, for the deltas within the subspaces.
        density: Share of the elements that the rule keeps.
        balance: How far the deltas are brought to one norm where the subspaces are chosen.

    Returns:
        A low-rank delta of the wanted rank.

    Source:
        He et al. 2026, https://arxiv.org/abs/2606.03723, by higher-order orthogonal iteration (De Lathauwer
        et al. 2000). Their exponent beta is ``1 - balance`` here.
    """
    space = join(deltas, weights)
    left, right, cores = _widest_first(space)
    if not cores:
        return space.delta(left, right)
    rank = context.rank_limit or max(span.stop - span.start for span in space.spans)
    p, q = common_subspaces(_balanced(torch.stack(cores), balance), rank)
    if rule != "linear":
        p, q = _aligned(cores, p, q)
    inside = [p.mT @ matrix @ q for matrix in cores]
    result = merged(rule, inside, density, context)
    return space.delta(left @ p @ result, right @ q)


def common_subspaces(cores: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Orthonormal P (p, k) and Q (q, k) with the largest ``sum_i |P^T cores_i Q|^2``, up to a local maximum.

    Args:
        cores: (n, p, q) float64, in coordinates of which the first ones are a good start.
        rank: Wanted k; at most p and q.
    """
    p, q = (torch.eye(side, rank, dtype=torch.float64) for side in cores.shape[1:])
    if rank >= max(cores.shape[1:]):
        return p, q
    # The steps are float32, which halves their cost; what they find is made orthonormal to the last digit.
    coarse = (cores / torch.linalg.vector_norm(cores)).float()
    by_rows, by_columns = coarse.flatten(0, 1), coarse.mT.flatten(0, 1)
    p, q, energy = p.float(), q.float(), 0.0
    for _ in range(_MOST_STEPS):
        p, _ = _improved(by_rows @ q, p)
        before = energy
        q, energy = _improved(by_columns @ p, q)
        if energy - before <= _CONVERGED * energy:
            break
    return _orthonormal(p), _orthonormal(q)


def _orthonormal(basis: Tensor) -> Tensor:
    """In float64, the lengths and angles set right that float32 left (one step of Newton and Schulz)."""
    basis = basis.double()
    return 1.5 * basis - 0.5 * (basis @ (basis.mT @ basis))


def _improved(images: Tensor, basis: Tensor) -> tuple[Tensor, float]:
    """One step of orthogonal iteration towards the leading left directions of some matrices.

    It never lowers the energy ``sum_i |basis^T images_i|^2``, and costs a fraction of all eigenvectors.

    Args:
        images: (n * p, r) the matrices, one below the other.
        basis: (p, k) orthonormal.

    Returns:
        The next basis, and the energy of the one given.
    """
    side = images.view(-1, basis.shape[0], images.shape[1]).transpose(0, 1).flatten(1)
    inside = side.mT @ basis
    return torch.linalg.qr(side @ inside).Q, float(torch.linalg.vector_norm(inside)) ** 2


def _aligned(cores: Sequence[Tensor], p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The same subspaces in bases that only the deltas decide: the widest directions of all inputs first."""
    inside = torch.stack([p.mT @ matrix @ q for matrix in cores])
    _, left = falling_eigh((inside @ inside.mT).sum(0), 0.0)
    _, right = falling_eigh((inside.mT @ inside).sum(0), 0.0)
    return p @ left, q @ right


def _balanced(cores: Tensor, balance: float) -> Tensor:
    norms = torch.linalg.vector_norm(cores, dim=(1, 2))
    return cores * ((norms.mean() / norms) ** balance)[:, None, None]


def _cores(space: JointSpace) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The deltas in orthonormal bases of their joint spaces.

    Returns:
        left (K, p) and right (K, q) with ``U left`` and ``V right`` orthonormal, and for each input the
        (p, q) matrix between them. The bases are the singular vectors of the inputs' balanced factors side
        by side, the largest first. Their signs are free: no rule looks at them.
    """
    root = space.values.sqrt()
    up_squares, up = falling_eigh(root[:, None] * space.gram_up * root)
    down_squares, down = falling_eigh(root[:, None] * space.gram_down * root)
    up_to, down_to = up * up_squares.sqrt(), down * down_squares.sqrt()
    cores = [up_to[span].mT @ down_to[span] for span in space.spans]
    return root[:, None] * up / up_squares.sqrt(), root[:, None] * down / down_squares.sqrt(), cores


def _widest_first(space: JointSpace) -> tuple[Tensor, Tensor, list[Tensor]]:
    """:func:`_cores` in coordinates of which the first k hold most, seen from either side alone (HOSVD).

    They are the left singular vectors of the deltas side by side, and the right ones of the deltas stacked.
    """
    values = space.values[:, None]
    up_squares, up = falling_eigh(values * space.gram_up * space.values)
    down_squares, down = falling_eigh(values * space.gram_down * space.values)
    up_to, down_to = up * up_squares.sqrt(), down * down_squares.sqrt()
    cores = [(up_to[span] / values[span]).mT @ down_to[span] for span in space.spans]
    return values * up / up_squares.sqrt(), values * down / down_squares.sqrt(), cores
