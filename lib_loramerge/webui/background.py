"""Work in the background: threads that exist while something waits for them. Knows no Gradio."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from ..errors import Cancelled

WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"

T = TypeVar("T")


class Worker(Generic[T]):
    """One thread, begun when something waits and ended when nothing does.

    Args:
        name: Of the thread.
        take: What is next, or None; called with :attr:`changed` held.
        do: Does it. What it raises ends the thread.

    Attributes:
        changed: Guards what ``take`` reads; who adds to that holds it and calls :meth:`wake`.
    """

    def __init__(self, name: str, take: Callable[[], T | None], do: Callable[[T], None]) -> None:
        self.changed = threading.Condition(threading.RLock())
        self._name, self._take, self._do = name, take, do
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None

    def wake(self) -> None:
        """Begins the thread unless it runs; to be called with :attr:`changed` held."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()

    def wait_for(self, state: Callable[[], bool], timeout: float) -> bool:
        """Whether ``state`` holds within ``timeout`` seconds."""
        with self.changed:
            return self.changed.wait_for(state, timeout)

    def join(self, timeout: float) -> None:
        """Waits for the end of the thread, unless this is it."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _work(self) -> None:
        while True:
            with self.changed:
                found = self._take()
                if found is None:
                    self._thread = None
                    self.changed.notify_all()
                    return
            self._do(found)


class Piece:
    """One piece of work on its way; only its :class:`Line` changes what is here.

    Attributes:
        position: How many are before it.
        closed: It was cancelled by nobody: the WebUI reloaded its interface, or ended.
    """

    def __init__(self) -> None:
        self.id = secrets.token_hex(6)
        self.state = WAITING
        self.position = 0
        self.closed = False
        self.created = time.time()
        self.started: float | None = None
        self.ended: float | None = None
        self._stop = threading.Event()

    @property
    def finished(self) -> bool:
        return self.state in (DONE, FAILED, CANCELLED)

    @property
    def stopping(self) -> bool:
        """Whether somebody asked for it to be cancelled."""
        return self._stop.is_set()

    def stop_here(self) -> None:
        """Ends the work if somebody asked for it.

        Raises:
            Cancelled: Somebody did.
        """
        if self.stopping:
            raise Cancelled("Stopped. Nothing was written.")


P = TypeVar("P", bound=Piece)


class Line(Generic[P]):
    """Pieces of work, done one after another by one thread; finished ones stay for a while to be read.

    All methods may be called from any thread.

    Args:
        name: Of the thread.
        do: Does a piece: it begins it with :meth:`begin` and ends it with :meth:`end`.

    Attributes:
        changed: Held by who looks at several pieces, or several times at one.
        version: Grows with every change of any piece.
    """

    def __init__(self, name: str, do: Callable[[P], None]) -> None:
        self._pieces: OrderedDict[str, P] = OrderedDict()
        self._worker: Worker[P] = Worker(name, self._next, do)
        self.changed = self._worker.changed
        self.version = 0

    def add(self, piece: P, most: int, kept: int) -> bool:
        """Puts a piece at the end of the line, unless too many wait.

        Args:
            most: How many may wait.
            kept: How many finished ones are remembered.
        """
        with self.changed:
            if len(self.unfinished()) > most:
                return False
            self._pieces[piece.id] = piece
            finished = [known.id for known in self._pieces.values() if known.finished]
            for old in finished[: max(0, len(finished) - kept)]:
                del self._pieces[old]
            self.notify()
            self._worker.wake()
            return True

    def get(self, ident: str) -> P | None:
        with self.changed:
            return self._pieces.get(ident)

    def all(self) -> list[P]:
        """Every piece still remembered, oldest first."""
        with self.changed:
            return [*self._pieces.values()]

    def unfinished(self) -> list[P]:
        """What runs and what waits, in the order of the line."""
        return [piece for piece in self.all() if not piece.finished]

    def cancel(self, ident: str) -> P | None:
        """Drops a waiting piece, stops a running one; None when there is no such piece."""
        with self.changed:
            piece = self._pieces.get(ident)
            if piece is not None and not piece.finished:
                piece._stop.set()
                if piece.state == WAITING:
                    self.end(piece, CANCELLED)
                self.notify()
            return piece

    def wait_for(self, state: Callable[[], bool], timeout: float) -> bool:
        """Whether ``state`` holds within ``timeout`` seconds."""
        return self._worker.wait_for(state, timeout)

    def close(self, timeout: float = 5.0) -> None:
        """Cancels everything and ends the thread. More can be added afterwards."""
        with self.changed:
            for piece in self.unfinished():
                piece.closed = True
                self.cancel(piece.id)
        self._worker.join(timeout)

    # For who does the work

    def begin(self, piece: P) -> bool:
        """Says that a piece runs from now on; False if it was cancelled meanwhile."""
        with self.changed:
            if piece.finished:
                return False
            piece.state, piece.started = RUNNING, time.time()
            self.notify()
            return True

    def end(self, piece: P, state: str) -> None:
        with self.changed:
            if not piece.finished:
                piece.state, piece.ended = state, time.time()
                self.notify()

    def notify(self) -> None:
        """Says that something has changed."""
        with self.changed:
            self.version += 1
            unfinished = self.unfinished()
            start = 0 if unfinished and unfinished[0].state == RUNNING else 1
            for index, piece in enumerate(unfinished):
                piece.position = index + start
            self.changed.notify_all()

    def _next(self) -> P | None:
        return next((piece for piece in self._pieces.values() if piece.state == WAITING), None)
