"""Recipe <-> JSON, strict in both directions: what REST takes and a merged file keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lib_loramerge.errors import RecipeError, Sentence
from lib_loramerge.recipe.check import nearest_hint, shown
from lib_loramerge.recipe.model import (
    INPUT_FIELDS,
    MAX_INPUTS,
    RECIPE_FIELDS,
    SETTINGS,
    LoraInput,
    MergeRecipe,
)
from lib_loramerge.recipe.text import parse_input, parse_inputs

VERSION = 1
STORED_RANK = "same"  # what a stored recipe without a rank was made with
LONGEST_JSON = 4_000_000  # characters; a full recipe of 100 LoRAs with block weights is far below


def to_json(recipe: MergeRecipe) -> dict[str, Any]:
    """The recipe as a JSON object; :func:`from_json` gives the same recipe back.

    Fields that are ``None`` are left out, all others are written, so that a
    later version with other defaults still reads the same recipe.
    """
    written: dict[str, Any] = {"version": VERSION}
    for name in RECIPE_FIELDS:
        value = getattr(recipe, name)
        if name == "inputs":
            written[name] = [_input_to_json(given) for given in value]
        elif name == "params":
            written[name] = dict(value)
        elif value is not None:
            written[name] = value
    return written


def _input_to_json(given: LoraInput) -> dict[str, Any]:
    return {name: getattr(given, name) for name in INPUT_FIELDS if getattr(given, name) is not None}


def from_json(obj: str | Mapping[str, Any]) -> MergeRecipe:
    """The recipe that a JSON object, or the text of one, describes.

    ``inputs`` is a list of objects with the fields of :class:`LoraInput`, or of
    recipe strings (``"a:0.8"``), or one prompt text with its tags. Fields not
    given have their defaults (a stored recipe, which states its version, has the rank
    that was the default then); ``unet`` without a value follows ``te``, as in a prompt.

    Raises:
        RecipeError: No JSON, unknown or doubled fields, wrong types, values out of
            range, or a recipe of a newer version.
    """
    fields = read_json(obj) if isinstance(obj, str) else obj
    if not isinstance(fields, Mapping):
        raise RecipeError("A recipe must be a JSON object, got {value}.", shown(fields))
    given = dict(fields)
    version = given.pop("version", VERSION)
    if isinstance(version, bool) or version != VERSION:
        raise RecipeError(
            "This recipe has version {version}; version {known} is what can be read.", shown(version), VERSION
        )
    if "version" in fields:
        given.pop("bake", None)  # What a baked checkpoint keeps beside its LoRAs.
        given.setdefault("rank", STORED_RANK)
    _refuse_unknown("A recipe", given, RECIPE_FIELDS)
    if "inputs" not in given:
        raise RecipeError("A recipe needs inputs, the list of its LoRAs.")
    given["inputs"] = _inputs_from_json(given["inputs"])
    for name, entry in SETTINGS.items():
        if entry.optional and given.get(name, "") is None:
            del given[name]  # null and absent mean the same where absent is allowed
    return MergeRecipe(**given)


def _inputs_from_json(given: object) -> tuple[LoraInput, ...]:
    if isinstance(given, str):
        return parse_inputs([given])
    if not isinstance(given, (list, tuple)):
        raise RecipeError("inputs must be a list of LoRAs, got {value}.", shown(given))
    if len(given) > MAX_INPUTS:
        raise RecipeError("A recipe takes from 1 to {most} LoRAs, got {count}.", MAX_INPUTS, len(given))
    return tuple(_input_from_json(item) for item in given)


def _input_from_json(item: object) -> LoraInput:
    if isinstance(item, str):
        return parse_input(item)
    if not isinstance(item, Mapping):
        raise RecipeError("An input must be an object or a recipe string, got {value}.", shown(item))
    _refuse_unknown("An input", item, INPUT_FIELDS)
    if "name" not in item:
        raise RecipeError("An input needs a name.")
    optional = ("te1", "te2", "te3", "dyn", "lbw", "lbwe", "x", "hash")
    fields = {k: v for k, v in item.items() if not (v is None and k in optional)}
    if "te" in fields:
        fields.setdefault("unet", fields["te"])  # One strength is that of both, as in a prompt.
    return LoraInput(**fields)


def _refuse_unknown(what: str, given: Mapping[Any, Any], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise RecipeError(
                "{what} has no field {name}. The fields are {fields}.{hint}",
                Sentence(what),
                shown(name),
                ", ".join(known),
                nearest_hint(str(name), known),
            )


def read_json(text: str) -> Any:
    """JSON in which no field stands twice.

    Raises:
        RecipeError: It is none, or too long.
    """
    if len(text) > LONGEST_JSON:
        raise RecipeError(
            "A recipe must be at most {most} characters long, got {count}.", LONGEST_JSON, len(text)
        )
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise RecipeError("A recipe must be a JSON object; this text is nested too deep.") from None
    except ValueError as error:  # JSONDecodeError, and integers of thousands of digits
        raise RecipeError("The recipe is not valid JSON: {error}.", str(error)[:200]) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(n for n in names if names.count(n) > 1)
        raise RecipeError("The recipe has the field {name} twice.", shown(doubled))
    return result


def _no_constant(name: str) -> object:
    raise RecipeError("The recipe holds {name}; only finite numbers are allowed.", name)
