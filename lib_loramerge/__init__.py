"""Merge LoRA files exactly, in seconds, with the error stated.

Importing this package imports neither torch nor a WebUI: public names are
loaded when first used, so that a WebUI's start and ``loramerge --help`` stay
instant.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "LoraMergeError": "errors",
    "LoraInput": "recipe",
    "MergeRecipe": "recipe",
    "parse_prompt": "recipe",
    "format_prompt": "recipe",
    "plan_merge": "merge",
    "run_merge": "merge",
    "MergePlan": "merge",
    "MergeReport": "report",
    "METHODS": "methods",
    "ADAPTERS": "adapters",
    "DIALECTS": "dialects",
    "inspect": "analysis",
    "compare": "analysis",
}

__all__ = [*_PUBLIC, "__version__", "merge"]


def __getattr__(name: str) -> object:
    if name == "merge":
        return import_module(".merge", __name__)  # a package that can be called, see there
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
