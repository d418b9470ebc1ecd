"""Layer names of the diffusion transformers: any spelling to the checkpoint's, and back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from .base import Members, Names, Rows
from .records import ARCHITECTURES

NAMES: dict[str, Names] = {
    record.id: record.names for record in ARCHITECTURES.values() if record.names is not None
}

# A flattened path with a block number: what stands before it, the number and the leaf.
_NUMBER = re.compile(r"(?<=_)\d+(?=_|$)")


@dataclass(frozen=True)
class Spelled:
    """What one flattened spelling means.

    Attributes:
        path: Dotted checkpoint path, with ``{}`` for a block's number.
        flat: The same flattened.
        rows: Which rows of the layer; None for all.
    """

    path: str
    flat: str
    rows: Rows | None


@dataclass(frozen=True)
class _Tables:
    """Flattened spellings of one model, ready for look-ups; templates hold ``{}`` for the number."""

    spellings: Mapping[str, Spelled]
    members: Mapping[str, Members]
    aliases: Mapping[str, tuple[str, ...]]
    apart: frozenset[str]


def flatten(path: str) -> str:
    """A path as kohya's names have it."""
    return path.replace(".", "_").replace("-", "_")


@cache
def _tables(architecture_id: str) -> _Tables | None:
    names = NAMES.get(architecture_id)
    if names is None:
        return None
    spellings: dict[str, Spelled] = {}
    others: dict[str, list[str]] = {}
    for path, (target, rows) in names.aliases.items():
        spellings[flatten(path)] = Spelled(target, flatten(target), rows)
        if rows is None:
            others.setdefault(flatten(target), []).append(path)
    for path, members in names.layers.items():
        for member, rows in members:
            spellings[flatten(member)] = Spelled(path, flatten(path), rows)
    for path in names.layers:
        spellings[flatten(path)] = Spelled(path, flatten(path), None)
    return _Tables(
        spellings,
        {flatten(path): members for path, members in names.layers.items()},
        {target: tuple(paths) for target, paths in others.items()},
        frozenset(one_number(name)[0] for name in spellings if "{}" not in name),
    )


def templates(flat: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A flattened path as it stands, then with its first block number taken out, then with two."""
    yield flat, ()
    for count in (1, 2):
        numbers = _NUMBER.findall(flat)[:count]
        if len(numbers) == count:
            yield _NUMBER.sub("{}", flat, count=count), tuple(numbers)


def one_number(flat: str) -> tuple[str, str]:
    """A flattened path with its first block number taken out, and the number; the path and "" without one."""
    found = _NUMBER.search(flat)
    return (_NUMBER.sub("{}", flat, count=1), found[0]) if found is not None else (flat, "")


def spelled(architecture_id: str, template: str) -> Spelled | None:
    """What a flattened spelling with ``{}`` for the number means in a base model."""
    tables = _tables(architecture_id)
    return tables.spellings.get(template) if tables is not None else None


def may_be_apart(architecture_id: str, template: str) -> bool:
    """Whether a model may have layers of this form that its table lists number by number."""
    tables = _tables(architecture_id)
    return tables is not None and (template in tables.apart or architecture_id == "stable_cascade")


def look_up(architecture_id: str, flat: str) -> tuple[Spelled, tuple[str, ...]] | None:
    """What a flattened spelling means in a base model, and its block numbers; None for no known layer."""
    tables = _tables(architecture_id)
    if tables is None:
        return None
    for template, numbers in templates(flatten(flat)):
        found = tables.spellings.get(template)
        if found is not None:
            return found, numbers
    return None


def resolve(architecture_id: str, flat: str) -> tuple[str, Rows | None] | None:
    """Flattened checkpoint path, and rows of it, for any flattened spelling; None for no known layer."""
    found = look_up(architecture_id, flat)
    return (found[0].flat.format(*found[1]), found[0].rows) if found is not None else None


def _of_path(architecture_id: str, flat: str) -> tuple[Spelled, tuple[str, ...]] | None:
    """Like ``look_up``, for canonical paths alone."""
    found = look_up(architecture_id, flat)
    return found if found is not None and found[0].flat.format(*found[1]) == flat else None


def dotted_path(architecture_id: str, flat: str) -> str | None:
    """Dotted form of a flattened checkpoint path, as hosts have it; None for no known layer."""
    found = _of_path(architecture_id, flat)
    return found[0].path.format(*found[1]) if found is not None else None


def is_parameter(architecture_id: str, flat: str) -> bool:
    """Whether a path is a tensor that is no module's weight; hosts know these by dotted names alone."""
    found = _of_path(architecture_id, flat)
    return found is not None and found[0].path in NAMES[architecture_id].parameters


def dotted_paths(architecture_id: str, flat: str) -> tuple[str, ...]:
    """Dotted forms of a flattened checkpoint path: the hosts' and those of the model's own code."""
    found, tables = _of_path(architecture_id, flat), _tables(architecture_id)
    if found is None or tables is None:
        return ()
    paths = (found[0].path, *tables.aliases.get(found[0].flat, ()))
    return tuple(path.format(*found[1]) for path in paths)


def diffusers_members(architecture_id: str, flat: str) -> Members:
    """Dotted diffusers layers of a flattened checkpoint path, each with its rows; () if there are none."""
    found, tables = _of_path(architecture_id, flat), _tables(architecture_id)
    if found is None or tables is None:
        return ()
    return tuple((path.format(*found[1]), rows) for path, rows in tables.members.get(found[0].flat, ()))
