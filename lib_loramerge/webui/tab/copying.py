"""Copying: the form as a prompt, a recipe and a command line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ...methods import METHODS
from ...recipe import format_prompt, to_command, to_json
from .. import baking as bakes
from .. import compat, form
from ..form import Changes, Form
from .wiring import FORM_NAMES

if TYPE_CHECKING:
    from ..host import Host
    from .wiring import Wiring


def connect(wiring: Wiring) -> None:
    """Attach the buttons; the page's script puts the text where the user can paste it from."""
    for name, text in _TEXTS.items():

        def make(values: Form, text: Callable[[Form, Host], str] = text) -> Changes:
            return {"copy_text": text(values, wiring.host)}

        event = wiring.on(name, make, FORM_NAMES, ("copy_text",), message="copy_message")
        compat.on(
            event.then,
            None,
            [wiring.widgets["copy_text"]],
            [],
            js="text => { loramergeCopy(text); return []; }",
        )


def as_prompt(values: Form, host: Host) -> str:
    return format_prompt(form.read_form(values, host, METHODS).check().inputs)


def as_json(values: Form, host: Host) -> str:
    recipe = form.read_form(values, host, METHODS).check()
    return json.dumps(to_json(recipe), ensure_ascii=False, indent=1)


def as_command(values: Form, host: Host) -> str:
    recipe = form.read_form(values, host, METHODS).check()
    if bakes.is_bake(values):
        return shlex.join(bakes.command(values, recipe, host))
    name = str(values["name"] or "").strip() or host.propose_name(recipe.inputs)
    folder = ["--lora-dir", str(host.write_dir())] if host.paths_allowed() else []
    words = to_command(recipe, name)
    return shlex.join([*words[:2], *folder, *words[2:]])


_TEXTS: Mapping[str, Callable[[Form, Host], str]] = {
    "copy_prompt": as_prompt,
    "copy_recipe": as_json,
    "copy_command": as_command,
}
