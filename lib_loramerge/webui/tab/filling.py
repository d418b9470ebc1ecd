"""Filling the form: rows, lists, and everything that a text, a file, a merge or a draft says of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial

from ...errors import RecipeError, Sentence
from ...methods import METHODS
from ...recipe.rank_rules import FAIR_RULES, RANK_RULES, RULE_FIELDS
from .. import baking as bakes
from .. import filled, form, render, sidecar
from ..compat import update
from ..form import Changes, Form
from ..merge_jobs import MergeRequest
from . import baking, presets
from .layout import mode_text
from .wiring import (
    FORM_NAMES,
    ROW_NAMES,
    ROW_PLACES,
    Wiring,
    argument,
    joined,
    listed,
    with_values,
)

_LAYOUTS = ("preset_layout", "preset_sliders")
_LISTS = ("base", "bake_base", "subfolder", "fill_file", "preset_pick", *_LAYOUTS)


class Filling(Wiring):
    """What puts values into the form."""

    def connect_rows(self) -> None:
        for index in range(form.MAX_ROWS):
            self._connect_row(index)
        self._connect_lists()

    def _connect_row(self, index: int) -> None:
        strength, slide, te, linked = (f"row{index}.{name}" for name in ("strength", "slide", "te", "linked"))
        # Strength, its slider and the text encoder follow one another in the browser, at once.
        self.browser(
            self.widgets[strength].input,
            [strength, te, linked],
            [slide, te],
            "(s, te, same) => [Math.max(-2, Math.min(2, Number(s) || 0)), same ? s : te]",
        )
        self.browser(
            self.widgets[slide].input,
            [slide, te, linked],
            [strength, te],
            "(s, te, same) => [s, same ? s : te]",
        )
        self.browser(
            self.widgets[te].input,
            [te, strength],
            [linked],
            "(te, s) => [te !== null && Number(te) === Number(s)]",
        )
        self.browser(
            self.widgets[linked].input, [linked, te, strength], [te], "(same, te, s) => [same ? s : te]"
        )
        if index > 0:
            pair = [f"row{row}.{name}" for row in (index - 1, index) for name in form.ROW_FIELDS]
            half = len(form.ROW_FIELDS)
            # Gradio 3 hands the outputs over, too, after the inputs.
            swap = f"(...v) => [...v.slice({half}, {2 * half}), ...v.slice(0, {half})]"
            self.browser(self.widgets[f"button.row{index}.up"].click, pair, pair, swap)
            self.browser(self.widgets[f"button.row{index - 1}.down"].click, pair, pair, swap)
        self.on(
            f"row{index}.remove",
            lambda values: self.remove_row(values, index),
            ("rows", *ROW_NAMES),
            ("rows", *ROW_NAMES, *ROW_PLACES, "fitted"),
            message="rows_message",
        )

    def remove_row(self, values: Form, index: int) -> Changes:
        """Rows after the removed one move up."""
        count = form.row_count(values)
        kept = [form.row_values(values, row) for row in range(count) if row != index]
        return self.show_rows({"rows": max(1, len(kept)), **_spread(kept)}, changed=range(index, count))

    def show_rows(self, values: Form, changed: Iterable[int] = range(form.MAX_ROWS)) -> Changes:
        """Row values with their lists, and which rows are seen."""
        count = form.row_count(values)
        changes: Changes = {"rows": count, "fitted": ""}
        names, weights, elements = self._choices()
        for row in changed:
            shown = row < count
            for name in form.ROW_FIELDS:
                value = values.get(f"row{row}.{name}", form.EMPTY_ROW[name])
                changes[f"row{row}.{name}"] = value
            if shown:
                lists = {"lora": names, "blocks": weights, "elements": elements}
                for name, choices in lists.items():
                    value = changes[f"row{row}.{name}"]
                    changes[f"row{row}.{name}"] = update(choices=choices, value=value)
            changes[f"row{row}"] = update(visible=shown)
        return changes

    def _choices(self) -> tuple[list[str], list[str], list[str]]:
        """What the lists of a row hold."""
        known = self.host.presets()
        return [entry.label for entry in self.host.loras()], ["", *known.weights], ["", *known.elements]

    def _connect_lists(self) -> None:
        every_row = ("rows", *ROW_NAMES, *ROW_PLACES, "fitted")
        self.on("add", self.add_row, ("rows", *ROW_NAMES), every_row, message="rows_message")
        self.on(
            "clear",
            lambda _: {**self.show_rows({"rows": form.START_ROWS}), **form.NO_RESULT},
            (),
            (*every_row, *form.NO_RESULT),
            message="rows_message",
        )
        outputs = (*every_row, "names", "pictures", *_LISTS, *_LAYOUTS)
        for name in ("refresh", "greet"):
            self.on(
                name,
                partial(self.refresh, look=name == "refresh"),
                ("rows", *ROW_NAMES, *_LISTS, "preset_kind"),
                outputs,
                message="rows_message",
            )
        everything = self.form_places
        self.on("fill_text", self.fill_from_text, ("fill_text",), everything, message="rows_message")
        self.on(
            "paste_prompt",
            self.fill_from_text,
            ("fill_text",),
            (*everything, "fill_text"),
            message="rows_message",
            js="() => [loramergePrompt()]",
        )
        self.on("fill_file", self.fill_from_file, ("fill_file",), everything, message="rows_message")
        self.on(
            "refill",
            self.fill_from_job,
            ("argument",),
            everything,
            message="rows_message",
            js=argument("refill"),
        )
        self.on(
            "restore",
            self.restore,
            ("argument",),
            (*everything, "names", "fill_file", "preset_pick"),
            message="rows_message",
            js=argument("restore"),
        )

    def add_row(self, values: Form) -> Changes:
        count = form.row_count(values)
        if count >= form.MAX_ROWS:
            raise RecipeError(
                "{most} rows are the most this page has. The command line takes more LoRAs.", form.MAX_ROWS
            )
        return self.show_rows({"rows": count + 1}, changed=[count])

    def refresh(self, values: Form, *, look: bool) -> Changes:
        """Fills every list again; what is chosen stays."""
        if look:
            self.host.refresh()
            self.host.refresh_checkpoints()
        names, weights, elements = self._choices()
        changes: Changes = {"fitted": "", **({"pictures": ""} if look else {})}
        for row in range(form.row_count(values)):
            # Lists alone, no values: those may have changed since the question was asked.
            for field, choices in (("lora", names), ("blocks", weights), ("elements", elements)):
                changes[f"row{row}.{field}"] = listed(choices, values.get(f"row{row}.{field}"))
        return {**changes, **self.lists(values)}

    def lists(self, values: Form) -> Changes:
        """The lists that are not in rows."""
        names = [entry.label for entry in self.host.loras()]
        picked = {"preset_kind": "", "preset_pick": "", **values}
        return {
            "names": render.data_place("names", names),
            "fill_file": listed(names, values.get("fill_file")),
            "base": listed(["", *self.host.checkpoints()], values.get("base")),
            "bake_base": listed(["", *self.host.checkpoints()], values.get("bake_base")),
            "subfolder": listed(self.host.subfolders(), values.get("subfolder")),
            "preset_pick": listed(presets.names(self.host, picked), picked["preset_pick"]),
            **presets.layouts(),
        }

    def fill_from_text(self, values: Form) -> Changes:
        wanted, notes = filled.read_pasted(str(values["fill_text"] or ""), self.host, METHODS)
        changes = self.show_form(wanted)
        return {**changes, "fill_text": update(), "rows_message": render.note_box(notes)}

    def fill_from_file(self, values: Form) -> Changes:
        name = form.lora_name(values["fill_file"], self.host.loras())
        if not name:
            raise RecipeError("Pick a merged file first.")
        # Not at the WebUI's start, see extension.py.
        from ...files import read_header
        from ...metadata import read_recipe

        path = self.host.find(name)
        recipe = read_recipe(read_header(path).metadata)
        if recipe is None:
            raise RecipeError(
                "{file} does not say how it was made: it was not merged by LoRA Merge.", path.name
            )
        described = filled.of_user_metadata(sidecar.read(path))
        return self.show_form({**filled.form_of(recipe, self.host, METHODS), **described})

    def fill_from_job(self, values: Form) -> Changes:
        job = self.jobs.get(str(values["argument"] or ""))
        if job is None:
            raise RecipeError("That merge is not remembered any more.")
        request = job.request
        recipe = getattr(request, "recipe", None)
        if recipe is None:
            raise RecipeError("Its settings are not those of a merge.")
        wanted = filled.form_of(recipe, self.host, METHODS)
        if isinstance(request, MergeRequest):
            wanted |= filled.of_user_metadata(request.user_metadata)
        if isinstance(request, MergeRequest) and not request.trial:
            wanted |= {"name": request.name, "subfolder": request.subfolder}
        wanted |= bakes.form_of(request)
        return self.show_form(wanted)

    def show_form(self, wanted: Form) -> Changes:
        """Control values, and which controls are seen with them."""
        if "mode" in wanted and "result_kind" not in wanted:
            wanted = {**wanted, "result_kind": bakes.LORA_FILE}  # As a recipe means it.
        rows = {name: value for name, value in wanted.items() if name == "rows" or name.startswith("row")}
        rest = {name: value for name, value in wanted.items() if name in FORM_NAMES and name not in ROW_NAMES}
        changes = {**rest, **self.show_rows(rows), "overwrite": False}
        if "mode" in wanted:
            changes |= self.chosen({}, wanted)
        return changes

    def restore(self, values: Form) -> Changes:
        """The form as this window left it before it was loaded again."""
        try:
            draft = json.loads(str(values["argument"] or ""))
        except ValueError:
            draft = None
        if not isinstance(draft, dict):
            return self.refresh({"rows": form.START_ROWS}, look=False)
        plain = (str, int, float, bool, type(None))
        kept = {
            name: value for name, value in draft.items() if name in FORM_NAMES and isinstance(value, plain)
        }
        mode = kept.get("mode") or next(iter(METHODS.values())).label
        lists = self.lists(kept)
        changes = {**lists, **self.show_form({**kept, "mode": mode})}
        for name in ("base", "bake_base", "subfolder"):
            # List and value in one change.
            if name in kept:
                changes[name] = joined(changes.get(name), lists[name], {"value": kept[name]})
        return changes

    def by_choice(self, values: Form) -> Changes:
        """What is seen depends on the mode and on the rank rule."""
        mode = form.mode_name(values.get("mode"), METHODS)
        method = METHODS.get(mode)
        rule = form.key_of(RANK_RULES, values.get("rank_rule") or RANK_RULES["auto"])
        ranked = method is None or method.uses_rank
        changes: Changes = {
            "rank_rule": update(visible=ranked),
            **{
                name: update(visible=ranked and RULE_FIELDS.get(rule) == name)
                for name in RULE_FIELDS.values()
            },
            "fair": update(visible=ranked and rule in FAIR_RULES and method is not None and method.exact),
            "normalize": update(visible=method is None or method.exact),
            "mode_text": mode_text(mode)
            if method is not None
            else render.error_box(Sentence("There is no mode {mode}.", mode)),
        }
        for name, other in METHODS.items():
            if other.params:
                changes[f"params.{name}"] = update(visible=name == mode)
        return {**changes, **baking.by_choice(values, self.host)}

    def chosen(self, values: Form, wanted: Form) -> Changes:
        """What is seen, and the values of controls that something else than their user sets."""
        return with_values(self.by_choice({**values, **wanted}), wanted)


def _spread(rows: Iterable[Form]) -> Changes:
    return {f"row{index}.{name}": value for index, row in enumerate(rows) for name, value in row.items()}
