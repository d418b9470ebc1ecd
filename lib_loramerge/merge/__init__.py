"""The merge from files to file; the only place that knows the whole order.

``plan_merge`` decides everything from headers, ``run_merge`` carries it out.
Reading tensors needs torch, so what does is loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .layout import LayerPlan, MergePlan, SourcePlan
from .plan import plan_merge
from .sources import Source, open_source

if TYPE_CHECKING:
    from .device import devices
    from .run import Progress, run_merge

_LATER = {"Progress": "run", "run_merge": "run", "devices": "device"}

__all__ = [
    "LayerPlan",
    "MergePlan",
    "Progress",
    "Source",
    "SourcePlan",
    "devices",
    "open_source",
    "plan_merge",
    "run_merge",
]


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LATER[name]}", __name__), name)
