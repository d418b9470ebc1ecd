"""Adapter kinds: what the tensors of one layer mean as a delta weight.

:func:`describe` judges a layer from its header, :func:`build` makes its delta.
A new kind is one ``register(AdapterKind(...))`` in a file of this package.
"""

from __future__ import annotations

from . import full, lora  # noqa: F401  (each registers its kinds)
from .kinds import ADAPTERS, AdapterKind, LayerFacts
from .layers import build, describe

__all__ = ["ADAPTERS", "AdapterKind", "LayerFacts", "build", "describe"]
