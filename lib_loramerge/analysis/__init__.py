"""Looking at LoRA files without merging them: what they are, how they get on, what rank they need."""

from __future__ import annotations

from .advise import AdviceReport, advise, expected_seconds
from .compare import CompareReport, compare
from .inspect import InspectReport, inspect

__all__ = [
    "AdviceReport",
    "CompareReport",
    "InspectReport",
    "advise",
    "compare",
    "expected_seconds",
    "inspect",
]
