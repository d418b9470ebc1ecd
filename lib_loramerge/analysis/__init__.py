"""Looking at LoRA files without merging them: what they are, and how they get on."""

from __future__ import annotations

from .inspect import InspectReport, inspect

__all__ = ["InspectReport", "inspect"]
