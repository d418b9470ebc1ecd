"""Every difference between the Gradio versions that the tab runs in: 3.41 to the newest."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import gradio as gr

MAJOR = int(gr.__version__.split(".")[0])
FILE_ROUTE = "file=" if MAJOR < 5 else "gradio_api/file="


Update = dict[str, object]
"""A change of a component, as :func:`update` makes it."""


class Event(Protocol):
    """What follows once an event's handler has answered."""

    @property
    def then(self) -> Trigger: ...


class Trigger(Protocol):
    """What attaches a handler, such as ``button.click``."""

    def __call__(
        self,
        *,
        fn: Callable[..., object] | None,
        inputs: list[Widget],
        outputs: list[Widget],
        **options: object,
    ) -> Event: ...


class Widget(Protocol):
    """A component or layout block; each has of this what its class in Gradio has."""

    do_not_save_to_config: bool
    click: Trigger
    input: Trigger
    change: Trigger

    def __enter__(self) -> Widget: ...

    def __exit__(self, *raised: object) -> None: ...


def make(kind: str, **options: object) -> Widget:
    """A component or layout block by the name of its class.

    The WebUI keeps the first value it saw of every labelled component in
    ``ui-config.json``; our defaults come from the settings, so all of ours
    ask to be left out of that file.
    """
    block: Widget = getattr(gr, kind)(**options)
    block.do_not_save_to_config = True
    return block


def on(
    trigger: Trigger,
    function: Callable[..., object] | None,
    inputs: Sequence[Widget] = (),
    outputs: Sequence[Widget] = (),
    *,
    js: str | None = None,
    queue: bool = False,
) -> Event:
    """Connect an event, such as ``button.click``.

    Events skip Gradio's queue unless asked: the queue of a WebUI waits for
    pictures, and its default limit of one run at a time for an event would let
    one window hold up another. The work of a merge is done by our own queue.
    """
    options: dict[str, object] = {"queue": queue, "show_progress": "hidden"}
    if MAJOR >= 4 and function is not None:
        # The page's script keeps this Gradio from complaining about the event.
        begin = "window.loramergeQuiet && loramergeQuiet()"
        js = f"(...v) => {{ {begin}; return ({js or '(...v) => v'})(...v); }}"
    if js is not None:
        options["_js" if MAJOR < 4 else "js"] = js
    if MAJOR < 6:
        options["api_name"] = False
    else:
        options["api_visibility"] = "private"
    return trigger(fn=function, inputs=list(inputs), outputs=list(outputs), **options)


def may_serve(blocks: object, path: Path) -> bool:
    """Whether the ``file=`` route of a launched Blocks gives out this file.

    Gradio 3 also serves what is below the current folder, and nothing with a
    name that begins with a dot on the way.
    """
    allowed, blocked = (list(getattr(blocks, f"{kind}_paths", None) or ()) for kind in ("allowed", "blocked"))
    path = Path(os.path.abspath(path))
    if MAJOR < 4:
        if any(part.startswith(".") for part in path.parts):
            return False
        allowed.append(os.getcwd())

    def inside(folders: Sequence[str]) -> bool:
        return any(path.is_relative_to(os.path.abspath(folder)) for folder in folders)

    return inside(allowed) and not inside(blocked)


def update(**changes: object) -> Update:
    """A change of a component; handlers never return components."""
    change: Update = gr.update(**changes)
    return change
