"""LoKr: the Kronecker product of two small matrices, each whole or factored."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..delta import Kronecker, LowRank, structured
from ..errors import IncompatibleError
from .kinds import AdapterKind, Layer, LayerFacts, Shape, Shapes, matrix, register, require, split_kernel
from .scaling import ALPHA_UNUSED, wide

# Above this rank the small factors are decomposed to find what rank they truly have.
_LARGE = 64
# From this rank on factors are not kept in float64.
_WHOLE = 512
_T1_IGNORED = "lokr_t1 is ignored, as every WebUI and LyCORIS itself do."

_W1 = (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"}))
_W2 = (
    frozenset({"lokr_w2"}),
    frozenset({"lokr_w2_a", "lokr_w2_b"}),
    frozenset({"lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
)


def _describe(shapes: Shapes, where: str, kernel: Shape | None) -> LayerFacts:
    for n in "12":
        whole, parts = f"lokr_w{n}", [f"lokr_w{n}_a", f"lokr_w{n}_b", "lokr_t2" if n == "2" else ""]
        double = [part for part in parts if whole in shapes and part in shapes]
        if double:
            raise IncompatibleError(
                "{where}: {whole} is stored whole and as {parts} at once.", where, whole, ", ".join(double)
            )
    a, c, rank1 = _small(shapes, "1", where)
    b, d, stored, rank2 = _large(shapes, where, kernel)
    notes: tuple[str, ...] = (_T1_IGNORED,) if "lokr_t1" in shapes else ()
    if "alpha" in shapes and _scale_rank(shapes) is None:
        notes += (ALPHA_UNUSED,)
    rank = min(rank1, a, c) * min(rank2, b, d * math.prod(stored))
    return LayerFacts("lokr", a * b, c * d, stored, rank, notes=notes)


def _small(shapes: Shapes, n: str, where: str) -> tuple[int, int, int]:
    """(rows, columns, rank) of w1."""
    if f"lokr_w{n}" in shapes:
        rows, columns = matrix(shapes[f"lokr_w{n}"], f"lokr_w{n}", where)
        return rows, columns, min(rows, columns)
    names = (f"lokr_w{n}_a", f"lokr_w{n}_b")
    (rows, rank), (rank2, columns) = (matrix(shapes[name], name, where) for name in names)
    require(rank == rank2, where, shapes, *names)
    return rows, columns, rank


def _large(shapes: Shapes, where: str, kernel: Shape | None) -> tuple[int, int, Shape, int]:
    """(rows, columns, kernel, rank) of w2."""
    if "lokr_w2" in shapes:
        rows, columns, stored = split_kernel(shapes["lokr_w2"], "lokr_w2", where, kernel)
        return rows, columns, stored, min(rows, columns * math.prod(stored))
    if "lokr_t2" in shapes:
        names = ("lokr_t2", "lokr_w2_a", "lokr_w2_b")
        rank_a, rank_b, stored = split_kernel(shapes["lokr_t2"], "lokr_t2", where, kernel)
        (rows_a, rows), (rows_b, columns) = (matrix(shapes[name], name, where) for name in names[1:])
        require((rank_a, rank_b) == (rows_a, rows_b), where, shapes, *names)
        return rows, columns, stored, rank_a
    rows, rank = matrix(shapes["lokr_w2_a"], "lokr_w2_a", where)
    rank2, columns, stored = split_kernel(shapes["lokr_w2_b"], "lokr_w2_b", where, kernel)
    require(rank == rank2, where, shapes, "lokr_w2_a", "lokr_w2_b")
    return rows, columns, stored, rank


def _build(layer: Layer) -> LowRank:
    """``kron(w1, w2)`` as ``(P1 kron P2) (Q1 kron Q2)`` from ``w1 = P1 Q1``, ``w2 = P2 Q2``.

    A convolution's w2 is unfolded first: the Kronecker product of the unfolded
    matrices is the unfolded product.
    """
    p1, q1 = _exact_factors(*_factors(layer, "1"))
    p2, q2 = _exact_factors(*_factors(layer, "2"))
    if p1.shape[1] * p2.shape[1] > _LARGE:
        return _from_singular_values(p1, q1, p2, q2, layer.facts.kernel)
    up, down = _kron(p1, p2), _kron(q1, q2)
    return LowRank(up, down, float(down.shape[0]), layer.facts.kernel)


def _kron(a: Tensor, b: Tensor) -> Tensor:
    """``torch.kron`` of matrices, which refuses some views that transposed factors are."""
    return (a[:, None, :, None].double() * b[None, :, None, :]).flatten(2).flatten(0, 1)


def _factors(layer: Layer, n: str) -> tuple[Tensor | None, Tensor]:
    """(P, Q) with w = P Q, or (None, w) for a factor that is stored whole."""
    slots = layer.slots
    if f"lokr_w{n}" in slots:
        return None, wide(slots[f"lokr_w{n}"]).flatten(1)
    a, b = wide(slots[f"lokr_w{n}_a"]).flatten(1), wide(slots[f"lokr_w{n}_b"]).flatten(1)
    if n == "2" and "lokr_t2" in slots:
        core = wide(slots["lokr_t2"])
        core = core.reshape(core.shape[0], core.shape[1], -1)
        folded = torch.einsum("ijk,jr->irk", core.double(), b.double())
        return a.T, folded.flatten(1)
    return a, b


def _exact_factors(p: Tensor | None, q: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the smallest rank that the shapes guarantee."""
    if p is not None and p.shape[1] <= min(p.shape[0], q.shape[1]):
        return p, q
    whole = q if p is None else p.double() @ q.double()
    rows, columns = whole.shape
    eye = torch.eye(min(rows, columns), dtype=whole.dtype, device=whole.device)
    return (eye, whole) if rows <= columns else (whole, eye)


def _from_singular_values(p1: Tensor, q1: Tensor, p2: Tensor, q2: Tensor, kernel: Shape) -> LowRank:
    """The same product with its numerically true rank, components ordered by size.

    The singular values of a Kronecker product are the products of its factors'
    singular values, and so are its vectors: the large matrix is never formed.
    """
    (a, u1, s1, v1), (b, u2, s2, v2) = _svd(p1, q1), _svd(p2, q2)
    values = torch.outer(s1, s2).flatten()
    order = torch.argsort(values, descending=True, stable=True)
    noise = values[order[0]] * torch.finfo(torch.float32).eps
    keep = order[: max(1, int((values > noise).sum()))]
    i, j = keep // len(s2), keep % len(s2)
    # Whole matrices are large: their factors take the type that they are stored in, if they are made at all.
    whole = len(keep) >= _WHOLE
    dtype = q2.dtype if whole else torch.float64
    made = Kronecker(a, b, (u1, u2), (v1, v2), (i, j), values[keep], dtype)
    known: dict[str, Any] = {"kernel": kernel, "spectra": (values[keep],)}
    if whole:
        return structured(made, float(len(keep)), **known)
    return LowRank(made.factor("up"), made.factor("down"), float(len(keep)), **known)


def _svd(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``p q`` and its singular vectors and values, (rows, k) (k,) (columns, k), in float64."""
    whole = p.double() @ q.double()
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    return whole, u, s, v.mT


def _scale_rank(shapes: Shapes) -> int | None:
    """The rank that the hosts divide alpha by: w2's, else w1's, else none."""
    for slot in ("lokr_w2_b", "lokr_w1_b"):
        if slot in shapes:
            return shapes[slot][0]
    return None


LOKR = register(
    AdapterKind(
        name="lokr",
        label="LoKr",
        forms=tuple(w1 | w2 for w1 in _W1 for w2 in _W2),
        optional=frozenset({"lokr_t1"}),
        family="LoKr",
        needs_base=False,
        exact_low_rank=True,
        keys="`lokr_w1` or `lokr_w1_a` `lokr_w1_b`; `lokr_w2` or `lokr_w2_a` `lokr_w2_b`, `lokr_t2`",
        does="Written as one product through its small factors, exactly; whole factors give a high rank.",
        source="Yeh et al. 2023 (LyCORIS), https://arxiv.org/abs/2309.14859",
        describe=_describe,
        build=_build,
        scale_rank=_scale_rank,
    )
)
