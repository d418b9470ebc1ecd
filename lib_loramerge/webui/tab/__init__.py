"""The LoRA Merge tab: rows, how, result, facts, presets; the same in every Gradio and without a WebUI."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gradio as gr

from .controls import BUTTONS, CONTROLS, ROW_BUTTONS, ROW_CONTROLS, Control, element_id
from .handlers import connect
from .layout import lay_out

if TYPE_CHECKING:
    from ..host import Host
    from ..jobs import JobQueue

__all__ = [
    "BUTTONS",
    "CONTROLS",
    "ROW_BUTTONS",
    "ROW_CONTROLS",
    "Control",
    "build_tab",
    "element_id",
    "fill_tab",
]


def build_tab(host: Host, jobs: JobQueue) -> gr.Blocks:
    """The tab as one ``gr.Blocks``, as the WebUI's ``on_ui_tabs`` wants it."""
    with gr.Blocks(analytics_enabled=False) as blocks:
        fill_tab(host, jobs)
    return blocks


def fill_tab(host: Host, jobs: JobQueue) -> None:
    """Puts the tab into the Blocks that is open."""
    connect(lay_out(host), host, jobs)
