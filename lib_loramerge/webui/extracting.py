"""The form of the Extract page as plain data. Knows no Gradio."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import LoraMergeError
from ..recipe import LoraInput
from ..recipe.model import MAX_SIZE
from .checkpoint_jobs import BASE, TUNED, ExtractRequest
from .form import PLAIN, SMALLEST, Form, key_of, number, whole

if TYPE_CHECKING:
    from .host import Host

MOST_RANKS = 4096  # As of checkpoints.differing, which is not loaded at the WebUI's start.
RULES = {
    "number": "A number",
    "auto": "What stands out of the rounding",
    "retain": "Keep a share",
    "size": "Fit a size",
}
PARTS = {"": "Everything", "unet": "Denoiser", "te": "Text encoders"}
PRECISIONS = {name: label for name, label in PLAIN["dtype"].labels.items() if name != "same"}
EMPTY = "Choose the two checkpoints to see here what will come out."


def rule_of(form: Form) -> str:
    return key_of(RULES, form.get("extract_rule")) or "number"


def request_of(form: Form, host: Host) -> ExtractRequest:
    """What the form asks for; an empty name is the proposed one.

    Raises:
        LoraMergeError: A field that cannot be understood, or a checkpoint that is not there.
    """
    rule = rule_of(form)
    settings: dict[str, object] = {
        "dtype": key_of(PRECISIONS, form.get("extract_dtype")) or "float16",
        "skip_unsupported": bool(form.get("extract_skip")),
    }
    if rule == "number":
        settings["rank"] = whole(form.get("extract_rank"), "Rank", 1, MOST_RANKS)
    else:
        settings["max_rank"] = whole(form.get("extract_max_rank"), "Largest rank", 1, MOST_RANKS)
    if rule == "auto":
        settings["rank"] = "auto"
    if rule == "retain":
        settings["retain"] = number(form.get("extract_retain"), "The share to keep", SMALLEST, 100) / 100
    if rule == "size":
        settings["size"] = number(form.get("extract_size"), "The largest file size", SMALLEST, MAX_SIZE)
    if form.get("extract_conv_rank") not in (None, ""):
        settings["conv_rank"] = whole(form.get("extract_conv_rank"), "Rank of convolutions", 0, MOST_RANKS)
    part = key_of(PARTS, form.get("extract_parts"))
    if part:
        settings["parts"] = (part,)
    tuned = str(form.get("extract_tuned") or "").strip()
    return ExtractRequest(
        tuned=tuned,
        base=str(form.get("extract_base") or "").strip(),
        settings=tuple(settings.items()),
        name=str(form.get("extract_name") or "").strip() or propose_name(tuned, host),
        overwrite=bool(form.get("extract_overwrite")),
    )


def propose_name(tuned: str, host: Host) -> str:
    """A free name made of the tuned checkpoint's."""
    path = host.checkpoint_path(tuned, TUNED)
    return host.propose_name([LoraInput(f"{path.stem}-lora")])


def facts(form: Form, host: Host) -> tuple[str, str]:
    """(HTML of what will come out, the name that is proposed), from headers alone; never raises."""
    from . import render, render_checkpoints  # Not at the WebUI's start, see extension.py.

    if not form.get("extract_tuned") or not form.get("extract_base"):
        return f'<div class="lm-quiet">{render.say(EMPTY)}</div>', ""
    name = ""
    try:
        name = propose_name(str(form["extract_tuned"]), host)
        host.checkpoint_path(str(form["extract_base"]), BASE)
        found = request_of(form, host).foreseen(host)
    except LoraMergeError as error:
        return render.error_box(host.shown(str(error))), name
    return render_checkpoints.extract_facts(found, host.free_bytes()), name
