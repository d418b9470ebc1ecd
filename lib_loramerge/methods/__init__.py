"""Merge methods: deltas of one layer and weights in, one delta out. A method is a decorated function."""

from __future__ import annotations

from . import elementwise, linear, spherical, subspace
from .registry import METHODS, LayerContext, MergeMethod, merge_method

__all__ = [
    "METHODS",
    "LayerContext",
    "MergeMethod",
    "elementwise",
    "linear",
    "merge_method",
    "spherical",
    "subspace",
]
