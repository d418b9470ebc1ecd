"""Layers that a file holds under two spellings: once where both say the same, an error where not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import adapters, dialects
from ..delta import Delta, place_rows, relative_error, take_rows
from ..errors import IncompatibleError, Sentence
from ..files import LoraFile

if TYPE_CHECKING:
    from .sources import SourcePart

# Two spellings that a tool wrote from the same numbers differ by no more than the rounding of a half.
_SAME = 1e-3


def one_spelling(path: Path, layer: str, parts: Sequence[SourcePart]) -> tuple[list[SourcePart], str | None]:
    """The parts of a layer, each row of it once, and a note of the spelling that was left out.

    Reads tensors only of layers that the file holds twice.

    Raises:
        IncompatibleError: The two spellings hold different numbers.
    """
    groups: list[list[SourcePart]] = []
    for part in parts:
        for group in groups:
            if not any(dialects.overlap(part.part.rows, other.part.rows) for other in group):
                group.append(part)
                break
        else:
            groups.append([part])
    if len(groups) < 2:
        return list(parts), None
    groups.sort(key=_covered, reverse=True)
    first, others = groups[0], [part for group in groups[1:] for part in group]
    with LoraFile(path) as file:
        for part in others:
            _compare(file, path, layer, first, part)
    shown = others[0].part.spelling
    return first, Sentence(
        "{spelling} repeats {other_spelling} with the same numbers and counts once.",
        shown,
        first[0].part.spelling,
    )


def _covered(parts: Sequence[SourcePart]) -> float:
    return sum(1.0 if part.part.rows is None else part.part.rows.units / part.part.rows.of for part in parts)


def _compare(file: LoraFile, path: Path, layer: str, first: Sequence[SourcePart], other: SourcePart) -> None:
    beside = [part for part in first if dialects.overlap(part.part.rows, other.part.rows)]
    if any(part.facts.needs_base for part in (*beside, other)):
        same = len(beside) == 1 and _same_tensors(file, beside[0], other)
    else:
        same = _same_change(file, path, beside, other)
    if not same:
        raise IncompatibleError(
            "{file}: the file holds one layer twice, as {spelling} and as {other_spelling}, with different "
            "numbers. Remove one of the two, or load each in a file of its own.",
            path.name,
            beside[0].part.spelling,
            other.part.spelling,
        )


def _same_tensors(file: LoraFile, first: SourcePart, other: SourcePart) -> bool:
    slots, theirs = first.part.slots, other.part.slots
    return slots.keys() == theirs.keys() and all(
        torch.allclose(file.read(slots[slot]), file.read(theirs[slot]), rtol=_SAME) for slot in slots
    )


def _same_change(file: LoraFile, path: Path, first: Sequence[SourcePart], other: SourcePart) -> bool:
    changes = [_change(file, path, part) for part in (*first, other)]
    weights = [weight for weight, _ in changes]
    biases = [bias for _, bias in changes]
    if any((weight is None) != (weights[0] is None) for weight in weights):
        return False
    return _equal(weights, first, other) and all(
        (bias is None) == (biases[0] is None) and (bias is None or _close(bias, biases[0])) for bias in biases
    )


def _close(first: Tensor, other: Tensor | None) -> bool:
    return (
        other is not None
        and first.shape == other.shape
        and torch.allclose(first, other, rtol=_SAME, atol=1e-7)
    )


def _change(file: LoraFile, path: Path, part: SourcePart) -> tuple[Delta | None, Tensor | None]:
    slots = {slot: file.read(key) for slot, key in part.part.slots.items()}
    built = adapters.build(slots, where=f"{path.name}: {part.part.spelling}", kernel=part.kernel)
    if part.taken is None or built.weight is None:
        return built.weight, built.bias
    bias = None if built.bias is None else torch.cat([built.bias[a:b] for a, b in part.taken])
    return take_rows(built.weight, part.taken), bias


def _equal(weights: Sequence[Delta | None], first: Sequence[SourcePart], other: SourcePart) -> bool:
    """Whether the other spelling has the rows that the first ones have of its part of the layer."""
    from ..delta import weighted_sum

    placed = []
    for weight, part in zip(weights, (*first, other), strict=True):
        if weight is None:
            return True
        placed.append(
            weight if part.spans is None or part.out is None else place_rows(weight, part.spans, part.out)
        )
    whole = weighted_sum(placed[:-1], [1.0] * len(first))
    if other.spans is not None:
        whole, last = take_rows(whole, other.spans), take_rows(placed[-1], other.spans)
    else:
        last = placed[-1]
    difference, size = relative_error(last, whole)
    return difference <= _SAME**2 * size
