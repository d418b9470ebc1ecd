"""Adapter kinds: what the tensors of one layer mean as a delta weight.

:func:`describe` judges a layer from its header, :func:`build` makes its delta.
A new kind is one ``register(AdapterKind(...))`` in a file of this package.
"""

from __future__ import annotations

# Each of these registers its kinds, in the order in which the table shows them.
# isort: off
from . import lora, loha, lokr, dora, glora, oft, ia3, full  # noqa: F401
# isort: on

from .kinds import ADAPTERS, AdapterKind, LayerFacts
from .layers import build, check_base_shape, describe
from .table import kinds_table

__all__ = ["ADAPTERS", "AdapterKind", "LayerFacts", "build", "check_base_shape", "describe", "kinds_table"]
