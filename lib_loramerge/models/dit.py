"""Layer names of the diffusion transformers: any spelling to the checkpoint's, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from .base import Members, Names, Rows
from .records import ARCHITECTURES
from .table import measure

NAMES: dict[str, Names] = {
    record.id: record.names for record in ARCHITECTURES.values() if record.names is not None
}

# A flattened path with a block number: what stands before it, the number and the leaf.
_NUMBER = re.compile(r"(?<=_)\d+(?=_|$)")


# Flattened path of a layer, the rows of it, and the rows of the joined layer that go there.
Fused = tuple[str, "Rows | None", Rows]

# What diffusers joins when it fuses projections, by the ending that all of them share a stem with.
_JOINED = {
    "to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}  # fmt: skip


@dataclass(frozen=True)
class Spelled:
    """What one flattened spelling means.

    Attributes:
        path: Dotted checkpoint path, with ``{}`` for a block's number.
        flat: The same flattened.
        rows: Which rows of the layer; None for all.
        fused: Of a spelling that joins several layers, each one's flattened path, the rows of it, and which
            rows of the joined layer these are; ``path`` is then the first one's.
    """

    path: str
    flat: str
    rows: Rows | None
    fused: tuple[Fused, ...] = ()


@dataclass(frozen=True)
class _Tables:
    """Flattened spellings of one model, ready for look-ups; templates hold ``{}`` for the number."""

    spellings: Mapping[str, Spelled]
    members: Mapping[str, Members]
    aliases: Mapping[str, tuple[str, ...]]
    apart: frozenset[str]
    joins: Mapping[str, tuple[tuple[str, Rows], ...]]


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
    joins: dict[str, list[tuple[str, Rows]]] = {}
    for joined, entry in _joined(architecture_id, names):
        spellings.setdefault(flatten(joined), entry)
        for path, rows, take in entry.fused:
            if rows is None:
                joins.setdefault(path, []).append((joined, take))
    for path in names.layers:
        spellings[flatten(path)] = Spelled(path, flatten(path), None)
    return _Tables(
        spellings,
        {flatten(path): members for path, members in names.layers.items()},
        {target: tuple(paths) for target, paths in others.items()},
        frozenset(one_number(name)[0] for name in spellings if "{}" not in name),
        {path: tuple(names) for path, names in joins.items()},
    )


def _joined(architecture_id: str, names: Names) -> Iterator[tuple[str, Spelled]]:
    """The projections that diffusers can fuse, under the name that it gives them."""
    places = {member: (path, rows) for path, members in names.layers.items() for member, rows in members}
    for member in places:
        stem, _, leaf = member.rpartition(".")
        for name, leaves in _JOINED.items():
            members = [places.get(f"{stem}.{each}") for each in leaves]
            if leaf != leaves[0] or None in members:
                continue
            known = [place for place in members if place is not None]
            counts = [_row_count(architecture_id, names, *place) for place in known]
            if None in counts:
                continue
            least = math.gcd(*(count or 0 for count in counts))
            ends = list(accumulate((count or 0) // least for count in counts))
            fused = tuple(
                (flatten(path), rows, Rows(((start, stop),), ends[-1]))
                for (path, rows), start, stop in zip(known, [0, *ends], ends)
            )
            yield f"{stem}.{name}", Spelled(known[0][0], flatten(known[0][0]), None, fused)


def _row_count(architecture_id: str, names: Names, path: str, rows: Rows | None) -> int | None:
    """Rows of a layer, or of a part of it, in the first size of a model; None where it is not known."""
    if path not in names.shapes:
        return None
    count = measure(names.shapes[path], ARCHITECTURES[architecture_id].sizes[0].dims)[0]
    return count if rows is None or count is None else count * rows.units // rows.of


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
    if found is None or found[0].fused:
        return None
    return found[0].flat.format(*found[1]), found[0].rows


def fused(architecture_id: str, flat: str) -> tuple[Fused, ...]:
    """The layers that a flattened spelling joins, in order; () where it names one layer or none."""
    found = look_up(architecture_id, flat)
    if found is None:
        return ()
    return tuple((path.format(*found[1]), rows, take) for path, rows, take in found[0].fused)


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


def joined_names(architecture_id: str, flat: str) -> tuple[tuple[str, Rows], ...]:
    """Dotted diffusers names of fused projections that hold a layer, each with its rows there."""
    found, tables = _of_path(architecture_id, flat), _tables(architecture_id)
    if found is None or tables is None:
        return ()
    return tuple((name.format(*found[1]), take) for name, take in tables.joins.get(found[0].flat, ()))
