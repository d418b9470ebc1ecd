"""Methods that merge the spaces that LoRAs span, in small common coordinates; no delta is formed whole."""

from __future__ import annotations

from . import aligned, directions
from .aligned import core, ctm, knots
from .directions import iso, null_space_priority, ssr, tsv
from .inner_rules import RULES
from .joint import JointSpace, join

__all__ = [
    "RULES",
    "JointSpace",
    "aligned",
    "core",
    "ctm",
    "directions",
    "iso",
    "join",
    "knots",
    "null_space_priority",
    "ssr",
    "tsv",
]
