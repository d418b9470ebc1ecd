"""The Merge form with another result, a checkpoint: its fields, its facts, its request. Knows no Gradio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ..errors import LoraMergeError, Sentence
from ..recipe import SETTINGS, MergeRecipe, to_command
from .checkpoint_jobs import TO_BAKE, BakeRequest
from .form import PLAIN, Changes, Form, key_of
from .host import ConflictError, Host

if TYPE_CHECKING:
    from ..recipe import LoraInput

LORA_FILE, CHECKPOINT = "LoRA file", "Checkpoint with it baked in"
RESULTS = (LORA_FILE, CHECKPOINT)
ROUNDINGS = {
    "auto": "Automatic",
    "nearest": "To the nearest number",
    "stochastic": "By chance",
}
DTYPES = {**PLAIN["dtype"].labels, "same": "Same as the checkpoint"}
BUTTON = "Bake and save"


class Facts(NamedTuple):
    """What is known of a bake before it begins.

    Attributes:
        html: The facts, or why there are none.
        problem: Why it cannot be done.
        float8: Whether the rounding matters.
        ema: Whether there are EMA weights to leave out.
    """

    html: str
    problem: str = ""
    float8: bool = False
    ema: bool = False


def is_bake(form: Form) -> bool:
    """Whether the form's result is a checkpoint."""
    return form.get("result_kind") == CHECKPOINT


def request_of(form: Form, recipe: MergeRecipe, name: str = "", overwrite: bool = False) -> BakeRequest:
    """What the form asks for."""
    return BakeRequest(
        recipe=recipe,
        base=str(form.get("bake_base") or "").strip(),
        name=name,
        overwrite=overwrite,
        rounding=key_of(ROUNDINGS, form.get("bake_rounding")) or "auto",
        dtype=key_of(DTYPES, form.get("bake_dtype")) or "same",
        drop_ema=bool(form.get("bake_drop_ema")),
        changed_sources=True,
    )


def form_of(request: object) -> Changes:
    """The controls of a job's result."""
    if not isinstance(request, BakeRequest):
        return {"result_kind": LORA_FILE}
    return {
        "result_kind": CHECKPOINT,
        "bake_base": request.base,
        "bake_rounding": ROUNDINGS[request.rounding],
        "bake_dtype": DTYPES[request.dtype],
        "bake_drop_ema": request.drop_ema,
        "name": request.name,
    }


def propose_name(form: Form, inputs: Sequence[LoraInput], host: Host) -> str:
    """A free name, once there is a checkpoint."""
    try:
        base = host.checkpoint_path(str(form.get("bake_base") or ""), TO_BAKE)
    except LoraMergeError:
        return ""
    return host.propose_checkpoint_name(base, [given.name.rpartition("/")[2] for given in inputs])


def facts(form: Form, recipe: MergeRecipe, host: Host) -> Facts:
    """What will come out, from headers alone."""
    from . import render, render_checkpoints  # Not at the WebUI's start, see extension.py.

    request = request_of(form, recipe)
    try:
        host.check_open()
        with request.prepared(host) as bake:
            report = bake.report(None)
            keys = bake.checkpoint.keys
            ema = any(key.startswith("model_ema.") for key in keys)
            float8 = any(dtype.startswith("F8") for dtype in report.dtypes)
    except LoraMergeError as error:
        return Facts(render.error_box(host.shown(str(error))), str(error))
    free = host.free_bytes(host.checkpoint_dirs()[0])
    if free is not None and free < report.size_bytes:
        short = Sentence(
            "The disk of the checkpoint folder has only {free} left, and the file takes {size}.",
            render.size_text(free),
            render.size_text(report.size_bytes),
        )
        report = replace(report, warnings=(*report.warnings, short))
    return Facts(render_checkpoints.bake_facts(report, free), "", float8, ema)


def check_name(form: Form, host: Host, overwrite: bool) -> tuple[str, str, tuple[str, ...]]:
    """(what is wrong with the name, that it is taken, the file that will be replaced)."""
    try:
        path = host.check_checkpoint_name(str(form.get("name") or "").strip(), overwrite)
    except ConflictError as error:
        return "", str(error), ()
    except LoraMergeError as error:
        return str(error), "", ()
    return "", "", (path.name,) if path.exists() else ()


def command(form: Form, recipe: MergeRecipe, host: Host) -> list[str]:
    """The command line of the same bake."""
    request = request_of(form, recipe)
    base = host.checkpoint_path(request.base, TO_BAKE)
    name = str(form.get("name") or "").strip() or propose_name(form, recipe.inputs, host)
    others = {name: entry.default for name, entry in SETTINGS.items() if "bake" not in entry.commands}
    merge = to_command(replace(recipe, **others), None)
    output = host.checkpoint_dirs()[0] / f"{name}.safetensors"
    options = ["-o", str(output) if host.paths_allowed() else output.name]
    if host.paths_allowed():
        options += ["--lora-dir", str(host.write_dir())]
    if request.rounding != "auto":
        options += ["--rounding", request.rounding]
    if request.dtype != "same":
        options += ["--dtype", request.dtype]
    if request.drop_ema:
        options.append("--drop-ema")
    # Checkpoint and LoRAs together at the end: the command takes them as one run of words.
    count = len(recipe.inputs)
    checkpoint = str(base) if host.paths_allowed() else base.name
    return [merge[0], "bake", *options, *merge[2:-count], checkpoint, *merge[-count:]]
