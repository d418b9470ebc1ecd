"""Checks shared by every form of a recipe: numbers, words, and the nearest right name."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from numbers import Integral, Real

from lib_loramerge.errors import RecipeError, Sentence

# ASCII digits only: int() and float() would also take "1_0", "inf", "nan" and digits of other scripts.
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_WHOLE = re.compile(r"[+-]?[0-9]+")
_LONGEST_NUMBER = 64
LONGEST_NAME = 4096  # characters of a name, a path or a text parameter


def shown(value: object) -> str:
    """``value`` as an error message shows it: quoted if text, cut if long."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits.
        text = Sentence("a number of thousands of digits")
    return text if len(text) <= 80 else Sentence("{start}... ({count} characters)", text[:60], len(text))


def _limits(minimum: float | None, maximum: float | None) -> str:
    if minimum is not None and maximum is not None:
        return Sentence(" from {minimum} to {maximum}", plain(minimum), plain(maximum))
    if minimum is not None:
        return Sentence(" of at least {minimum}", plain(minimum))
    if maximum is not None:
        return Sentence(" of at most {maximum}", plain(maximum))
    return ""


def plain(value: float) -> str:
    """The shortest text that reads back as the same number: ``1``, ``0.8``, ``1e-07``."""
    if isinstance(value, int):
        return str(value)
    if value == 0:
        return "0"  # also for -0.0
    if value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return repr(value)


def _spelled(value: object, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_NUMBER and bool(pattern.fullmatch(value.strip()))


def check_number(
    name: str,
    value: object,
    minimum: float | None = None,
    maximum: float | None = None,
    *,
    text: bool = False,
) -> float:
    """``value`` as a finite float within the limits.

    Args:
        name: The field, as the message names it.
        value: An int or float; with ``text`` also a decimal number as text.
        minimum: Smallest value allowed, if there is one.
        maximum: Largest value allowed, if there is one.
        text: Whether text is converted.

    Raises:
        RecipeError: For anything else: NaN, infinity, booleans, hexadecimal,
            digit groups, empty text, values outside the limits.
    """
    number: float | None = None
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except (OverflowError, ValueError):
            number = None
    elif text and _spelled(value, _NUMBER):
        number = float(str(value))
    in_range = (
        number is not None
        and math.isfinite(number)
        and (minimum is None or number >= minimum)
        and (maximum is None or number <= maximum)
    )
    if number is None or not in_range:
        raise RecipeError(
            "{name} must be a number{limits}, got {value}.", name, _limits(minimum, maximum), shown(value)
        )
    return number


def check_whole(
    name: str, value: object, minimum: int | None = None, maximum: int | None = None, *, text: bool = False
) -> int:
    """``value`` as an int within the limits; with ``text`` also as decimal text.

    Raises:
        RecipeError: For anything else, booleans and fractions included.
    """
    number: int | None = None
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
    elif text and _spelled(value, _WHOLE):
        number = int(str(value))
    in_range = (
        number is not None
        and (minimum is None or number >= minimum)
        and (maximum is None or number <= maximum)
    )
    if number is None or not in_range:
        raise RecipeError(
            "{name} must be a whole number{limits}, got {value}.",
            name,
            _limits(minimum, maximum),
            shown(value),
        )
    return number


def check_text(name: str, value: object, longest: int, *, padded: bool = False) -> str:
    """``value`` as text that is not empty, not padded (unless allowed), and not longer than ``longest``.

    Raises:
        RecipeError: For anything else; NUL can stand in no name or path and is refused too.
    """
    if not isinstance(value, str):
        raise RecipeError("{name} must be text, got {value}.", name, shown(value))
    if not value.strip():
        raise RecipeError("{name} must not be empty.", name)
    if len(value) > longest:
        raise RecipeError(
            "{name} must be at most {most} characters long, got {count}.", name, longest, len(value)
        )
    if "\0" in value:
        raise RecipeError("{name} must not contain a NUL character, got {value}.", name, shown(value))
    if value != value.strip() and not padded:
        raise RecipeError("{name} must not begin or end with a space, got {value}.", name, shown(value))
    return value


def check_flag(name: str, value: object) -> bool:
    """``value`` if it is a boolean; anything else is a :class:`RecipeError`."""
    if not isinstance(value, bool):
        raise RecipeError("{name} must be true or false, got {value}.", name, shown(value))
    return value


def check_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """``value`` if it is one of ``choices``; anything else is a :class:`RecipeError` with the nearest."""
    choices = tuple(choices)
    if isinstance(value, str) and value in choices:
        return value
    hint = nearest_hint(value, choices) if isinstance(value, str) else ""
    raise RecipeError(
        "{name} must be one of {choices}, got {value}.{hint}", name, ", ".join(choices), shown(value), hint
    )


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The names most like ``name``, best first: for "did you mean" in errors.

    Case is ignored, and a name that contains the wanted one (or the other way
    round) counts as near however long it is.
    """
    wanted = name.casefold()
    by_folded: dict[str, str] = {}
    for candidate in names:
        by_folded.setdefault(candidate.casefold(), candidate)
    found = difflib.get_close_matches(wanted, by_folded, n=count, cutoff=0.6)
    if wanted:
        others = [c for c in by_folded if c not in found]
        containing = [c for c in others if wanted in c or (len(c) > 2 and c in wanted)]
        found += sorted(containing, key=lambda c: abs(len(c) - len(wanted)))
    if not found:
        found = difflib.get_close_matches(wanted, by_folded, n=count, cutoff=0.4)
    return [by_folded[f] for f in found[:count]]


def nearest_hint(name: str, names: Iterable[str]) -> str:
    """`` Nearest: a, b, c.`` to put at the end of a message, or nothing."""
    found = nearest(name, names)
    return Sentence(" Nearest: {near}.", ", ".join(found)) if found else ""
