"""The nodes. Each is a class of plain data and one function, as ComfyUI's first node interface has it.

That interface works in every version of ComfyUI; older versions lack the newer one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import folder_paths

from ..errors import RecipeError
from ..methods import METHODS
from ..recipe import DTYPES, LoraInput, parse_prompt
from . import merging, pictures
from .baking import BakeLoras
from .inputs import CATEGORY, LORAS, GrowingInputs, loras_of, parameter_widgets, params_of, rank_widgets
from .merging import Merged

NONE = "none"
MERGED = "LORAMERGE_MERGED"


def _strength(tooltip: str) -> tuple[str, dict[str, Any]]:
    return "FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01, "tooltip": tooltip}


class LoadLora:
    """One LoRA with its strengths, or all LoRAs of a prompt."""

    CATEGORY = CATEGORY
    DESCRIPTION = "A LoRA to merge, with strengths and block weights; or the <lora:...> tags of a prompt."
    RETURN_TYPES = (LORAS,)
    RETURN_NAMES = ("loras",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "lora_name": (
                    [NONE, *folder_paths.get_filename_list("loras")],
                    {"tooltip": "The file. Choose none to use the prompt alone."},
                ),
                "strength_model": _strength("Strength for the diffusion model; 1 is the whole LoRA."),
                "strength_clip": _strength("Strength for the text encoders."),
                "preset": (
                    [NONE, *merging.presets().weights],
                    {"tooltip": "Block weights by the name of a preset of preset.txt."},
                ),
                "block_weights": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Block weights as numbers with commas between them; wins over the preset.",
                    },
                ),
            },
            "optional": {
                "prompt": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "tooltip": "Every <lora:name:strength> tag is added; other text is ignored.",
                    },
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, **widgets: Any) -> str:
        inputs = cls._inputs(**widgets)
        blocks = any(given.lbw or given.lbwe for given in inputs)
        return merging.stamp(
            [merging.find(given.name) for given in inputs] + [merging.preset_file()] * blocks
        )

    def load(self, **widgets: Any) -> tuple[tuple[LoraInput, ...]]:
        return (self._inputs(**widgets),)

    @staticmethod
    def _inputs(
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        preset: str,
        block_weights: str,
        prompt: str | None = None,
    ) -> tuple[LoraInput, ...]:
        loras = list(parse_prompt(prompt or ""))
        if lora_name != NONE:
            blocks = block_weights.strip() or (None if preset == NONE else preset)
            name = merging.lora_name(lora_name)
            loras.insert(0, LoraInput(name, te=strength_clip, unet=strength_model, lbw=blocks))
        if not loras:
            raise RecipeError("Choose a LoRA, or write a prompt with <lora:name:strength> tags.")
        return tuple(loras)


class MergeLoras:
    """Any number of LoRAs to one, in ComfyUI's temporary folder."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Merges LoRAs exactly. Nothing is saved: apply the result, or save it with another node."
    RETURN_TYPES = (MERGED,)
    RETURN_NAMES = ("merged_lora",)
    FUNCTION = "merge"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        kind = (LORAS, {"tooltip": "From Load LoRA for merging. A new input appears when this one is used."})
        return {
            "required": {
                "loras_1": kind,
                "mode": (list(METHODS), {"default": "svd", "tooltip": "How the LoRAs become one."}),
                **rank_widgets(),
                "precision": (list(DTYPES), {"tooltip": "Of the file; same is the widest of the inputs."}),
                "device": (
                    list(merging.DEVICES),
                    {"tooltip": "The CPU is fast enough for almost every merge."},
                ),
                # Not "seed": the page would draw a new one for every run, and merge again.
                "random_seed": (
                    "INT",
                    {"default": 0, "min": 0, "max": 2**53 - 1, "tooltip": "For modes that draw at random."},
                ),
                "base": (
                    [NONE, *merging.checkpoints()],
                    {"tooltip": "Base model, for LoRAs that change the model in proportion (DoRA ...)."},
                ),
            },
            "optional": GrowingInputs("loras_", kind, {"loras_2": kind, **parameter_widgets()}),
        }

    @classmethod
    def IS_CHANGED(cls, base: str, **_: Any) -> str:
        return "" if base == NONE else merging.stamp([merging.checkpoint(base)])

    def merge(
        self, mode: str, precision: str, device: str, random_seed: int, base: str, **more: Any
    ) -> tuple[Merged]:
        merged = merging.merge(
            loras_of(more), device, None if base == NONE else base, mode=mode, dtype=precision,
            seed=random_seed, params=params_of(mode, more), **merging.rank_fields(METHODS[mode], more),
        )  # fmt: skip
        return (merged,)


class ApplyMerged:
    """Patches MODEL and CLIP, as ComfyUI's own LoRA loader does with a file."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Applies a merged LoRA to the model without saving it."
    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "merged_lora": (MERGED,),
                "strength_model": _strength("1 is what the merge says."),
                "strength_clip": _strength("1 is what the merge says."),
            },
            "optional": {"model": ("MODEL",), "clip": ("CLIP",)},
        }

    def apply(
        self,
        merged_lora: Merged,
        strength_model: float,
        strength_clip: float,
        model: Any = None,
        clip: Any = None,
    ) -> tuple[Any, Any]:
        if model is None and clip is None:
            raise RecipeError("Connect a MODEL, a CLIP or both.")
        return merging.apply(merged_lora, model, clip, strength_model, strength_clip)


class SaveMerged:
    """Writes the merged LoRA into the LoRA folder."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Saves a merged LoRA into ComfyUI's LoRA folder, with its recipe in the metadata."
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("lora_name",)
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "merged_lora": (MERGED,),
                "name": ("STRING", {"default": "merged", "tooltip": "File name without suffix."}),
                "subfolder": (
                    "STRING",
                    {"default": "", "tooltip": "Below the LoRA folder; made when missing."},
                ),
                "overwrite": ("BOOLEAN", {"default": False, "tooltip": "Replace a file of this name."}),
            },
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    def save(
        self,
        merged_lora: Merged,
        name: str,
        subfolder: str,
        overwrite: bool,
        prompt: Any = None,
        extra_pnginfo: Any = None,
    ) -> dict[str, Any]:
        extra = merging.workflow_metadata(prompt, extra_pnginfo)
        target = merging.save(merged_lora, name, subfolder, overwrite, extra)
        listed = str(target.relative_to(folder_paths.get_folder_paths("loras")[0]))
        report = replace(merged_lora.report, output=listed, size_bytes=target.stat().st_size)
        return {"ui": {"text": [report.to_text()]}, "result": (listed,)}


class Report:
    """The report of a merge as text and picture."""

    CATEGORY = CATEGORY
    DESCRIPTION = "What was merged, how exact the result is, and where the LoRAs agree or fight."
    RETURN_TYPES = ("STRING", "IMAGE")
    RETURN_NAMES = ("report", "picture")
    FUNCTION = "report"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"merged_lora": (MERGED,)}}

    def report(self, merged_lora: Merged) -> dict[str, Any]:
        text = merged_lora.report.to_text()
        picture = pictures.of_merge(merged_lora)
        return {"ui": {"text": [text], "images": pictures.shown(picture)}, "result": (text, picture)}


_NODES: Sequence[tuple[str, type, str]] = (
    ("LoraMergeLoad", LoadLora, "Load LoRA for merging"),
    ("LoraMergeMerge", MergeLoras, "Merge LoRAs"),
    ("LoraMergeApply", ApplyMerged, "Apply merged LoRA"),
    ("LoraMergeSave", SaveMerged, "Save merged LoRA"),
    ("LoraMergeReport", Report, "LoRA report"),
    ("LoraMergeBake", BakeLoras, "Bake LoRAs into checkpoint"),
)
NODE_CLASS_MAPPINGS = {name: node for name, node, _ in _NODES}
NODE_DISPLAY_NAME_MAPPINGS = {name: title for name, _, title in _NODES}
