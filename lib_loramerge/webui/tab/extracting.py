"""The page of extraction: a LoRA of what one checkpoint is more than another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .. import compat, extracting, render
from ..checkpoint_jobs import AnalysisRequest
from ..compat import update
from ..host.checkpoints import CLOSED
from .controls import Control, choice, one_line, open_list

if TYPE_CHECKING:
    from ..form import Changes, Form
    from ..host import Host
    from .layout import Layout
    from .running import Running

TITLE = "Extract"
CONTROLS = (
    Control(
        "extract_tuned",
        "Dropdown",
        open_list("Fine-tuned checkpoint", scale=1, min_width=240),
        "The LoRA will hold what this one is more than the base.",
    ),
    Control(
        "extract_base",
        "Dropdown",
        open_list("Its base", scale=1, min_width=240),
        "The checkpoint that it was trained from. With another one the LoRA holds their difference, too.",
    ),
    Control(
        "extract_rule",
        "Dropdown",
        choice("Rank rule", extracting.RULES, "number", scale=2, min_width=200),
        "How much of the difference the LoRA may hold. A higher rank keeps more and makes a larger file.",
    ),
    Control(
        "extract_rank",
        "Number",
        {"label": "Rank of every layer", "value": 64, "precision": 0, "scale": 1, "min_width": 110},
        "1 or more. 64 is common; 128 is large.",
    ),
    Control(
        "extract_retain",
        "Number",
        {"label": "Share to keep, %", "value": 95, "visible": False, "scale": 1, "min_width": 110},
        "Every layer gets the smallest rank that keeps this share of it.",
    ),
    Control(
        "extract_size",
        "Number",
        {"label": "Largest file size, MB", "value": 150, "visible": False, "scale": 1, "min_width": 110},
        "MB are 1,000,000 bytes. Every layer gets the rank with which the whole loses least.",
    ),
    Control(
        "extract_max_rank",
        "Number",
        {
            "label": "Largest rank",
            "value": 128,
            "precision": 0,
            "visible": False,
            "scale": 1,
            "min_width": 110,
        },
        "No layer gets more. The report tells in how many it was too little.",
    ),
    Control(
        "extract_conv_rank",
        "Textbox",
        one_line("Rank of convolutions", "as the rest, 32 at most", scale=1, min_width=130),
        "A number, or empty for the rank of the rest, 32 at most. 0 leaves convolutions out.",
    ),
    Control(
        "extract_parts",
        "Dropdown",
        choice("Parts of the model", extracting.PARTS, "", scale=1, min_width=150),
        "Which part of the model goes into the LoRA.",
    ),
    Control(
        "extract_dtype",
        "Dropdown",
        choice("Precision", extracting.PRECISIONS, "float16", scale=1, min_width=150),
        "How numbers are stored. float16 is half the size of float32 and exact enough.",
    ),
    Control(
        "extract_skip",
        "Checkbox",
        {"label": "Leave out what cannot be merged", "value": False, "scale": 2, "min_width": 200},
        "Otherwise two checkpoints with layers of different shapes are refused.",
    ),
    Control(
        "extract_name",
        "Textbox",
        one_line("Name", scale=4, min_width=180),
        "Name of the new LoRA. Empty takes the name that is proposed in grey.",
    ),
    Control(
        "extract_overwrite",
        "Checkbox",
        {"label": "Overwrite", "value": False, "scale": 0, "min_width": 110},
        "Replace a LoRA of this name. It goes off after every extraction.",
    ),
)
BUTTONS: Mapping[str, tuple[str, str]] = {
    "extract_refresh": ("Refresh the list", "Look for new checkpoints."),
    "extract_analyse": (
        "Analyse",
        "Reads both checkpoints whole and tells what each rank would cost and lose. Nothing is written.",
    ),
    "extract": ("Extract and save", "Reads both checkpoints whole and makes the LoRA in the LoRA folder."),
}
NAMES = tuple(control.name for control in CONTROLS)
RESULT, JOBS, MESSAGE, FACTS = "extract_result", "extract_jobs", "extract_message", "extract_facts"
ANALYSIS = "extract_analysis"
_SEEN = ("extract_rank", "extract_retain", "extract_size", "extract_max_rank")


def lay_out(layout: Layout) -> None:
    """The page's controls, or why they are not there."""
    if not layout.host.can_bake():
        compat.make("HTML", value=render.note_box([CLOSED]), elem_id="loramerge_extract_closed")
        return

    def line(name: str, *controlled: str) -> None:
        with compat.make("Row", elem_id=f"loramerge_extract_{name}_line"):
            for one in controlled:
                layout.control(one)

    with compat.make("Row", elem_id="loramerge_extract_columns"):
        with compat.make("Column", scale=9, min_width=320, elem_id="loramerge_extract_form"):
            with layout.section("extract_what", "What differs"):
                line("pair", "extract_tuned", "extract_base")
                with compat.make("Row"):
                    layout.button("extract_refresh", scale=0, min_width=130)
            with layout.section("extract_how", "How"):
                line("rank", "extract_rule", *_SEEN, "extract_conv_rank")
                line("more", "extract_parts", "extract_dtype", "extract_skip")
            with layout.section("extract_result", "Result"):
                line("name", "extract_name", "extract_overwrite")
        with compat.make("Column", scale=5, min_width=280, elem_id="loramerge_extract_side"):
            with layout.section("extract_facts", "What will come out"):
                layout.place(FACTS, f'<div class="lm-quiet">{render.say(extracting.EMPTY)}</div>')
            with compat.make("Row", elem_id="loramerge_extract_buttons"):
                layout.button("extract", variant="primary", scale=2, min_width=150)
                layout.button("extract_analyse", scale=1, min_width=110)
            layout.place(MESSAGE)
            layout.place(JOBS)
            layout.place(RESULT)
    # Below both columns: its picture needs the whole width.
    layout.place(ANALYSIS)


def connect(wiring: Running) -> None:
    """Attach the handlers of the page."""
    host: Host = wiring.host

    def fill(values: Form) -> Changes:
        known = ["", *host.checkpoints()]
        return {
            name: update(choices=known if values[name] in known else [values[name], *known])
            for name in ("extract_tuned", "extract_base")
        }

    def refresh(values: Form) -> Changes:
        host.refresh_checkpoints()
        return fill(values)

    def look(values: Form) -> Changes:
        html, name = extracting.facts(values, host)
        shown = _shown_by(extracting.rule_of(values))
        return {FACTS: html, "extract_name": update(placeholder=name), **shown}

    def start(values: Form) -> Changes:
        job = wiring.jobs.submit(extracting.request_of(values, host))
        return {**wiring.begun(job), "extract_overwrite": False}

    def analyse(values: Form) -> Changes:
        request = AnalysisRequest(extracting.request_of(values, host), str(values["argument"]))
        return wiring.begun(wiring.jobs.submit(request))

    def use(values: Form) -> Changes:
        """Takes a rank, a size or a rule that the analysis offers into the form."""
        offered = json.loads(str(values["argument"] or "{}"))
        changes: Changes = {}
        for field, rule in (("rank", "number"), ("size", "size"), ("auto", "auto")):
            if field in offered:
                changes = {"extract_rule": extracting.RULES[rule], **_shown_by(rule)}
                if field != "auto":
                    changes[f"extract_{field}"] = update(value=offered[field], visible=True)
        return changes

    pair = ("extract_tuned", "extract_base")
    wiring.on("extract_refresh", refresh, pair, pair, message=MESSAGE)
    for name in ("greet", "refresh", "restore"):
        wiring.on(name, fill, pair, pair, message="argument")
    # What an error says stays until something is changed; what was typed stays in any case.
    asked = tuple(name for name in NAMES if name not in ("extract_name", "extract_overwrite"))
    for name in asked:
        wiring.on(wiring.widgets[name].change, look, NAMES, (FACTS, "extract_name", *_SEEN), message=MESSAGE)
    analysed = ("argument", *NAMES)
    wiring.on(
        "extract_analyse",
        analyse,
        analysed,
        (*wiring.job_places, "started"),
        message=MESSAGE,
        js=f"(...v) => [loramergeTheme(), ...v.slice(1, {len(analysed)})]",
    )
    js = "() => loramergeArgument('extract_use')"
    wiring.on("extract_use", use, ("argument",), ("extract_rule", *_SEEN), message=MESSAGE, js=js)
    wiring.on("extract", start, NAMES, (*wiring.job_places, "started", "extract_overwrite"), message=MESSAGE)


def _shown_by(rule: str) -> Changes:
    """Which fields a rule for the rank has."""
    return {
        "extract_rank": update(visible=rule == "number"),
        "extract_retain": update(visible=rule == "retain"),
        "extract_size": update(visible=rule == "size"),
        "extract_max_rank": update(visible=rule != "number"),
    }
