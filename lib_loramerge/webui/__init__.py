"""The WebUI side: the tab, REST, and everything that knows a host.

A WebUI executes ``scripts/lora_merge.py``, which imports this package and calls :func:`register`.
Everything is imported here at once: the extension's folder is on ``sys.path`` only meanwhile.
"""

from __future__ import annotations

from typing import Any

from . import api, settings
from .host import Host, WebuiHost
from .jobs import JobQueue
from .tab import build_tab

TITLE = "LoRA Merge"
IDENT = "loramerge"

_services: tuple[Host, JobQueue] | None = None


def services() -> tuple[Host, JobQueue]:
    """The host and the queue of this process; they outlive a reload of the page and of the UI."""
    global _services
    if _services is None:
        host = WebuiHost()
        _services = (host, JobQueue(host))
    return _services


def register(script_callbacks: Any) -> None:
    """Tells the host what we have.

    Args:
        script_callbacks: The host's ``modules.script_callbacks``.
    """
    script_callbacks.on_ui_settings(add_settings)
    script_callbacks.on_before_ui(take_up)
    script_callbacks.on_ui_tabs(make_tabs)
    script_callbacks.on_app_started(add_routes)
    script_callbacks.on_script_unloaded(let_go)


def add_settings() -> None:
    from modules import shared

    host, _ = services()
    devices = tuple(value for _, value in host.devices())
    settings.add_to_host(shared, settings.rows(tuple(api.METHODS), tuple(api.DTYPES), devices))


def take_up() -> None:
    """Makes trials known again to a host that has loaded its extensions anew."""
    _, jobs = services()
    jobs.trials.register_all()


def make_tabs() -> list[tuple[Any, str, str]]:
    return [(build_tab(*services()), TITLE, IDENT)]


def add_routes(demo: Any, app: Any) -> None:
    """Adds REST where the host serves its own; ``demo`` is None with ``--nowebui``."""
    from modules import shared

    options = shared.cmd_opts
    if getattr(options, "api", False) or getattr(options, "nowebui", False):
        api.mount(app, *services(), api_auth=getattr(options, "api_auth", None))


def let_go() -> None:
    """Ends our threads and takes our hands off the host, before its extensions are loaded anew."""
    host, jobs = services()
    jobs.close()
    host.close()
