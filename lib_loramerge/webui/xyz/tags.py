"""The ``<lora:...>`` tags of a prompt, changed by their number; everything else in the prompt stays."""

from __future__ import annotations

from collections.abc import Callable

from ...recipe import parse_input
from ...recipe.check import plain
from ...recipe.text import NUMERIC, split_fields, split_name, tag_places


def changed(text: str, change: Callable[[int, str], str | None]) -> str:
    """A prompt with its tags changed.

    Args:
        change: The number of a tag, from 1, and what stands in it, to what is to stand in it; None takes
            the tag out.
    """
    pieces, last = [], 0
    for number, (start, body, end) in enumerate(tag_places(text), 1):
        wanted = change(number, text[body:end])
        pieces.append(text[last:start])
        if wanted is not None:
            pieces.append(f"{text[start:body]}{wanted}>")
        last = end + 1
    return "".join([*pieces, text[last:]])


def name_of(body: str) -> str:
    """The LoRA that a tag names."""
    return split_name(body)[0]


def with_strength(body: str, value: float) -> str:
    """A tag whose denoiser has the strength ``value``; its text encoder keeps its proportion to it."""
    given = parse_input(f"<lora:{body}>", skip_unsupported=True)
    of = given.unet or given.te
    return _with(body, lambda old: value * (old / of) if of else value)


def times(body: str, factor: float) -> str:
    """A tag of ``factor`` times the strength."""
    return _with(body, lambda old: old * factor)


def _with(body: str, change: Callable[[float], float]) -> str:
    given = parse_input(f"<lora:{body}>", skip_unsupported=True)
    name, rest = split_name(body)
    positions, keyed = split_fields(rest)
    te, unet = _tidy(change(given.te)), _tidy(change(given.unet))
    for key in ("te", "unet"):
        keyed.pop(key, None)
    for key in ("te1", "te2", "te3"):
        if key in keyed:
            keyed[key] = plain(_tidy(change(getattr(given, key))))
    more = positions[1:]
    if more and not NUMERIC.fullmatch(more[0]):  # sd-webui-lora-block-weight's NAME:STRENGTH:BLOCKS
        if unet != te:
            keyed = {"unet": plain(unet), **keyed}
        numbers = [plain(te), *more]
    elif unet != te or len(more) > 1:
        numbers = [plain(te), plain(unet), *more[1:]]
    else:
        numbers = [plain(te)]
    return ":".join([name, *numbers, *(f"{key}={value}" for key, value in keyed.items())])


def _tidy(value: float) -> float:
    """A strength as people write it: 0.6 and not 0.6000000000000001."""
    return float(f"{value:.10g}")


def with_blocks(body: str, blocks: str) -> str:
    """A tag with the block weights ``blocks`` in place of those it has."""
    name, rest = split_name(body)
    positions, keyed = split_fields(rest)
    positions = positions[:1] + [value for value in positions[1:] if NUMERIC.fullmatch(value)]
    keyed.pop("w", None)
    keyed["lbw"] = blocks
    return ":".join([name, *positions, *(f"{key}={value}" for key, value in keyed.items())])
