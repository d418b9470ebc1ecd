"""All singular values of a large delta of known ones to which small deltas were added, by counting.

With ``A = U diag(s) V^T + X Y`` (s known, X Y of few components r) the singular values of A are the positive
eigenvalues of ``[[0, A], [A^T, 0]]``, which differs from that of the known part by a matrix of rank 2 r. By
Sylvester's law of inertia the number of them above any t is

    #{s_i > t} + #{positive eigenvalues of M(t)} - r,   M(t) of 2 r x 2 r:

    M(t) = (1/t) [[X^T X, 0], [0, Y Y^T]] - [[0, I], [I, 0]]
           + [[a^T p a, a^T q b], [b^T q a, b^T p b]],   a = U^T X,  b = V^T Y^T,
    p = diag(s^2 / (t (t^2 - s^2))),  q = diag(s / (t^2 - s^2))

which costs a thousandth of a decomposition of A. Values are found between the rungs of a ladder of t, and at
the end all are scaled so that the sum of their squares is the squared norm of A, which is known.

Source: Haynsworth 1968, Determination of the inertia of a partitioned Hermitian matrix; slicing a spectrum by
    inertia: Parlett, The Symmetric Eigenvalue Problem, chapter 3.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .core import NOISE, Spectrum, cancelled, decompose
from .sampled import sampled_values
from .small import as_double, grams, sizes
from .types import LowRank, Mixed

_STEP = 0.03  # Distance of the rungs, as a part of the value.
_FINE, _PARTS = 128, 16  # So many of the largest values are found to such a part of that.
_WEAK = 0.02  # Values below this part of the largest are found to four times that step.
_LARGE = 1536  # Known components from which on computing all values costs more.
_PAYS = (
    1 / 24
)  # Components beside the known ones, as a part of these, up to which counting is the quicker way.


def all_values(delta: LowRank | Mixed) -> Spectrum:
    """A delta's singular values, without what is needed to write it.

    Exact where :func:`decompose` is quick. Otherwise the largest 128 values are right to 0.4 %, the others to
    3 %, those that hardly count to 12 %, and the norm exactly. Of sums of several whole-matrix LoKr see
    :func:`~lib_loramerge.delta.sampled.sampled_values`.
    """
    found = None
    if isinstance(delta, LowRank) and is_counted(delta):
        found = _counted(delta) if _is_small_beside(delta) else sampled_values(delta)
    return found if found is not None else decompose(delta, vectors=False)


def is_counted(delta: LowRank | Mixed) -> bool:
    """Whether :func:`all_values` counts the singular values of a delta instead of computing them."""
    if not isinstance(delta, LowRank) or len(delta.spectra) < 2:
        return False
    return max(_known(delta), default=0) >= _LARGE and (
        delta.structure is not None or _is_small_beside(delta)
    )


def _known(delta: LowRank) -> list[int]:
    """Ranks of the parts whose singular values are known."""
    return [part for part, own in zip(delta.parts, delta.spectra, strict=True) if own is not None]


def _is_small_beside(delta: LowRank) -> bool:
    """Whether one part is known, and the others are few components beside it."""
    known = _known(delta)
    return len(known) == 1 and delta.rank - known[0] <= _PAYS * known[0]


@dataclass(frozen=True, eq=False)
class _Update:
    """The known values, and what of the small deltas M(t) is made of."""

    known: Tensor  # (n,) descending
    a: Tensor  # (n, r)
    b: Tensor  # (n, r)
    left: Tensor  # (r, r) X^T X
    right: Tensor  # (r, r) Y Y^T

    def above(self, t: float) -> int:
        """Number of singular values larger than t > 0."""
        known, r = self.known, self.a.shape[1]
        apart = t * t - known.square()
        apart = torch.where(apart.abs() < 1e-14 * t * t, 1e-14 * t * t, apart)
        q = (known / apart)[:, None]
        p = q * (known / t)[:, None]
        across = self.a.mT @ (q * self.b) - torch.eye(r, dtype=torch.float64)
        small = torch.cat(
            [
                torch.cat([self.left / t + self.a.mT @ (p * self.a), across], 1),
                torch.cat([across.mT, self.right / t + self.b.mT @ (p * self.b)], 1),
            ]
        )
        positive = int((torch.linalg.eigvalsh(small) > 0).sum())
        return max(0, int((known > t).sum()) + positive - r)


def _counted(delta: LowRank) -> Spectrum | None:
    small, gains = grams(delta), delta.component_gains()
    energy, size = (float(found) for found in sizes(small, gains, delta.parts))
    if not math.isfinite(energy) or energy == 0 or cancelled(energy, size):
        return None
    update = _update(delta, small.up, small.down, gains)
    values = _values(update, NOISE * size, energy, min(delta.out, delta.in_))
    values = values * (energy / float(values.square().sum())) ** 0.5
    return Spectrum(values, energy, size)


def _update(delta: LowRank, ups: Tensor, downs: Tensor, gains: Tensor) -> _Update:
    edges = list(itertools.pairwise(itertools.accumulate(delta.parts, initial=0)))
    place = next(index for index, own in enumerate(delta.spectra) if own is not None)
    start, stop = edges[place]
    rest = torch.ones(delta.rank, dtype=torch.bool)
    rest[start:stop] = False
    own = delta.spectra[place]
    assert own is not None
    values, gain = own.cpu().double(), float(gains[start])
    # Known components share the roots of their values; those of no size lead nowhere.
    there = values > 0
    roots = values[there].sqrt()[:, None]
    known = slice(start, stop)
    a = (ups[known][there][:, rest] / roots) * gains[rest]
    b = (downs[known][there][:, rest] / roots) * math.copysign(1.0, gain)
    left = gains[rest][:, None] * ups[rest][:, rest] * gains[rest]
    right = downs[rest][:, rest]
    # X and Y brought to one size, so that rounding harms neither.
    balance = (float(left.diagonal().sum()) / max(float(right.diagonal().sum()), 1e-300)) ** 0.25 or 1.0
    return _Update(
        as_double(values[there] * abs(gain)), a / balance, b * balance, left / balance**2, right * balance**2
    )


def _values(update: _Update, least: float, energy: float, most: int) -> Tensor:
    """(k,) all singular values above ``least``, descending; ``most`` of them at most."""
    top = float(update.known[0]) + (float(update.left.trace()) * float(update.right.trace())) ** 0.5
    top = min(top, energy**0.5) * (1 + 1e-6)
    rungs, counts = [top], [0]
    while rungs[-1] > least and counts[-1] < most:
        step = _STEP if rungs[-1] > _WEAK * top else 4 * _STEP
        high, low = rungs[-1], rungs[-1] / (1 + step)
        found = update.above(low)
        if counts[-1] < min(_FINE, found):
            for part in range(1, _PARTS):
                rungs.append(high / (1 + step) ** (part / _PARTS))
                counts.append(max(counts[-1], min(found, update.above(rungs[-1]))))
        rungs.append(low)
        counts.append(max(counts[-1], found))
    pieces = [torch.zeros(0, dtype=torch.float64)]
    for (high, before), (low, after) in itertools.pairwise(zip(rungs, counts)):
        if after > before:
            inside = (torch.arange(after - before, dtype=torch.float64) + 0.5) / (after - before)
            pieces.append(high * (low / high) ** inside)
    return torch.cat(pieces)[:most]
