"""Which kind a layer's slots are, and which slots only come along.

A layer holds one algebra (the slots of one kind) and companions: alpha, scales,
biases, a DoRA magnitude. Everything else is an error that names the layer, so
that no tensor is lost silently.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

from .. import refused
from ..errors import IncompatibleError, Sentence, UnsupportedError, joined
from .kinds import ADAPTERS, AdapterKind

RESIDUAL_PARTS = frozenset({"bias_indices", "bias_values", "bias_size"})
MAGNITUDES = frozenset({"dora_scale", "magnitude"})
COMPANIONS = frozenset({"alpha", "scale", "scalar", "diff_b", "bias"}) | RESIDUAL_PARTS

# How keys spell what comes along with any kind, or is refused, where that is not its name.
_ENDINGS = {
    "alpha": ("alpha", "network_alpha"),
    "magnitude": ("magnitude", "lora_magnitude_vector", "lora_magnitude_vector.weight"),
}


def endings() -> dict[str, tuple[str, ...]]:
    """Every slot to the endings of keys that spell it, the one that is written first."""
    slots = (
        COMPANIONS | MAGNITUDES | frozenset(refused.SLOTS).union(*(kind.slots for kind in ADAPTERS.values()))
    )
    spelled = dict(_ENDINGS)
    for kind in ADAPTERS.values():
        spelled |= kind.endings
    return {slot: spelled.get(slot, (slot,)) for slot in sorted(slots)}


@cache
def _families() -> dict[str, tuple[tuple[AdapterKind, ...], frozenset[str]]]:
    """Kinds that share slots, and those slots; which of them are present decides the kind."""
    found: dict[str, list[AdapterKind]] = {}
    for kind in ADAPTERS.values():
        if kind.family:
            found.setdefault(kind.family, []).append(kind)
    return {
        name: (tuple(kinds), frozenset().union(*(kind.slots for kind in kinds)))
        for name, kinds in found.items()
    }


@dataclass(frozen=True)
class Group:
    """The slots of one layer, sorted out.

    Attributes:
        kind: The algebra; None when only companions are left that change nothing.
        magnitude: The slot of a DoRA magnitude, if there is one.
        notes: Sentences for the report.
    """

    kind: AdapterKind | None
    magnitude: str | None = None
    notes: tuple[str, ...] = ()


def identify(slots: Collection[str], where: str) -> Group:
    """Sort out the slots of one layer.

    Raises:
        UnsupportedError: A slot that cannot be merged, or two algebras at once.
        IncompatibleError: An algebra that lacks a part.
    """
    present = frozenset(slots)
    for slot in sorted(present & refused.SLOTS.keys()):
        raise UnsupportedError(
            "{where}: {slot} cannot be merged: it {reason}.", where, slot, Sentence(refused.SLOTS[slot])
        )
    families = [name for name, (_, slots) in _families().items() if present & slots]
    if len(families) > 1:
        raise UnsupportedError(
            "{where}: this layer holds {kinds} at once, and the WebUIs disagree which of them counts.",
            where,
            joined(" and ", map(Sentence, families)),
        )
    if not families:
        return _companions_only(present, where)
    magnitudes = sorted(present & MAGNITUDES)
    if len(magnitudes) > 1:
        raise UnsupportedError(
            "{where}: this layer holds two DoRA magnitudes, {magnitudes}.", where, " and ".join(magnitudes)
        )
    kind = _complete_kind(families[0], present, where)
    _check_residual(present, where)
    _check_leftovers(kind, present, where)
    return Group(kind, magnitudes[0] if magnitudes else None)


def _complete_kind(family: str, present: frozenset[str], where: str) -> AdapterKind:
    kinds, slots = _families()[family]
    own = present & slots
    for kind in kinds:
        if own <= kind.slots and any(form <= own for form in kind.forms):
            return kind
    # Name what is missing from the form that is nearest to complete.
    forms = [form for kind in kinds for form in kind.forms]
    form = min(forms, key=lambda form: (len(form - own), -len(form & own)))
    there, missing = _listed(sorted(own)), sorted(form - own)
    if not missing:
        raise IncompatibleError(
            "{where}: {slots} do not belong together in one {kind} layer.", where, there, Sentence(family)
        )
    raise IncompatibleError(
        "{where}: this {kind} layer is incomplete: it has {has} and lacks {lacking}.",
        where,
        Sentence(family),
        there,
        _listed(missing),
    )


def _companions_only(present: frozenset[str], where: str) -> Group:
    unknown = sorted(present - COMPANIONS - MAGNITUDES)
    if unknown:
        raise UnsupportedError("{where}: nothing here can merge the slot {slots}.", where, _listed(unknown))
    if "diff_b" in present:
        rest = sorted(present - {"diff_b", "alpha", "scale", "scalar"})
        if rest:
            raise IncompatibleError(
                "{where}: {slots} lacks the factors that it belongs to.", where, _listed(rest)
            )
        return Group(ADAPTERS["bias"])
    rest = sorted(present - {"alpha", "scale", "scalar"})
    if rest:
        raise IncompatibleError(
            "{where}: {slots} lacks the factors that it belongs to.", where, _listed(rest)
        )
    left = _listed(sorted(present))
    return Group(
        None, None, (Sentence("{slots} without any factors was dropped; it changes nothing.", left),)
    )


def _check_residual(present: frozenset[str], where: str) -> None:
    parts = present & RESIDUAL_PARTS
    if parts and parts != RESIDUAL_PARTS:
        raise IncompatibleError(
            "{where}: the sparse residual is incomplete: it has {has} and lacks {lacking}.",
            where,
            _listed(sorted(parts)),
            _listed(sorted(RESIDUAL_PARTS - parts)),
        )
    if parts and "bias" in present:
        raise UnsupportedError("{where}: this layer holds a dense and a sparse residual at once.", where)


def _check_leftovers(kind: AdapterKind, present: frozenset[str], where: str) -> None:
    unknown = sorted(present - kind.slots - COMPANIONS - MAGNITUDES)
    if unknown:
        raise UnsupportedError(
            "{where}: {slots} has no meaning in a {kind} layer.",
            where,
            _listed(unknown),
            kind.label,
        )


def _listed(names: Collection[str]) -> str:
    return ", ".join(names)
