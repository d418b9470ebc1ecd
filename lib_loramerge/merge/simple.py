"""A merge in one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import blocks
from ..errors import RecipeError
from ..files import LoraFolder
from ..recipe import RECIPE_FIELDS, MergeRecipe, nearest_hint, parse_inputs
from .plan import plan_merge

if TYPE_CHECKING:
    from ..report import MergeReport
    from .work import Progress


def merge_files(
    loras: str | Sequence[str],
    output: str | os.PathLike[str],
    *,
    lora_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancel: Callable[[], bool] | None = None,
    **settings: Any,
) -> MergeReport:
    """Merge LoRA files, and write and report the result. ``lib_loramerge.merge`` is this function.

    Args:
        loras: Texts as the command line takes them, ``"a.safetensors:0.8"``, or a prompt with tags.
        output: File to write, ``.safetensors``.
        lora_dir: Folder in which names that are no paths are looked up.
        overwrite: Replace ``output`` if it exists.
        progress, cancel: As :func:`run_merge` takes them.
        settings: Fields of :class:`MergeRecipe`: ``mode``, ``rank``, ``dtype``, ``params`` ...

    Raises:
        LoraMergeError: Anything that the caller can mend; nothing was written.
    """
    from .run import run_merge

    for name in settings:
        if name not in RECIPE_FIELDS or name == "inputs":
            raise RecipeError("A merge has no setting {name}.{hint}", name, nearest_hint(name, RECIPE_FIELDS))
    recipe = MergeRecipe(inputs=parse_inputs([loras] if isinstance(loras, str) else loras), **settings)
    plan = plan_merge(
        recipe,
        find=LoraFolder([Path(lora_dir)] if lora_dir else [], allow_paths=True).find,
        presets=blocks.load_presets([blocks.bundled_preset_path()]),
        base=Path(recipe.base) if recipe.base else None,
    )
    return run_merge(plan, Path(output), overwrite=overwrite, progress=progress, cancel=cancel)
