"""What we use of the host's objects around a picture; every host has more of them, and perhaps not all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol


class Picture(Protocol):
    """``StableDiffusionProcessing``: one picture, or a plot, on its way."""

    prompt: str | list[str]
    hr_prompt: str
    styles: Sequence[str]
    extra_generation_params: Mapping[str, object]
    init: Callable[..., None]
    close: Callable[[], None]
    comment: Callable[[str], None]


class AxisOption(Protocol):
    """An axis of the X/Y/Z plot."""

    label: str
    cost: float
    format_value: Callable[[Picture, object, object], str]
    confirm: Callable[[Picture, Sequence[object]], None]
    prepare: Callable[[str], list[str]]
    choices: Callable[[], list[str]] | None


class AxisOptions(Protocol):
    """The class of the axes."""

    def __call__(
        self, label: str, type: type, apply: Callable[[Picture, object, object], None], /
    ) -> AxisOption: ...
