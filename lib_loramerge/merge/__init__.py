"""The merge from files to file; the only place that knows the whole order.

``plan_merge`` decides everything from headers, ``run_merge`` carries it out.
Reading tensors needs torch, so what does is loaded when first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .layout import LayerPlan, MergePlan, SourcePlan
from .plan import plan_merge
from .simple import merge_files
from .sources import Source, open_source

if TYPE_CHECKING:
    from .read import Shared
    from .run import run_merge
    from .work import Progress

_LATER = {"Progress": "work", "Shared": "read", "run_merge": "run"}

__all__ = [
    "LayerPlan",
    "MergePlan",
    "Progress",
    "Shared",
    "Source",
    "SourcePlan",
    "merge_files",
    "open_source",
    "plan_merge",
    "run_merge",
]


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LATER[name]}", __name__), name)


class _Callable(ModuleType):
    """``lib_loramerge.merge(...)`` merges, though ``lib_loramerge.merge`` is also this package."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return merge_files(*args, **settings)


sys.modules[__name__].__class__ = _Callable
