"""What each program that uses LoRAs knows of their names and kinds: one module and one record a host.

All of it was read from the host's own code, at the version that its record states. ``tests/accepted_names``
holds the complete lists that this code gives; a test compares.
"""

from __future__ import annotations

from importlib import import_module

from ..models import open_clip_attention
from ..recipe import HOSTS as NAMES
from ._base import Host, forms

HOSTS: dict[str, Host] = {name: import_module(f".{name}", __name__).HOST for name in NAMES}

__all__ = ["HOSTS", "Host", "companions", "forms"]


def companions(architecture: str, layer: str) -> tuple[str, ...]:
    """Layers that some host takes only together with this one, itself included; () if it stands alone."""
    if any(host.attention_as_one and architecture in host.base_models for host in HOSTS.values()):
        return open_clip_attention(architecture, layer)
    return ()
