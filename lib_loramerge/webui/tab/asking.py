"""Asking for the facts: what a merge of the form as it is now would be, with every change of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ...errors import Sentence
from ...methods import METHODS
from .. import baking as bakes
from .. import form, render
from ..compat import update
from ..form import Changes, Form
from . import baking, presets
from .controls import BUTTONS
from .filling import Filling
from .wiring import FORM_NAMES, listed

if TYPE_CHECKING:
    from ..facts import Facts

# What the server proposes, and the page takes.
PROPOSED = (
    *("name", "name_auto", "activation_text", "activation_auto", "overwrite"),
    *(f"row{index}.lora" for index in range(form.MAX_ROWS)),
)


class Asking(Filling):
    """What tells of the form."""

    def connect_form(self) -> None:
        for name in ("mode", "rank_rule"):
            self.on(
                self.widgets[name].input,
                self.by_choice,
                ("mode", "rank_rule", "result_kind"),
                self.shown_by_choice,
                message="how_message",
            )
        ticked = (
            "overwrite",
            *(f"row{row}.{name}" for row in range(form.MAX_ROWS) for name in ("on", "lora")),
        )
        self.browser(
            self.widgets["overwrite"].input,
            ticked,
            ("overwrite_for",),
            f"(on, ...v) => [on ? JSON.stringify(v.slice(0, {len(ticked) - 1})"
            ".filter((text, at) => at % 2 && v[at - 1])) : '']",
        )
        self.on(
            "ask",
            self.ask,
            (*FORM_NAMES, "refused", "preset_row", "fitted"),
            (
                *(f"row{row}.{place}" for row in range(form.MAX_ROWS) for place in ("facts", "blocks")),
                "fitted",
                "facts",
                "how_message",
                "name_message",
                "proposed",
                "preview",
                "base",
                "base_model",
                "seed",
                "bake_rounding",
                "bake_drop_ema",
                "draft",
                "button.merge",
                "name",
                "preset_row",
                "message",
                "refused",
            ),
            message="rows_message",
        )
        # In the browser: what was typed since the question was asked must not be lost.
        js = f"(...v) => loramergeTake({json.dumps(PROPOSED)}, v)"
        self.browser(self.widgets["button.take"].click, PROPOSED, PROPOSED, js)

    def ask(self, values: Form) -> Changes:
        """The facts, for the form as it is now."""
        from .. import facts  # Not at the WebUI's start, see extension.py.

        found = facts.gather(values, self.host, METHODS, self.jobs.looks)
        changes: Changes = {f"row{row}.facts": found.rows.get(row, "") for row in range(form.MAX_ROWS)}
        changes |= self.preset_lists(values, found.presets)
        how = [
            self.host.shown(found.problems[name])
            for name in ("how", "mode", "rank_rule", "seed", "base", *form.PLAIN)
            if name in found.problems
        ]
        # The stamp tells the page's script that its question was answered.
        button = _merge_text(found, bakes.is_bake(values))
        words = render.button_words("#loramerge_merge", button)
        changes["facts"] = f'<div data-stamp="{time.time()}">{found.plan}{words}</div>'
        changes["how_message"] = "".join(map(render.error_box, how))
        changes["name_message"] = render.error_box(
            self.host.shown(found.problems.get("name", ""))
        ) or render.warning_box(map(self.host.shown, _about_name(found)))
        changes["button.merge"] = update(value=button, variant="stop" if found.replaced else "primary")
        changes |= baking.by_facts(found, values)
        changes["name"] = update(placeholder=found.name)
        changes["preset_row"] = presets.row_list(values)
        proposed = self.proposed(values, found.name, found.activation_text)
        if values["overwrite"] and not found.overwrite:
            proposed["overwrite"] = (True, False)
        changes["proposed"] = json.dumps(proposed)
        gone = {} if values["preview"] in found.previews else {"value": form.NO_PREVIEW}
        changes["preview"] = update(choices=list(found.previews), **gone)
        changes["base"] = update(visible=found.needs_base)
        named = str(values["base_model"] or "")
        changes["base_model"] = update(
            visible=bool(found.base_models or named), choices=["", *found.base_models]
        )
        changes["seed"] = update(visible=found.random)
        changes["rows_message"] = update()
        changes["draft"] = json.dumps(
            {name: values[name] for name in FORM_NAMES if worth_keeping(name, values[name])}
        )
        refused = str(values["refused"] or "")
        if refused:
            # The reasons of a refusal stay as long as they hold.
            changes |= self.refusal(found.reasons(refused == "trial"), refused)
        return changes

    def preset_lists(self, values: Form, fitting: Mapping[int, list[str]]) -> Changes:
        """Rows whose list of presets is not that of their base model get it; a list in use is left alone."""
        try:
            fitted = dict(json.loads(str(values["fitted"] or "{}")))
        except (TypeError, ValueError):
            fitted = {}
        changes: Changes = {}
        everything = list(self.host.presets().weights)
        for row in range(form.row_count(values)):
            names = fitting.get(row, everything)
            stamp = len(names) if names == everything else ",".join(names)
            if fitted.get(str(row), len(everything)) != stamp:
                changes[f"row{row}.blocks"] = listed(["", *names], values[f"row{row}.blocks"])
            fitted[str(row)] = stamp
        return {**changes, "fitted": json.dumps(fitted)}

    def refusal(self, reasons: Iterable[str], what: str) -> Changes:
        """Why nothing was begun, all of it, and for :meth:`ask` that and what was refused; or none of it."""
        boxes = "".join(render.error_box(self.host.shown(text)) for text in reasons)
        return {"message": boxes, "refused": what if boxes else ""}

    def proposed(self, values: Form, name: str, activation_text: str) -> dict[str, tuple[object, object]]:
        """Control to what it held, None for whatever it holds, and what it should hold."""
        proposals: dict[str, tuple[object, object]] = {}
        entries = self.host.loras()
        for row in range(form.row_count(values)):
            # A part of a name was typed, or the list knows the base model by now.
            typed = values[f"row{row}.lora"]
            label = form.lora_label(form.lora_name(typed, entries), entries)
            if typed and label != typed:
                proposals[f"row{row}.lora"] = (typed, label)
        for control, auto, text in (
            ("name", "name_auto", name),
            ("activation_text", "activation_auto", activation_text),
        ):
            last = values[auto] or ""
            if (values[control] or "") == last != text:
                proposals |= {control: (last, text), auto: (None, text)}
        return proposals


def _about_name(found: Facts) -> list[str]:
    """What to know of the files that are where the result goes."""
    if found.taken:
        return [found.taken]
    return [Sentence("{files} will be replaced.", " and ".join(found.replaced))] if found.replaced else []


def _merge_text(found: Facts, bake: bool) -> str:
    """The button that merges says which file it replaces."""
    if found.replaced:
        return Sentence("Replace {name}", found.replaced[0].rpartition(".")[0])
    return bakes.BUTTON if bake else BUTTONS["merge"][0]


def worth_keeping(name: str, value: object) -> bool:
    """Whether a draft needs the value: most of a form is as it was made."""
    if name.startswith("row") and "." in name:
        return value != form.EMPTY_ROW[name.split(".", 1)[1]]
    return value not in ("", None) and not name.startswith("overwrite")
