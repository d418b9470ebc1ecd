"""The preview pictures of LoRAs, small, in the lists that they are chosen from."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .. import render, sidecar

if TYPE_CHECKING:
    from ..host import Host
    from .wiring import Wiring

SIDE = 48  # pixels, twice what the list shows
MOST = 600
SECONDS = 10.0  # A slow disk gets no longer; what was read is remembered, and the rest comes after a refresh.


def connect(wiring: Wiring) -> None:
    """Attach what the page's script presses when a list first opens."""
    wiring.on("pictures", lambda _: {"pictures": found(wiring.host)}, (), ("pictures",))


def found(host: Host) -> str:
    """HTML with the pictures by label, as ``data:`` addresses; LoRAs without a picture are left out."""
    ends = time.monotonic() + SECONDS
    pictures: dict[str, str] = {}
    for entry in host.loras():
        if len(pictures) == MOST or time.monotonic() > ends:
            break
        picture = sidecar.shown_preview(entry.path, host, SIDE)
        if picture:
            pictures[entry.label] = picture
    return render.data_place("pictures", pictures)
