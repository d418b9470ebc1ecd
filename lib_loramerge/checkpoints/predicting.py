"""What a checkpoint predicts, noise or v: its weights do not say it, so that hosts look in several places."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .reading import Checkpoint

_MARKS = ("v_pred", "edm_vpred.sigma_max")
"""Tensors that say it, as ComfyUI and Forge read them."""

_SD2_NORM = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SD2_SPREAD = 0.09
"""By which ComfyUI and Forge tell Stable Diffusion 2's two kinds apart."""

_YAML = re.compile(r"""^\s*parameterization:\s*["']?v["']?\s*(?:#.*)?$""", re.MULTILINE)
_MOST_TEXT = 1 << 20


def predicts_v(checkpoint: Checkpoint) -> bool:
    """Whether the file or what lies beside it says that the model predicts v."""
    return (
        any(mark in checkpoint.keys for mark in _MARKS)
        or checkpoint.files[0].header.metadata.get("modelspec.prediction_type") in ("v", "v_prediction")
        or _spread_of_sd2(checkpoint)
        or _YAML.search(_text(checkpoint.path.with_suffix(".yaml"))) is not None
        or _of_scheduler(checkpoint.path)
    )


def _spread_of_sd2(checkpoint: Checkpoint) -> bool:
    if checkpoint.architecture.id != "sd2" or _SD2_NORM not in checkpoint.keys:
        return False
    rows = checkpoint.rows(_SD2_NORM, 0, checkpoint.info(_SD2_NORM).shape[0])
    return float(rows.double().std(correction=0)) > _SD2_SPREAD


def _of_scheduler(path: Path) -> bool:
    if not path.is_dir():
        return False
    try:
        config = json.loads(_text(path / "scheduler" / "scheduler_config.json") or "{}")
    except (ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("prediction_type") == "v_prediction"


def _text(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(_MOST_TEXT).decode("utf-8", "replace")
    except OSError:
        return ""
