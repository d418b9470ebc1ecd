"""LoHa: the elementwise product of two low-rank matrices, which is low rank itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..delta import LowRank
from .kinds import AdapterKind, Layer, LayerFacts, Shape, Shapes, matrix, register, require, split_kernel
from .scaling import wide

_FACTORS = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})


def _describe_loha(shapes: Shapes, where: str, kernel: Shape | None) -> LayerFacts:
    out, rank1 = matrix(shapes["hada_w1_a"], "hada_w1_a", where)
    out2, rank2 = matrix(shapes["hada_w2_a"], "hada_w2_a", where)
    rows1, in_, stored = split_kernel(shapes["hada_w1_b"], "hada_w1_b", where, kernel)
    rows2, in2, stored2 = split_kernel(shapes["hada_w2_b"], "hada_w2_b", where, kernel)
    fits = (out, rank1, rank2, in_, stored) == (out2, rows1, rows2, in2, stored2)
    require(fits, where, shapes, *sorted(_FACTORS))
    return _facts("loha", out, in_, stored, rank1 * rank2)


def _describe_loha_tucker(shapes: Shapes, where: str, kernel: Shape | None) -> LayerFacts:
    # The factors lie the other way round here: (rank, out) and (rank, in).
    sides = []
    for n in "12":
        rank_a, out = matrix(shapes[f"hada_w{n}_a"], f"hada_w{n}_a", where)
        rank_b, in_ = matrix(shapes[f"hada_w{n}_b"], f"hada_w{n}_b", where)
        core_a, core_b, stored = split_kernel(shapes[f"hada_t{n}"], f"hada_t{n}", where, kernel)
        names = (f"hada_t{n}", f"hada_w{n}_a", f"hada_w{n}_b")
        require((core_a, core_b) == (rank_a, rank_b), where, shapes, *names)
        sides.append((out, in_, stored, rank_a))
    require(sides[0][:3] == sides[1][:3], where, shapes, *sorted(_FACTORS), "hada_t1", "hada_t2")
    out, in_, stored, _ = sides[0]
    return _facts("loha_tucker", out, in_, stored, sides[0][3] * sides[1][3])


def _facts(kind: str, out: int, in_: int, kernel: Shape, rank: int) -> LayerFacts:
    facts = LayerFacts(kind, out, in_, kernel, rank)
    return LayerFacts(kind, out, in_, kernel, min(rank, out, facts.columns or rank))


def _build_loha(layer: Layer) -> LowRank:
    a1, b1, a2, b2 = (wide(layer.slots[slot]).flatten(1) for slot in sorted(_FACTORS))
    return _hadamard(a1, b1, a2, b2, layer.facts.kernel)


def _build_loha_tucker(layer: Layer) -> LowRank:
    a1, b1 = _unfold(layer, "1")
    a2, b2 = _unfold(layer, "2")
    return _hadamard(a1, b1, a2, b2, layer.facts.kernel)


def _unfold(layer: Layer, n: str) -> tuple[Tensor, Tensor]:
    """One Tucker side as (out, r) and (r, in * kh * kw)."""
    core, a, b = (wide(layer.slots[slot]) for slot in (f"hada_t{n}", f"hada_w{n}_a", f"hada_w{n}_b"))
    core = core.reshape(core.shape[0], core.shape[1], -1)
    folded = torch.einsum("ijk,jr->irk", core.double(), b.flatten(1).double())
    return a.flatten(1).T, folded.flatten(1)


def _hadamard(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, kernel: Shape) -> LowRank:
    """``(a1 b1) * (a2 b2)`` elementwise as one product.

    Entry (o, i) is ``sum_j sum_k a1[o,j] a2[o,k] b1[j,i] b2[k,i]``: the row-wise
    Khatri-Rao product of the a's times the column-wise one of the b's, of rank
    r1 * r2. Where that exceeds what the layer can hold, the layer's own matrix
    and an identity are smaller and as exact. Products are float64: rounded to float32 they
    would be another delta, and what is left when it is subtracted from itself would be noise.
    """
    a1, b1, a2, b2 = (factor.double() for factor in (a1, b1, a2, b2))
    out, columns, rank = a1.shape[0], b1.shape[1], a1.shape[1] * a2.shape[1]
    if rank > min(out, columns):
        return whole_as_low_rank((a1 @ b1) * (a2 @ b2), kernel)
    up = (a1[:, :, None] * a2[:, None, :]).reshape(out, rank)
    down = (b1[:, None, :] * b2[None, :, :]).reshape(rank, columns)
    return LowRank(up, down, float(rank), kernel)


def whole_as_low_rank(weight: Tensor, kernel: Shape) -> LowRank:
    """A matrix as the product of itself and an identity on its shorter side."""
    out, columns = weight.shape
    rank = min(out, columns)
    eye = torch.eye(rank, dtype=weight.dtype, device=weight.device)
    up, down = (eye, weight) if out <= columns else (weight, eye)
    return LowRank(up, down, float(rank), kernel)


def _rank(shapes: Shapes) -> int:
    return shapes["hada_w1_b"][0]


LOHA = register(
    AdapterKind(
        name="loha",
        label="LoHa",
        forms=(_FACTORS,),
        family="LoHa",
        needs_base=False,
        exact_low_rank=True,
        keys="`hada_w1_a` `hada_w1_b` `hada_w2_a` `hada_w2_b`",
        does="Written as one product of the two ranks (Khatri-Rao), exactly.",
        source="Hyeon-Woo et al. 2021 (FedPara), https://arxiv.org/abs/2108.06098",
        describe=_describe_loha,
        build=_build_loha,
        scale_rank=_rank,
    )
)

LOHA_TUCKER = register(
    AdapterKind(
        name="loha_tucker",
        label="LoHa, Tucker",
        forms=(_FACTORS | {"hada_t1", "hada_t2"},),
        family="LoHa",
        needs_base=False,
        exact_low_rank=True,
        keys="the same with `hada_t1` `hada_t2`",
        does="The cores are folded in, then as LoHa.",
        source="Yeh et al. 2023 (LyCORIS), https://arxiv.org/abs/2309.14859",
        describe=_describe_loha_tucker,
        build=_build_loha_tucker,
        scale_rank=_rank,
    )
)
