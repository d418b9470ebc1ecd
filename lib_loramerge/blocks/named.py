"""Block weights by name: ``D00-D07:0.5,S*:1,BASE:0``, with ``=`` in place of ``:`` where that is clearer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lib_loramerge.block_lists import TEXT_ENCODERS, in_ranges
from lib_loramerge.errors import RecipeError
from lib_loramerge.recipe import nearest_hint
from lib_loramerge.recipe.check import shown

if TYPE_CHECKING:
    from lib_loramerge.models import BlockMap

_MARK = re.compile(r"[:=]")


@dataclass(frozen=True)
class NamedWeight:
    """One entry: what it names, its weight as written, and the blocks that no later entry names again."""

    text: str
    weight: str
    blocks: tuple[str, ...]


def parts(text: str) -> list[str]:
    """The parts between commas and line ends, without empty ones."""
    return [part.strip() for part in re.split(r"[,\r\n]", text) if part.strip()]


def is_elemental(text: str) -> bool:
    """Whether a text holds elemental rules, which have two colons each."""
    return any(part.count(":") > 1 for part in parts(text))


def is_named(text: str) -> bool:
    """Whether a text gives block weights by name."""
    return not is_elemental(text) and _MARK.search(text) is not None


def split_named(text: str, what: str) -> list[tuple[str, str]]:
    """(blocks, weight) of each entry, as written.

    Raises:
        RecipeError: An entry without exactly one ``:`` or ``=``, or with nothing on one side of it.
    """
    found = []
    for part in parts(text):
        sides = [side.strip() for side in _MARK.split(part)]
        if len(sides) != 2 or not all(sides):
            raise RecipeError(
                "{what}: an entry by name is BLOCKS:WEIGHT, such as B00-B07:0.5, got {part}.",
                what,
                shown(part),
            )
        found.append((sides[0], sides[1]))
    return found


def by_name(text: str, model: BlockMap, what: str) -> list[NamedWeight]:
    """The entries of ``text`` with their blocks of a base model; of two for one block the later counts.

    Raises:
        RecipeError: A name that is no block of the model, an entry whose blocks all have a later one.
    """
    found: list[NamedWeight] = []
    later: set[str] = set()
    for name, weight in reversed(split_named(text, what)):
        own = tuple(block for block in blocks_of(name, model, what) if block not in later)
        if not own:
            raise RecipeError(
                "{what}: {name} has no effect, since later entries name all of its blocks.", what, shown(name)
            )
        later.update(own)
        found.append(NamedWeight(name, weight, own))
    return found[::-1]


def blocks_of(name: str, model: BlockMap, what: str) -> Sequence[str]:
    """The blocks of ``D03``, ``D00-D07`` (either order), ``S*`` or ``*``; ``BASE`` is all text encoders.

    Raises:
        RecipeError: No block of the model is called so.
    """
    ids = model.ids
    encoders = [block for block in ids if block in TEXT_ENCODERS]
    if name == "BASE" and encoders:
        return encoders
    if name == "*":
        return ids
    if name.endswith("*"):
        # Numbers alone stand for the star: B* is not BASE.
        stem = name[:-1]
        found = [
            block for block in ids if block.startswith(stem) and block[len(stem) :].strip("0123456789") == ""
        ]
    elif "-" in name:
        first, _, last = (end.strip() for end in name.partition("-"))
        found = []
        if first in ids and last in ids:
            low, high = sorted((ids.index(first), ids.index(last)))
            found = list(ids[low : high + 1])
    else:
        found = [name] if name in ids else []
    if not found:
        raise RecipeError(
            "{what}: {name} names no block of {model}, which has {ids}.{hint}",
            what,
            shown(name),
            model.label,
            in_ranges(ids),
            nearest_hint(name, ids),
        )
    return found


def fits(text: str, model: BlockMap) -> bool:
    """Whether every entry names blocks of a base model."""
    try:
        return bool(by_name(text, model, model.label))
    except RecipeError:
        return False
