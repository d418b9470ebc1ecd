"""What happens when something is pressed. Values travel by name; no Gradio component is returned."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ...errors import LoraMergeError, RecipeError
from ...methods import METHODS
from ...recipe import format_prompt, to_command, to_json
from .. import baking as bakes
from .. import compat, form, render, sidecar
from ..compat import update
from ..merge_jobs import MergeRequest
from . import analysing, baking, extracting, picturing, presets, thumbnails
from .controls import BUTTONS, CONTROLS, ROW_CONTROLS, param_control
from .layout import mode_text

if TYPE_CHECKING:
    from ..facts import Facts
    from ..host import Host
    from ..jobs import Job, JobQueue

Form = Mapping[str, Any]
Changes = dict[str, Any]

ROW_NAMES = tuple(f"row{index}.{control.name}" for index in range(form.MAX_ROWS) for control in ROW_CONTROLS)
FORM_NAMES = (
    *ROW_NAMES,
    *(control.name for control in CONTROLS),
    *baking.NAMES,
    *(param_control(method.name, param).name for method in METHODS.values() for param in method.params),
)
ROW_PLACES = tuple(f"row{index}" for index in range(form.MAX_ROWS))
# What the server proposes, and the page takes.
PROPOSED = (
    *("name", "name_auto", "activation_text", "activation_auto", "overwrite"),
    *(f"row{index}.lora" for index in range(form.MAX_ROWS)),
)
SHOWN_FIRST = 60 * 60  # A finished merge is shown again after a reload for an hour.


# JavaScript of the page, called with the values of the inputs.
def _argument(name: str) -> str:
    return f"() => loramergeArgument('{name}')"


def connect(widgets: Mapping[str, Any], host: Host, jobs: JobQueue) -> None:
    """Attach every handler to its component."""
    _Wiring(widgets, host, jobs).connect()


class _Wiring:
    """The tab's handlers, with what all of them need."""

    def __init__(self, widgets: Mapping[str, Any], host: Host, jobs: JobQueue) -> None:
        self.widgets = widgets
        self.host = host
        self.jobs = jobs
        self.shown_by_choice = _shown_by_choice()
        # Where running jobs and their ends are shown, on each page that begins some.
        self.job_places = tuple(
            name for name in ("jobs", "result", extracting.JOBS, extracting.RESULT) if name in widgets
        )
        # No answer to a question that was asked before may hide from the page that a merge of its own began.
        self.begun_places = (*self.job_places, "started", "overwrite", "refused")
        self.form_places = (*FORM_NAMES, *ROW_PLACES, "fitted", *self.shown_by_choice)

    # --- connecting --------------------------------------------------------------------------

    def on(
        self,
        trigger: Callable[..., Any],
        handler: Callable[[Form], Changes],
        inputs: Iterable[str] = (),
        outputs: Iterable[str] = (),
        *,
        message: str = "message",
        js: str | None = None,
    ) -> Any:
        """Connect a handler that takes and gives values by name.

        A :class:`LoraMergeError` is shown in the place ``message``; all else stays as it is.
        """
        names, places = list(inputs), list(dict.fromkeys([*outputs, message]))

        def run(*values: Any) -> list[Any]:
            try:
                changes = {message: "", **handler(dict(zip(names, values)))}
            except LoraMergeError as error:
                changes = {message: render.error_box(self.host.shown(str(error)))}
            return [changes.get(place, update()) for place in places]

        return compat.on(
            trigger,
            run,
            [self.widgets[name] for name in names],
            [self.widgets[name] for name in places],
            js=js,
        )

    def button(self, name: str, handler: Callable[[Form], Changes], *args: Any, **kwargs: Any) -> Any:
        return self.on(self.widgets[f"button.{name}"].click, handler, *args, **kwargs)

    def browser(
        self, trigger: Callable[..., Any], inputs: Iterable[str], outputs: Iterable[str], js: str
    ) -> None:
        """Connect a piece of JavaScript that needs nothing of the server."""
        compat.on(
            trigger,
            None,
            [self.widgets[name] for name in inputs],
            [self.widgets[name] for name in outputs],
            js=js,
        )

    def connect(self) -> None:
        for index in range(form.MAX_ROWS):
            self._connect_row(index)
        self._connect_rows()
        self._connect_form()
        self._connect_jobs()
        self._connect_copy()
        presets.connect(self)
        baking.connect(self)
        if extracting.RESULT in self.widgets:
            extracting.connect(self)
        analysing.connect(self, FORM_NAMES)
        picturing.connect(self, FORM_NAMES)
        thumbnails.connect(self)

    # --- rows --------------------------------------------------------------------------------

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
        self.button(
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

    def _connect_rows(self) -> None:
        every_row = ("rows", *ROW_NAMES, *ROW_PLACES, "fitted")
        self.button("add", self.add_row, ("rows", *ROW_NAMES), every_row, message="rows_message")
        self.button(
            "clear",
            lambda _: {**self.show_rows({"rows": form.START_ROWS}), **form.NO_RESULT},
            (),
            (*every_row, *form.NO_RESULT),
            message="rows_message",
        )
        outputs = (*every_row, "names", "pictures", *_LISTS)
        for name in ("refresh", "greet"):
            self.button(
                name,
                partial(self.refresh, look=name == "refresh"),
                ("rows", *ROW_NAMES, *_LISTS, "preset_kind"),
                outputs,
                message="rows_message",
            )
        everything = self.form_places
        self.button("fill_text", self.fill_from_text, ("fill_text",), everything, message="rows_message")
        self.button(
            "paste_prompt",
            self.fill_from_text,
            ("fill_text",),
            (*everything, "fill_text"),
            message="rows_message",
            js="() => [loramergePrompt()]",
        )
        self.button("fill_file", self.fill_from_file, ("fill_file",), everything, message="rows_message")
        self.button(
            "refill",
            self.fill_from_job,
            ("argument",),
            everything,
            message="rows_message",
            js=_argument("refill"),
        )
        self.button(
            "restore",
            self.restore,
            ("argument",),
            (*everything, "names", "fill_file", "preset_pick"),
            message="rows_message",
            js=_argument("restore"),
        )

    def add_row(self, values: Form) -> Changes:
        count = form.row_count(values)
        if count >= form.MAX_ROWS:
            raise RecipeError(
                f"{form.MAX_ROWS} rows are the most this page has. The command line takes more LoRAs."
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
        }

    def fill_from_text(self, values: Form) -> Changes:
        wanted, notes = form.read_pasted(str(values["fill_text"] or ""), self.host, METHODS)
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
            raise RecipeError(f"{path.name} does not say how it was made: it was not merged by LoRA Merge.")
        described = form.of_user_metadata(sidecar.read(path))
        return self.show_form({**form.form_of(recipe, self.host, METHODS), **described})

    def fill_from_job(self, values: Form) -> Changes:
        job = self.jobs.get(str(values["argument"] or ""))
        if job is None:
            raise RecipeError("That merge is not remembered any more.")
        request = job.request
        recipe = getattr(request, "recipe", None)
        if recipe is None:
            raise RecipeError("Its settings are not those of a merge.")
        wanted = form.form_of(recipe, self.host, METHODS)
        if isinstance(request, MergeRequest):
            wanted |= form.of_user_metadata(request.user_metadata)
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
            changes |= _with_values(self.by_choice(wanted), wanted)
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
        changes = {**self.lists(kept), **self.show_form({**kept, "mode": mode})}
        for name in ("base", "bake_base", "subfolder"):
            # List and value in one change.
            if name in kept:
                seen = changes[name] if isinstance(changes.get(name), dict) else {}
                changes[name] = {**seen, **self.lists(kept)[name], "value": kept[name]}
        return changes

    # --- how, facts --------------------------------------------------------------------------

    def _connect_form(self) -> None:
        seen = _shown_by_choice()
        for name in ("mode", "rank_rule"):
            self.on(
                self.widgets[name].input,
                self.by_choice,
                ("mode", "rank_rule", "result_kind"),
                seen,
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
        self.button(
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

    def by_choice(self, values: Form) -> Changes:
        """What is seen depends on the mode and on the rank rule."""
        mode = form.mode_name(values.get("mode"), METHODS)
        method = METHODS.get(mode)
        rule = form.key_of(form.RANK_RULES, values.get("rank_rule") or form.RANK_RULES["auto"])
        ranked = method is None or method.uses_rank
        changes: Changes = {
            "rank_rule": update(visible=ranked),
            **{
                name: update(visible=ranked and form.RULE_FIELDS.get(rule) == name)
                for name in form.RULE_FIELDS.values()
            },
            "fair": update(
                visible=ranked and rule in form.FAIR_RULES and method is not None and method.exact
            ),
            "mode_text": mode_text(mode)
            if method is not None
            else render.error_box(f"There is no mode {mode}."),
        }
        for name, other in METHODS.items():
            if other.params:
                changes[f"params.{name}"] = update(visible=name == mode)
        return {**changes, **baking.by_choice(values, self.host)}

    def ask(self, values: Form) -> Changes:
        """The facts, for the form as it is now."""
        from .. import facts  # Not at the WebUI's start, see extension.py.

        found = facts.gather(values, self.host, METHODS)
        changes: Changes = {f"row{row}.facts": found.rows.get(row, "") for row in range(form.MAX_ROWS)}
        changes |= self.preset_lists(values, found.presets)
        how = [
            self.host.shown(found.problems[name])
            for name in ("how", "mode", "rank_rule", "seed", "base", *form.PLAIN)
            if name in found.problems
        ]
        # The stamp tells the page's script that its question was answered.
        changes["facts"] = f'<div data-stamp="{time.time()}">{found.plan}</div>'
        changes["how_message"] = "".join(map(render.error_box, how))
        changes["name_message"] = render.error_box(
            self.host.shown(found.problems.get("name", ""))
        ) or render.warning_box(map(self.host.shown, _about_name(found)))
        changes["button.merge"] = _merge_button(found, bakes.is_bake(values))
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
        if values["refused"]:
            # The reasons of a refusal stay as long as they hold.
            changes |= self.refusal(found.reasons(values["refused"] == "trial"), values["refused"])
        return changes

    def preset_lists(self, values: Form, fitting: Mapping[int, list[str]]) -> Changes:
        """Rows whose list of presets is not that of their base model get it; a list in use is left alone."""
        try:
            fitted = dict(json.loads(values["fitted"] or "{}"))
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

    def proposed(self, values: Form, name: str, activation_text: str) -> dict[str, tuple[Any, Any]]:
        """Control to what it held, None for whatever it holds, and what it should hold."""
        proposals: dict[str, tuple[Any, Any]] = {}
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

    # --- jobs --------------------------------------------------------------------------------

    def _connect_jobs(self) -> None:
        outputs = self.job_places
        begun = self.begun_places
        self.button("merge", lambda values: self.start(values, trial=False), FORM_NAMES, begun)
        self.button("try", lambda values: self.start(values, trial=True), FORM_NAMES, begun)
        self.button(
            "again",
            self.again,
            ("argument", *FORM_NAMES),
            (*begun, "conv_rank", *self.shown_by_choice),
            js=f"(...v) => [...loramergeArgument('again'), ...v.slice(1, {len(FORM_NAMES) + 1})]",
        )
        self.button("poll", self.poll, ("argument",), outputs, message="argument", js=_argument("poll"))
        self.button("drop", self.drop, ("argument",), outputs, message="argument", js=_argument("drop"))

    def start(self, values: Form, *, trial: bool) -> Changes:
        from .. import facts  # Not at the WebUI's start, see extension.py.

        found = facts.gather(values, self.host, METHODS)
        reasons = found.reasons(trial)
        try:
            if not reasons:
                return self._begin(values, trial)
        except LoraMergeError as error:
            reasons = [str(error)]
        changes = self.refusal(reasons, "trial" if trial else "merge")
        return changes if found.overwrite else {**changes, "overwrite": False}

    def _begin(self, values: Form, trial: bool) -> Changes:
        recipe = form.read_form(values, self.host, METHODS).check()
        overwrite = form.may_overwrite(values, self.host.loras())
        if bakes.is_bake(values):
            name = str(values["name"] or "").strip() or bakes.propose_name(values, recipe.inputs, self.host)
            job = self.jobs.submit(bakes.request_of(values, recipe, name, overwrite))
            return {**self.begun(job), "overwrite": False}
        name = str(values["name"] or "").strip() or self.host.propose_name(recipe.inputs)
        preview = str(values["preview"] or "")
        request = MergeRequest(
            recipe=recipe,
            name=name,
            subfolder=str(values["subfolder"] or "").strip(),
            overwrite=overwrite,
            trial=trial,
            user_metadata=None if trial else form.user_metadata(values),
            preview="" if preview == form.NO_PREVIEW or trial else preview,
            changed_sources=True,
        )
        job = self.jobs.submit(request)
        # The tick was for this merge alone.
        done = {} if trial else {"overwrite": False}
        return {**self.begun(job), **done}

    def again(self, values: Form) -> Changes:
        """A merge once more, keeping everything; the form says so where it is still that merge's."""
        job = self.jobs.get(str(values["argument"] or ""))
        if job is None:
            raise RecipeError("That merge is not remembered any more.")
        same = form.read_form(values, self.host, METHODS).recipe == getattr(job.request, "recipe", None)
        begun = self.jobs.again_exactly(job)
        changes = self.begun(begun)
        if same:
            full = {"rank_rule": form.RANK_RULES["full"], "conv_rank": None}
            changes |= {"conv_rank": None, **_with_values(self.by_choice({**values, **full}), full)}
        return changes

    def begun(self, job: Job) -> Changes:
        return {**self._state(job), "started": f"{job.id} {job.created}", "refused": ""}

    def poll(self, values: Form) -> Changes:
        return {**self._state(self._followed(str(values["argument"] or ""))), "argument": update()}

    def drop(self, values: Form) -> Changes:
        job = self.jobs.cancel(str(values["argument"] or ""))
        if job is not None:
            deadline = time.monotonic() + 1.0
            while not job.finished and time.monotonic() < deadline:
                self.jobs.wait(self.jobs.version, 0.1)
        return {**self._state(job), "argument": update()}

    def _followed(self, job_id: str) -> Job | None:
        """The job that a page shows: its own, else the one at work, else the last one done."""
        job = self.jobs.get(job_id) or self.jobs.current()
        if job is None:
            recent = [job for job in self.jobs.list() if job.ended and time.time() - job.ended < SHOWN_FIRST]
            job = recent[-1] if recent else None
        return job

    def _state(self, job: Job | None) -> Changes:
        known = self.jobs.list()
        shown = render.job_list(known, job, f"{time.time()}", self.host.labels_state())
        changes: Changes = {"jobs": shown, extracting.JOBS: shown}
        if job is not None:
            place = extracting.RESULT if job.request.kind == "extract" else "result"
            changes[place] = render.job_result(job, self.host) if job.finished else ""
        return changes

    # --- copying -----------------------------------------------------------------------------

    def _connect_copy(self) -> None:
        kinds: dict[str, Callable[[Form], str]] = {
            "copy_prompt": self.as_prompt,
            "copy_recipe": self.as_json,
            "copy_command": self.as_command,
        }
        for name, make in kinds.items():
            event = self.button(
                name, partial(self.copy, make=make), FORM_NAMES, ("copy_text",), message="copy_message"
            )
            compat.on(
                event.then,
                None,
                [self.widgets["copy_text"]],
                [],
                js="text => { loramergeCopy(text); return []; }",
            )

    def copy(self, values: Form, *, make: Callable[[Form], str]) -> Changes:
        return {"copy_text": make(values)}

    def as_prompt(self, values: Form) -> str:
        return format_prompt(form.read_form(values, self.host, METHODS).check().inputs)

    def as_json(self, values: Form) -> str:
        recipe = form.read_form(values, self.host, METHODS).check()
        return json.dumps(to_json(recipe), ensure_ascii=False, indent=1)

    def as_command(self, values: Form) -> str:
        recipe = form.read_form(values, self.host, METHODS).check()
        if bakes.is_bake(values):
            return shlex.join(bakes.command(values, recipe, self.host))
        name = str(values["name"] or "").strip() or self.host.propose_name(recipe.inputs)
        folder = ["--lora-dir", str(self.host.write_dir())] if self.host.paths_allowed() else []
        words = to_command(recipe, name)
        return shlex.join([*words[:2], *folder, *words[2:]])


_LISTS = ("base", "bake_base", "subfolder", "fill_file", "preset_pick")


def listed(choices: list[str], value: object) -> Any:
    """New choices for a list that keeps its value; some versions of Gradio drop a value that is no choice."""
    text = str(value or "")
    return update(choices=choices if text in choices or not text else [text, *choices])


def _about_name(found: Facts) -> list[str]:
    """What to know of the files that are where the result goes."""
    if found.taken:
        return [found.taken]
    return [f"{' and '.join(found.replaced)} will be replaced."] if found.replaced else []


def _merge_button(found: Facts, bake: bool) -> Any:
    """The button that merges says which file it replaces."""
    stem = found.replaced[0].rpartition(".")[0] if found.replaced else ""
    text = f"Replace {stem}" if stem else bakes.BUTTON if bake else BUTTONS["merge"][0]
    return update(value=text, variant="stop" if stem else "primary")


def _spread(rows: Iterable[Mapping[str, Any]]) -> Changes:
    return {f"row{index}.{name}": value for index, row in enumerate(rows) for name, value in row.items()}


def _shown_by_choice() -> tuple[str, ...]:
    return (
        "rank_rule",
        "rank",
        "retain",
        "size",
        "fair",
        "mode_text",
        *baking.SEEN,
        *(f"params.{name}" for name, method in METHODS.items() if method.params),
    )


def _with_values(changes: Changes, wanted: Form) -> Changes:
    """Visibility and value of a control in one change."""
    merged = {}
    for name, change in changes.items():
        if name in wanted and isinstance(change, dict):
            change = {**change, "value": wanted[name]}
        merged[name] = change
    return merged


def worth_keeping(name: str, value: object) -> bool:
    """Whether a draft needs the value: most of a form is as it was made."""
    if name.startswith("row") and "." in name:
        return value != form.EMPTY_ROW[name.split(".", 1)[1]]
    return value not in ("", None) and not name.startswith("overwrite")
