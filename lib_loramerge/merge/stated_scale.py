"""The scale that a trainer wrote beside the tensors, where no WebUI looks for it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import Sentence

CONFIG = "adapter_config.json"
HEADER_KEY = "lora_adapter_metadata"
# A configuration is small; what is larger is something else.
_MOST_BYTES = 1_000_000


def stated_scale_note(path: Path, metadata: Mapping[str, str], ranks: Collection[int]) -> str | None:
    """A note on a file without alphas whose configuration states a scale other than 1.

    Args:
        ranks: Ranks of the factors in the file. A configuration of another rank was written
            for another file of the folder.

    Source: PEFT scales by ``lora_alpha / r``, or by ``lora_alpha / sqrt(r)`` with ``use_rslora``;
        the WebUIs read neither place and take a scale of 1.
    """
    for where, settings in _settings(path, metadata):
        rank = settings.get("r", settings.get("rank"))
        alpha = settings.get("lora_alpha", settings.get("alpha"))
        if not _is_number(rank) or not _is_number(alpha) or rank not in ranks or rank <= 0:
            continue
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        if abs(scale - 1) > 1e-9:
            return Sentence(
                "{file} states a scale of {scale} (alpha {alpha}, rank {rank}), which no WebUI reads: "
                "in a prompt, and here, this file counts with a scale of 1. Give it {scale} times the "
                "strength to get what its trainer meant.",
                where,
                f"{scale:g}",
                f"{alpha:g}",
                f"{rank:g}",
            )
    return None


def _settings(path: Path, metadata: Mapping[str, str]) -> list[tuple[str, Mapping[str, Any]]]:
    """Where a configuration was found, and its settings; one for each component that has its own."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    stored = _object(metadata.get(HEADER_KEY, ""))
    components: dict[str, dict[str, Any]] = {}
    for key, value in stored.items():
        component, _, name = key.rpartition(".")
        components.setdefault(component, {})[name] = value
    found += [(HEADER_KEY, settings) for settings in components.values()]
    beside = path.parent / CONFIG
    try:
        if beside.is_file() and beside.stat().st_size <= _MOST_BYTES:
            found.append((CONFIG, _object(beside.read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError):
        pass
    return found


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text) if text else {}
    except (json.JSONDecodeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
