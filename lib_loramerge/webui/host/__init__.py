"""Every access to the WebUI: folders, LoRA list, refresh, queue lock, caches, options.

:class:`Host` is what the tab, the jobs and REST speak to. :class:`WebuiHost` asks A1111, Forge and their
forks, :class:`SdnextHost` asks SD.Next, always at the time of the call and never at import;
:class:`StandaloneHost` is the same without one. :mod:`.known` holds how each WebUI is recognised.
"""

from __future__ import annotations

from .base import Host, LoraEntry, without
from .known import SDNEXT, recognise
from .refusals import ClosedError, ConflictError, UnknownNameError
from .sdnext import SdnextHost
from .standalone import StandaloneHost
from .webui import WebuiHost

__all__ = [
    "ClosedError",
    "ConflictError",
    "Host",
    "LoraEntry",
    "SdnextHost",
    "StandaloneHost",
    "UnknownNameError",
    "WebuiHost",
    "host_of_this_process",
    "without",
]


def host_of_this_process() -> WebuiHost:
    """The adapter of the WebUI that runs us."""
    known = recognise()
    return SdnextHost(known) if known is SDNEXT else WebuiHost(known)
