"""Control values that make a recipe, from one that is stored, pasted or queued. Knows no Gradio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import RecipeError
from ..recipe import LoraInput, MergeRecipe, format_input, from_json, parse_prompt
from ..recipe.rank_rules import RANK_RULES, rule_of
from .form import EMPTY_ROW, MAX_ROWS, PLAIN, ROW_FIELDS, Changes, lora_label, lora_name
from .sidecar import UserMetadata

if TYPE_CHECKING:
    from ..methods import MergeMethod
    from .host import Host, LoraEntry


def row_of(given: LoraInput, entries: Sequence[LoraEntry]) -> Changes:
    """The controls of one row for one input."""
    rest = replace(given, name="x", te=1.0, unet=1.0, lbw=None, lbwe=None, hash=None)
    extra = format_input(rest).split(":")[1:]
    label = lora_label(given.name, entries)
    return {
        "on": True,
        "lora": label,
        "strength": given.unet,
        "slide": max(-2.0, min(2.0, given.unet)),
        "te": given.te,
        "linked": given.te == given.unet,
        "blocks": given.lbw or "",
        "elements": given.lbwe or "",
        "extra": ":".join(part for part in extra if "=" in part and part.split("=")[0] not in ("te", "unet")),
        "origin": f"{given.hash} {lora_name(label, entries)}" if given.hash else "",
    }


def rows_of(inputs: Sequence[LoraInput], entries: Sequence[LoraEntry]) -> Changes:
    """All row controls for a list of inputs; rows beyond it are emptied.

    Raises:
        RecipeError: More inputs than the page has rows.
    """
    if len(inputs) > MAX_ROWS:
        raise RecipeError(
            "{count} LoRAs are more than the {most} rows of this page. The command line takes more.",
            len(inputs),
            MAX_ROWS,
        )
    values: Changes = {"rows": max(len(inputs), 1)}
    for index in range(MAX_ROWS):
        row = row_of(inputs[index], entries) if index < len(inputs) else EMPTY_ROW
        values |= {f"row{index}.{name}": row[name] for name in ROW_FIELDS}
    return values


def form_of(recipe: MergeRecipe, host: Host, methods: Mapping[str, MergeMethod]) -> Changes:
    """All control values that make this recipe.

    Raises:
        RecipeError: It has more inputs than the page has rows, or a method that is not here.
    """
    if recipe.mode not in methods:
        raise RecipeError(
            "The recipe uses the mode {mode}, which this version does not have.", repr(recipe.mode)
        )
    method = methods[recipe.mode]
    values = rows_of(recipe.inputs, host.loras())
    values |= {
        "mode": method.label,
        "rank_rule": RANK_RULES[rule_of(recipe)],
        "conv_rank": "" if recipe.conv_rank is None else str(recipe.conv_rank),
        "base": recipe.base or "",
        "seed": recipe.seed,
        **{name: entry.shown(getattr(recipe, name)) for name, entry in PLAIN.items()},
    }
    if isinstance(recipe.rank, int):
        values["rank"] = recipe.rank
    share = recipe.keep if recipe.retain is None else recipe.retain
    if share is not None:
        values["retain"] = share * 100
    if recipe.size is not None:
        values["size"] = recipe.size
    device = next((label for label, key in host.devices() if key == recipe.device), None)
    if device is not None:
        values["device"] = device
    for param in method.params:
        values[f"param.{method.name}.{param.name}"] = recipe.params.get(param.name, param.default)
    return values


def read_pasted(text: str, host: Host, methods: Mapping[str, MergeMethod]) -> tuple[Changes, list[str]]:
    """Control values from pasted text: a prompt with LoRA tags, a picture's settings, or a recipe as JSON.

    Returns:
        The values, and a sentence for everything that was left out.

    Raises:
        RecipeError: Nothing in it can be used.
    """
    if not text.strip():
        raise RecipeError("Paste a prompt with <lora:...> tags, or a recipe, first.")
    if text.lstrip().startswith("{"):
        return form_of(from_json(text), host, methods), []
    from .xyz.infotext import recipe_of, says_merge  # Not at the WebUI's start, see extension.py.

    if says_merge(text):
        return form_of(recipe_of(text, host.settings()), host, methods), []
    notes: list[str] = []
    inputs = parse_prompt(text, skip_unsupported=True, notes=notes)
    if not inputs:
        raise RecipeError("There is no <lora:name:strength> tag in this text.")
    return rows_of(inputs, host.loras()), notes


def of_user_metadata(data: UserMetadata | None) -> Changes:
    """Control values for what a ``<name>.json`` says; none where it says nothing."""
    if data is None or data.empty:
        return {}
    return {
        "activation_text": data.activation_text,
        "preferred_weight": data.preferred_weight or None,
        "notes": data.notes,
    }
