"""How each tool spells the names in a LoRA file, read and written.

A key is the name of a layer and, after it, a slot: which tensor of the layer it
is. ``slots`` knows the endings, ``registry`` the beginnings, and
``models`` what lies between. ``parse_file`` reads a whole file, because
only all names together show the base model, and a name has a meaning only in one.
"""

from __future__ import annotations

from .output import has_alpha, needs_one_rank, output_key, output_parts, output_style, spelling_of
from .parse import ParsedFile, Part, overlap, parse_file
from .registry import DIALECTS, Dialect
from .slots import SLOTS, is_adapters, split_key

__all__ = [
    "DIALECTS",
    "SLOTS",
    "Dialect",
    "ParsedFile",
    "Part",
    "has_alpha",
    "is_adapters",
    "needs_one_rank",
    "output_key",
    "output_parts",
    "output_style",
    "overlap",
    "parse_file",
    "spelling_of",
    "split_key",
]
