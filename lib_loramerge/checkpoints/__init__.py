"""Checkpoints: LoRAs baked into them, LoRAs extracted from two of them, and differences of them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .baking import Bake, BakeSettings
    from .differing import ExtractSettings
    from .extracted import ExtractReport
    from .extracting import extract
    from .foreseeing import Foreseen, foresee
    from .looking import is_checkpoint, look
    from .outcome import BakeReport
    from .preparing import prepare_bake, prepare_difference
    from .reading import Checkpoint

# Baking needs torch, which listing commands does not.
_LATER = {
    "Bake": "baking",
    "BakeReport": "outcome",
    "BakeSettings": "baking",
    "Checkpoint": "reading",
    "ExtractReport": "extracted",
    "ExtractSettings": "differing",
    "Foreseen": "foreseeing",
    "extract": "extracting",
    "foresee": "foreseeing",
    "is_checkpoint": "looking",
    "look": "looking",
    "prepare_bake": "preparing",
    "prepare_difference": "preparing",
}

__all__ = [
    "Bake",
    "BakeReport",
    "BakeSettings",
    "Checkpoint",
    "ExtractReport",
    "ExtractSettings",
    "Foreseen",
    "extract",
    "foresee",
    "is_checkpoint",
    "look",
    "prepare_bake",
    "prepare_difference",
]


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LATER[name]}", __name__), name)
