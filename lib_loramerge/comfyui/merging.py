"""A merge inside ComfyUI: its LoRA folders, its device, its progress bar and its interrupt button."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths

from ..blocks import Presets, bundled_preset_path, load_presets
from ..errors import Cancelled, IncompatibleError
from ..files import LoraFolder, open_file, output_path, write_again
from ..merge import MergePlan, Progress, plan_merge, run_merge
from ..metadata import renamed
from ..methods import MergeMethod
from ..recipe import LoraInput, MergeRecipe
from ..recipe.rank_rules import CONV_RULES, FAIR_RULES, RANK_RULES, RULE_FIELDS, rule_settings
from ..report import MergeReport

DEVICES = ("CPU", "ComfyUI's device")
# What a merge of the largest common LoRAs needs of an accelerator, beside the models there.
DEVICE_BYTES = 2 << 30
# Kinds of ComfyUI's folders that hold base models; those with a denoiser alone are in the second.
CHECKPOINT_KINDS = ("checkpoints", "diffusion_models")


class Merged:
    """A merged LoRA in ComfyUI's temporary folder; the file goes when no node holds it any more.

    Attributes:
        path: The file, complete.
        plan: What was merged.
        report: What became of it.
    """

    def __init__(self, path: Path, plan: MergePlan, report: MergeReport) -> None:
        self.path = path
        self.plan = plan
        self.report = report
        weakref.finalize(self, _forget, path)


def _forget(path: Path) -> None:
    # Windows keeps a file that is mapped by a patched model; ComfyUI empties the folder at its next start.
    with contextlib.suppress(OSError):
        path.unlink()


def find(name: str) -> Path:
    """The file of a LoRA name: as ComfyUI's list has it, with or without its suffix, or as in a prompt.

    Raises:
        FileError: There is none, or more than one.
    """
    for candidate in (name, f"{name}.safetensors"):
        path = folder_paths.get_full_path("loras", candidate)
        if path is not None:
            return Path(path)
    return LoraFolder(folder_paths.get_folder_paths("loras")).find(name)


def lora_name(listed: str) -> str:
    """A name of ComfyUI's list as a recipe holds it: with ``/`` and without ``.safetensors``."""
    name = listed.replace("\\", "/")
    return name[: -len(".safetensors")] if name.lower().endswith(".safetensors") else name


def checkpoints() -> list[str]:
    """Base models: those of the checkpoint folder by their names, others with their folder's in front."""
    own, alone = map(folder_paths.get_filename_list, CHECKPOINT_KINDS)
    return [*own, *(f"{CHECKPOINT_KINDS[1]}/{name}" for name in alone)]


def checkpoint(listed: str) -> Path:
    """The file of a name of :func:`checkpoints`."""
    return Path(folder_paths.get_full_path_or_raise(*kind_of_checkpoint(listed)))


def kind_of_checkpoint(listed: str) -> tuple[str, str]:
    """(kind of folder, name in it) of a name of :func:`checkpoints`."""
    start = f"{CHECKPOINT_KINDS[1]}/"
    if listed.startswith(start):
        return CHECKPOINT_KINDS[1], listed.removeprefix(start)
    return CHECKPOINT_KINDS[0], listed


def stamp(paths: Sequence[Path]) -> str:
    """Changes when one of the files does: name, size and time of each."""
    status = [(path, os.stat(path)) for path in paths]
    return "|".join(f"{path}:{entry.st_size}:{entry.st_mtime_ns}" for path, entry in status)


def preset_file() -> Path:
    """The ``preset.txt`` that block weights by name come from."""
    return bundled_preset_path()


def presets() -> Presets:
    """The block-weight presets of ``preset.txt``."""
    return load_presets([preset_file()])


def rank_fields(method: MergeMethod, widgets: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of :class:`MergeRecipe` for the rank's widgets; those that do not apply are ignored."""
    if not method.uses_rank:
        return {}
    rule = next(rule for rule, label in RANK_RULES.items() if label == widgets["rank_rule"])
    fields = rule_settings(rule, widgets.get(RULE_FIELDS.get(rule, "")))
    if rule in CONV_RULES and widgets["conv_rank"]:
        fields["conv_rank"] = widgets["conv_rank"]
    if rule in FAIR_RULES and method.exact:
        fields["fair"] = widgets["fair"]
    return fields


def merge(inputs: Sequence[LoraInput], device: str, base: str | None, **fields: Any) -> Merged:
    """Merge into ComfyUI's temporary folder.

    Args:
        device: Of :data:`DEVICES`.
        base: Of :func:`checkpoints`, for adapters that need the base model.
        fields: Of :class:`MergeRecipe`.

    Raises:
        LoraMergeError: Anything a user can cause; no file is left then.
        InterruptProcessingException: The user pressed Interrupt.
    """
    base_path = None if base is None else checkpoint(base)
    recipe = MergeRecipe(
        inputs=tuple(inputs),
        device=_device(device),
        base=None if base_path is None else str(base_path),
        **fields,
    )
    plan = plan_merge(recipe, find=find, presets=presets(), base=base_path)
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"loramerge-{secrets.token_hex(8)}.safetensors"
    return Merged(path, plan, replace(_run(plan, path), output="nothing: not saved"))


def _device(choice: str) -> str:
    """The recipe's device; CPU for one that torch gives no name the merge knows."""
    if choice == DEVICES[0]:
        return "cpu"
    device = comfy.model_management.get_torch_device()
    if device.type not in ("cuda", "mps", "xpu"):
        return "cpu"
    # ComfyUI's models make room, and come back when they are used.
    comfy.model_management.free_memory(DEVICE_BYTES, device)
    return str(device)


def _run(plan: MergePlan, path: Path) -> MergeReport:
    bar = comfy.utils.ProgressBar(len(plan.layers))

    def show(progress: Progress) -> None:
        bar.update_absolute(progress.done, progress.total)

    try:
        return run_merge(
            plan, path, progress=show,
            cancel=comfy.model_management.processing_interrupted,
        )  # fmt: skip
    except Cancelled:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise


def apply(
    merged: Merged, model: Any, clip: Any, strength_model: float, strength_clip: float
) -> tuple[Any, Any]:
    """Patch copies of ComfyUI's MODEL and CLIP, each of which may be None.

    Raises:
        IncompatibleError: No layer of the file fits what is connected.
    """
    tensors = comfy.utils.load_torch_file(str(merged.path), safe_load=True)
    patched = comfy.sd.load_lora_for_models(model, clip, tensors, strength_model, strength_clip)
    if _patches(*patched) == _patches(model, clip):
        raise IncompatibleError(
            "No layer of the merged LoRA fits the connected model. The LoRA is for {base_model}: connect a "
            "model of that kind.",
            merged.report.base_model,
        )
    return patched


def _patches(model: Any, clip: Any) -> int:
    patchers = [model, None if clip is None else clip.patcher]
    return sum(
        len(list_) for patcher in patchers if patcher is not None for list_ in patcher.patches.values()
    )


def save(merged: Merged, name: str, subfolder: str, overwrite: bool, extra: Mapping[str, str]) -> Path:
    """Write the merged LoRA into ComfyUI's first LoRA folder.

    Args:
        extra: Further metadata.

    Raises:
        OutputError: The name is taken or impossible, or the disk is full.
    """
    target = output_path(folder_paths.get_folder_paths("loras")[0], name, subfolder)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_file(merged.path) as source:
        metadata = {**renamed(source.metadata, target.stem), **extra}
        write_again(
            target, source, metadata, overwrite=overwrite,
            stop=comfy.model_management.throw_exception_if_processing_interrupted,
        )  # fmt: skip
    return target


def workflow_metadata(prompt: Any, extra_pnginfo: Mapping[str, Any] | None) -> dict[str, str]:
    """The workflow as ComfyUI's own save nodes keep it; nothing where the user has disabled that."""
    from comfy.cli_args import args

    if args.disable_metadata:
        return {}
    kept = {} if prompt is None else {"prompt": json.dumps(prompt)}
    return kept | {key: json.dumps(value) for key, value in (extra_pnginfo or {}).items()}


__all__ = [
    "CHECKPOINT_KINDS",
    "DEVICES",
    "Merged",
    "apply",
    "checkpoint",
    "checkpoints",
    "find",
    "kind_of_checkpoint",
    "lora_name",
    "merge",
    "preset_file",
    "presets",
    "rank_fields",
    "save",
    "stamp",
    "workflow_metadata",
]
