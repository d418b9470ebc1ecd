"""What happens when something is pressed: the handlers of all pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from . import analysing, baking, copying, extracting, offers, picturing, presets, thumbnails
from .running import Running

if TYPE_CHECKING:
    from ..compat import Widget
    from ..host import Host
    from ..jobs import JobQueue


def connect(widgets: Mapping[str, Widget], host: Host, jobs: JobQueue) -> None:
    """Attach every handler to its component."""
    wiring = Running(widgets, host, jobs)
    wiring.connect_rows()
    wiring.connect_form()
    wiring.connect_jobs()
    copying.connect(wiring)
    presets.connect(wiring)
    baking.connect(wiring)
    if extracting.RESULT in widgets:
        extracting.connect(wiring)
    analysing.connect(wiring)
    offers.connect(wiring)
    picturing.connect(wiring)
    thumbnails.connect(wiring)
