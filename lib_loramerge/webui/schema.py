"""The JSON that REST takes and gives, as JSON Schema for the host's ``/docs``.

Written out instead of derived from a model class: the hosts bring pydantic 1 or 2, and the recipe is
checked by the library itself, whose sentences are better than either's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..methods import METHODS
from ..recipe import SETTINGS
from .analyse import KINDS, THEMES

MAX_INPUTS = 64
MAX_TEXT = 100_000
MAX_DEPTH = 12
# Of checkpoints/, which is not loaded at the WebUI's start; a test compares them.
ROUNDINGS = ("auto", "nearest", "stochastic")
BAKED_DTYPES = ("same", "float32", "float16", "bfloat16")
EXTRACTED_DTYPES = ("float16", "bfloat16", "float32")
PARTS = ("unet", "te", "te1", "te2", "te3")
VECTORS = ("unet", "none", "all")

Schema = Mapping[str, Any]


def object_of(properties: Mapping[str, Schema], required: tuple[str, ...] = ()) -> Schema:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }


def text(description: str = "", **more: object) -> Schema:
    return {"type": "string", **({"description": description} if description else {}), **more}


def number(description: str = "", **more: object) -> Schema:
    return {"type": "number", **({"description": description} if description else {}), **more}


def input_schema() -> Schema:
    strength = {f"te{n}": number(f"strength of text encoder {n} alone", nullable=True) for n in (1, 2, 3)}
    return object_of(
        {
            "name": text("LoRA name as the prompt has it, or sub/name"),
            "te": number("strength of the text encoders", default=1.0),
            "unet": number("strength of the denoiser", default=1.0),
            **strength,
            "dyn": {"type": "integer", "minimum": 1, "nullable": True, "description": "first dyn ranks only"},
            "lbw": text(
                "block weights: a preset name, a list of the base model, or B00-B07:0.5,BASE:0", nullable=True
            ),
            "lbwe": text("elemental block weights: a preset name", nullable=True),
            "x": number("value of X entries of the block weights", nullable=True),
            "hash": text("sshs_model_hash that the file must have", nullable=True),
        },
        ("name",),
    )


def recipe_schema() -> Schema:
    """The recipe, as it is also kept in a merged file's metadata (``loramerge_recipe``)."""
    settings = {name: entry.schema() for name, entry in SETTINGS.items()}
    settings["mode"] |= {"enum": list(METHODS), "description": "merge method, see GET methods"}
    settings["base"] |= {"description": "title of a checkpoint of the host's list, for adapters that need it"}
    return object_of(
        {
            "version": {"type": "integer", "enum": [1]},
            "inputs": {"type": "array", "items": input_schema(), "minItems": 1, "maxItems": MAX_INPUTS},
            "params": {"type": "object", "description": "parameters of the merge method, see GET methods"},
            **settings,
        },
        ("inputs",),
    )


def merge_schema() -> Schema:
    return object_of(
        {
            "recipe": recipe_schema(),
            "name": text("file name without folder; not needed for a trial"),
            "subfolder": text("folder below the LoRA folder", default=""),
            "overwrite": {"type": "boolean", "default": False},
            "trial": {
                "type": "boolean",
                "default": False,
                "description": "usable in prompts until the host ends, not saved",
            },
            "activation_text": text(default=""),
            "preferred_weight": number(default=0),
            "negative_text": text(default=""),
            "notes": text(default=""),
            "description": text(default=""),
            "preview": text("name of the LoRA whose preview picture is copied", default=""),
        },
        ("recipe",),
    )


def sweep_schema() -> Schema:
    recipe = recipe_schema()
    texts = text("as in a prompt, with ranges or lists: style:0.2..1/5")
    recipe["properties"]["inputs"]["items"] = {"anyOf": [input_schema(), texts]}
    values = {"type": "array", "items": {"anyOf": [number(), text()]}}
    return object_of(
        {
            "recipe": recipe,
            "axes": {
                "type": "object",
                "description": "settings, parameters of the mode or mix, each with its values",
                "additionalProperties": {"anyOf": [values, text("a range: 0.2..1/5")]},
            },
            "name": text("of the folder of the files, below the LoRA folder"),
            "subfolder": text("folder below the LoRA folder that it is made in", default=""),
            "zip": {"type": "boolean", "default": False, "description": "the n-th values together"},
            "resume": {"type": "boolean", "default": False, "description": "keep files of the same recipe"},
        },
        ("recipe", "name"),
    )


def bake_schema() -> Schema:
    return object_of(
        {
            "recipe": recipe_schema(),
            "base": text("title of a checkpoint, see GET checkpoints"),
            "name": text("file name without folder, in the checkpoint folder"),
            "overwrite": {"type": "boolean", "default": False},
            "rounding": text("auto: by chance in float8", enum=list(ROUNDINGS), default="auto"),
            "dtype": text("of the matrices", enum=list(BAKED_DTYPES), default="same"),
            "drop_ema": {"type": "boolean", "default": False, "description": "leave EMA weights out"},
            "hash": {"type": "boolean", "default": True, "description": "keep a record for A1111"},
        },
        ("recipe", "base", "name"),
    )


def extract_schema() -> Schema:
    whole = {"type": "integer", "minimum": 1}
    return object_of(
        {
            "tuned": text("title of the fine-tuned checkpoint"),
            "base": text("title of the checkpoint that it was trained from"),
            "name": text("file name without folder; not needed for a dry run"),
            "subfolder": text("folder below the LoRA folder", default=""),
            "overwrite": {"type": "boolean", "default": False},
            "rank": {
                "description": "a number, or auto",
                "default": 64,
                "anyOf": [whole, text(enum=["auto"])],
            },
            "conv_rank": {"type": "integer", "minimum": 0, "nullable": True},
            "retain": number("in place of rank: share of each layer's norm to keep", nullable=True),
            "size": number("in place of rank: best ranks for so many MB of 1,000,000 bytes", nullable=True),
            "max_rank": {**whole, "default": 128, "description": "limit of auto, retain and size"},
            "parts": {"type": "array", "items": text(enum=list(PARTS)), "description": "empty for all"},
            "vectors": text(enum=list(VECTORS), default="unet"),
            "dialect": SETTINGS["dialect"].schema(),
            "hash": {"type": "boolean", "default": True, "description": "of both, kept in the metadata"},
            "dtype": text("of the LoRA", enum=list(EXTRACTED_DTYPES), default="float16"),
            "skip_unsupported": {"type": "boolean", "default": False},
            "dry_run": {
                "type": "boolean",
                "default": False,
                "description": "write nothing; the report has size and error at every rank",
            },
        },
        ("tuned", "base"),
    )


def plot_schema() -> Schema:
    return object_of(
        {
            "recipe": recipe_schema(),
            "kind": text("what to draw", enum=list(KINDS), default=KINDS[0]),
            "theme": text("colours", enum=list(THEMES), default=THEMES[0]),
        },
        ("recipe",),
    )


PNG: Schema = text(format="binary")


def job_schema() -> Schema:
    progress = object_of(
        {
            "phase": text(enum=["look", "merge", "extract", "hash", "write"]),
            "done": {"type": "integer"},
            "total": {"type": "integer"},
            "unit": text(enum=["layers", "bytes", "thousandths"]),
            "layer": text(),
            "fraction": number(minimum=0, maximum=1),
            "seconds_left": number(nullable=True),
        }
    )
    return object_of(
        {
            "id": text(),
            "state": text(enum=["waiting", "running", "done", "failed", "cancelled"]),
            "kind": text(enum=["merge", "bake", "extract", "analysis", "sweep"]),
            "title": text(),
            "trial": {"type": "boolean"},
            "position": {"type": "integer", "description": "0 runs, 1 is next"},
            "created": number("seconds since 1970"),
            "started": number(nullable=True),
            "ended": number(nullable=True),
            "progress": {**progress, "nullable": True},
            "output": text("path below the LoRA folder, once done", nullable=True),
            "prompt_name": text("NAME in <lora:NAME:1>, once done"),
            "report": {
                "type": "object",
                "nullable": True,
                "description": "what was written, and how exact it is",
            },
            "error": text("why it failed"),
            "notes": {"type": "array", "items": text()},
        }
    )


def error_schema() -> Schema:
    return object_of({"error": text("what is wrong, and what to do")}, ("error",))
