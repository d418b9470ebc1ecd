"""The node that bakes LoRAs into a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths

from ..errors import Cancelled
from ..files import output_path
from ..merge import Progress
from ..methods import METHODS
from ..recipe import MergeRecipe
from . import merging
from .inputs import CATEGORY, LORAS, GrowingInputs, loras_of, parameter_widgets, params_of

ROUNDINGS = ("auto", "nearest", "stochastic")
PRECISIONS = ("same", "float16", "bfloat16", "float32")


class BakeLoras:
    """LoRAs into a checkpoint, as a new file in the ComfyUI folder of its kind."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Adds LoRAs to a checkpoint and saves it as a new one, tensor by tensor. All that the LoRAs do not "
        "change stays byte for byte."
    )
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("ckpt_name", "report")
    FUNCTION = "bake"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        kind = (LORAS, {"tooltip": "From Load LoRA for merging. A new input appears when this one is used."})
        return {
            "required": {
                "loras_1": kind,
                "ckpt_name": (
                    merging.checkpoints(),
                    {"tooltip": "The LoRAs are added to this one; its file stays as it is."},
                ),
                "name": ("STRING", {"default": "baked", "tooltip": "File name without suffix."}),
                "overwrite": ("BOOLEAN", {"default": False, "tooltip": "Replace a checkpoint of this name."}),
                "mode": (list(METHODS), {"default": "svd", "tooltip": "How the LoRAs become one."}),
                "precision": (list(PRECISIONS), {"tooltip": "Of the matrices; same as the checkpoint."}),
                "rounding": (
                    list(ROUNDINGS),
                    {"tooltip": "auto: by chance in float8, which loses small changes, else to the nearest."},
                ),
                "drop_ema": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Leave out the EMA weights, which only training needs."},
                ),
                "random_seed": (
                    "INT",
                    {"default": 0, "min": 0, "max": 2**53 - 1, "tooltip": "For what is drawn at random."},
                ),
            },
            "optional": GrowingInputs("loras_", kind, {"loras_2": kind, **parameter_widgets()}),
        }

    @classmethod
    def IS_CHANGED(cls, ckpt_name: str, name: str, **_: Any) -> str:
        target = _target(ckpt_name, name)
        return merging.stamp([merging.checkpoint(ckpt_name), *([target] if target.is_file() else [])])

    def bake(
        self,
        ckpt_name: str,
        name: str,
        overwrite: bool,
        mode: str,
        precision: str,
        rounding: str,
        drop_ema: bool,
        random_seed: int,
        **more: Any,
    ) -> dict[str, Any]:
        from ..checkpoints import BakeSettings, prepare_bake

        recipe = MergeRecipe(inputs=loras_of(more), mode=mode, seed=random_seed, params=params_of(mode, more))
        target = _target(ckpt_name, name)
        try:
            with prepare_bake(
                recipe,
                merging.checkpoint(ckpt_name),
                find=merging.find,
                presets=merging.presets(),
                settings=BakeSettings(rounding, precision, drop_ema),
                stop=comfy.model_management.throw_exception_if_processing_interrupted,
            ) as bake:
                report = bake.run(
                    target,
                    overwrite=overwrite,
                    progress=_bar(),
                    cancel=comfy.model_management.processing_interrupted,
                )
        except Cancelled:
            comfy.model_management.throw_exception_if_processing_interrupted()
            raise
        listed = target.name
        text = report.to_text().replace(str(target), listed)
        return {"ui": {"text": [text]}, "result": (listed, text)}


def _target(ckpt_name: str, name: str) -> Path:
    """In the first folder of the kind that holds the base."""
    kind, _ = merging.kind_of_checkpoint(ckpt_name)
    return output_path(folder_paths.get_folder_paths(kind)[0], name)


def _bar() -> Callable[[Progress], None]:
    """ComfyUI's progress bar, which hashing fills to a third."""
    bar = comfy.utils.ProgressBar(100)

    def show(progress: Progress) -> None:
        share = progress.done / progress.total if progress.total else 1.0
        bar.update_absolute(
            round(100 * (share / 3 if progress.phase == "hash" else 1 / 3 + share * 2 / 3)), 100
        )

    return show
