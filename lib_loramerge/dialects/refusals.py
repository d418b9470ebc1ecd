"""Which keys show that a file cannot be merged as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from ..refused import KINDS, Kind
from .slots import is_adapters


def claims(kind: Kind, key: str) -> bool:
    """Whether a file of this kind has such a key."""
    return kind.found.search(key) is not None and not (kind.whole and is_adapters(key))


def claimed(keys: Iterable[str]) -> dict[Kind, tuple[str, ...]]:
    """Kinds that keys show, in the table's order; each key counts for the first kind that claims it."""
    found: dict[Kind, list[str]] = {}
    for key in keys:
        kind = next((kind for kind in KINDS if claims(kind, key)), None)
        if kind is not None:
            found.setdefault(kind, []).append(key)
    return {kind: tuple(found[kind]) for kind in KINDS if kind in found}


def refused(keys: Iterable[str], unread: Iterable[str], layers: int) -> Kind | None:
    """What a file is that is no LoRA; None if it may be one.

    Args:
        keys: Of the whole file.
        unread: Those that no dialect understands.
        layers: Number of layers that the others make.
    """
    key = next(filter(_one_key().match, keys), None)
    if key is not None:
        return next(kind for kind in KINDS if kind.one_key and claims(kind, key))
    found = claimed(unread)
    return next(iter(found)) if sum(map(len, found.values())) >= max(1, layers) else None


@cache
def _one_key() -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{kind.pattern})" for kind in KINDS if kind.one_key))
