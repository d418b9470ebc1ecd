"""The command line that does what a recipe says."""

from __future__ import annotations

from lib_loramerge.recipe.check import plain
from lib_loramerge.recipe.model import SETTINGS, MergeRecipe
from lib_loramerge.recipe.text import format_input


def to_command(recipe: MergeRecipe, output: str | None = None) -> list[str]:
    """The ``loramerge merge`` call of a recipe, one list item per argument.

    Quote it with ``shlex.join`` to show it. Settings at their default are left
    out, source hashes always (``--recipe`` is the way to keep those).

    Args:
        recipe: What to merge and how.
        output: The ``-o`` argument, if known.

    Raises:
        RecipeError: A LoRA name that the recipe grammar cannot hold.
    """
    words: list[str] = ["loramerge", "merge"]
    if output is not None:
        words += _option("--output" if output.startswith("-") else "-o", output)
    for name, entry in SETTINGS.items():
        value = getattr(recipe, name)
        if value != entry.default:
            words += [entry.flag] if entry.kind is bool else _option(entry.flag, value)
    for name, value in recipe.params.items():
        flag = "--" + name.replace("_", "-")
        words += _option(flag, str(value).lower() if isinstance(value, bool) else value)
    loras = [format_input(given) for given in recipe.inputs]
    if any(lora.startswith("-") for lora in loras):
        words.append("--")  # from here on nothing is an option, whatever it begins with
    return words + loras


def _option(flag: str, value: float | int | str) -> list[str]:
    text = value if isinstance(value, str) else plain(value)
    # A separate word that begins with a dash would be taken for the next option.
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]
