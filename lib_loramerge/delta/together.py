"""Layers of one shape through an accelerator together.

The large products run there in batches; the R x R problems run on the processor's cores meanwhile free,
where LAPACK solves hundreds of them faster than an accelerator does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .core import Spectrum, decompose, gram, sums_hold
from .storing import (
    Stored,
    roots_in_range,
    rounding_of_orthogonal,
    store_truncated,
    working_dtype,
    write_layer,
)
from .threads import own_settings, parallel_map
from .types import Dense, Grams, LowRank, Merged, Mixed

_TOGETHER = 32  # Layers in one batch: their float64 copies stay below a few hundred MB.

Choose = Callable[[Spectrum], int]


def write_layers(
    deltas: Sequence[Merged],
    dtype: torch.dtype,
    choose: Sequence[Choose | None],
    *,
    most: Sequence[int | None] | None = None,
    fixed_alpha: bool = False,
    workers: int | None = None,
) -> list[Stored | None]:
    """:func:`write_layer` for several layers, those of one shape together. The tensors come back on the CPU.

    Args:
        deltas: On one device, in any order and of any shapes.
        dtype: Output dtype.
        choose: One rank rule per delta.
        most: For each delta, the largest rank its rule can give, where that is known.
        fixed_alpha: The file has no alpha tensors, so alpha cannot take part of the scale.
        workers: Threads for the small problems.
    """
    results: list[Stored | None] = [None] * len(deltas)
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, (delta, rule) in enumerate(zip(deltas, choose)):
        if not isinstance(delta, Dense) and rule and delta.rank <= min(delta.out, delta.in_):
            groups[type(delta), delta.up.shape, delta.down.shape, delta.up.dtype].append(index)
        else:
            limit = most[index] if most else None
            results[index] = _on_cpu(write_layer(delta, dtype, rule, most=limit, fixed_alpha=fixed_alpha))
    with own_settings():
        for members in groups.values():
            for start in range(0, len(members), _TOGETHER):
                batch = members[start : start + _TOGETHER]
                low = [delta for delta in (deltas[index] for index in batch) if not isinstance(delta, Dense)]
                rules = [rule for rule in (choose[index] for index in batch) if rule]
                for index, stored in zip(batch, _write_batch(low, dtype, rules, workers, fixed_alpha)):
                    results[index] = stored
    return results


def _write_batch(
    deltas: Sequence[LowRank | Mixed],
    dtype: torch.dtype,
    choose: Sequence[Choose],
    workers: int | None,
    fixed_alpha: bool,
) -> list[Stored | None]:
    ups = torch.stack([delta.up for delta in deltas])
    downs = torch.stack([delta.down for delta in deltas])
    small: Sequence[Grams | None] = [None] * len(deltas)  # a mixed delta brings them along
    if isinstance(deltas[0], LowRank):
        small = [Grams(up, down) for up, down in zip(_gram(ups.mT), _gram(downs))]

    def solve(index: int) -> Spectrum:
        return decompose(deltas[index], small=small[index])

    spectra = list(parallel_map(solve, range(len(deltas)), workers=workers))
    by_rank: dict[int, list[int]] = defaultdict(list)
    for index, (spectrum, rule) in enumerate(zip(spectra, choose)):
        by_rank[min(rule(spectrum), spectrum.rank)].append(index)
    results: list[Stored | None] = [None] * len(deltas)
    for rank, members in by_rank.items():
        if rank:
            chosen = [spectra[index] for index in members]
            batch = _store_batch(ups[members], downs[members], chosen, rank, dtype, fixed_alpha)
            for index, stored in zip(members, batch):
                results[index] = stored
    return results


def _store_batch(
    ups: Tensor,
    downs: Tensor,
    spectra: Sequence[Spectrum],
    rank: int,
    dtype: torch.dtype,
    fixed_alpha: bool,
) -> list[Stored]:
    """Truncation and rounding of layers that keep the same rank. Unusual layers go one by one."""
    mixings = [spectrum.mixing(rank) for spectrum in spectra if spectrum.mixing]
    side = max(ups.shape[-2], downs.shape[-1])
    work = torch.float32 if torch.finfo(dtype).bits < 32 else torch.float64
    left = torch.stack([left for left, _ in mixings]).to(work).to(ups.device)
    right = torch.stack([right for _, right in mixings]).to(work).to(ups.device)
    up, down = ups.to(work) @ left, right.mT @ downs.to(work)
    written_up, written_down = up.to(dtype), down.to(dtype)
    every = torch.stack([spectrum.values[:rank] for spectrum in spectra])
    errors, farthest = rounding_of_orthogonal(up, down, written_up, written_down, every)
    written_up, written_down = written_up.cpu(), written_down.cpu()
    results = []
    for index, spectrum in enumerate(spectra):
        values = spectrum.values[:rank]
        usual = working_dtype(spectrum, dtype) == work and roots_in_range(values, side, dtype)
        usual = usual and sums_hold(spectrum, *mixings[index])
        if not (usual and float(farthest[index]) <= torch.finfo(dtype).eps):
            results.append(_moved(store_truncated(spectrum, rank, dtype, fixed_alpha=fixed_alpha)))
            continue
        error_sq = spectrum.tail(rank) + max(0.0, float(errors[index]))
        factors = written_up[index].clone(), written_down[index].clone()
        kernel = spectrum.source.kernel if spectrum.source else ()
        results.append(Stored(*factors, float(rank), kernel, error_sq, spectrum.energy))
    return results


def _gram(rows: Tensor) -> Tensor:
    return gram(rows).cpu()


def _on_cpu(stored: Stored | None) -> Stored | None:
    return None if stored is None else _moved(stored)


def _moved(stored: Stored) -> Stored:
    return Stored(
        stored.up.cpu(), stored.down.cpu(), stored.alpha, stored.kernel, stored.error_sq, stored.exact_sq
    )
