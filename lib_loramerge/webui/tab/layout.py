"""Where every control of the tab stands. Makes components; connects nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ...blocks import BLOCK_IDS
from ...methods import METHODS
from ...recipe.rank_rules import RANK_RULES
from .. import compat, render, render_jobs
from ..filled import row_of
from ..form import MAX_ROWS, PLAIN, START_ROWS
from . import baking, extracting, picturing
from .controls import (
    BUTTONS,
    CONTROLS,
    ROW_BUTTONS,
    ROW_CONTROLS,
    Control,
    element_id,
    open_list,
    param_control,
)

if TYPE_CHECKING:
    from ..compat import Widget
    from ..host import Host

HOW_MORE = ("conv_rank", "normalize", "dialect", "skip_unsupported")
RESULT_MORE = (("activation_text", "preferred_weight"), ("notes", "preview"))
# Kept for the page's script and for the handlers alone.
SCRIPT_FIELDS = ("argument", "draft", "proposed", "copied", "started", "refused", "fitted", "plot")
SCRIPT_BUTTONS = (
    *("greet", "ask", "take", "poll", "drop", "refill", "again", "restore", "look", "unlook", "pictures"),
    *("keep", "use", "extract_use"),
)
PRESET_KINDS = ("Block weights", "Elemental weights")


def lay_out(host: Host) -> dict[str, Widget]:
    """All components by name: controls, ``button.<name>``, and the places that handlers write to."""
    return Layout(host).widgets


class Layout:
    """Makes the components in the order in which they stand on the page."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.widgets: dict[str, Widget] = {}
        every = (*CONTROLS, *baking.CONTROLS, *extracting.CONTROLS)
        self._controls = {control.name: control for control in every}
        with compat.make("Column", elem_id="loramerge_app"):
            compat.make(
                "HTML",
                value=render.page_words(hints(), host.prompts),
                visible=True,
                elem_id="loramerge_page",
            )
            with compat.make("Tabs", elem_id="loramerge_tabs"):
                with compat.make("Tab", label="Merge", elem_id="loramerge_page_merge"):
                    self._merge_page()
                if host.checkpoint_dirs():
                    with compat.make("Tab", label=extracting.TITLE, elem_id="loramerge_page_extract"):
                        extracting.lay_out(self)
                with compat.make("Tab", label="Block presets", elem_id="loramerge_page_presets"):
                    self._preset_page()
            with compat.make("Row", elem_id="loramerge_hidden"):
                self._hidden()

    # Pieces

    def widget(self, name: str, kind: str, **options: object) -> None:
        """One component that handlers know by this name."""
        self.widgets[name] = compat.make(kind, **{"elem_id": element_id(name), **options})

    def put(self, control: Control, **changes: object) -> None:
        """A control, perhaps under another name than its table's."""
        self.widget(control.name, control.kind, **{**control.options, **changes})

    def control(self, name: str, **changes: object) -> None:
        """One control of the form."""
        self.put(self._controls[name], **changes)

    def button(self, name: str, **options: object) -> None:
        """One of our buttons, by its name in the table."""
        text, _ = {**BUTTONS, **extracting.BUTTONS}[name]
        options = {"value": text, "elem_id": element_id(name), "size": "sm", **options}
        self.widget(f"button.{name}", "Button", **options)

    def place(self, name: str, value: str = "") -> None:
        """An empty place for HTML from handlers."""
        self.widget(name, "HTML", value=value)

    @contextmanager
    def section(self, name: str, title: str) -> Iterator[None]:
        with compat.make("Column", elem_id=f"loramerge_section_{name}"):
            compat.make("HTML", value=f"<h3>{render.say(title)}</h3>", elem_id=f"loramerge_title_{name}")
            yield

    # The page

    def _merge_page(self) -> None:
        with compat.make("Row", elem_id="loramerge_columns"):
            with compat.make("Column", scale=9, min_width=520, elem_id="loramerge_form"):
                self._rows()
                self._how()
                self._result()
            with compat.make("Column", scale=5, min_width=280, elem_id="loramerge_side"):
                self._side()
        # Below both columns: its pictures need the whole width.
        self.place("analyse_result")

    def _rows(self) -> None:
        with self.section("loras", "LoRAs"):
            for index in range(MAX_ROWS):
                self._row(index)
            with compat.make("Row", elem_id="loramerge_row_tools"):
                self.button("add", scale=0, min_width=120)
                self.button("refresh", scale=0, min_width=130)
                self.button("clear", scale=0, min_width=80)
            with compat.make(
                "Accordion",
                label="Fill from a prompt, a recipe or a merged file",
                open=False,
                elem_id="loramerge_fill",
            ):
                self._fill()
            self.place("rows_message")

    def _row(self, index: int) -> None:
        controls = {control.name: control for control in ROW_CONTROLS}
        first = dict(enumerate(self.host.first_inputs)).get(index)
        values = {} if first is None else row_of(first, self.host.loras())

        def put(name: str) -> None:
            changes: dict[str, object] = {"value": values[name]} if name in values else {}
            if name == "lora" and values:
                changes["choices"] = [values[name]]
            self.put(controls[name]._replace(name=f"row{index}.{name}"), **changes)

        with compat.make("Column", visible=index < START_ROWS, elem_id=f"loramerge_row{index}") as group:
            with compat.make("Row", elem_id=f"loramerge_row{index}_line"):
                for name in ("on", "lora", "strength", "slide", "te", "linked", "blocks"):
                    put(name)
                with compat.make("Row", elem_id=f"loramerge_row{index}_buttons"):
                    for name, (text, _) in ROW_BUTTONS.items():
                        self.widget(
                            f"button.row{index}.{name}",
                            "Button",
                            value=text,
                            elem_id=f"loramerge_row{index}_{name}",
                            size="sm",
                            scale=0,
                            min_width=26,
                        )
            with compat.make("Row", elem_id=f"loramerge_row{index}_options"):
                put("elements")
                put("extra")
            self.place(f"row{index}.facts")
        self.widgets[f"row{index}"] = group

    def _fill(self) -> None:
        with compat.make("Row"):
            self.widget(
                "fill_text",
                "Textbox",
                label="Prompt or recipe",
                lines=2,
                max_lines=8,
                scale=4,
                min_width=220,
                placeholder="<lora:style:0.8> <lora:face:0.5:lbw=MIDD>",
                elem_id="loramerge_fill_source",
            )
            with compat.make("Column", scale=1, min_width=150):
                self.button("fill_text")
                self.button("paste_prompt", visible=bool(self.host.prompts))
        with compat.make("Row"):
            self.widget(
                "fill_file",
                "Dropdown",
                **open_list("Merged file", scale=4, min_width=220, elem_id="loramerge_fill_name"),
            )
            with compat.make("Column", scale=1, min_width=150):
                self.button("fill_file")

    def _how(self) -> None:
        settings = self.host.settings()
        devices = self.host.devices()
        with self.section("how", "How"):
            with compat.make("Row", elem_id="loramerge_how_line"):
                labels = [method.label for method in METHODS.values()]
                method = METHODS.get(settings.mode) or next(iter(METHODS.values()))
                self.control("mode", choices=labels, value=method.label)
                rule, rank = _rank_setting(settings.rank)
                self.control("rank_rule", value=rule, visible=method.uses_rank)
                self.control(
                    "rank",
                    value=rank,
                    visible=method.uses_rank and rule == RANK_RULES["number"],
                )
                self.control("retain")
                self.control("size")
                self.control("fair")
                self.control("dtype", value=PLAIN["dtype"].shown(settings.dtype))
                device = next((label for label, key in devices if key == settings.device), devices[0][0])
                self.control("device", choices=[label for label, _ in devices], value=device)
            self.place("mode_text", mode_text(method.name))
            self._params(method.name)
            with compat.make("Row", elem_id="loramerge_needed_line"):
                self.control("base_model")
                self.control("base")
                self.control("seed")
            with (
                compat.make("Accordion", label="More", open=False, elem_id="loramerge_how_more"),
                compat.make("Row"),
            ):
                self.control("host", value=PLAIN["host"].shown(self.host.record))
                for name in HOW_MORE:
                    self.control(name)
            self.place("how_message")

    def _params(self, shown: str) -> None:
        for method in METHODS.values():
            if not method.params:
                continue
            with compat.make(
                "Row", visible=method.name == shown, elem_id=f"loramerge_params_{method.name}"
            ) as row:
                for param in method.params:
                    self.put(param_control(method.name, param))
            self.widgets[f"params.{method.name}"] = row

    def _result(self) -> None:
        with self.section("result", "Result"):
            baking.lay_out_choice(self)
            with compat.make("Row", elem_id="loramerge_result_line"):
                self.control("name")
                self.control("subfolder", visible=not self.host.hide_dirs())
                self.control("overwrite")
            self.place("name_message")
            baking.lay_out(self)
            with compat.make(
                "Accordion",
                label="Activation text, notes and picture",
                open=False,
                elem_id="loramerge_result_more",
            ) as more:
                for line in RESULT_MORE:
                    with compat.make("Row"):
                        for name in line:
                            self.control(name)
            self.widgets["result_more"] = more

    def _side(self) -> None:
        with self.section("facts", "What will come out"):
            self.place("facts")
            with compat.make("Row", elem_id="loramerge_analyse_line"):
                self.button("analyse", scale=0, min_width=110)
            self.place("analyse_state")
        with compat.make("Row", elem_id="loramerge_go_line"):
            self.button("merge", variant="primary", size="lg", min_width=140)
            self.button("try", size="lg", min_width=140, visible=self.host.can_try)
        picturing.lay_out(self)
        self.place("message")
        self.place("jobs", render_jobs.job_list([], None, ""))
        self.place("result")
        with compat.make("Accordion", label="Copy", open=False, elem_id="loramerge_copy"):
            with compat.make("Row"):
                for name in ("copy_prompt", "copy_recipe", "copy_command"):
                    self.button(name, min_width=100)
            self.place("copy_message")
            self.widget(
                "copy_text",
                "Textbox",
                label="Copied to the clipboard",
                lines=2,
                max_lines=12,
                interactive=True,
            )

    # Presets

    def _preset_page(self) -> None:
        with self.section("presets", "Block presets"):
            self._preset_editor()

    def _preset_editor(self) -> None:
        with compat.make("Row", elem_id="loramerge_preset_line"):
            self.widget(
                "preset_kind",
                "Radio",
                label="Kind",
                choices=list(PRESET_KINDS),
                value=PRESET_KINDS[0],
                scale=0,
                min_width=300,
            )
            self.widget("preset_pick", "Dropdown", **open_list("Preset", scale=2, min_width=180))
            self.widget(
                "preset_layout",
                "Dropdown",
                label="Blocks",
                choices=list(PRESET_LAYOUTS),
                value=next(iter(PRESET_LAYOUTS)),
                scale=2,
                min_width=180,
                interactive=True,
            )
            self.button("preset_reload", scale=0, min_width=140)
        self.widget(
            "preset_text",
            "Textbox",
            label="Weights",
            lines=2,
            max_lines=8,
            placeholder="1,0.5,R,U,X,X+0.1 …",
        )
        self.place("preset_sliders", slider_place({}))
        with compat.make("Row", elem_id="loramerge_preset_save_line"):
            self.widget(
                "preset_name",
                "Textbox",
                label="Preset name",
                lines=1,
                max_lines=1,
                scale=2,
                min_width=180,
            )
            self.button("preset_save", variant="primary", scale=1, min_width=120)
            self.button("preset_delete", scale=1, min_width=120)
            rows = open_list("Row and LoRA", choices=["1"], value="1", scale=2, min_width=180)
            self.widget("preset_row", "Dropdown", **rows)
            self.button("preset_use", scale=1, min_width=120)
        self.place("preset_message")

    def _hidden(self) -> None:
        """What the page's script presses and fills; never shown."""
        for control in CONTROLS:
            if control.hidden:
                self.put(control)
        for index in range(MAX_ROWS):
            for control in ROW_CONTROLS:
                if control.hidden:
                    self.put(control._replace(name=f"row{index}.{control.name}"))
        self.place("names")
        self.place("pictures")
        for name in SCRIPT_FIELDS:
            self.widget(name, "Textbox", label=name, value="")
        for name in SCRIPT_BUTTONS:
            self.widget(f"button.{name}", "Button", value=name, elem_id=f"loramerge_do_{name}")


PRESET_LAYOUTS: Mapping[str, int] = {
    "SD 1 and 2: 17": 17,
    "SD 1 and 2, all blocks: 26": 26,
    "SDXL: 12": 12,
    "SDXL, all blocks: 20": 20,
    "Flux: 61": 61,
}


def slider_place(lists: Mapping[str, Sequence[str]]) -> str:
    """Where the page's script draws a slider for each entry of a list.

    Args:
        lists: Blocks by label, beside those that a WebUI's start knows.
    """
    known = {label: list(BLOCK_IDS[count]) for label, count in PRESET_LAYOUTS.items()}
    data = render.foreign(json.dumps({**known, **{label: list(ids) for label, ids in lists.items()}}))
    return f'<div id="loramerge_sliders" data-blocks="{data}"></div>'


def _rank_setting(rank: str) -> tuple[str, int]:
    """Label of the rank rule and the number that a setting means."""
    if rank in ("auto", "same", "full"):
        return RANK_RULES[rank], 32
    return RANK_RULES["number"], int(rank) if rank.isdigit() else 32


def mode_text(mode: str) -> str:
    """The plain sentence below the mode."""
    method = METHODS[mode]
    parts = [render.say(method.summary)]
    if method.avoid:
        parts.append(f'<span class="lm-quiet">{render.say("Avoid it")} {render.say(method.avoid)}</span>')
    if method.experimental:
        parts.append(f'<em class="lm-badge">{render.say("Experimental")}</em>')
    return f'<div class="lm-mode">{" ".join(parts)}</div>'


def hints() -> dict[str, str]:
    """Element id to the help shown on hover; ``row*`` stands for every row."""
    controls = (*CONTROLS, *baking.CONTROLS, *extracting.CONTROLS)
    found = {element_id(control.name): control.hint for control in controls if control.hint}
    found |= {f"loramerge_row*_{control.name}": control.hint for control in ROW_CONTROLS if control.hint}
    found |= {f"loramerge_row*_{name}": hint for name, (_, hint) in ROW_BUTTONS.items()}
    found |= {element_id(name): hint for name, (_, hint) in (*BUTTONS.items(), *extracting.BUTTONS.items())}
    for method in METHODS.values():
        for param in method.params:
            found[element_id(f"param.{method.name}.{param.name}")] = param.help
    return found
