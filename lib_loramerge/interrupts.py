"""Ctrl+C, and the signals that end a program otherwise: all of them stop the work in the same way.

Python raises ``KeyboardInterrupt`` wherever the program happens to be. In a callback or a destructor, of
which importing torch runs many, it is printed and lost. Therefore it is also remembered here, and a merge
asks before each step.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

_caught: list[tuple[int, float]] = []
AGAIN_SECONDS = 1.0


def listen() -> None:
    """From now on every such signal raises ``KeyboardInterrupt`` and is remembered.

    A signal that is ignored (``nohup``) stays so. Nothing happens outside the main thread, which alone may
    set handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    _caught.clear()
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    last = _caught[-1][1] if _caught else -AGAIN_SECONDS
    _caught.append((number, time.monotonic()))
    # Shells and supervisors send a signal to a process and to its group: one wish, reported twice.
    if _caught[-1][1] - last >= AGAIN_SECONDS:
        raise KeyboardInterrupt


def asked() -> bool:
    """Whether somebody has asked the program to stop."""
    return bool(_caught)


def exit_status() -> int:
    """What a shell says of a program that the signal ended: 130 for Ctrl+C, 143 for SIGTERM."""
    return 128 + (_caught[0][0] if _caught else signal.SIGINT)
