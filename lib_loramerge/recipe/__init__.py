"""What one merge is: its LoRAs, their strengths and every setting, as plain data.

The same recipe is a line of text (the WebUI's own prompt grammar), a JSON
object (REST, and what a merged file keeps of itself) and a command line; the
functions here turn each form into the others and refuse what makes no sense,
naming the field, the value and the limit.
"""

from __future__ import annotations

from lib_loramerge.recipe.check import nearest, nearest_hint
from lib_loramerge.recipe.command import to_command
from lib_loramerge.recipe.model import (
    DIALECTS,
    DTYPES,
    HOSTS,
    MAX_INPUTS,
    NORMALIZE,
    RANK_WORDS,
    RECIPE_FIELDS,
    SETTINGS,
    STRENGTH_LIMIT,
    LoraInput,
    MergeRecipe,
    parse_rank,
)
from lib_loramerge.recipe.settings import Param, Setting, check_params
from lib_loramerge.recipe.stored import from_json, to_json
from lib_loramerge.recipe.text import format_input, format_prompt, parse_input, parse_inputs, parse_prompt

__all__ = [
    "DIALECTS",
    "DTYPES",
    "HOSTS",
    "MAX_INPUTS",
    "NORMALIZE",
    "RANK_WORDS",
    "RECIPE_FIELDS",
    "SETTINGS",
    "STRENGTH_LIMIT",
    "LoraInput",
    "MergeRecipe",
    "Param",
    "Setting",
    "check_params",
    "format_input",
    "format_prompt",
    "from_json",
    "nearest",
    "nearest_hint",
    "parse_input",
    "parse_inputs",
    "parse_prompt",
    "parse_rank",
    "to_command",
    "to_json",
]
