"""What a field of a recipe is: a setting of every merge, or a parameter of one merge method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lib_loramerge.errors import RecipeError, Sentence
from lib_loramerge.recipe.check import (
    LONGEST_NAME,
    check_choice,
    check_flag,
    check_number,
    check_text,
    check_whole,
    nearest_hint,
    shown,
)

Value = float | int | str | bool
"""What a parameter of a merge method may be."""

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")


@dataclass(frozen=True)
class Setting:
    """One field of :class:`MergeRecipe` besides its inputs and the method's parameters.

    Attributes:
        name: The field; ``--with-dashes`` on the command line.
        default: Its value when not given; None where the field is optional.
        check: The value in its type, or a :class:`RecipeError` that names field, limits and value.
        help: One sentence without a full stop, for the command line and REST's schema.
        kind: Its type on the command line and in JSON.
        words: The texts allowed; beside numbers where ``minimum`` is given.
        metavar: Its placeholder on the command line.
        minimum: Smallest whole number allowed, for the schema.
        commands: The commands of ``loramerge`` that take it.
        option: Its option without dashes, where that is not its name.
        label: Above its control in the tab; empty where the tab makes that control by itself.
        labels: Each of ``words`` as the tab shows it; the empty word is the optional field left open.
    """

    name: str
    default: Any
    check: Callable[[object], Any]
    help: str
    kind: type
    words: tuple[str, ...]
    metavar: str | None
    minimum: int | None
    commands: tuple[str, ...]
    option: str = ""
    label: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def hint(self) -> str:
        """Its help as a sentence."""
        return f"{self.help[0].upper()}{self.help[1:]}."

    def shown(self, value: Any) -> Any:
        """What its control holds for a value."""
        return self.labels.get(value or "", "" if value is None else value)

    def read(self, shown: Any) -> Any:
        """The value that its control means.

        Raises:
            RecipeError: Text that it does not take; the message names the control.
        """
        if self.kind is bool:
            return bool(shown)
        text = str(shown or "").strip()
        text = next((word for word, label in self.labels.items() if label == text), text)
        return self.check(text) if text else self.default

    @property
    def flag(self) -> str:
        """Its option on the command line."""
        return "--" + (self.option or self.name.replace("_", "-"))

    @property
    def optional(self) -> bool:
        """Whether None means that it was not given."""
        return self.default is None

    def schema(self) -> dict[str, Any]:
        """JSON Schema of its values."""
        types = {int: "integer", float: "number", bool: "boolean", str: "string"}
        one: dict[str, Any] = {"type": types[self.kind]}
        if self.words:
            one["enum"] = list(self.words)
        if self.words and self.minimum is not None:
            one = {"oneOf": [{"type": "integer", "minimum": self.minimum}, one]}
        elif self.minimum is not None:
            one["minimum"] = self.minimum
        if self.optional:
            return {**one, "nullable": True, "description": self.help}
        return {**one, "default": self.default, "description": self.help}


def setting(
    default: Any,
    check: Callable[[object], Any],
    help: str,
    *,
    kind: type = str,
    words: tuple[str, ...] = (),
    metavar: str | None = None,
    minimum: int | None = None,
    commands: tuple[str, ...],
    option: str = "",
    label: str = "",
    labels: Mapping[str, str] | None = None,
) -> Any:
    """A dataclass field with its :class:`Setting`, whose name is that of the field."""
    entry = Setting(
        "", default, check, help, kind, words, metavar, minimum, commands, option, label, labels or {}
    )
    return field(default=default, metadata={"setting": entry})


@dataclass(frozen=True)
class Param:
    """One tunable of a merge method, defined once; the tab, CLI and REST read it.

    Attributes:
        name: The field's name, ``lower_case``; ``--lower-case`` on the command line.
        default: Its value when not given; its type is the parameter's type.
        help: One sentence for the user.
        minimum: Smallest value allowed (numbers only).
        maximum: Largest value allowed (numbers only).
        choices: The values allowed (text only).
    """

    name: str
    default: Value
    help: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()

    def check(self, value: object) -> Value:
        """``value`` in the type of the default, converted from text if need be.

        Raises:
            RecipeError: Not of the type, not finite, out of the limits or not a
                choice; the message names the parameter, the limits and the value.
        """
        if isinstance(self.default, bool):
            return self._check_flag(value)
        if isinstance(self.default, int):
            # Sliders of some Gradio versions hand whole numbers over as floats.
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            low = None if self.minimum is None else int(self.minimum)
            high = None if self.maximum is None else int(self.maximum)
            return check_whole(self.name, value, low, high, text=True)
        if isinstance(self.default, float):
            return check_number(self.name, value, self.minimum, self.maximum, text=True)
        if self.choices:
            return check_choice(self.name, value, self.choices)
        return check_text(self.name, value, LONGEST_NAME)

    def range_text(self) -> str:
        """What it may be, and what it is when not given: ``"0.01 to 1, default 0.5"``."""
        if self.choices:
            limits = ", ".join(self.choices)
        elif isinstance(self.default, bool):
            limits = "yes or no"
        else:
            low = "" if self.minimum is None else f"{self.minimum:g}"
            high = "" if self.maximum is None else f"{self.maximum:g}"
            limits = (
                f"{low} to {high}"
                if low and high
                else f"from {low}"
                if low
                else f"up to {high}"
                if high
                else "any"
            )
        return f"{limits}, default {self.default}"

    def to_json(self) -> dict[str, Any]:
        """Everything about it, for programs; absent limits are null."""
        return {
            "name": self.name,
            "type": type(self.default).__name__,
            "default": self.default,
            "minimum": self.minimum,
            "maximum": self.maximum,
            "choices": list(self.choices),
            "help": self.help,
        }

    def _check_flag(self, value: object) -> bool:
        if isinstance(value, str):
            if value.strip().lower() in _TRUE:
                return True
            if value.strip().lower() in _FALSE:
                return False
        return check_flag(self.name, value)


def check_params(params: Sequence[Param], given: Mapping[str, object], *, mode: str) -> dict[str, Value]:
    """Every parameter of a method with its given or default value, checked.

    Raises:
        RecipeError: A value that does not fit, or a name the method does not know.
    """
    known = {p.name: p for p in params}
    for name in given:
        if name not in known:
            takes = Sentence("It takes {names}.", ", ".join(known)) if known else Sentence("It takes none.")
            hint = nearest_hint(str(name), known)
            raise RecipeError(
                "Mode {mode} has no parameter {name}. {takes}{hint}", mode, shown(name), takes, hint
            )
    return {p.name: p.check(given.get(p.name, p.default)) for p in params}
