"""What varies in a sweep, and the recipes that come of it.

In any field of a LoRA stands a range or a list instead of one value::

    style:0.2..1.0/5          five strengths from 0.2 to 1.0
    subject:unet=0/0.5/1      three strengths of the denoiser
    face:1:lbw=ALL/MIDD/OUTD  three presets

Settings take lists, ``--rank 8,16,32``. All axes are combined, unless they are zipped.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lib_loramerge.errors import RecipeError
from lib_loramerge.merge.plan import file_stem
from lib_loramerge.methods import METHODS
from lib_loramerge.recipe import SETTINGS, LoraInput, MergeRecipe, Param, parse_inputs, parse_rank
from lib_loramerge.recipe.check import plain, shown
from lib_loramerge.recipe.text import split_name, tag_bodies

MOST_POINTS = 10_000  # of one axis, and of all together

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_RANGE = re.compile(rf"\s*({_NUMBER})\.\.({_NUMBER})/(\d+)\s*")
# What X/Y/Z plots call a range: "0.2-1.0 [5]" and "0-1 (+0.25)".
_COUNTED = re.compile(rf"\s*({_NUMBER})\s*-\s*({_NUMBER})\s*\[(\d+)\]\s*")
_STEPPED = re.compile(rf"\s*({_NUMBER})\s*-\s*({_NUMBER})\s*\(([+-]\d*\.?\d+)\)\s*")
_KEY = re.compile(r"\s*([A-Za-z][A-Za-z0-9_]*)\s*=(.*)", re.DOTALL)
_UNSAFE = re.compile(r"[^\w.,+-]+")


@dataclass(frozen=True)
class Axis:
    """One thing that varies.

    Attributes:
        label: What it is, for messages and tables: ``style``, ``subject unet``, ``rank``.
        values: Its values as text, in order.
        place: Index of the LoRA and of its field, the name of a setting, or ``"mix"``.
    """

    label: str
    values: tuple[str, ...]
    place: tuple[int, int] | str


@dataclass(frozen=True)
class Point:
    """One recipe of a sweep.

    Attributes:
        name: Stem of its file, made of what varies alone.
        values: Label of each axis to its value here.
    """

    recipe: MergeRecipe
    name: str
    values: Mapping[str, str]


def values_of(text: str) -> tuple[str, ...]:
    """The values that a range or a list stands for; a plain value is a list of one.

    Raises:
        RecipeError: A range of no points or of too many.
    """
    if match := _RANGE.fullmatch(text) or _COUNTED.fullmatch(text):
        return _spaced(float(match[1]), float(match[2]), int(match[3]), text)
    if match := _STEPPED.fullmatch(text):
        first, last, step = float(match[1]), float(match[2]), float(match[3])
        if step == 0 or (last - first) * step < 0:
            raise RecipeError(
                "{text} never gets from {first} to {last}.", shown(text), plain(first), plain(last)
            )
        count = math.floor((last - first) / step + 1e-9) + 1
        return _spaced(first, first + step * (count - 1), count, text)
    return tuple(part.strip() for part in text.split("/"))


def _spaced(first: float, last: float, count: int, text: str) -> tuple[str, ...]:
    if not 1 <= count <= MOST_POINTS:
        raise RecipeError("{text} must have from 1 to {most} points.", shown(text), MOST_POINTS)
    if count == 1:
        return (plain(first),)
    # Decimals as people write them: 0.2 + 4 * 0.1 is 0.6, not 0.6000000000000001.
    return tuple(plain(float(f"{first + (last - first) * i / (count - 1):.10g}")) for i in range(count))


def expand(
    loras: Sequence[str],
    settings: Mapping[str, Sequence[Any]],
    params: Mapping[str, Sequence[str]],
    *,
    mix: str | None = None,
    zipped: bool = False,
    prefix: str = "",
    fields: Mapping[str, Any] | None = None,
    most: int = MOST_POINTS,
) -> list[Point]:
    """All recipes of a sweep.

    Args:
        loras: Texts as ``merge`` takes them, with ranges or lists in their fields; tags work too.
        settings: Settings of the recipe to their values; more than one makes an axis.
        params: The same for the method's parameters.
        mix: Shares of the second of two LoRAs; the first has the rest. Their own strengths count besides.
        zipped: The n-th values of all axes belong together.
        prefix: How all names begin.
        fields: Other fields of the recipe, the same in all.
        most: Recipes that there may be.

    Raises:
        RecipeError: Nothing varies, two points are the same, or a value makes no sense.
    """
    pieces = [_pieces(body, tag) for body, tag in _bodies(loras)]
    axes = [
        Axis(_label(parts, index), values, (lora, index))
        for lora, (parts, fanned) in enumerate(pieces)
        for index, values in fanned.items()
    ]
    axes += [
        Axis(name, tuple(plain(v) if not isinstance(v, str) else v for v in values), name)
        for name, values in [*settings.items(), *params.items()]
        if len(values) > 1
    ]
    if mix is not None:
        if len(pieces) != 2:
            raise RecipeError("A mix needs exactly two LoRAs, got {count}.", len(pieces))
        axes.append(Axis("mix", values_of(mix), "mix"))
    if not axes:
        raise RecipeError(
            "Nothing varies. Write a range or a list for a strength (style:0.2..1.0/5, style:0.5/1), "
            "or a list for a setting (--rank 8,16,32)."
        )
    axes = _distinct(axes)
    points: list[Point] = []
    for values in combine(axes, zipped=zipped, most=most):
        chosen = dict(zip(axes, values, strict=True))
        named = {axis.place: value for axis, value in chosen.items() if isinstance(axis.place, str)}
        given = {name: _typed(name, named.get(name, values[0])) for name, values in settings.items()}
        own = {name: named.get(name, values[0]) for name, values in params.items()}
        foreign = _foreign(given.get("mode"), own, settings.get("mode", ()))
        inputs = _inputs(pieces, {axis.place: value for axis, value in chosen.items()})
        if "mix" in named:
            inputs = _mixed(inputs, named["mix"])
        recipe = MergeRecipe(
            inputs=inputs,
            **{**(fields or {}), **given},
            params={name: value for name, value in own.items() if name not in foreign},
        )
        chosen = {axis: value for axis, value in chosen.items() if axis.place not in foreign}
        labels = {axis.label: value for axis, value in chosen.items()}
        if not foreign or all(point.recipe != recipe for point in points):
            points.append(Point(recipe, _name(prefix, chosen), labels))
    _refuse_doubled(points)
    return points


def _foreign(mode: str | None, params: Mapping[str, str], modes: Sequence[str]) -> frozenset[str]:
    """Parameters that this mode lacks and another mode of the sweep has."""

    def has(name: str) -> set[str]:
        return {param.name for param in METHODS[name].params} if name in METHODS else set()

    if mode is None:
        return frozenset()
    others = set().union(*(has(name) for name in modes))
    return frozenset(name for name in params if name in others - has(mode))


def combine(axes: Sequence[Axis], *, zipped: bool, most: int = MOST_POINTS) -> list[tuple[str, ...]]:
    """The values of all points: every combination, or the n-th of each axis together.

    Raises:
        RecipeError: Axes of unequal lengths cannot be zipped, or there are too many combinations.
    """
    lengths = [len(axis.values) for axis in axes]
    if zipped and len(set(lengths)) > 1:
        counts = ", ".join(f"{axis.label} has {length}" for axis, length in zip(axes, lengths, strict=True))
        raise RecipeError("--zip needs the same number of values everywhere: {counts}.", counts)
    count = lengths[0] if zipped else math.prod(lengths)
    if count > most:
        raise RecipeError(
            "This sweep has {count} combinations; at most {most} are possible.", f"{count:,}", f"{most:,}"
        )
    values = [axis.values for axis in axes]
    return list(zip(*values, strict=True) if zipped else itertools.product(*values))


def _bodies(loras: Sequence[str]) -> list[tuple[str, bool]]:
    """Text of each LoRA, and whether it came from a tag."""
    found: list[tuple[str, bool]] = []
    for text in loras:
        bodies = tag_bodies(text)
        found += [(body, True) for body in bodies] if bodies else [(text, False)]
    if not found:
        raise RecipeError("Name at least one LoRA, for example: loramerge sweep style:0.2..1.0/5 -o sweep")
    return found


_Pieces = tuple[list[str], dict[int, tuple[str, ...]]]


def _pieces(body: str, tag: bool) -> _Pieces:
    """Name and fields of one LoRA, and the values of the fields that vary, by their index."""
    name, rest = split_name(body if tag else body.strip())
    parts = [name, *([] if rest is None else rest.split(":"))]
    fanned: dict[int, tuple[str, ...]] = {}
    for index, part in enumerate(parts[1:], 1):
        keyed = _KEY.fullmatch(part)
        values = values_of(keyed[2] if keyed else part)
        if len(values) > 1:
            fanned[index] = values
    return parts, fanned


def _label(parts: Sequence[str], index: int) -> str:
    name = file_stem(parts[0].strip())
    keyed = _KEY.fullmatch(parts[index])
    if keyed:
        return f"{name} {keyed[1]}"
    return name if index == 1 else f"{name} {('unet', 'dyn')[min(index, 3) - 2]}"


def _distinct(axes: Sequence[Axis]) -> list[Axis]:
    """The same LoRA may stand in a sweep twice: its axes are numbered."""
    seen: dict[str, int] = {}
    result = []
    for axis in axes:
        seen[axis.label] = seen.get(axis.label, 0) + 1
        count = seen[axis.label]
        result.append(axis if count == 1 else replace(axis, label=f"{axis.label} {count}"))
    return result


def _inputs(pieces: Sequence[_Pieces], chosen: Mapping[Any, str]) -> tuple[LoraInput, ...]:
    texts = []
    for lora, (parts, _) in enumerate(pieces):
        fields = [parts[0]]
        for index, part in enumerate(parts[1:], 1):
            value = chosen.get((lora, index))
            keyed = _KEY.fullmatch(part)
            fields.append(part if value is None else f"{keyed[1]}={value}" if keyed else value)
        texts.append(":".join(fields))
    return parse_inputs(texts)


def _mixed(inputs: Sequence[LoraInput], share: str) -> tuple[LoraInput, ...]:
    try:
        second = float(share)
    except ValueError:
        raise RecipeError("A mix must be a number, got {share}.", shown(share)) from None
    return tuple(_times(entry, factor) for entry, factor in zip(inputs, (1 - second, second), strict=True))


def _times(entry: LoraInput, factor: float) -> LoraInput:
    strengths = ("te", "unet", "te1", "te2", "te3")
    return replace(
        entry, **{n: value * factor for n in strengths if (value := getattr(entry, n)) is not None}
    )


def _typed(name: str, value: Any) -> Any:
    """A setting's value from its text; the recipe checks it."""
    entry = SETTINGS[name]
    if name == "rank":
        return parse_rank(value)
    if not isinstance(value, str) or entry.kind is str:
        return value
    if entry.kind is bool:
        return Param(name, False, entry.help).check(value)
    try:
        return entry.kind(value)
    except ValueError:
        raise RecipeError("{flag} takes numbers, got {value}.", entry.flag, shown(value)) from None


def _name(prefix: str, chosen: Mapping[Axis, str]) -> str:
    """``both_style-0.2_subject-0.5_r16``: the name of what varies, and its value."""
    parts = [prefix] if prefix else []
    for axis, value in chosen.items():
        # A list of block weights is no name of a file; its place in the axis tells it.
        word = f"list{axis.values.index(value) + 1}" if "," in value else value
        word = re.sub(r"^-", "m", word.removesuffix(".0"))
        if axis.place == "rank":
            parts.append(f"r{word}" if word.isdigit() else word)
        elif axis.place == "mode":
            parts.append(word)
        else:
            parts.append(f"{axis.label.replace(' ', '-')}-{word}")
    return _UNSAFE.sub("-", "_".join(parts)).strip("-. ") or "sweep"


def _refuse_doubled(points: Sequence[Point]) -> None:
    seen: dict[str, Point] = {}
    for point in points:
        other = seen.setdefault(point.name.lower(), point)
        if other is not point:
            raise RecipeError(
                "Two files of this sweep would be named {point}: a value stands there twice.", point.name
            )
