"""Layers of one shape written together.

A layer asks for hundreds of short operations, and between them Python's threads wait for each other: done for
several layers at once they leave the cores, or the accelerator, to the arithmetic. The R x R problems are
solved on the CPU in any case, where LAPACK is faster than an accelerator.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import OutputError
from .core import CANCELLED, NOISE, SINGULAR, Spectrum, decompose, gram, lost_of_parts, mixings_fit, sums_hold
from .settings import own_settings
from .storing import (
    Stored,
    doubtless,
    not_negative,
    roots_in_range,
    rounding_of_orthogonal,
    store_truncated,
    working_dtype,
    write_layer,
)
from .types import Grams, LowRank, Merged, Mixed

Choose = Callable[[Spectrum], int]


def write_layers(
    deltas: Sequence[Merged],
    dtype: torch.dtype,
    choose: Sequence[Choose | None],
    *,
    names: Sequence[str] = (),
    most: Sequence[int | None] = (),
    fixed_alpha: bool = False,
) -> list[Stored | None]:
    """:func:`write_layer` for several layers, those of one shape together. The tensors come back on the CPU.

    Args:
        deltas: On one device, in any order and of any shapes.
        dtype: Output dtype.
        choose: One rank rule per delta.
        names: Of the layers, for messages.
        most: For each delta, the largest rank its rule can give, where that is known.
        fixed_alpha: The file has no alpha tensors, so alpha cannot take part of the scale.

    Raises:
        OutputError: A layer is too large for this dtype.
    """
    results: list[Stored | None] = [None] * len(deltas)
    with own_settings():
        for members in _batches(deltas, choose):
            if len(members) == 1:
                (index,) = members
                limit = most[index] if most else None
                with _named(names, index):
                    stored = write_layer(
                        deltas[index], dtype, choose[index], most=limit, fixed_alpha=fixed_alpha
                    )
                results[index] = stored and _moved(stored)
                continue
            batch = _Batch.of([deltas[index] for index in members])
            ranks = defaultdict(list)
            for place, spectrum in enumerate(batch.spectra):
                rule = choose[members[place]]
                assert rule is not None
                ranks[min(rule(spectrum), spectrum.rank)].append(place)
            for rank, places in ranks.items():
                for place, stored in zip(places, _stored(batch, places, rank, dtype), strict=True):
                    if stored is None and rank:
                        with _named(names, members[place]):
                            spectrum = batch.spectra[place]
                            stored = store_truncated(spectrum, rank, dtype, fixed_alpha=fixed_alpha)
                            stored = stored and _moved(stored)
                    results[members[place]] = stored
    return results


@contextmanager
def _named(names: Sequence[str], index: int) -> Iterator[None]:
    try:
        yield
    except OutputError as error:
        raise OutputError(f"{names[index]}: {error}" if names else str(error)) from error


def _batches(deltas: Sequence[Merged], choose: Sequence[Choose | None]) -> Iterator[list[int]]:
    """Which deltas go together: low-rank ones of one shape; all others alone."""
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, (delta, rule) in enumerate(zip(deltas, choose, strict=True)):
        if isinstance(delta, LowRank | Mixed) and rule and 0 < delta.rank <= min(delta.out, delta.in_):
            parts = delta.parts if isinstance(delta, LowRank) else ()
            factors = delta.up.shape, delta.up.dtype, delta.down.shape, delta.down.dtype
            groups[type(delta), parts, delta.rank, factors].append(index)
        else:
            yield [index]
    yield from groups.values()


@dataclass(frozen=True, eq=False)
class _Batch:
    """Low-rank deltas of one shape.

    Attributes:
        ups, downs: (n, out, R) and (n, R, in), on the deltas' device.
        spectra: One per delta.
        solved: What the spectra of the usual ones were made of; None for mixed deltas.
    """

    ups: Tensor
    downs: Tensor
    spectra: Sequence[Spectrum]
    solved: _Solved | None

    @classmethod
    def of(cls, deltas: Sequence[Merged]) -> _Batch:
        low = [delta for delta in deltas if isinstance(delta, LowRank | Mixed)]
        ups, downs = torch.stack([delta.up for delta in low]), torch.stack([delta.down for delta in low])
        plain = [delta for delta in low if isinstance(delta, LowRank)]
        if len(plain) < len(low):
            return cls(ups, downs, [decompose(delta) for delta in low], None)
        small = Grams(gram(ups.mT).cpu(), gram(downs).cpu())
        solved = _solve(plain, small)
        return cls(ups, downs, [solved.spectrum(index) for index in range(len(plain))], solved)

    def mixings(self, places: Sequence[int], rank: int) -> tuple[Tensor, Tensor]:
        """(n, R, rank) each: the deltas' best approximations are ``ups @ left`` and ``right^T @ downs``."""
        if self.solved is not None:
            return self.solved.mixings(places, rank)
        pairs = [mixing(rank) for mixing in (self.spectra[place].mixing for place in places) if mixing]
        return torch.stack([left for left, _ in pairs]), torch.stack([right for _, right in pairs])

    def lost(self, places: Sequence[int], mixings: tuple[Tensor, Tensor]) -> Tensor | None:
        """What cuts take from the parts of sums; see ``lost_of_parts``. None for mixed deltas."""
        if self.solved is None:
            return None
        deltas, small = self.solved.deltas, self.solved.small
        gains = torch.stack([deltas[place].component_gains() for place in places])
        if len(deltas[0].parts) < 2:
            return None
        return lost_of_parts(Grams(small.up[places], small.down[places]), gains, deltas[0].parts, *mixings)

    def usual(self, place: int) -> bool:
        """Whether the delta may be truncated with the others."""
        return self.solved is None or place in self.solved.row


@dataclass(frozen=True, eq=False)
class _Solved:
    """:func:`decompose` of several deltas, which is told there.

    Attributes:
        deltas: All of them, and
        small: their Gram matrices, (n, R, R) float64 on the CPU.
        row: Where a delta is in what follows. Those whose rows depend on each other are not there.
        energy, size: (k,) squared norms, and sizes of the inputs.
        values: (k, R) falling, 0 where there is only noise.
        low, weighted, q: (k, R, R) float64.
    """

    deltas: Sequence[LowRank]
    small: Grams
    row: dict[int, int]
    energy: list[float]
    size: list[float]
    counts: list[int]
    values: Tensor
    low: Tensor
    weighted: Tensor
    q: Tensor

    def spectrum(self, place: int) -> Spectrum:
        if place not in self.row:
            small = Grams(self.small.up[place], self.small.down[place])
            return decompose(self.deltas[place], small=small)
        row = self.row[place]

        def mixing(rank: int) -> tuple[Tensor, Tensor]:
            left, right = self.mixings([place], rank)
            return left[0], right[0]

        values, size = self.values[row, : self.counts[row]], self.size[row]
        doubt = (self.values.shape[1] - self.counts[row]) * (NOISE * size) ** 2
        several = len(self.deltas[place].parts) > 1
        own = Grams(self.small.up[place], self.small.down[place]) if several else None
        return Spectrum(values, self.energy[row], size, self.deltas[place], mixing, doubt=doubt, small=own)

    def mixings(self, places: Sequence[int], rank: int) -> tuple[Tensor, Tensor]:
        rows = [self.row[place] for place in places]
        first = self.q[rows, :, self.q.shape[-1] - rank :].flip(-1)
        root = self.values[rows, None, :rank].sqrt()
        left = self.weighted[rows] @ (first / root)
        return left, torch.linalg.solve_triangular(self.low[rows].mT, first * root, upper=True)


def _solve(deltas: Sequence[LowRank], small: Grams) -> _Solved:
    gains = torch.stack([delta.component_gains() for delta in deltas])
    low, info = torch.linalg.cholesky_ex(small.down)
    lengths = small.down.diagonal(dim1=-2, dim2=-1).sqrt()
    pivots = low.diagonal(dim1=-2, dim2=-1)
    product = gains[:, :, None] * small.up * small.down * gains[:, None, :]
    energy = product.sum((-2, -1)).clamp(min=0)
    edges = itertools.pairwise(itertools.accumulate(deltas[0].parts, initial=0))
    own = [product[:, start:stop, start:stop].sum((-2, -1)).clamp(min=0).sqrt() for start, stop in edges]
    size = torch.stack(own).sum(0) if len(own) > 1 else energy.sqrt()
    usual = (info == 0) & (pivots >= SINGULAR * lengths).all(-1)
    usual &= energy.isfinite() & (energy > (CANCELLED * size) ** 2)
    places = usual.nonzero().flatten().tolist()
    low, gains, up, energy, size = low[usual], gains[usual], small.up[usual], energy[usual], size[usual]
    weighted = gains[:, :, None] * low
    squares, q = torch.linalg.eigh(weighted.mT @ up @ weighted)
    values = squares.clamp(min=0).sqrt().flip(-1)
    real = values > NOISE * size[:, None]
    return _Solved(
        deltas=deltas,
        small=small,
        row={place: row for row, place in enumerate(places)},
        energy=energy.tolist(),
        size=size.tolist(),
        counts=real.sum(-1).tolist(),
        values=values * real,
        low=low,
        weighted=weighted,
        q=q,
    )


def _stored(batch: _Batch, places: Sequence[int], rank: int, dtype: torch.dtype) -> list[Stored | None]:
    """Truncation and rounding of deltas that keep the same rank; None for those that have to go alone."""
    results: dict[int, Stored] = {}
    work = torch.float32 if torch.finfo(dtype).bits < 32 else torch.float64
    together = [place for place in places if rank and batch.usual(place)]
    together = [place for place in together if working_dtype(batch.spectra[place], dtype) == work]
    if together:
        whole = len(together) == len(batch.spectra)
        ups, downs = (batch.ups, batch.downs) if whole else (batch.ups[together], batch.downs[together])
        mixings = batch.mixings(together, rank)
        if not mixings_fit(*mixings):
            return [None] * len(places)
        left, right = (mixing.to(work).to(ups.device) for mixing in mixings)
        up, down = ups.to(work) @ left, right.mT @ downs.to(work)
        written = up.to(dtype), down.to(dtype)
        spectra = [batch.spectra[place] for place in together]
        values = torch.stack([spectrum.values[:rank] for spectrum in spectra])
        errors, farthest = (found.tolist() for found in rounding_of_orthogonal(up, down, *written, values))
        written = written[0].cpu(), written[1].cpu()
        side = max(ups.shape[-2], downs.shape[-1])
        lost = batch.lost(together, mixings)
        for row, (place, spectrum) in enumerate(zip(together, spectra, strict=True)):
            fits = roots_in_range(spectrum.values[:rank], side, dtype)
            holds = sums_hold(spectrum, mixings[0][row], mixings[1][row])
            error_sq = spectrum.tail(rank) + not_negative(errors[row])
            sure = doubtless(spectrum, error_sq) and farthest[row] <= torch.finfo(dtype).eps
            if fits and holds and sure:
                kernel = spectrum.source.kernel if spectrum.source else ()
                factors = written[0][row].clone(), written[1][row].clone()
                taken = None if lost is None else lost[row]
                results[place] = Stored(*factors, float(rank), kernel, error_sq, spectrum.energy, taken)
    return [results.get(place) for place in places]


def _moved(stored: Stored) -> Stored:
    return replace(stored, up=stored.up.cpu(), down=stored.down.cpu())
