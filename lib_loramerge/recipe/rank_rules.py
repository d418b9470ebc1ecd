"""Rank rules by the words that people choose them by, for the tab and for ComfyUI's nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lib_loramerge.recipe.model import MergeRecipe

RecipeValues = dict[str, Any]
"""Fields of a recipe by name, which ``MergeRecipe`` checks one by one."""

RANK_RULES = {
    "auto": "Automatic",
    "same": "Same as the inputs",
    "number": "A number",
    "full": "Keep everything",
    "retain": "Keep a share",
    "keep": "Keep a share of each LoRA",
    "size": "Fit a size",
}
# The control beside each rule that needs a number; the rules that can be fair, and those that convolutions
# may have a rank of their own beside.
RULE_FIELDS = {"number": "rank", "retain": "retain", "keep": "retain", "size": "size"}
FAIR_RULES = frozenset({"same", "number", "size"})
CONV_RULES = frozenset({"auto", "same", "number", "full"})


def rule_settings(rule: str, number: float | None = None) -> RecipeValues:
    """Fields of a recipe for a rule of :data:`RANK_RULES`, and the number beside it where it has one."""
    if rule in ("retain", "keep", "size"):
        return {rule: number}
    return {"rank": number if rule == "number" else rule}


def with_rank(recipe: MergeRecipe, rank: int | str) -> MergeRecipe:
    """The recipe with this rank and no other rule for ranks or sizes."""
    return replace(recipe, rank=rank, conv_rank=None, retain=None, size=None, keep=None, fair=False)


def rule_of(recipe: MergeRecipe) -> str:
    """The rule of :data:`RANK_RULES` that a recipe has."""
    return recipe.own_ranks or ("number" if isinstance(recipe.rank, int) else recipe.rank)
