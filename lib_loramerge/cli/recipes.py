"""The recipe that a command line asks for: of LoRAs and options, or from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError
from ..recipe import MergeRecipe, from_json, parse_inputs
from ..recipe.rank_rules import with_rank
from .options import given_fields

if TYPE_CHECKING:
    import argparse


def recipe_of(options: argparse.Namespace) -> tuple[MergeRecipe, list[str]]:
    """The recipe that the options ask for, and notes on what was skipped in it."""
    notes: list[str] = []
    fields = given_fields(options)
    if getattr(options, "recipe", None) is not None:
        if options.loras:
            raise RecipeError("Give either LORAs or --recipe FILE, not both.")
        recipe = read_recipe_file(options.recipe)
        if options.allow_changed_sources:
            recipe = replace(recipe, inputs=tuple(replace(entry, hash=None) for entry in recipe.inputs))
        return replaced(recipe, fields), notes
    if not options.loras:
        base = getattr(options, "checkpoint", None)
        command = "merge" if base is None else f"bake {base.name}"
        raise RecipeError(
            "Name at least one LoRA to merge, for example: loramerge {command} a.safetensors:0.8 -o out",
            command,
        )
    if getattr(options, "inputs", None):
        return MergeRecipe(inputs=options.inputs, **fields), notes
    inputs = parse_inputs(
        options.loras, skip_unsupported=bool(getattr(options, "skip_unsupported", None)), notes=notes
    )
    return MergeRecipe(inputs=inputs, **fields), notes


def replaced(recipe: MergeRecipe, fields: Mapping[str, Any]) -> MergeRecipe:
    """A stored recipe with the options that were given instead of its own, and without those they exclude."""
    if any(name in fields for name in ("retain", "size", "keep")):
        recipe = with_rank(recipe, "auto")
    elif any(name in fields for name in ("rank", "conv_rank")):
        recipe = replace(with_rank(recipe, recipe.rank), conv_rank=recipe.conv_rank)
    if fields.get("mode", recipe.mode) != recipe.mode:
        recipe = replace(recipe, params={})
    elif "params" in fields:
        fields = {**fields, "params": {**recipe.params, **fields["params"]}}
    return replace(recipe, **fields)


def read_recipe_file(path: Path) -> MergeRecipe:
    """The recipe in a merged file's metadata, or in a JSON file."""
    from ..files import LORA_SUFFIXES, read_header
    from ..metadata import read_recipe

    if path.suffix.lower() not in LORA_SUFFIXES:
        return from_json(text_of(path))
    recipe = read_recipe(read_header(path).metadata)
    if recipe is None:
        raise RecipeError("{file} holds no recipe: it was not made by LoRA Merge.", path.name)
    return recipe


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # editors on Windows begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError("{path} cannot be read as a recipe: {error}.", path, error) from error
