"""What a request holds, read and checked field by field.

Bodies are read here, not by a model class, so that every host's FastAPI and pydantic answer alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NoReturn, TypeVar

from ..recipe import MergeRecipe, from_json
from .access import Refusal
from .listing import readable
from .schema import MAX_DEPTH, MAX_INPUTS, MAX_TEXT

if TYPE_CHECKING:
    from fastapi import Request

T = TypeVar("T")

MAX_BODY_BYTES = 1 << 20
MAX_DRAINED_BYTES = 64 << 20
# Text on the wire that can only be an attempt to leave the folder, on any system.
_PATH = re.compile(r"^(?:[/\\~]|[A-Za-z]:)|(?:^|[/\\])\.\.(?:[/\\]|$)|[\x00-\x1f]")


async def read_json(request: Request) -> dict[str, object]:
    """The JSON object of a request's body.

    Only ``application/json``: a form could be posted by any web page that the user happens to visit.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(400, "Send JSON, with the header Content-Type: application/json.")
    body = bytearray()
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received <= MAX_BODY_BYTES:
            body += chunk
        elif received > MAX_DRAINED_BYTES:
            break
        # The rest is read and thrown away: a client that still sends would not read our answer.
    if received > MAX_BODY_BYTES:
        raise Refusal(413, f"The body is larger than {MAX_BODY_BYTES >> 20} MiB.")
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refusal(400, f"The body is not JSON: {reason}.") from error
    if not isinstance(content, dict):
        raise Refusal(422, "The body must be a JSON object.")
    _check_limits(content, 0)
    return content


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _check_limits(value: object, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise Refusal(422, f"The JSON is nested deeper than {MAX_DEPTH} levels.")
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise Refusal(422, f"A text is longer than {MAX_TEXT} characters.")
        if readable(value) != value:
            raise Refusal(400, f"{value[:60]!a} is no text: it holds half a character.")
    elif isinstance(value, (dict, list)):
        if len(value) > MAX_INPUTS:
            what = "inputs" if isinstance(value, list) else "fields"
            raise Refusal(422, f"A list may have {MAX_INPUTS} {what} at most; one has {len(value)}.")
        for key in value if isinstance(value, dict) else ():
            _check_limits(key, depth)
        for item in value.values() if isinstance(value, dict) else value:
            _check_limits(item, depth + 1)


class Fields:
    """The fields of a JSON object, each of the type asked for.

    Args:
        known: The only ones that it may have.

    Raises:
        Refusal: It has another.
    """

    def __init__(self, content: Mapping[str, object], known: Iterable[str]) -> None:
        unknown = sorted(set(content) - set(known))
        if unknown:
            raise Refusal(422, f"Unknown field {unknown[0][:60]!r}; known are {', '.join(known)}.")
        self._content = content

    def text(self, name: str) -> str:
        return self._get(name, "", str, "text")

    def choice(self, name: str, known: tuple[str, ...]) -> str:
        """One of ``known``; the first when it is not given."""
        value = self._get(name, known[0], str, "text")
        if value not in known:
            raise Refusal(422, f"{name} must be one of {', '.join(known)}.")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        return self._get(name, default, bool, "true or false")

    def name(self, field: str) -> str:
        """The name of a file to be written, which may not be empty nor a path."""
        value = self.text(field)
        if not value.strip():
            raise Refusal(400, f"{field} is missing: what should the file be called?")
        refuse_path(value)
        return value

    def given(self, name: str) -> bool:
        return self._content.get(name) is not None

    def whole(self, name: str) -> int:
        value = self._get(name, 0, int, "a whole number")
        if isinstance(value, bool) or abs(value) > 1e9:
            raise Refusal(422, f"{name} must be a whole number.")
        return value

    def rank(self, name: str) -> int | str:
        return "auto" if self._content.get(name) == "auto" else self.whole(name)

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._get(name, [], list, "a list of texts")
        texts = tuple(item for item in value if isinstance(item, str))
        if len(texts) < len(value):
            raise Refusal(422, f"{name} must be a list of texts.")
        return texts

    def refuse(self, reason: str) -> NoReturn:
        raise Refusal(422, reason)

    def number(self, name: str) -> float:
        value = self._content.get(name, 0.0)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > 1e9:
            raise Refusal(422, f"{name} must be a number.")
        return float(value)

    def recipe(self) -> MergeRecipe:
        """The recipe in the field ``recipe``, which names files of the LoRA folder alone."""
        stored = self.mapping("recipe")
        inputs = stored.get("inputs")
        if isinstance(inputs, list) and len(inputs) > MAX_INPUTS:
            raise Refusal(422, f"A recipe may have {MAX_INPUTS} inputs at most; this one has {len(inputs)}.")
        recipe = from_json(stored)
        for entry in recipe.inputs:
            refuse_path(entry.name)
        return recipe

    def mapping(self, name: str) -> Mapping[str, object]:
        return self._get(name, {}, dict, "an object")

    def _get(self, name: str, default: T, kind: type[T], words: str) -> T:
        value = self._content.get(name, default)
        if not isinstance(value, kind):
            raise Refusal(422, f"{name} must be {words}.")
        return value


def refuse_path(name: str) -> None:
    if _PATH.search(name):
        raise Refusal(
            400, f"{name[:80]!r} is not a name inside the LoRA folder; paths are not accepted here."
        )
