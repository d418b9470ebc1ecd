"""Tables of layer names, written as text: one line for a layer, or for several that go the same way.

A line is ``PATH SHAPE > MEMBERS | ALIASES``, each part after the path optional::

    [double_blocks.{D} > transformer_blocks.{}]
    img_attn.qkv 3h,h > attn.to_q + attn.to_k + attn.to_v | img_attn_qkv

* ``PATH`` is the layer's place in the checkpoint, under the root of the section in brackets. ``!`` before
  it marks a parameter that is no module's ``weight``.
* ``SHAPE`` is rows and columns in the dimensions of a size of the model (``3h``, ``h+2k``, ``64``, ``*``).
* ``MEMBERS`` are diffusers' layers; ``=`` is the same path. Joined by ``+``, they are rows of a fused layer
  in that order, in the proportion that ``name:3`` gives. ``~`` before one: its two halves are swapped.
* ``ALIASES`` are other spellings of the whole layer, under the same root; ``/`` begins one at the top.
  ``name<n:a-b`` is a spelling of rows a to b of n.
* ``{a,b}`` in path, members and aliases stands for one layer each.

The number of blocks in a root's braces is a dimension, or a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from .base import Members, Names, Rows

_SWAPPED = Rows(((1, 2), (0, 1)), 2)
_BRACES = re.compile(r"\{([^{}]*,[^{}]*)\}")
_COUNT = re.compile(r"\{(\w+)\}")


def parse_table(text: str) -> Names:
    """The names that a text table holds."""
    layers: dict[str, Members] = {}
    aliases: dict[str, tuple[str, Rows | None]] = {}
    shapes: dict[str, str] = {}
    counts: dict[str, str] = {}
    parameters: set[str] = set()
    root, theirs = "", ""
    for line in text.strip().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("["):
            root, _, theirs = (part.strip() for part in line.strip("[]").partition(">"))
            count = _COUNT.search(root)
            root = _COUNT.sub("{}", root)
            if count is not None:
                counts[root.partition(".{}")[0]] = count[1]
            theirs = theirs or root
            continue
        for row in _expanded(line):
            row, _, alias = row.partition("|")
            row, _, members = row.partition(">")
            leaf, _, shape = row.strip().partition(" ")
            path = _under(root, leaf.lstrip("!"))
            if leaf.startswith("!"):
                parameters.add(path)
            layers[path] = _members(members.strip(), theirs, leaf)
            if shape.strip():
                shapes[path] = shape.strip()
            for name in alias.split():
                spelling, rows = _alias(name)
                aliases[_under(root, spelling)] = (path, rows)
    return Names(layers, aliases, shapes, counts, frozenset(parameters))


def _expanded(line: str) -> Iterator[str]:
    """Lines without alternatives in braces; alternatives of one line go in step."""
    groups = _BRACES.findall(line)
    if not groups:
        if line:
            yield line
        return
    for index in range(len(groups[0].split(","))):
        choices = iter(groups)
        yield _BRACES.sub(lambda _: next(choices).split(",")[index], line)  # noqa: B023


def _under(root: str, leaf: str) -> str:
    if leaf.startswith("/"):
        return leaf[1:]
    if leaf == ".":
        return root
    return f"{root}.{leaf}" if root else leaf


def _members(text: str, root: str, leaf: str) -> Members:
    if not text:
        return ()
    names = [name.strip() for name in text.split("+")]
    if len(names) == 1:
        name = leaf if names[0] == "=" else names[0].lstrip("~")
        return ((_under(root, name), _SWAPPED if names[0].startswith("~") else None),)
    units = [int(name.partition(":")[2] or 1) for name in names]
    members, start = [], 0
    for name, count in zip(names, units, strict=True):
        members.append((_under(root, name.partition(":")[0]), Rows(((start, start + count),), sum(units))))
        start += count
    return tuple(members)


def _alias(text: str) -> tuple[str, Rows | None]:
    name, cut, rows = text.partition("<")
    if not cut:
        return name, None
    of, _, span = rows.partition(":")
    start, _, stop = span.partition("-")
    return name, Rows(((int(start), int(stop)),), int(of))


def measure(text: str, dims: Mapping[str, int]) -> tuple[int | None, ...]:
    """Numbers of a shape in the dimensions of one size; None where any number will do."""
    return tuple(_measure(part, dims) for part in text.split(","))


def _measure(text: str, dims: Mapping[str, int]) -> int | None:
    total = 0
    for term in text.split("+"):
        match = re.fullmatch(r"(\d*)([a-zA-Z_]*)", term)
        if match is None or (match[2] and match[2] not in dims):
            return None
        total += (int(match[1]) if match[1] else 1) * (dims[match[2]] if match[2] else 1)
    return total
