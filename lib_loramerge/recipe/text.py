"""Recipe <-> text: the WebUI's prompt grammar, inside tags or alone.

``NAME[:TE[:UNET[:DYN]]]`` and ``key=value`` fields after it, in any order; of these ``lbw=`` and
``lbwe=`` may hold colons of their own::

    <lora:style:0.8>  <lora:face:0.7:0.5:lbw=MIDD>  sub/name:te=0:unet=1  C:\\x\\a.safetensors:0.5

Numbers are read as the WebUI reads them: one number means text encoder and
denoiser both; ``te=`` and ``unet=`` win over positions, and a denoiser that is
not given follows the text encoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from lib_loramerge.errors import RecipeError, Sentence
from lib_loramerge.recipe.check import check_number, check_whole, nearest_hint, plain, shown
from lib_loramerge.recipe.model import MAX_INPUTS, MAX_RANK, STRENGTH_LIMIT, WEIGHT, LoraInput

LONGEST_TEXT = 1_000_000  # characters of one prompt

# As the WebUI finds them; other networks (<hypernet:...>) and prompt text are skipped.
_TAG = re.compile(r"<(?:lora|lyco):")
# A name that is a path keeps its colons: the Windows drive, and all up to a known suffix.
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_FILE = re.compile(r".*?\.(?:safetensors|ckpt|pt)(?=:|$)", re.IGNORECASE | re.DOTALL)
_KEYED = re.compile(r"\s*([A-Za-z][A-Za-z0-9_]*)\s*=(.*)", re.DOTALL)
# What was meant as a number, well or badly; anything else in its place is the name of a preset.
# 26-MIDD is a name all the same.
NUMERIC = re.compile(
    r"\s*((?![0-9]+-[A-Za-z])[+\-.0-9].*|nan|inf|infinity|true|false|none|null)?\s*", re.I | re.DOTALL
)

_NUMBERS = ("te", "unet", "te1", "te2", "te3", "x")
_IN_STEPS = ("start", "stop", "step")
_KEYS = (*_NUMBERS, "dyn", "lbw", "w", "lbwe", *_IN_STEPS)
# What names blocks in lbw=D00-D07:0.5,S*:1 and no preset.
_BLOCK = r"(?:BASE|CLIP|T5|IN|OUT|[A-Z]{1,3}[0-9]{2,3})"
_BLOCKS = re.compile(rf"\s*(?:{_BLOCK}(?:\s*-\s*{_BLOCK})?|[A-Z]{{0,3}}[0-9]{{0,2}}\*)\s*")
_STEPS_REASON = "a merged file acts on every step, so a choice of sampling steps cannot be kept in it"


def parse_prompt(
    text: str, *, skip_unsupported: bool = False, notes: list[str] | None = None
) -> tuple[LoraInput, ...]:
    """Every ``<lora:...>`` and ``<lyco:...>`` tag of a prompt, in order.

    Args:
        text: A prompt; all that is not such a tag is skipped.
        skip_unsupported: Leave ``start=``, ``stop=``, ``step=`` and ``@`` schedules out
            instead of refusing them.
        notes: What was left out is appended here, one sentence each.

    Raises:
        RecipeError: A tag that makes no sense; the message quotes it.
    """
    if not isinstance(text, str):
        raise RecipeError("A prompt must be text, got {text}.", shown(text))
    if len(text) > LONGEST_TEXT:
        raise RecipeError(
            "A prompt must be at most {most} characters long, got {count}.", LONGEST_TEXT, len(text)
        )
    bodies = tag_bodies(text)
    if len(bodies) > MAX_INPUTS:
        raise RecipeError("A recipe takes from 1 to {most} LoRAs, got {count}.", MAX_INPUTS, len(bodies))
    return tuple(_parse(body, skip_unsupported, notes, tag=True) for body in bodies)


def tag_bodies(text: str) -> list[str]:
    """What stands between the brackets of every closed tag."""
    return [text[start:end] for _, start, end in tag_places(text)]


def tag_places(text: str) -> list[tuple[int, int, int]]:
    """Where every closed tag begins, and where its body begins and ends, in time linear in the text."""
    places = []
    tag = _TAG.search(text)
    while tag:
        end = text.find(">", tag.end())
        if end < 0:
            break
        if end > tag.end():
            places.append((tag.start(), tag.end(), end))
        tag = _TAG.search(text, end)
    return places


def parse_input(text: str, *, skip_unsupported: bool = False, notes: list[str] | None = None) -> LoraInput:
    """One LoRA: a tag with or without its brackets, or a path with fields after it.

    Arguments and errors as :func:`parse_prompt`.
    """
    found = parse_inputs([text], skip_unsupported=skip_unsupported, notes=notes)
    if len(found) != 1:
        raise RecipeError("One LoRA is expected, got {count} in {text}.", len(found), shown(text))
    return found[0]


def parse_inputs(
    texts: Sequence[str], *, skip_unsupported: bool = False, notes: list[str] | None = None
) -> tuple[LoraInput, ...]:
    """The LoRAs of several texts, as the command line gets them.

    Each text is one LoRA without brackets, or a prompt with one or more tags.
    Arguments and errors as :func:`parse_prompt`; no LoRA at all is an error.
    """
    found: list[LoraInput] = []
    for text in texts:
        if not isinstance(text, str) or len(text) > LONGEST_TEXT:
            raise RecipeError(
                "A LoRA must be text of at most {most} characters, got {text}.", LONGEST_TEXT, shown(text)
            )
        if tag_bodies(text):
            found += parse_prompt(text, skip_unsupported=skip_unsupported, notes=notes)
        elif text.lstrip().startswith("<"):
            raise RecipeError(
                "{text} is not a tag: write <lora:NAME:STRENGTH> or NAME:STRENGTH.", shown(text)
            )
        else:
            found.append(_parse(text, skip_unsupported, notes))
    if not 1 <= len(found) <= MAX_INPUTS:
        raise RecipeError("A recipe takes from 1 to {most} LoRAs, got {count}.", MAX_INPUTS, len(found))
    return tuple(found)


def _parse(body: str, skip: bool, notes: list[str] | None, *, tag: bool = False) -> LoraInput:
    """One LoRA from the text inside the brackets.

    Args:
        tag: There were brackets: blanks around the name belong to it, as in the WebUI.
    """
    name, rest = split_name(body if tag else body.strip())
    name = name if tag and name.strip() else name.strip()
    try:
        positions, keyed = split_fields(rest)
        left_out = _leave_out_steps(positions, keyed, skip)
        values = _keyed_values(keyed)
        _add_positions(values, positions)
        _add_defaults(values)
        found = LoraInput(name=name, **values)
    except RecipeError as error:
        if not name or str(error).startswith(f"{shown(name)}: "):
            raise
        raise RecipeError("{name}: {error}", shown(name), error) from None
    if notes is not None:
        reason = Sentence(_STEPS_REASON)
        notes += [
            Sentence("{name}: {what} was left out: {reason}.", shown(name), what, reason) for what in left_out
        ]
    return found


def split_name(body: str) -> tuple[str, str | None]:
    """(name, what follows its colon), with the colons of a path kept in the name."""
    path = _FILE.match(body)
    if path:
        name = path.group()
    else:
        drive = _DRIVE.match(body)
        end = body.find(":", drive.end() if drive else 0)
        name = body if end < 0 else body[:end]
    rest = body[len(name) + 1 :] if len(body) > len(name) else None
    return name, rest


def split_fields(rest: str | None) -> tuple[list[str], dict[str, str]]:
    """Fields in positions, and fields with a key, both as written."""
    positions: list[str] = []
    keyed: dict[str, str] = {}
    parts = [] if rest is None else rest.split(":")
    index = 0
    while index < len(parts):
        match = _KEYED.fullmatch(parts[index])
        if match is None:
            positions.append(parts[index].strip())
            index += 1
            continue
        key, value = match[1], match[2].strip()
        if key not in _KEYS:
            raise RecipeError(
                "there is no field {name}=. The fields are {fields}.{hint}",
                key,
                ", ".join(_KEYS),
                nearest_hint(key, _KEYS),
            )
        if key in keyed:
            raise RecipeError("{name}= is given twice.", key)
        index += 1
        if key in ("lbw", "w"):
            end = _end_of_blocks(value, parts, index)
            value = ":".join([value, *parts[index:end]]).strip()
            index = end
        if key == "lbwe":
            end = _end_of_rules(parts, index, len(positions))
            value = ":".join([value, *parts[index:end]]).strip()
            index = end
        keyed[key] = value
    return positions, keyed


def _end_of_blocks(value: str, parts: list[str], start: int) -> int:
    """Where the value of an ``lbw=`` ends that names blocks, ``D00-D07:0.5,S*:1``.

    A colon belongs to it when blocks stand before it and a weight after it; a
    preset's name ends at its colon.
    """
    end, before = start, value
    while end < len(parts) and _BLOCKS.fullmatch(before.rpartition(",")[2]):
        weight, comma, before = parts[end].partition(",")
        if not WEIGHT.fullmatch(weight.strip()):
            break
        end += 1
        if not comma:
            break
    return end


def _end_of_rules(parts: list[str], start: int, positions: int) -> int:
    """Where the value of an ``lbwe=`` ends whose ``parts[start:]`` follow it.

    A stored recipe spells its elemental rules out, ``lbwe=IN05-OUT05:attn:0``, and
    such a value goes on up to the next key. A preset's name ends at its colon, and
    numbers after it are positions.
    """
    end = start
    while end < len(parts) and not _KEYED.fullmatch(parts[end]):
        end += 1
    spelled_out = end - start >= 2 and (positions >= 2 or not NUMERIC.fullmatch(parts[start]))
    if end - start >= 2 and not parts[start].strip():
        spelled_out = True  # blocks::ratio, a rule for every element
    return end if spelled_out else start


def _leave_out_steps(positions: list[str], keyed: dict[str, str], skip: bool) -> list[str]:
    """Take out what only acts on some sampling steps; what was taken out."""
    found = [f"{key}={keyed.pop(key)}" for key in _IN_STEPS if key in keyed]
    for index, value in enumerate(positions):
        if "@" in value:  # a schedule of strengths by step; the plain WebUI reads none of it
            found.append(value)
            positions[index] = "1"
    for key in ("te", "unet"):
        if "@" in keyed.get(key, ""):
            found.append(f"{key}={keyed[key]}")
            keyed[key] = "1"
    if found and not skip:
        raise RecipeError(
            "{what} is not possible: {reason}. Take it out, or allow what is unsupported to be skipped.",
            found[0][:80],
            Sentence(_STEPS_REASON),
        )
    return found


def _number(name: str, value: str) -> float:
    return check_number(name, value, -STRENGTH_LIMIT, STRENGTH_LIMIT, text=True)


def _keyed_values(keyed: dict[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {name: _number(name, keyed[name]) for name in _NUMBERS if name in keyed}
    if "dyn" in keyed:
        values["dyn"] = check_whole("dyn", keyed["dyn"], 1, MAX_RANK, text=True)
    if "lbw" in keyed and "w" in keyed:
        raise RecipeError("lbw= and w= mean the same; give one.")
    for key in ("lbw", "w", "lbwe"):
        if key in keyed:
            if not keyed[key]:
                raise RecipeError("{name}= must not be empty.", key)
            values["lbwe" if key == "lbwe" else "lbw"] = keyed[key]
    return values


def _add_positions(values: dict[str, Any], positions: list[str]) -> None:
    """TE, UNET and DYN by position; a keyed field wins, as in the WebUI.

    sd-webui-lora-block-weight's older form is known too: block weights in third
    place and, in fourth, the value of X or an elemental preset.
    """
    if len(positions) > 3:
        given = shown(":".join(positions))
        raise RecipeError(
            "NAME:TE:UNET:DYN has at most 3 numbers, got {count}: {given}.", len(positions), given
        )
    for name, value in zip(("te", "unet"), positions):
        if name == "unet" and ("," in value or not NUMERIC.fullmatch(value)):
            _add_block_positions(values, positions[1:])
            return
        if name == "te" and not NUMERIC.fullmatch(value):
            raise RecipeError(
                "te must be a number from {minimum} to {maximum}, got {value}. Block weights are written "
                "lbw=NAME.",
                plain(-STRENGTH_LIMIT),
                plain(STRENGTH_LIMIT),
                shown(value),
            )
        values.setdefault(name, _number(name, value))
    if len(positions) > 2:
        values.setdefault("dyn", check_whole("dyn", positions[2], 1, MAX_RANK, text=True))


def _add_block_positions(values: dict[str, Any], positions: list[str]) -> None:
    if "lbw" in values:
        raise RecipeError(
            "block weights are given twice: {given} and lbw={weights}.", shown(positions[0]), values["lbw"]
        )
    values["lbw"] = positions[0]
    if len(positions) > 1:
        name = "x" if NUMERIC.fullmatch(positions[1]) else "lbwe"
        if name in values:
            raise RecipeError(
                "{name} is given twice: {given} and {name}={value}.", name, shown(positions[1]), values[name]
            )
        values[name] = _number("x", positions[1]) if name == "x" else positions[1]


def _add_defaults(values: dict[str, Any]) -> None:
    """Strengths not given: the denoiser follows the text encoder.

    With ``unet=`` alone the WebUI leaves the text encoder at 1, but
    sd-webui-lora-block-weight, which takes over when block weights are given,
    gives both that strength.
    """
    if "te" not in values:
        by_blocks = "lbw" in values or "lbwe" in values
        values["te"] = values.get("unet", 1.0) if by_blocks else 1.0
    values.setdefault("unet", values["te"])


def format_input(given: LoraInput) -> str:
    """One LoRA in the grammar; :func:`parse_input` reads it back.

    Without brackets, unless only these keep the name whole (one that begins with
    ``<``). ``hash`` is the one field that text does not carry.

    Raises:
        RecipeError: A name that the grammar cannot hold, such as ``a:b``.
    """
    body = _body(given)
    for text in (body, f"<lora:{body}>"):
        if _reads_back(text, given):
            return text
    raise _unwritable(given)


def format_prompt(inputs: Iterable[LoraInput]) -> str:
    """The LoRAs as prompt tags: ``<lora:a:0.8><lora:b:0.5:lbw=MIDD>``.

    :func:`parse_prompt` reads them back, all but ``hash``.

    Raises:
        RecipeError: A name that a tag cannot hold, such as ``a>b``.
    """
    tags = []
    for given in inputs:
        tag = f"<lora:{_body(given)}>"
        if not _reads_back(tag, given):
            raise _unwritable(given)
        tags.append(tag)
    return "".join(tags)


def _body(given: LoraInput) -> str:
    fields = [given.name, plain(given.te)]
    # Rules spelled out contain colons; with both numbers before them they cannot be misread.
    if given.unet != given.te or (given.lbwe is not None and ":" in given.lbwe):
        fields.append(plain(given.unet))
    for name in ("dyn", "te1", "te2", "te3"):
        value = getattr(given, name)
        if value is not None:
            fields.append(f"{name}={plain(value)}")
    if given.lbw is not None:
        fields.append(f"lbw={given.lbw}")
    if given.x is not None:
        fields.append(f"x={plain(given.x)}")
    if given.lbwe is not None:
        fields.append(f"lbwe={given.lbwe}")
    return ":".join(fields)


def _reads_back(text: str, given: LoraInput) -> bool:
    try:
        return parse_inputs([text]) == (replace(given, hash=None),)
    except RecipeError:
        return False


def _unwritable(given: LoraInput) -> RecipeError:
    return RecipeError("{name} cannot be written as text: rename the file or the preset.", shown(given.name))
