"""What one picture of a plot does to the LoRAs of its prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ...errors import RecipeError
from ...methods import METHODS
from ...recipe import MergeRecipe, check_params, format_input, nearest_hint, parse_prompt, parse_rank
from ...recipe.check import check_number, plain, shown
from ...recipe.rank_rules import RecipeValues
from ...recipe.settings import Value
from ...recipe.text import tag_bodies
from ..settings import Settings
from . import tags

ALL = "none"
WHOLE: RecipeValues = {"mode": "svd", "rank": "full"}
"""Of a recipe that is what the tags of a prompt are."""


@dataclass(frozen=True)
class Cell:
    """The values of our axes in one picture; what no axis gives is None or empty.

    Attributes:
        strengths: Number of a tag, from 1, to the strength of its LoRA.
        mix: Share of the second LoRA; the first has the rest. Their own strengths count besides.
        left_out: Numbers of tags to be taken out.
        blocks: Number of a tag to its block weights, a preset or a list.
        rank: A rule as :func:`rank_fields` reads it.
        params: Parameters of the mode.
    """

    strengths: Mapping[int, float] = field(default_factory=dict)
    mix: float | None = None
    left_out: frozenset[int] = frozenset()
    blocks: Mapping[int, str] = field(default_factory=dict)
    mode: str | None = None
    rank: str | None = None
    params: Mapping[str, Value] = field(default_factory=dict)

    @property
    def merges(self) -> bool:
        """Whether tags alone cannot say it."""
        return bool(self.blocks or self.mode or self.rank or self.params)

    def rewritten(self, prompt: str) -> str:
        """The prompt with strengths, block weights and what is left out in its tags."""

        def change(number: int, body: str) -> str | None:
            if number in self.left_out:
                return None
            if number in self.strengths:
                body = tags.with_strength(body, self.strengths[number])
            if self.mix is not None and number <= 2:
                body = tags.times(body, self.mix if number == 2 else 1 - self.mix)
            if number in self.blocks:
                body = tags.with_blocks(body, self.blocks[number])
            return body

        return tags.changed(prompt, change)

    def recipe(self, prompt: str, defaults: Settings) -> MergeRecipe:
        """What is to be merged for a prompt that :meth:`rewritten` gave.

        Block weights alone cut nothing: the picture is that of the prompt. With a mode, a rank or a
        parameter it is that of the file that a merge would write.

        Raises:
            RecipeError: Tags or values that make no sense.
        """
        mode = self.mode or _mode_with(self.params, defaults.mode)
        params = {name: value for name, value in self.params.items() if name != "seed"}
        if self.mode in METHODS:  # Another mode of this axis has what this one lacks.
            own = {param.name for param in METHODS[mode].params}
            params = {name: value for name, value in params.items() if name in own}
        only_blocks = not (self.mode or self.rank or self.params)
        rule: RecipeValues = {"mode": mode, **rank_fields(self.rank or defaults.rank)}
        return MergeRecipe(
            inputs=parse_prompt(prompt),
            params=params,
            seed=int(self.params.get("seed", 0)),
            device=defaults.device,
            dtype=defaults.dtype,
            **(WHOLE if only_blocks else rule),
        )


def words(recipe: MergeRecipe) -> str:
    """A recipe as people write it: ``style:0.8 + face:0.5, ties, rank 16, density 0.3``."""
    rule = [f"{name} {value}" for name in ("retain", "size") if (value := getattr(recipe, name)) is not None]
    parts = [
        " + ".join(format_input(given) for given in recipe.inputs),
        recipe.mode,
        *(rule or [f"rank {recipe.rank}"]),
        *(
            f"{name} {value if isinstance(value, (str, bool)) else plain(value)}"
            for name, value in recipe.params.items()
        ),
        *([f"seed {recipe.seed}"] if recipe.seed else []),
    ]
    return ", ".join(parts)


def rank_fields(text: str) -> RecipeValues:
    """``8``, ``auto``, ``same``, ``full``, ``retain 0.99`` or ``size 50`` as fields of a recipe.

    Raises:
        RecipeError: Anything else.
    """
    rule, _, value = text.strip().replace("=", " ").partition(" ")
    if rule.lower() in ("retain", "size"):
        return {rule.lower(): check_number(rule.lower(), value.strip(), text=True)}
    return {"rank": parse_rank(text)}


def read_params(text: str) -> dict[str, Value]:
    """``density=0.3``, or several with blanks between them.

    Raises:
        RecipeError: No mode has such a parameter, or its value does not fit.
    """
    found: dict[str, Value] = {}
    for part in text.split():
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise RecipeError(
                "Write a parameter as name=value, for example density=0.3, not {part}.", shown(part)
            )
        found[name.replace("-", "_")] = value
    if not found:
        raise RecipeError("Write a parameter as name=value, for example density=0.3.")
    seed = found.pop("seed", None)
    if seed is not None:
        found["seed"] = int(check_number("seed", seed, 0, text=True))
    own = {name: value for name, value in found.items() if name != "seed"}
    if own:
        mode = _mode_with(own, "")
        params = check_params(METHODS[mode].params, own, mode=mode)
        found |= {name: params[name] for name in own}
    return found


def _mode_with(params: Iterable[str], default: str) -> str:
    """The default mode where it has these parameters, else the first one that has them.

    Raises:
        RecipeError: None has.
    """
    wanted = {name for name in params if name != "seed"}

    def has(mode: str) -> bool:
        return wanted <= {param.name for param in METHODS[mode].params}

    found = next((mode for mode in (default, *METHODS) if mode in METHODS and has(mode)), None)
    if found is None:
        known = {param.name for method in METHODS.values() for param in method.params}
        unknown = sorted(wanted - known)
        if unknown:
            raise RecipeError(
                "No mode has a parameter {name}.{hint}", unknown[0], nearest_hint(unknown[0], known)
            )
        raise RecipeError("No mode has {params} together.", " and ".join(sorted(wanted)))
    return found


def read_left_out(text: str) -> frozenset[int]:
    """``none``, ``2`` or ``1+3``: numbers of LoRAs.

    Raises:
        RecipeError: Anything else.
    """
    if text.strip().lower() in (ALL, ""):
        return frozenset()
    numbers = [part.strip() for part in text.split("+")]
    if not all(part.isdecimal() and int(part) > 0 for part in numbers):
        raise RecipeError("Write none, the number of a LoRA, or several as 1+3, not {text}.", shown(text))
    return frozenset(int(part) for part in numbers)


def count(prompt: str) -> int:
    """How many LoRAs a prompt has."""
    return len(tag_bodies(prompt))
