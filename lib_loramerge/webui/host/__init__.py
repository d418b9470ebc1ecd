"""Every access to the WebUI: folders, LoRA list, refresh, queue lock, caches, options.

:class:`Host` is what the tab, the jobs and REST speak to. :class:`WebuiHost` asks A1111, Forge and their
forks, always at the time of the call and never at import; :class:`StandaloneHost` is the same without one.
"""

from __future__ import annotations

from .base import ConflictError, Host, LoraEntry, UnknownNameError, without
from .standalone import StandaloneHost
from .webui import WebuiHost

__all__ = ["ConflictError", "Host", "LoraEntry", "StandaloneHost", "UnknownNameError", "WebuiHost", "without"]
