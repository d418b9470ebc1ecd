"""The tab's form as plain data, and the recipe that it means; :mod:`.filled` is the other way. No Gradio.

A form is a mapping from the name of a control to its value, as
:mod:`lib_loramerge.webui.tab.controls` lists them; the controls of row 2 are
``row2.lora``, ``row2.strength`` and so on, a parameter of a method is
``param.ties.density``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..errors import LoraMergeError, RecipeError, Sentence, mapped
from ..recipe import SETTINGS, LoraInput, MergeRecipe, parse_input
from ..recipe.check import check_number, check_whole
from ..recipe.model import MAX_RANK, MAX_SEED, MAX_SIZE, STRENGTH_LIMIT
from ..recipe.rank_rules import CONV_RULES, FAIR_RULES, RANK_RULES, RULE_FIELDS, RecipeValues, rule_settings
from .labels import is_label
from .sidecar import UserMetadata

if TYPE_CHECKING:
    from ..methods import MergeMethod
    from .host import Host, LoraEntry

Form = Mapping[str, object]
"""Control to its value."""
Changes = dict[str, object]
"""Control or place of the page to its new value, or to a change of it."""

MAX_ROWS = 16
NO_PREVIEW = "None"
START_ROWS = 2
SMALLEST = 0.001  # percent of a share, MB of a file
ROW_FIELDS = ("on", "lora", "strength", "slide", "te", "linked", "blocks", "elements", "extra", "origin")
EMPTY_ROW: Form = {
    "on": True,
    "lora": "",
    "strength": 1.0,
    "slide": 1.0,
    "te": 1.0,
    "linked": True,
    "blocks": "",
    "elements": "",
    "extra": "",
    "origin": "",
}
# What the form says of the file to be made, as a fresh form has it; what Clear puts back.
NO_RESULT: Form = {
    "name": "",
    "name_auto": "",
    "overwrite": False,
    "overwrite_for": "",
    "activation_text": "",
    "activation_auto": "",
    "preferred_weight": None,
    "notes": "",
    "preview": NO_PREVIEW,
}
# Settings of a recipe whose controls are made from the recipe's own table.
PLAIN = {name: entry for name, entry in SETTINGS.items() if entry.label}
_HASH = re.compile("[0-9a-f]{8,64}")


@dataclass(frozen=True)
class Reading:
    """What a form says, as far as it can be understood.

    Attributes:
        recipe: None when something is missing or wrong.
        inputs: The rows that count, in order.
        rows: Row number of each of ``inputs``.
        problems: Control, or ``"row3"`` for a row, to the sentence to show beside it.
    """

    recipe: MergeRecipe | None
    inputs: tuple[LoraInput, ...] = ()
    rows: tuple[int, ...] = ()
    problems: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> MergeRecipe:
        """The recipe.

        Raises:
            RecipeError: There is none; the first problem.
        """
        if self.recipe is not None and not self.problems:
            return self.recipe
        raise RecipeError(next(iter(self.problems.values()), "Pick at least one LoRA first."))


def key_of(labels: Mapping[str, str], value: object) -> str:
    """The key of a choice from the text shown for it; other text as it is."""
    text = str(value or "")
    return next((key for key, label in labels.items() if label == text), text)


def lora_name(value: object, entries: Sequence[LoraEntry]) -> str:
    """The LoRA's name from what a dropdown holds: a name, a label of the list, or typed text.

    Words that one label only has all of mean that LoRA.
    """
    by_label = {entry.label: entry.name for entry in entries}
    names = set(by_label.values())
    if value in names:
        return str(value)  # Blanks around a name belong to it.
    text = str(value or "").strip()
    if text in names:
        return text
    if text in by_label:
        return by_label[text]
    # A label made before the list knew the base model, or after, or of a file that is gone.
    stem, *rest = (part.strip() for part in text.split(" · "))
    if stem in names or (rest and is_label(rest)):
        return stem
    if text and not any(entry.alias == text for entry in entries):
        words = text.casefold().split()
        # Not the broken ones: a new file may have the word that marks them as its name.
        containing = [
            entry.name
            for entry in entries
            if not entry.broken and all(word in entry.label.casefold() for word in words)
        ]
        if len(containing) == 1:
            return containing[0]
    return text


def lora_label(name: str, entries: Sequence[LoraEntry]) -> str:
    """What the dropdown shows for a name; names that are not listed stay as they are."""
    for entry in entries:
        if entry.name == name:
            return entry.label
    for entry in entries:
        if entry.alias == name:
            return entry.label
    return name


def number(value: object, what: str, low: float | None = None, high: float | None = None) -> float:
    """A finite number from a field that people type into, within the limits.

    Raises:
        RecipeError: Empty, no number, or outside the limits.
    """
    if value is None or value == "":
        raise RecipeError("{what} is empty: type a number.", Sentence(what))
    if isinstance(value, str):
        value = value.strip().replace(",", ".")
    return check_number(Sentence(what), value, low, high, text=True)


def whole(value: object, what: str, low: int | None = None, high: int | None = None) -> int:
    """A whole number from such a field.

    Raises:
        RecipeError: Empty, no whole number, or outside the limits.
    """
    result = number(value, what)
    return check_whole(Sentence(what), int(result) if result.is_integer() else result, low, high)


def row_count(form: Form) -> int:
    """How many rows the page shows."""
    count = form.get("rows") or START_ROWS
    try:
        return max(1, min(MAX_ROWS, int(count))) if isinstance(count, (int, float, str)) else START_ROWS
    except (ValueError, OverflowError):
        return START_ROWS


def row_values(form: Form, index: int) -> Changes:
    """The values of one row, by field."""
    return {name: form.get(f"row{index}.{name}", EMPTY_ROW[name]) for name in ROW_FIELDS}


def read_row(values: Form, entries: Sequence[LoraEntry]) -> LoraInput | None:
    """One row as an input of the recipe; None when it is off or empty.

    Raises:
        RecipeError: A field that cannot be understood.
    """
    name = lora_name(values["lora"], entries)
    if not name or not values["on"]:
        return None
    limits = (-STRENGTH_LIMIT, STRENGTH_LIMIT)
    unet = number(values["strength"], "Strength", *limits)
    te = unet if values["linked"] else number(values["te"], "Text encoder strength", *limits)
    given = LoraInput(name, te=te, unet=unet)
    extra = str(values["extra"] or "").strip().strip(":").strip()
    if extra:
        given = _with_extra(given, extra)
    blocks, elements = (str(values[key] or "").strip() for key in ("blocks", "elements"))
    return replace(
        given,
        lbw=blocks or given.lbw,
        lbwe=elements or given.lbwe,
        hash=_hash_of(str(values["origin"] or ""), name),
    )


def _hash_of(origin: str, name: str) -> str | None:
    """The hash beside a row, as long as the row has the LoRA it came with."""
    digest, _, made_with = origin.partition(" ")
    return digest if made_with == name and _HASH.fullmatch(digest) else None


def _with_extra(given: LoraInput, extra: str) -> LoraInput:
    """Adds the options of a row's last field, which is a piece of the prompt's own grammar."""
    if any("=" not in part for part in extra.split(":")):
        raise RecipeError("Other options must look like dyn=8:te2=0.5, got {given}.", repr(extra))
    try:
        parsed = parse_input(f"x:te={given.te!r}:unet={given.unet!r}:{extra}")
    except RecipeError as error:
        named = mapped(str(error), lambda part: re.sub("^'x'", lambda _: repr(given.name), part))
        raise RecipeError(named) from None
    return replace(parsed, name=given.name)


def read_form(form: Form, host: Host, methods: Mapping[str, MergeMethod]) -> Reading:
    """The form as a recipe, with a sentence for every control that is wrong."""
    problems: dict[str, str] = {}
    entries = host.loras()
    inputs, rows = [], []
    for index in range(row_count(form)):
        try:
            given = read_row(row_values(form, index), entries)
        except LoraMergeError as error:
            problems[f"row{index}"] = str(error)
            continue
        if given is not None:
            inputs.append(given)
            rows.append(index)
    settings = _read_how(form, host, methods, problems)
    if not inputs or problems:
        return Reading(None, tuple(inputs), tuple(rows), problems)
    try:
        recipe = MergeRecipe(inputs=tuple(inputs), **settings)
    except LoraMergeError as error:
        problems["how"] = str(error)
        return Reading(None, tuple(inputs), tuple(rows), problems)
    return Reading(recipe, tuple(inputs), tuple(rows), problems)


def picked(form: Form, entries: Sequence[LoraEntry]) -> set[str]:
    """Names of the LoRAs in the rows that are on."""
    rows = (row_values(form, index) for index in range(row_count(form)))
    return {lora_name(row["lora"], entries) for row in rows if row["on"]} - {""}


def may_overwrite(form: Form, entries: Sequence[LoraEntry]) -> bool:
    """Whether Overwrite is ticked, and was ticked for the LoRAs that are in the rows now."""
    if not form.get("overwrite"):
        return False
    try:
        ticked_for = json.loads(str(form.get("overwrite_for") or "null"))
    except ValueError:
        return False
    if not isinstance(ticked_for, list):
        return False
    return picked(form, entries) == {lora_name(text, entries) for text in ticked_for} - {""}


def _read_how(
    form: Form, host: Host, methods: Mapping[str, MergeMethod], problems: dict[str, str]
) -> RecipeValues:
    """The recipe's fields below the rows."""
    mode = mode_name(form.get("mode"), methods)
    method = methods.get(mode)
    settings: RecipeValues = {
        "mode": mode,
        "device": _device(form.get("device"), host),
        "base": str(form.get("base") or "").strip() or None,
    }
    for name, entry in PLAIN.items():
        try:
            settings[name] = entry.read(form.get(name))
        except LoraMergeError as error:
            problems[name] = str(error)
    if method is None or method.uses_rank:
        try:
            settings |= _read_rank(form)
        except LoraMergeError as error:
            problems["rank_rule"] = str(error)
    if method is not None and not (method.uses_rank and method.exact):
        settings["fair"] = False  # Its control is hidden.
    if method is not None and not method.exact:
        settings["normalize"] = None  # So is this one.
    if method is not None:
        settings["params"] = {}
        for param in method.params:
            value = form.get(f"param.{mode}.{param.name}")
            try:
                settings["params"][param.name] = param.check(param.default if value is None else value)
            except LoraMergeError as error:
                problems["mode"] = str(error)
    try:
        settings["seed"] = whole(form.get("seed") or 0, "Seed", 0, MAX_SEED)
    except LoraMergeError as error:
        problems["seed"] = str(error)
    return settings


def _read_rank(form: Form) -> RecipeValues:
    rule = key_of(RANK_RULES, form.get("rank_rule")) or "auto"
    given: float | None = None
    if rule == "number":
        given = whole(form.get("rank"), "Rank", 1, MAX_RANK)
    elif rule == "size":
        given = number(form.get("size"), "The file size", SMALLEST, MAX_SIZE)
    elif rule in RULE_FIELDS:
        given = number(form.get("retain"), "The share to keep", SMALLEST, 100) / 100
    settings = (
        rule_settings(rule, given) if rule in FAIR_RULES else {"fair": False, **rule_settings(rule, given)}
    )
    if rule in CONV_RULES and form.get("conv_rank") not in (None, "", "0", 0):
        settings["conv_rank"] = whole(form.get("conv_rank"), "Rank of convolutions", 1, MAX_RANK)
    return settings


def _device(value: object, host: Host) -> str:
    return next((key for label, key in host.devices() if value in (label, key)), str(value or "auto"))


def mode_name(value: object, methods: Mapping[str, MergeMethod]) -> str:
    """Name of a merge method from the label the dropdown shows."""
    return next(
        (name for name, method in methods.items() if value in (name, method.label)), str(value or "svd")
    )


def is_random(
    reading: Reading, methods: Mapping[str, MergeMethod], mode: str, weights: Mapping[str, str]
) -> bool:
    """Whether the seed matters: the method draws, or some block weight is R or U.

    Args:
        weights: Presets of block weights, by name.
    """
    method = methods.get(mode)
    if method is not None and method.random:
        return True
    lists = [weights.get(given.lbw, given.lbw) for given in reading.inputs if given.lbw]
    return any({"R", "U"} & {entry.strip() for entry in re.split("[,:=]", text)} for text in lists)


def user_metadata(form: Form) -> UserMetadata | None:
    """What goes into the WebUI's ``<name>.json``; None when there is nothing to say.

    Raises:
        RecipeError: The preferred weight is no number.
    """
    weight = form.get("preferred_weight")
    data = UserMetadata(
        activation_text=str(form.get("activation_text") or "").strip(),
        preferred_weight=number(weight, "Preferred weight") if weight not in (None, "") else 0.0,
        notes=str(form.get("notes") or "").strip(),
    )
    return None if data.empty else data
