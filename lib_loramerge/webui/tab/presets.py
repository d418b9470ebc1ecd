"""The page of presets: pick, edit, save into ``preset.txt``, delete."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from ...blocks import BLOCK_IDS, delete_preset, save_preset
from ...errors import RecipeError, Sentence
from .. import form, render
from ..compat import Update, update
from .layout import PRESET_LAYOUTS, slider_place

if TYPE_CHECKING:
    from ..form import Changes, Form
    from ..host import Host
    from .wiring import Wiring

ELEMENTS = "Elemental weights"


def names(host: Host, values: Form) -> list[str]:
    """The presets of the kind that is chosen."""
    return ["", *_known(host, values)]


def _known(host: Host, values: Form) -> Mapping[str, str]:
    known = host.presets()
    return known.elements if values["preset_kind"] == ELEMENTS else known.weights


@cache
def model_lists() -> dict[str, tuple[str, ...]]:
    """The lists of block weights of all base models, by label, beside those of a fresh page."""
    from ...models import ARCHITECTURES, block_map  # Not at the WebUI's start, see extension.py.

    known = set(BLOCK_IDS.values())
    found: dict[str, tuple[str, ...]] = {}
    for identity, record in ARCHITECTURES.items():
        for size in (*record.sizes, None):
            model = block_map(identity, size)
            for entry in model.lists:
                if entry.ids not in known and entry.ids and record.blocks:
                    name = f"{record.label}: {len(entry.ids)}"
                    if entry.use != "all blocks":
                        name = f"{record.label}, numbered blocks alone: {len(entry.ids)}"
                    found.setdefault(name, entry.ids)
    return found


def layouts() -> Changes:
    """Lists and sliders for every base model, once the page asks; what is chosen stays."""
    lists = model_lists()
    return {
        "preset_layout": update(choices=[*PRESET_LAYOUTS, *sorted(lists)]),
        "preset_sliders": slider_place(lists),
    }


def row_list(values: Form) -> Update:
    """The rows by their LoRAs, for the list beside "Use in this row"; the chosen row stays."""
    rows = [(row, str(values[f"row{row}.lora"] or "")) for row in range(form.row_count(values))]
    choices = [f"{row + 1}: {lora}" if lora else str(row + 1) for row, lora in rows]
    try:
        row = chosen_row(values["preset_row"])
    except RecipeError:
        row = 0
    return update(choices=choices, value=choices[min(row, len(choices) - 1)])


def chosen_row(value: object) -> int:
    """Number of a row, from 0, of what that list holds.

    Raises:
        RecipeError: It begins with no number.
    """
    return form.whole(str(value or "").partition(":")[0], "Row") - 1


def connect(wiring: Wiring) -> None:
    """Attach the handlers of the page."""
    host = wiring.host
    widgets = wiring.widgets
    place = "preset_message"

    def pick(values: Form) -> Changes:
        name = str(values["preset_pick"] or "")
        text = _known(host, values).get(name)
        if text is None:
            return {}
        return {"preset_text": text, "preset_name": name}

    def change_kind(values: Form) -> Changes:
        elemental = values["preset_kind"] == ELEMENTS
        listed = update(choices=["", *_known(host, values)], value="")
        return {
            "preset_pick": listed,
            "preset_text": "",
            "preset_name": "",
            "preset_layout": update(visible=not elemental),
        }

    def save(values: Form) -> Changes:
        name = str(values["preset_name"] or "").strip()
        if not name:
            raise RecipeError("Give the preset a name first.")
        save_preset(host.preset_path(), name, str(values["preset_text"] or "").strip())
        return {
            **lists(values, name),
            place: render.note_box([Sentence("{name} is saved in {file}.", name, host.preset_path().name)]),
        }

    def delete(values: Form) -> Changes:
        name = str(values["preset_name"] or "").strip()
        delete_preset(host.preset_path(), name)
        return {
            **lists(values, ""),
            place: render.note_box(
                [Sentence("{name} is deleted from {file}.", name, host.preset_path().name)]
            ),
        }

    def lists(values: Form, picked: str) -> Changes:
        known = host.presets()
        picks = update(choices=["", *_known(host, values)], value=picked)
        changes: Changes = {"preset_pick": picks, "fitted": ""}
        for row in range(form.MAX_ROWS):
            current = form.row_values(values, row)
            changes[f"row{row}.blocks"] = update(choices=["", *known.weights], value=current["blocks"])
            changes[f"row{row}.elements"] = update(choices=["", *known.elements], value=current["elements"])
        return changes

    def reload(values: Form) -> Changes:
        problems = host.presets().problems
        return {**lists(values, str(values["preset_pick"] or "")), place: render.note_box(problems)}

    def use(values: Form) -> Changes:
        row = chosen_row(values["preset_row"])
        if not 0 <= row < form.row_count(values):
            raise RecipeError("There are {count} rows on the Merge page.", form.row_count(values))
        field = "elements" if values["preset_kind"] == ELEMENTS else "blocks"
        text = str(values["preset_text"] or "").strip()
        note = render.note_box([Sentence("Row {row} uses these weights now.", row + 1)])
        return {f"row{row}.{field}": text, place: note}

    fields = tuple(f"row{row}.{name}" for row in range(form.MAX_ROWS) for name in ("blocks", "elements"))
    own = ("preset_kind", "preset_pick", "preset_text", "preset_name", "preset_row", "rows")
    shown = ("preset_pick", "preset_text", "preset_name", "preset_layout")
    wiring.on(widgets["preset_pick"].input, pick, ("preset_kind", "preset_pick"), shown, message=place)
    wiring.on(widgets["preset_kind"].input, change_kind, ("preset_kind", "preset_pick"), shown, message=place)
    wiring.on("preset_save", save, (*own, *fields), ("preset_pick", "fitted", *fields), message=place)
    wiring.on("preset_delete", delete, (*own, *fields), ("preset_pick", "fitted", *fields), message=place)
    wiring.on("preset_reload", reload, (*own, *fields), ("preset_pick", "fitted", *fields), message=place)
    wiring.on("preset_use", use, (*own, *fields), fields, message=place)
