"""Norms, inner products and distances of deltas, without forming a low-rank one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kronecker import Kronecker, operator, terms_of
from .kronecker import inner as inner_of_terms
from .small import gram, grams, whitener
from .types import Delta, Dense, Grams, LowRank, stack

_EXACT_BELOW = 1e-8  # Squared relative distance under which the Gram form would lose digits to cancellation.


def norm(delta: Delta) -> float:
    """Frobenius norm of a delta weight."""
    return math.sqrt(max(0.0, inner(delta, delta)))


def inner(a: Delta, b: Delta) -> float:
    """Frobenius inner product ``sum(a * b)``, in float64, of two deltas on one device."""
    if a is b and isinstance(a, LowRank) and len(a.spectra) == 1 and a.spectra[0] is not None:
        return float((a.spectra[0].cpu() * a.component_gains()).square().sum())
    if isinstance(a, LowRank) and isinstance(b, LowRank) and (operator(a) or operator(b)):
        return sum(inner_of_terms(one, two) for one in terms_of(a) for two in terms_of(b))
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        left = a.component_gains()[:, None] * b.component_gains()
        return float((cross(a.up.mT, b.up.mT) * cross(a.down, b.down) * left.to(a.up.device)).sum())
    if isinstance(a, LowRank):
        return inner(b, a)
    weight = a.weight.double()
    if isinstance(b, Dense):
        return float((weight * b.weight.double()).sum())
    gains = b.component_gains().to(weight.device)
    return float((((weight @ b.down.double().mT) * b.up.double()).sum(0) * gains).sum())


def cross(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b^T`` in float64 of rows (r, n) and (s, n)."""
    return a.double() @ b.double().mT


def inner_products(deltas: Sequence[Delta]) -> Tensor:
    """(n, n) float64 on the CPU: the Frobenius inner product of each two deltas of one shape."""
    low = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(low) < len(deltas) or any(operator(delta) for delta in low):
        rows = [[inner(a, b) for b in deltas] for a in deltas]
        return torch.tensor(rows, dtype=torch.float64)
    whole = stack(low, [1.0] * len(low))
    return _products_of_parts(grams(whole), whole.component_gains(), _places(low))


@dataclass(frozen=True, eq=False)
class Overlaps:
    """How much the deltas of one layer have to do with each other: (n, n) float64 on the CPU each.

    Attributes:
        products: Frobenius inner products.
        inputs: Mean squared cosine of the principal angles of their row spaces, 0 (they look at different
            features) to 1 (at the same); NaN where one of the two is dense.
        outputs: The same of their column spaces: whether they write to the same features.
    """

    products: Tensor
    inputs: Tensor
    outputs: Tensor


def overlaps(deltas: Sequence[Delta]) -> Overlaps:
    """Similarity of each pair of deltas of one layer, from one pass over the factors of low-rank ones."""
    low = [index for index, delta in enumerate(deltas) if isinstance(delta, LowRank)]
    inputs, outputs = torch.full((2, len(deltas), len(deltas)), math.nan, dtype=torch.float64)
    if not low:
        return Overlaps(inner_products(deltas), inputs, outputs)
    parts = [delta for delta in deltas if isinstance(delta, LowRank)]
    if any(delta.structure is not None for delta in parts):
        for (i, a), (j, b) in itertools.combinations_with_replacement(zip(low, parts), 2):
            inputs[i, j] = inputs[j, i] = _shared_space("down", a, b)
            outputs[i, j] = outputs[j, i] = _shared_space("up", a, b)
        return Overlaps(inner_products(deltas), inputs, outputs)
    whole = stack(parts, [1.0] * len(parts))
    small, places = grams(whole), _places(parts)
    inputs[_square(low)], outputs[_square(low)] = _shared(small.down, places), _shared(small.up, places)
    if len(low) < len(deltas):
        return Overlaps(inner_products(deltas), inputs, outputs)
    return Overlaps(_products_of_parts(small, whole.component_gains(), places), inputs, outputs)


def norms_outside(whole: Delta | None, part: Delta) -> tuple[float, float]:
    """Squared norm of what of ``part`` lies outside the column and row spaces of ``whole``, and of all of it.

    What was merged into ``whole`` lies inside, but for what a rank cut off. Nothing is outside a matrix that
    is no low-rank one, and everything outside None.
    """
    size = max(0.0, inner(part, part))
    if whole is None:
        return size, size
    if not isinstance(whole, LowRank) or whole.structure is not None:
        return 0.0, size
    if isinstance(part, LowRank) and part.structure is None:
        both = stack([whole, part], [1.0, 1.0])
        small, (first, second) = grams(both), _places([whole, part])
        up, down = (
            whitener(square[first, first]).mT @ square[first, second] for square in (small.up, small.down)
        )
        inside = (up * part.component_gains().cpu()) @ down.mT
    else:
        matrix = part.weight if isinstance(part, Dense) else part.dense()
        left, right = whole.up.double(), whole.down.double()
        across = left.mT @ matrix.reshape(len(left), -1).double() @ right.mT
        inside = whitener(gram(left.mT).cpu()).mT @ across.cpu() @ whitener(gram(right).cpu())
    return max(0.0, size - float(inside.square().sum())), size


def sampled_rows(delta: Delta, rows: int = 64) -> Tensor:
    """About ``rows`` rows of a delta weight, evenly spread, (n, in * kh * kw) float32."""
    step = max(1, delta.out // rows)
    if isinstance(delta, LowRank) and isinstance(delta.structure, Kronecker):
        return (delta.structure.rows(0, delta.out, step) * delta.gain).float()
    if isinstance(delta, Dense):
        return delta.weight[::step].float()
    up = delta.up[::step].double() * delta.component_gains().to(delta.up.device)
    return up.float() @ delta.down.float()


def conflict_of(first: Tensor, second: Tensor) -> float:
    """Share of elements, weighted by ``|a b|``, in which two matrices have opposite signs.

    0.5 is what unrelated matrices give.
    """
    product = first * second
    total, size = float(product.sum()), float(product.abs_().sum())
    return min(1.0, max(0.0, (size - total) / (2 * size))) if size > 0 else 0.0


def relative_error(exact: Delta, written: Delta) -> tuple[float, float]:
    """Squared distance of ``written`` from ``exact``, and the squared norm of ``exact``.

    Both on one device. Squares, so that they can be added over the layers of a file. Low-rank deltas that
    nearly agree go through orthogonal factors, so that a distance of 1e-12 is still right.
    """
    if isinstance(exact, Dense) or isinstance(written, Dense):
        difference = exact.dense() - written.dense()
        return float((difference**2).sum()), inner(exact, exact)
    exact_sq, written_sq = inner(exact, exact), inner(written, written)
    error_sq = exact_sq - 2 * inner(exact, written) + written_sq
    if error_sq < _EXACT_BELOW * max(exact_sq, written_sq):
        error_sq = squared_distance(exact, written)
    return max(0.0, error_sq), max(0.0, exact_sq)


def lost_of_inputs(deltas: Sequence[Delta], weights: Sequence[float], written: Delta | None) -> Tensor:
    """(n, 2) float64: each weighted delta's inner product with their sum less ``written``, and its square.

    Args:
        deltas: Of one shape, on one device.
        weights: One strength per delta.
        written: What was made of them; None for nothing.
    """
    strengths = torch.tensor(weights, dtype=torch.float64)
    products = inner_products(deltas) * strengths[:, None] * strengths
    rest = products.sum(1)
    if written is not None:
        rest = rest - strengths * torch.tensor(
            [inner(delta, written) for delta in deltas], dtype=torch.float64
        )
    return torch.stack([rest, products.diagonal()], 1)


def added_by_components(deltas: Sequence[Delta], weights: Sequence[float], best: LowRank) -> Tensor:
    """(n, k) float64 on the CPU: each weighted delta's inner product with every component of ``best``.

    Args:
        deltas: Of the shape of ``best``, on its device.
        weights: One strength per delta.
    """
    gains, rows = best.component_gains().to(best.up.device), []
    for delta, weight in zip(deltas, weights, strict=True):
        if isinstance(delta, LowRank):
            own = delta.component_gains().to(best.up.device)
            row = own @ (cross(delta.up.mT, best.up.mT) * cross(delta.down, best.down))
        else:
            row = ((delta.weight.double() @ best.down.double().mT) * best.up.double()).sum(0)
        rows.append(weight * row * gains)
    return torch.stack(rows).cpu()


def squared_distance(exact: LowRank, written: LowRank) -> float:
    """Squared Frobenius distance of two low-rank deltas on one device, true also where it is tiny."""
    if exact.rank + written.rank >= min(exact.out, exact.in_):
        return float((exact.dense() - written.dense()).square().sum())
    return _distance_by_qr(exact, written)


def _distance_by_qr(a: LowRank, b: LowRank) -> float:
    gains = [delta.component_gains().to(delta.up.device) for delta in (a, b)]
    left = torch.cat([a.up.double() * gains[0], -b.up.double() * gains[1]], dim=1)
    right = torch.cat([a.down.double(), b.down.double()])
    r_left, r_right = torch.linalg.qr(left, mode="r").R, torch.linalg.qr(right.mT, mode="r").R
    return float(((r_left @ r_right.mT) ** 2).sum())


def _places(deltas: Sequence[LowRank]) -> list[slice]:
    """Where each delta's components are among those of their stack."""
    edges = itertools.accumulate((delta.rank for delta in deltas), initial=0)
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def _square(indices: list[int]) -> tuple[Tensor, Tensor]:
    chosen = torch.tensor(indices)
    return chosen[:, None], chosen


def _products_of_parts(small: Grams, gains: Tensor, places: Sequence[slice]) -> Tensor:
    """Inner products of deltas that were put side by side, from the Gram matrices of all."""
    product = gains[:, None] * small.up * small.down * gains
    owner = torch.zeros(gains.shape[0], len(places), dtype=torch.float64)
    for index, place in enumerate(places):
        owner[place, index] = 1.0
    return owner.mT @ product @ owner


def _shared_space(name: str, a: LowRank, b: LowRank) -> float:
    """Mean squared cosine of the angles between the spaces of two factors, ``up`` or ``down``."""
    one, two = a.structure, b.structure
    if a is b:
        return 1.0 if a.rank else 0.0
    if isinstance(one, Kronecker) and isinstance(two, Kronecker) and one.a.shape == two.a.shape:
        return min(1.0, one.shared(name, two) / min(a.rank, b.rank))
    if not isinstance(one, Kronecker) and isinstance(two, Kronecker):
        return _shared_space(name, b, a)
    columns = _orthonormal(name, b)
    least = min(a.rank if isinstance(one, Kronecker) else columns.shape[1], columns.shape[1])
    if isinstance(one, Kronecker):
        found = one.along(name, columns)
    else:
        own = _orthonormal(name, a)
        least, found = min(least, own.shape[1]), own.mT @ columns
    return min(1.0, float(found.square().sum()) / least) if least else 0.0


def _orthonormal(name: str, delta: LowRank) -> Tensor:
    """Orthonormal columns, float64, that span those of ``up``, or the rows of ``down``."""
    rows = (delta.up.mT if name == "up" else delta.down).double()
    return rows.mT @ whitener(gram(rows))


def _shared(square: Tensor, places: Sequence[slice]) -> Tensor:
    """(n, n) mean squared cosine of the principal angles between each two row spaces.

    Args:
        square: Gram matrix of the rows of all.
        places: Which rows are whose.
    """
    whiteners = [whitener(square[place, place]) for place in places]
    shared = torch.zeros((len(places), len(places)), dtype=torch.float64)
    for i, j in itertools.combinations_with_replacement(range(len(places)), 2):
        least = min(whiteners[i].shape[1], whiteners[j].shape[1])
        if i == j:
            shared[i, i] = 1.0 if least else 0.0
        elif least:
            angles = whiteners[i].mT @ square[places[i], places[j]] @ whiteners[j]
            shared[i, j] = shared[j, i] = min(1.0, float(angles.square().sum()) / least)
    return shared
