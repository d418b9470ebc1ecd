"""What a WebUI loads: settings, the tab, REST.

A WebUI executes ``scripts/lora_merge.py``, which imports this module and calls :func:`register`. The
extension's folder is on ``sys.path`` only meanwhile; modules inside the package are found later as well.
Therefore the host, the settings and the queue are imported at once, the tab when the WebUI builds its pages,
and what looks at files and merges them (``merge``, ``analysis``, ``files``, ``dialects``, ``adapters``) after
the WebUI has started, by :func:`warm_up`, or when first used. That halves what we add to the start.
``tests/benchmarks/imports.py`` measures it.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from ..methods import METHODS
from . import settings
from .access import LOOPBACK, Names, allowed_hosts
from .form import PLAIN
from .host import Host, host_of_this_process
from .jobs import JobQueue
from .trial import remove_stale_folders
from .xyz.plot import Plot
from .xyz.register import add_axes, script_class

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

TITLE = "LoRA Merge"
IDENT = "loramerge"

_LOADED = time.time()
_services: tuple[Host, JobQueue] | None = None
_plot: Plot | None = None
_warming: threading.Thread | None = None


def services() -> tuple[Host, JobQueue]:
    """The host and the queue of this process; they outlive a reload of the page and of the UI."""
    global _services
    if _services is None:
        host = host_of_this_process()
        _services = (host, JobQueue(host))
    return _services


def plot() -> Plot:
    """What the axes of the X/Y/Z plot share; it outlives a reload of the UI, too."""
    global _plot
    if _plot is None:
        _plot = Plot(services()[0])
    return _plot


def axes_script() -> type:
    """The script that the host is to find in the module of ``scripts/``."""
    from modules import scripts  # noqa: F401 - the host has it, under a name of its own perhaps

    return script_class(plot)


def register() -> None:
    """Tells the host what we have; called while it loads its extensions."""
    from modules import script_callbacks

    # By then the host has loaded its X/Y/Z plot.
    script_callbacks.on_before_ui(lambda: add_axes(plot()))
    script_callbacks.on_ui_settings(add_settings)
    script_callbacks.on_ui_tabs(make_tabs)
    script_callbacks.on_app_started(add_routes)
    script_callbacks.on_script_unloaded(let_go)


def add_settings() -> None:
    from modules import shared

    host, _ = services()
    modes = tuple((method.label, name) for name, method in METHODS.items())
    dtypes = tuple((label, name) for name, label in PLAIN["dtype"].labels.items())
    settings.add_to_host(shared, settings.rows(modes, dtypes, tuple(host.devices())))


def make_tabs() -> list[tuple[gr.Blocks, str, str]]:
    from .tab import build_tab  # Only where there is a page, and not with --nowebui.

    tab = build_tab(*services())
    for block in tab.blocks.values():
        # The host would write every value into ui-config.json and put stale ones back at the next start.
        block.do_not_save_to_config = True
    return [(tab, TITLE, IDENT)]


def add_routes(demo: gr.Blocks | None, app: FastAPI) -> None:
    """Adds REST where the host serves its own; ``demo`` is None with ``--nowebui``."""
    global _warming
    from modules import shared

    host, jobs = services()
    # A host that has loaded its extensions anew has forgotten them.
    jobs.trials.register_all()
    _warming = threading.Thread(target=warm_up, name="loramerge-import", daemon=True)
    _warming.start()
    options = shared.cmd_opts
    if getattr(options, "api", False) or getattr(options, "nowebui", False):
        from . import api  # needed only here, and not cheap to load

        auth = host.api_users()
        api.mount(app, host, jobs, api_auth=auth, names=names(options), welcome=welcome(options))


def names(options: object) -> Names | None:
    """The names under which REST answers; None where the WebUI serves others, under names we cannot know."""
    server = (getattr(options, "server_name", None) or "").strip("[]")
    open_to_all = server in ("0.0.0.0", "::", "*") or (not server and getattr(options, "listen", False))
    if open_to_all or getattr(options, "share", False) or getattr(options, "ngrok", None):
        return None
    return Names([*LOOPBACK, server, *allowed_hosts()])


def welcome(options: object) -> Callable[[str], bool]:
    """Whether the host's own options let the pages of another origin ask for anything."""

    def option(*spellings: str) -> str:
        return next((str(value) for name in spellings if (value := getattr(options, name, None))), "")

    given = option("cors_allow_origins", "cors_origins").split(",")
    listed = {origin.strip().rstrip("/") for origin in given}
    pattern = option("cors_allow_origins_regex", "cors_regex")
    return lambda origin: origin in listed or bool(pattern and re.fullmatch(pattern, origin))


def warm_up() -> None:
    """Imports the rest and labels the LoRAs, so that the first look at the tab is quick."""
    for name in ("merge.run", "analysis", "webui.facts", "webui.analyse"):
        import_module(f"lib_loramerge.{name}")
    services()[0].refresh_labels_async()
    remove_stale_folders()


def let_go() -> None:
    """Ends our threads and takes our hands off the host, before its extensions are loaded anew."""
    if _warming is not None:
        _warming.join(30)  # Or it would start other threads, and import old code beside the new.
    host, jobs = services()
    jobs.close()
    if _plot is not None:
        _plot.end()
    host.close()
    if _changed_on_disk():
        # The extension was updated: the host is about to run the new script, which must find the new code.
        jobs.trials.remove_all()
        for name in [name for name in list(sys.modules) if name.partition(".")[0] == "lib_loramerge"]:
            sys.modules.pop(name, None)


def _changed_on_disk() -> bool:
    """Whether any module of ours is newer on disk than in memory."""
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if name.partition(".")[0] == "lib_loramerge" and path:
            try:
                if os.stat(path).st_mtime > _LOADED:
                    return True
            except OSError:
                return True
    return False
