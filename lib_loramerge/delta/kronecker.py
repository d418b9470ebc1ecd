"""Whole-matrix LoKr and sums with it, without their large factors.

``a kron b`` of (m, n) and (p, q) has mp x nq numbers and min(mp, nq) components, but a product with it takes
two small ones, its singular values and vectors are the products of those of a and b, and inner products of
two of equal form are ``<a1, a2> <b1, b2>``.

Source: Van Loan 2000, The ubiquitous Kronecker product, https://doi.org/10.1016/S0377-0427(00)00393-9.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .types import LowRank

_CHUNK = 1 << 20  # Numbers of a matrix that are formed at once.


@dataclass(frozen=True, eq=False)
class Kronecker:
    """``a kron b`` in its components: u, s and v are their singular vectors and values, all float64.

    Attributes:
        u, v: Of a and of b, (m, r) (p, t) and (n, r) (q, t).
        chosen: (R,) and (R,) int64, which of a's and which of b's each component is; their products fall.
        values: (R,) singular values of the components.
        dtype: Of the large factors, where they are made after all.
    """

    a: Tensor
    b: Tensor
    u: tuple[Tensor, Tensor]
    v: tuple[Tensor, Tensor]
    chosen: tuple[Tensor, Tensor]
    values: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, components and columns."""
        return (
            self.a.shape[0] * self.b.shape[0],
            self.values.shape[0],
            self.a.shape[1] * self.b.shape[1],
        )

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        held = (self.a, self.b, *self.u, *self.v, *self.chosen, self.values)
        return sum(one.numel() * one.element_size() for one in held)

    def factor(self, name: str, rank: int | None = None) -> Tensor:
        """The first columns of ``up``, or rows of ``down``; both have the roots of the values in them."""
        i, j = (index[:rank] for index in self.chosen)
        root = self.values[:rank].sqrt()
        one, two = self.u if name == "up" else self.v
        if name == "up":
            one, two = one[:, i].to(self.dtype), (two[:, j] * root).to(self.dtype)
            return (one[:, None] * two[None]).flatten(0, 1)
        one, two = one.mT[i].to(self.dtype), (two.mT[j] * root[:, None]).to(self.dtype)
        return (one[:, :, None] * two[:, None, :]).flatten(1)

    def along(self, name: str, columns: Tensor) -> Tensor:
        """(R, c) float64: products of columns with the singular vectors, left ones for ``up``."""
        one, two = self.u if name == "up" else self.v
        i, j = self.chosen
        return _times(one.mT, two.mT, columns.double())[i * two.shape[1] + j]

    def coordinates(self, name: str, columns: Tensor) -> Tensor:
        """(R, c) float64: ``up^T columns``, or ``down columns``."""
        return self.along(name, columns) * self.values.sqrt()[:, None]

    def shared(self, name: str, other: Kronecker) -> float:
        """Sum of the squared products of the singular vectors of two of equal form."""
        mine, theirs = (self.u, other.u) if name == "up" else (self.v, other.v)
        small, large = ((one.mT @ two).square() for one, two in zip(mine, theirs))
        there = []
        for one, basis in ((self, mine), (other, theirs)):
            mask = torch.zeros(basis[0].shape[1], basis[1].shape[1], dtype=torch.float64)
            mask[one.chosen] = 1.0
            there.append(mask)
        return float((small * (there[0] @ large @ there[1].mT)).sum())

    def across(self, name: str, other: Kronecker) -> Tensor:
        """(R, S) float64: ``up^T other.up``, or ``down other.down^T``, of two of equal form."""
        mine, theirs = (self.u, other.u) if name == "up" else (self.v, other.v)
        small, large = (one.mT @ two for one, two in zip(mine, theirs))
        (i, j), (others_i, others_j) = self.chosen, other.chosen
        found = small[i][:, others_i] * large[j][:, others_j]
        return found.mul_(self.values.sqrt()[:, None]).mul_(other.values.sqrt())

    def times(self, columns: Tensor) -> Tensor:
        """``(a kron b) columns``, in the dtype of these."""
        return _times(self.a.to(columns.dtype), self.b.to(columns.dtype), columns)

    def transposed_times(self, columns: Tensor) -> Tensor:
        return _times(self.a.mT.to(columns.dtype), self.b.mT.to(columns.dtype), columns)

    def rows(self, start: int, stop: int, step: int = 1) -> Tensor:
        """Some rows of the matrix, float64."""
        index = torch.arange(start, stop, step)
        one, two = self.a[index // self.b.shape[0]], self.b[index % self.b.shape[0]]
        return (one[:, :, None] * two[:, None, :]).flatten(1)

    def inner(self, other: Kronecker) -> float:
        if self.a.shape == other.a.shape:
            return float((self.a * other.a).sum() * (self.b * other.b).sum())
        rows, _, columns = self.shape
        step = max(1, _CHUNK // columns)
        spans = [(start, min(rows, start + step)) for start in range(0, rows, step)]
        return sum(float((self.rows(*span) * other.rows(*span)).sum()) for span in spans)

    def negated(self) -> Kronecker:
        return Kronecker(
            -self.a, self.b, (-self.u[0], self.u[1]), self.v, self.chosen, self.values, self.dtype
        )


@dataclass(frozen=True, eq=False)
class Terms:
    """A sum of deltas side by side: the components of the one after those of the other."""

    terms: Sequence[LowRank]

    @property
    def shape(self) -> tuple[int, int, int]:
        first = self.terms[0]
        return first.out, sum(term.rank for term in self.terms), first.in_

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        held = [term.structure or (term.up, term.down) for term in self.terms]
        return sum(
            sum(factor.numel() * factor.element_size() for factor in one)
            if isinstance(one, tuple)
            else one.size
            for one in held
        )

    def factor(self, name: str, rank: int | None = None) -> Tensor:
        if len(self.terms) == 1 and self.terms[0].structure is not None:
            return self.terms[0].structure.factor(name, rank)
        factors = [term.up if name == "up" else term.down for term in self.terms]
        return torch.cat(factors, dim=1)[:, :rank] if name == "up" else torch.cat(factors)[:rank]


Structure = Kronecker | Terms


@dataclass(frozen=True, eq=False)
class Operator:
    """A structured delta as a linear map, in float32 or float64 as what it is applied to."""

    terms: Sequence[LowRank]

    @cached_property
    def products(self) -> Tensor:
        """(n, n) float64: inner products of the terms."""
        return torch.tensor([[inner(a, b) for b in self.terms] for a in self.terms], dtype=torch.float64)

    @property
    def energy(self) -> float:
        """Squared norm of the sum."""
        return float(self.products.sum())

    @property
    def size(self) -> float:
        """Sum of the norms of the terms."""
        return float(self.products.diagonal().clamp(min=0).sqrt().sum())

    def times(self, right: Tensor) -> Tensor:
        """The delta times (in, c)."""
        return sum((_term_times(term, right) for term in self.terms[1:]), _term_times(self.terms[0], right))

    def onto(self, left: Tensor) -> Tensor:
        """``left^T`` times the delta, (c, in), of (out, c)."""
        found = [_term_onto(term, left) for term in self.terms]
        return sum(found[1:], found[0])


def operator(delta: LowRank) -> Operator | None:
    """A delta that has structure as a linear map; None for any other."""
    return None if delta.structure is None else Operator(terms_of(delta))


def terms_of(delta: LowRank) -> Sequence[LowRank]:
    """What a sum with structure is the sum of; of any other delta itself."""
    return delta.structure.terms if isinstance(delta.structure, Terms) else [delta]


def inner(a: LowRank, b: LowRank) -> float:
    """Frobenius inner product of two terms."""
    one, two = a.structure, b.structure
    if isinstance(one, Kronecker) and isinstance(two, Kronecker):
        return one.inner(two) * a.gain * b.gain
    if isinstance(one, Kronecker):
        right = b.down.double().mT * b.component_gains()
        return float((one.times(right) * b.up.double()).sum()) * a.gain
    if isinstance(two, Kronecker):
        return inner(b, a)
    left = a.component_gains()[:, None] * b.component_gains()
    products = (a.up.double().mT @ b.up.double()) * (a.down.double() @ b.down.double().mT)
    return float((products * left).sum())


def _term_times(term: LowRank, right: Tensor) -> Tensor:
    if isinstance(term.structure, Kronecker):
        return term.structure.times(right) * term.gain
    gains = term.component_gains().to(right.dtype)
    return term.up.to(right.dtype) @ (gains[:, None] * (term.down.to(right.dtype) @ right))


def _term_onto(term: LowRank, left: Tensor) -> Tensor:
    if isinstance(term.structure, Kronecker):
        return (term.structure.transposed_times(left) * term.gain).mT
    gains = term.component_gains().to(left.dtype)
    return ((left.mT @ term.up.to(left.dtype)) * gains) @ term.down.to(left.dtype)


def _times(a: Tensor, b: Tensor, columns: Tensor) -> Tensor:
    """``(a kron b) columns`` of (nq, c)."""
    (m, n), (p, q), count = a.shape, b.shape, columns.shape[1]
    inside = columns.reshape(n, q, count).transpose(0, 1).reshape(q, n * count)
    inside = (b @ inside).reshape(p, n, count).transpose(0, 1).reshape(n, p * count)
    return (a @ inside).reshape(m * p, count)
