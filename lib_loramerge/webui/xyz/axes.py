"""The table of axes: what each is called, takes, does to a picture, and says on the grid."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...errors import RecipeError, Sentence
from ...methods import METHODS
from ...recipe import nearest_hint
from ...recipe.check import check_number, plain, shown
from ...recipe.text import tag_bodies
from . import cell as cells
from . import tags
from .cell import Cell

PREFIX = "[LoRA Merge] "
# A plot runs the dearest axis outermost. Another strength is another tag; another merge is another LoRA,
# which Forge patches in and A1111 applies to every layer; a VAE costs 0.7 and a checkpoint 1.
CHEAP, DEAR = 0.1, 0.5
MOST_STRENGTHS, MOST_BLOCKS = 4, 2


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        name: Its label without what all of ours begin with.
        kind: What the host makes of the text of a value, ``str`` or ``float``.
        change: A cell and a value as the host gives it to the cell with it; what makes no sense raises.
        shown: The names of the prompt's LoRAs and a value to the words on the grid.
        needs: How many LoRAs the prompt must have.
        choices: Values to choose from: ``modes``, ``presets``, ``numbers``; empty: they are typed.
    """

    name: str
    kind: type
    change: Callable[[Cell, object], Cell]
    shown: Callable[[Sequence[str], object], str]
    cost: float = DEAR
    needs: int = 1
    choices: str = ""

    @property
    def label(self) -> str:
        return PREFIX + self.name


def _number(name: str, value: object) -> float:
    # The host counts in binary: 0.1 steps come as 0.30000000000000004.
    return float(f"{check_number(name, value, -1000, 1000, text=True):.10g}")


def _mode(value: object) -> str:
    text = str(value).strip()
    by_label = {method.label.casefold(): name for name, method in METHODS.items()}
    name = by_label.get(text.casefold(), text.casefold())
    if name not in METHODS:
        raise RecipeError("There is no mode {mode}.{hint}", shown(text), nearest_hint(text, METHODS))
    return name


def _blocks(value: object) -> str:
    text = str(value).strip()
    if not text or ":" in text or ">" in text:
        raise RecipeError("Block weights are a preset's name or a list of numbers, not {text}.", shown(text))
    return text


def _rank(value: object) -> str:
    cells.rank_fields(str(value))
    return str(value).strip()


def _name(names: Sequence[str], number: int) -> str:
    return names[number - 1] if number <= len(names) else f"LoRA {number}"


def _without(names: Sequence[str], value: object) -> str:
    left_out = cells.read_left_out(str(value))
    return "without " + ", ".join(_name(names, n) for n in sorted(left_out)) if left_out else "all LoRAs"


def _rank_words(text: str) -> str:
    return text.replace("=", " ") if text.lower().startswith(("retain", "size")) else f"rank {text}"


def _mix_words(names: Sequence[str], value: object) -> str:
    second = _number("mix", value)
    first = plain(float(f"{1 - second:.10g}"))
    return f"{first} {_name(names, 1)} + {plain(second)} {_name(names, 2)}"


def _strength(number: int) -> Axis:
    def change(cell: Cell, value: object) -> Cell:
        strength = _number(Sentence("The strength of LoRA {number}", number), value)
        return replace(cell, strengths={**cell.strengths, number: strength})

    return Axis(
        f"Strength of LoRA {number}",
        float,
        change,
        lambda names, value: f"{_name(names, number)} {plain(_number('strength', value))}",
        cost=CHEAP,
        needs=number,
    )


def _block_weights(number: int) -> Axis:
    return Axis(
        f"Block weights of LoRA {number}",
        str,
        lambda cell, value: replace(cell, blocks={**cell.blocks, number: _blocks(value)}),
        lambda names, value: f"{_name(names, number)}: {value}",
        needs=number,
        choices="presets",
    )


AXES = (
    *(_strength(number) for number in range(1, MOST_STRENGTHS + 1)),
    Axis(
        "Mix of LoRA 1 and 2",
        float,
        lambda cell, value: replace(cell, mix=_number("The mix", value)),
        _mix_words,
        cost=CHEAP,
        needs=2,
    ),
    *(_block_weights(number) for number in range(1, MOST_BLOCKS + 1)),
    Axis(
        "Mode",
        str,
        lambda cell, value: replace(cell, mode=_mode(value)),
        lambda names, value: METHODS[_mode(value)].label,
        choices="modes",
    ),
    Axis(
        "Rank",
        str,
        lambda cell, value: replace(cell, rank=_rank(value)),
        lambda names, value: _rank_words(str(value).strip()),
    ),
    Axis(
        "Parameter of the mode",
        str,
        lambda cell, value: replace(cell, params={**cell.params, **cells.read_params(str(value))}),
        lambda names, value: str(value).strip(),
    ),
    Axis(
        "Leave out LoRA",
        str,
        lambda cell, value: replace(cell, left_out=cells.read_left_out(str(value))),
        _without,
        cost=CHEAP,
        choices="numbers",
    ),
)
LEAVE_OUT = AXES[-1]


def names_in(prompt: str) -> list[str]:
    """The LoRAs of a prompt as the grid calls them."""
    return [tags.name_of(body).rpartition("/")[2] for body in tag_bodies(prompt)]


def typed_values(axis: Axis, text: str) -> list[str]:
    """The values of a typed text, with our ranges and lists among the host's: ``0.2..1/5``, ``0.2/0.5``.

    Raises:
        RecipeError: A number that is none, which the host would say in words of its own.
    """
    from ...sweep.axes import values_of  # Not at the WebUI's start, see extension.py.

    values = [value.strip() for value in next(csv.reader(io.StringIO(text), skipinitialspace=True), [])]
    if axis.kind is not float:
        return values
    found = [value for part in values if part for value in values_of(part)]
    for value in found:
        if not any(mark in value[1:] for mark in "-[("):  # The host's own ranges.
            axis.change(Cell(), value)
    return found


def check_values(axis: Axis, prompt: str, values: Sequence[object]) -> list[Cell]:
    """The cells of an axis alone.

    Raises:
        RecipeError: A value that makes no sense, or too few LoRAs in the prompt.
    """
    made = [axis.change(Cell(), value) for value in values]
    needed = max([axis.needs, *(max(cell.left_out, default=0) for cell in made)])
    there = cells.count(prompt)
    if there < needed:
        raise RecipeError(
            "LoRAs in the prompt: {count}. {axis} needs at least {needed}.", there, axis.label, needed
        )
    return made
