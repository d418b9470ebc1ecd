"""Wan 2.2's two models: one for the noisy half of the steps, one for the rest. A LoRA is for one of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import RecipeError
from ..recipe import MergeRecipe
from .base_model import model_id
from .sources import Source, open_source

# LoRAs say it in their names.
_NOISE = {
    "high": re.compile(r"high[ ._-]?noise|(?<![a-z])(?:high|hn)(?![a-z])"),
    "low": re.compile(r"low[ ._-]?noise|(?<![a-z])(?:low|ln)(?![a-z])"),
}
_KEYS = ("ss_output_name", "modelspec.title", "ss_sd_model_name", "modelspec.architecture")


def noise(source: Source) -> str | None:
    """``"high"`` or ``"low"``, as a LoRA's name or metadata say; None if they do not, or it is no Wan."""
    if source.architecture.id != "wan":
        return None
    metadata = source.header.metadata
    for text in (source.path.stem, *(metadata.get(key, "") for key in _KEYS)):
        found = [name for name, pattern in _NOISE.items() if pattern.search(text.lower())]
        if len(found) == 1:
            return found[0]
    return None


def by_noise(recipe: MergeRecipe, find: Callable[[str], Path]) -> Mapping[str, MergeRecipe]:
    """One recipe for the high-noise inputs and one for the low-noise ones, each in the order given.

    Raises:
        RecipeError: An input does not say which model it is for, or all are for one of them.
    """
    chosen = model_id(recipe.base_model) if recipe.base_model is not None else None
    kinds = []
    for entry in recipe.inputs:
        source = open_source(find(entry.name), chosen)
        kind = noise(source)
        if kind is None:
            raise RecipeError(
                "{file} does not say whether it is for Wan 2.2's high-noise or low-noise model (neither its "
                "name nor its metadata). Put high_noise or low_noise into its file name.",
                source.path.name,
            )
        kinds.append(kind)
    recipes = {}
    for kind in _NOISE:
        inputs = tuple(entry for entry, of in zip(recipe.inputs, kinds) if of == kind)
        if not inputs:
            raise RecipeError(
                "--pairs makes one file for each of Wan 2.2's models, and no input is for the {kind}-noise "
                "one. Add its LoRA, or leave out --pairs.",
                kind,
            )
        recipes[kind] = replace(recipe, inputs=inputs)
    return recipes
