"""Adapter kinds: what the tensors of one layer mean as a delta weight.

:func:`describe` judges a layer from its header, :func:`build` makes its delta.
A new kind is one ``register(AdapterKind(...))`` in a file of this package, which is found by itself.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

# Each of these registers its kinds, in the order in which the table shows them.
# isort: off
from . import lora, loha, lokr, dora, glora, oft, ia3, full  # noqa: F401
# isort: on

from .glora import GLORA_SLOTS, is_old_glora
from .groups import endings
from .kinds import ADAPTERS, AdapterKind, LayerFacts
from .layers import build, check_base_shape, describe, measured
from .scaling import ALPHA_ZERO

# Kinds in further modules come last in it.
for _entry in iter_modules(__path__):
    import_module(f".{_entry.name}", __name__)

__all__ = [
    "ADAPTERS",
    "ALPHA_ZERO",
    "GLORA_SLOTS",
    "AdapterKind",
    "LayerFacts",
    "build",
    "check_base_shape",
    "describe",
    "endings",
    "is_old_glora",
    "measured",
]
