"""Every control of the tab, once: its widget, its words, and what it fills.

Layout, handlers, hints, translations and tests read these tables. A new setting
of the recipe that has a label there needs a line in ``CONTROLS``, for its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from ...recipe.rank_rules import RANK_RULES
from ..form import NO_PREVIEW, PLAIN

if TYPE_CHECKING:
    from ...recipe import Param


class Control(NamedTuple):
    """One widget of the form.

    Attributes:
        name: Its name in the form; the element is ``loramerge_<name>``.
        kind: Class of the Gradio component.
        options: What the component is made with.
        hint: Help shown on hover.
        fills: Fields of ``LoraInput`` (``input.``), ``MergeRecipe`` (``recipe.``)
            and ``MergeRequest`` (``request.``) that its value goes into.
        hidden: Kept on the page for its value alone.
    """

    name: str
    kind: str
    options: Mapping[str, object]
    hint: str = ""
    fills: tuple[str, ...] = ()
    hidden: bool = False


def open_list(label: str, **options: object) -> Mapping[str, object]:
    """A list that handlers fill, and that takes other texts, too."""
    return {"label": label, "choices": [], "value": "", "allow_custom_value": True, **options}


def one_line(label: str, placeholder: str = "", **options: object) -> Mapping[str, object]:
    """A field for a short text; ``placeholder`` stands in it while it is empty."""
    shown = {"placeholder": placeholder} if placeholder else {}
    return {"label": label, "value": "", **shown, "lines": 1, "max_lines": 1, **options}


def choice(label: str, labels: Mapping[str, str], chosen: str, **options: object) -> Mapping[str, object]:
    """A list of what is shown for each of some words."""
    return {"label": label, "choices": list(labels.values()), "value": labels[chosen], **options}


def _plain(name: str, **options: object) -> Control:
    """The control of a setting, made from the recipe's own table."""
    entry = PLAIN[name]
    kind = "Checkbox" if entry.kind is bool else "Dropdown"
    options = {"label": entry.label, "value": entry.shown(entry.default), **options}
    if kind == "Dropdown":
        options |= {"choices": list(entry.labels.values()), "allow_custom_value": not entry.words}
    return Control(name, kind, options, entry.hint, (f"recipe.{name}",))


ROW_CONTROLS = (
    Control(
        "on",
        "Checkbox",
        {"label": "On", "value": True, "scale": 0, "min_width": 44},
        "Use this LoRA. Off keeps the row and leaves it out of the merge.",
    ),
    Control(
        "lora",
        "Dropdown",
        open_list("LoRA", scale=6, min_width=200),
        "Type a part of the name, the folder or the base model to search.",
        ("input.name",),
    ),
    Control(
        "strength",
        "Number",
        {"label": "Strength", "value": 1.0, "scale": 0, "min_width": 84},
        "As in the prompt: 1 is the whole LoRA, 0 nothing, negative the opposite. Any number.",
        ("input.unet",),
    ),
    Control(
        "slide",
        "Slider",
        {
            "label": "Strength slider",
            "minimum": -2,
            "maximum": 2,
            "step": 0.05,
            "value": 1.0,
            "show_label": False,
            "scale": 2,
            "min_width": 110,
        },
        "Strength from -2 to 2. Type in the field for other numbers.",
    ),
    Control(
        "te",
        "Number",
        {"label": "Text encoder", "value": 1.0, "scale": 0, "min_width": 84},
        "Strength for the text encoder. It follows Strength until you type here.",
        ("input.te",),
    ),
    Control(
        "linked",
        "Checkbox",
        {"label": "Same", "value": True, "scale": 0, "min_width": 64},
        "The text encoder takes the same strength.",
    ),
    Control(
        "blocks",
        "Dropdown",
        open_list("Block weights", scale=3, min_width=120),
        (
            "A preset, a list of numbers with commas (R, U and X are allowed, too), or blocks by name: "
            "D00-D07:0.5,BASE:0. Empty is 1 for every block."
        ),
        ("input.lbw",),
    ),
    Control(
        "elements",
        "Dropdown",
        open_list("Elemental weights", scale=2, min_width=160),
        "An elemental preset, or blocks:elements:weight.",
        ("input.lbwe",),
    ),
    Control(
        "extra",
        "Textbox",
        one_line("Other options", "dyn=8:te2=0.5:x=0.3", scale=3, min_width=160),
        (
            "As in the prompt: dyn= uses only the first ranks, te1= te2= te3= are strengths of one "
            "text encoder, x= is the value of X in block weights."
        ),
        ("input.dyn", "input.te1", "input.te2", "input.te3", "input.x"),
    ),
    # What a stored recipe knows of the file, to tell when it is another one now.
    Control("origin", "Textbox", {"label": "origin", "value": ""}, fills=("input.hash",), hidden=True),
)

CONTROLS = (
    # How
    Control(
        "mode",
        "Dropdown",
        {"label": "Mode", "choices": [], "scale": 3, "min_width": 200},
        "How the LoRAs become one. The sentence below says what it does.",
        ("recipe.mode",),
    ),
    Control(
        "rank_rule",
        "Dropdown",
        choice("Rank", RANK_RULES, "auto", scale=2, min_width=190),
        "Automatic keeps everything, except in modes that choose elements. A number makes a smaller file.",
        ("recipe.rank", "recipe.retain", "recipe.size", "recipe.keep"),
    ),
    Control(
        "rank",
        "Number",
        {
            "label": "Rank of every layer",
            "value": 32,
            "precision": 0,
            "visible": False,
            "scale": 1,
            "min_width": 110,
        },
        "1 or more. 32 is common; 128 is large.",
        ("recipe.rank",),
    ),
    Control(
        "retain",
        "Number",
        {"label": "Share to keep, %", "value": 99, "visible": False, "scale": 1, "min_width": 110},
        "Every layer gets the smallest rank that keeps this share, of it or of each LoRA.",
        ("recipe.retain",),
    ),
    Control(
        "size",
        "Number",
        {"label": "File size, MB", "value": 100, "visible": False, "scale": 1, "min_width": 110},
        "The best file that is no larger than this.",
        ("recipe.size",),
    ),
    _plain("fair", scale=1, min_width=190, visible=False),
    _plain("dtype", scale=2, min_width=190),
    Control(
        "device",
        "Dropdown",
        {"label": "Device", "choices": [], "scale": 1, "min_width": 100},
        ("Where the arithmetic runs. The CPU is fast enough for almost every merge and needs no VRAM."),
        ("recipe.device",),
    ),
    Control(
        "base",
        "Dropdown",
        open_list("Base checkpoint", visible=False, scale=3, min_width=200),
        (
            "One of the inputs changes the model in proportion to its weights, so the checkpoint it "
            "was trained on is needed."
        ),
        ("recipe.base",),
    ),
    Control(
        "seed",
        "Number",
        {"label": "Seed", "value": 0, "precision": 0, "visible": False, "scale": 1, "min_width": 110},
        "The same seed gives the same file again.",
        ("recipe.seed",),
    ),
    Control(
        "conv_rank",
        "Textbox",  # A number field shows 0 where it is empty.
        one_line("Rank of convolutions", "by the rule above", scale=1, min_width=130),
        "A number, or empty for the rule above. Convolutions often need less rank than the rest.",
        ("recipe.conv_rank",),
    ),
    _plain("normalize", scale=2, min_width=160),
    _plain("base_model", scale=2, min_width=190, visible=False),
    _plain("host", scale=2, min_width=160),
    _plain("dialect", scale=2, min_width=160),
    _plain("skip_unsupported", scale=2, min_width=200),
    # Result
    Control(
        "name",
        "Textbox",
        one_line("Name", scale=4, min_width=180),
        "Name of the new file. A free name is proposed until you type your own.",
        ("request.name",),
    ),
    Control(
        "subfolder",
        "Dropdown",
        open_list("Subfolder", scale=2, min_width=140),
        ("A folder inside the LoRA folder. Empty is the LoRA folder itself; a new name makes a new folder."),
        ("request.subfolder",),
    ),
    Control(
        "overwrite",
        "Checkbox",
        {"label": "Overwrite", "value": False, "scale": 0, "min_width": 110},
        "Replace a file of this name. It goes off after every merge and when other LoRAs are picked.",
        ("request.overwrite",),
    ),
    Control(
        "activation_text",
        "Textbox",
        {"label": "Activation text", "value": "", "lines": 2, "max_lines": 4, "scale": 4, "min_width": 200},
        (
            "Words that the WebUI puts into the prompt together with the LoRA. Taken from the inputs "
            "until you edit it."
        ),
        ("request.user_metadata",),
    ),
    Control(
        "preferred_weight",
        "Number",
        {"label": "Preferred weight", "value": None, "scale": 1, "min_width": 110},
        "The strength that the WebUI proposes for the new LoRA. Empty leaves it to the WebUI.",
        ("request.user_metadata",),
    ),
    Control(
        "notes",
        "Textbox",
        {"label": "Notes", "value": "", "lines": 2, "max_lines": 4, "scale": 4, "min_width": 200},
        "Shown on the card of the LoRA in the WebUI.",
        ("request.user_metadata",),
    ),
    Control(
        "preview",
        "Dropdown",
        open_list("Preview picture from", choices=[NO_PREVIEW], value=NO_PREVIEW, scale=1, min_width=160),
        "Picture of the card of the new LoRA.",
        ("request.preview",),
    ),
    # Kept for their values: what the page proposed last, to tell an edit from a proposal.
    Control("rows", "Number", {"label": "rows", "value": 2, "precision": 0}, hidden=True),
    # The LoRAs that the rows held when Overwrite was ticked.
    Control("overwrite_for", "Textbox", {"label": "overwrite_for", "value": ""}, hidden=True),
    Control("name_auto", "Textbox", {"label": "name_auto", "value": ""}, hidden=True),
    Control("activation_auto", "Textbox", {"label": "activation_auto", "value": ""}, hidden=True),
)

BUTTONS: Mapping[str, tuple[str, str]] = {
    "add": ("Add a LoRA", "One more row."),
    "refresh": ("Refresh the list", "Look for new LoRA files, presets and checkpoints."),
    "clear": ("Clear", "Empties the rows and what Result says of the new file. The rest of the form stays."),
    "paste_prompt": (
        "Take the txt2img prompt",
        "Fills the rows from the LoRA tags of the prompt in txt2img.",
    ),
    "fill_text": ("Fill the form", "Fills the rows from the text above; a recipe fills the whole form."),
    "fill_file": ("Fill from this file", "A merged file remembers how it was made: fills the whole form."),
    "copy_prompt": ("Copy as prompt", "The rows as LoRA tags for a prompt."),
    "copy_recipe": (
        "Copy as recipe (JSON)",
        "The whole form as a recipe for REST, the command line or this page.",
    ),
    "copy_command": ("Copy as command line", "The command that makes the same file."),
    "merge": ("Merge and save", "Makes the file in the LoRA folder."),
    "try": (
        "Try without saving",
        "Makes the merged LoRA for this session only, to use it in the next picture.",
    ),
    "see": (
        "See it in pictures",
        "Puts these LoRAs into the txt2img prompt and opens the X/Y/Z plot with what varies. "
        "Nothing is saved.",
    ),
    "analyse": (
        "Analyse",
        "Shows where the LoRAs agree or fight, and which rank is needed. Nothing is written.",
    ),
    "preset_load": ("Load", "Shows the preset below."),
    "preset_save": ("Save preset", "Writes it into preset.txt. Comments and order of that file stay."),
    "preset_delete": ("Delete preset", "Removes it from preset.txt."),
    "preset_reload": ("Reload presets", "Reads the preset files again."),
    "preset_use": ("Use in this row", "Puts these block weights into a row of the Merge page."),
}
ROW_BUTTONS: Mapping[str, tuple[str, str]] = {
    "more": ("⋯", "More options of this row"),
    "up": ("▲", "Move this row up"),
    "down": ("▼", "Move this row down"),
    "remove": ("✕", "Remove this row"),
}


def param_control(method: str, param: Param) -> Control:
    """The widget of one parameter of a merge method, made from the parameter alone."""
    label = param.name.replace("_", " ").capitalize()
    options: dict[str, object] = {"label": label, "value": param.default, "scale": 1, "min_width": 140}
    kind = "Textbox"
    if isinstance(param.default, bool):
        kind = "Checkbox"
    elif param.choices:
        kind, options["choices"] = "Dropdown", list(param.choices)
    elif isinstance(param.default, (int, float)):
        kind = "Number"
        if param.minimum is not None and param.maximum is not None:
            kind = "Slider"
            options |= {"minimum": param.minimum, "maximum": param.maximum, "step": _step(param)}
        elif isinstance(param.default, int):
            options["precision"] = 0
    return Control(f"param.{method}.{param.name}", kind, options, param.help, ("recipe.params",))


def _step(param: Param) -> float:
    if isinstance(param.default, int):
        return 1
    span = float(param.maximum or 0) - float(param.minimum or 0)
    return 0.01 if span <= 2 else 0.1


def element_id(name: str) -> str:
    """Element id of a control, button or place of the tab."""
    return "loramerge_" + name.replace(".", "_")
