"""Everything a user can cause or fix, and the sentences that say so.

Front ends catch :class:`LoraMergeError` and show ``str(error)``. Any other
exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

_SLOT = re.compile(r"\{(\w+)\}")


class Sentence(str):
    """English text that remembers what it was made of, so that a page can say it in another language.

    ``Sentence("{file} has {count} layers.", path.name, 3)`` is the text ``"a.safetensors has 3 layers."``.
    What is cut out of it or joined to it is plain text again; slots and :func:`joined` keep it whole.
    ``Sentence(word)`` says of a word from a table that it is ours, and no name that somebody gave.

    Attributes:
        key: The English with a named slot for each part; translations are found by it.
        parts: What the slots hold, in the order in which they first stand in the key. A part that is a
            sentence, or an error, is translated too; plain text never is.
    """

    key: str
    parts: tuple[str, ...]

    def __new__(cls, key: str, *parts: object) -> Sentence:
        if isinstance(key, Sentence) and not parts:
            return key
        held = tuple(part if isinstance(part, str) else str(part) for part in parts)
        self = super().__new__(cls, fill(key, key, held))
        self.key, self.parts = key, held
        return self

    def __str__(self) -> str:
        return self  # So that str() of an error has a key and parts, too.

    def __reduce__(self) -> tuple[Any, ...]:
        return Sentence, (self.key, *self.parts)

    def map(self, change: Callable[[str], str]) -> Sentence:
        """The same sentence with ``change`` applied to the plain text in its slots, however deep."""
        return Sentence(self.key, *(mapped(part, change) for part in self.parts))

    def to_json(self) -> list[Any]:
        """The key and its parts, sentences among them as lists of their own."""
        return [self.key, *(part.to_json() if isinstance(part, Sentence) else part for part in self.parts)]


def fill(text: str, key: str, parts: Sequence[str]) -> str:
    """``text`` with the parts of a sentence in the slots that it shares with the sentence's key.

    Raises:
        ValueError: There are more slots than parts, or fewer.
    """
    slots = dict(zip(dict.fromkeys(_SLOT.findall(key)), parts, strict=True)) if parts else {}
    return _SLOT.sub(lambda slot: slots.get(slot[1], slot[0]), text)


def joined(separator: str, texts: Iterable[str], last: str | None = None) -> Sentence:
    """``separator.join(texts)`` that keeps the sentences among them; ``last`` stands before the last one."""
    held = list(texts)
    slots = [f"{{{index}}}" for index in range(len(held))]
    if last is not None and len(held) > 1:
        slots[-2:] = [last.join(slots[-2:])]
    return Sentence(separator.join(slots), *held)


def counted(count: int, one: str, many: str, *parts: object) -> Sentence:
    """The sentence for one thing, or that for several; its first slot holds the count."""
    return Sentence(one if count == 1 else many, count, *parts)


def mapped(text: str, change: Callable[[str], str]) -> str:
    """``change`` of plain text, and of the parts alone where it is a sentence."""
    return text.map(change) if isinstance(text, Sentence) else change(text)


class LoraMergeError(Exception):
    """Base of every error a user can cause or fix.

    The message is one or two sentences: what is wrong, in which file and
    layer, and the way out. It is given as to :class:`Sentence`: a key and
    what its slots hold.
    """

    def __init__(self, key: str, *parts: object) -> None:
        self.sentence = Sentence(key, *parts)
        super().__init__(self.sentence)


class FileError(LoraMergeError):
    """A file that cannot be read, is damaged, or is not what its name says."""


class UnsupportedError(LoraMergeError):
    """A file or layer of a kind that cannot be merged, with the reason."""


class UnknownKeyError(LoraMergeError):
    """Tensor names that no dialect or adapter kind claims."""


class RecipeError(LoraMergeError):
    """A recipe, preset, parameter or option that makes no sense."""


class IncompatibleError(LoraMergeError):
    """Inputs that do not fit each other: base models, shapes, ranks."""


class OutputError(LoraMergeError):
    """A result that cannot be written where it was asked for."""


class Cancelled(LoraMergeError):
    """The user stopped the work; nothing was written."""
