"""The recipe of a picture, read back from what the WebUI writes beneath it."""

from __future__ import annotations

import json
import re

from ...errors import RecipeError
from ...methods import METHODS
from ...recipe import MergeRecipe, check_params, parse_inputs, parse_prompt
from ...recipe.check import check_whole
from ...recipe.model import MAX_SEED
from ..settings import Settings
from .cell import WHOLE, rank_fields
from .plot import INFOTEXT

# ``Key: value`` behind a comma or at the start of a line. Hosts quote values with commas as JSON.
_OURS = re.compile(rf'(?:^|, ){re.escape(INFOTEXT)}: ("(?:[^"\\]|\\.)*"|[^,\n]*)', re.MULTILINE)
_GRID = "Script: X/Y/Z"
_WORDS = re.compile(
    rf"(?P<inputs>.+), (?P<mode>{'|'.join(METHODS)}), (?P<rule>(?:rank|retain|size) [^ ,]+)"
    r"(?P<params>(?:, [a-z_]+ [^ ,]+)*)"
)


def says_merge(infotext: str) -> bool:
    """Whether a picture was made with a merge of a plot of ours."""
    return _OURS.search(infotext) is not None


def recipe_of(infotext: str, defaults: Settings) -> MergeRecipe:
    """The recipe whose merge gives a picture's LoRA, or that of the LoRA tags of its prompt.

    Raises:
        RecipeError: It is the picture of a whole grid, or one without LoRAs.
    """
    if _GRID in infotext:
        raise RecipeError(
            "This is the whole grid. Choose one of its pictures, which the plot shows with Include Sub "
            "Images."
        )
    prompt = re.split(r"\n(?:Negative prompt|Steps): ", infotext.replace("\r\n", "\n"))[0]
    ours = _OURS.search(infotext, len(prompt))
    if ours is not None:
        return read_words(_unquoted(ours[1]), defaults)
    inputs = parse_prompt(prompt, skip_unsupported=True)
    if not inputs:
        raise RecipeError("This picture was made without a LoRA. Choose one that was made with some.")
    return MergeRecipe(inputs=inputs, **WHOLE, dtype=defaults.dtype, device=defaults.device)


def _unquoted(text: str) -> str:
    """A value as it was before the host quoted it."""
    try:
        return str(json.loads(text)) if text.startswith('"') else text
    except ValueError:  # Changed by hand.
        raise _no_merge(text) from None


def _no_merge(text: str) -> RecipeError:
    return RecipeError("The picture's {field} does not say a merge: {reason}", INFOTEXT, text[:200])


def read_words(text: str, defaults: Settings) -> MergeRecipe:
    """The recipe that :func:`.cell.words` wrote.

    Raises:
        RecipeError: The text is not of that form.
    """
    found = _WORDS.fullmatch(text.strip())
    if found is None:
        raise _no_merge(text)
    kind, _, rule = found["rule"].partition(" ")
    params = dict(part.split(" ", 1) for part in found["params"].split(", ") if part)
    seed = check_whole("seed", params.pop("seed", 0), 0, MAX_SEED, text=True)
    mode = found["mode"]
    checked = check_params(METHODS[mode].params, params, mode=mode)
    return MergeRecipe(
        inputs=parse_inputs(found["inputs"].split(" + ")),
        mode=mode,
        params={name: checked[name] for name in params},
        seed=seed,
        **rank_fields(rule if kind == "rank" else f"{kind} {rule}"),
        dtype=defaults.dtype,
        device=defaults.device,
    )
