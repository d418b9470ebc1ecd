"""Merged LoRAs that live until the WebUI ends: "Try without saving".

A trial is an ordinary merged file in a folder of ours in the system's temporary folder. The host lists it
under a fresh name, so that ``<lora:that-name:1>`` works in the next picture; nothing is written to the
LoRA folder. Its name is never used again: hosts remember what they loaded under a name.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..recipe import MergeRecipe

MAX_TRIALS = 8
PREFIX = "loramerge-trial-"
NAME_PREFIX = "loramerge-try-"
# Where a process cannot be asked whether it runs, a folder is left alone for so long.
STALE_SECONDS = 2 * 24 * 3600


@dataclass(frozen=True)
class Trial:
    """One temporary merge that the host knows."""

    name: str
    path: Path
    recipe: MergeRecipe
    created: float


class Trials:
    """The temporary merges of this process, oldest first."""

    def __init__(self, register: Callable[[str, Path], None], unregister: Callable[[str], None]) -> None:
        self._register = register
        self._unregister = unregister
        self._lock = threading.RLock()
        self._trials: dict[str, Trial] = {}
        self._folder: Path | None = None

    def new_path(self) -> Path:
        """Where the next trial is to be written: a name nobody used before."""
        with self._lock:
            if self._folder is None or not self._folder.is_dir():
                remove_stale_folders()
                self._folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
            return self._folder / f"{NAME_PREFIX}{secrets.token_hex(3)}.safetensors"

    def add(self, path: Path, recipe: MergeRecipe) -> Trial:
        """Tells the host of a finished trial; the oldest ones make room."""
        with self._lock:
            trial = Trial(path.stem, path, recipe, time.time())
            self._register(trial.name, path)
            self._trials[trial.name] = trial
            for name in list(self._trials)[:-MAX_TRIALS]:
                self.remove(name)
            return trial

    def names(self) -> list[str]:
        with self._lock:
            return list(self._trials)

    def get(self, name: str) -> Trial | None:
        with self._lock:
            return self._trials.get(name)

    def register_all(self) -> None:
        """Tells the host again; after its scripts were loaded anew it may have forgotten."""
        with self._lock:
            for trial in self._trials.values():
                self._register(trial.name, trial.path)

    def remove(self, name: str) -> None:
        """Takes a trial from the host and from the disk."""
        with self._lock:
            trial = self._trials.pop(name, None)
            if trial is None:
                return
            self._unregister(name)
            # Windows keeps a file that the host has mapped; the folder goes at exit.
            with contextlib.suppress(OSError):
                trial.path.unlink(missing_ok=True)

    def remove_of(self, recipe: MergeRecipe) -> list[str]:
        """Removes the trials of a recipe that was saved under a real name; gives their names."""
        with self._lock:
            names = [trial.name for trial in self._trials.values() if trial.recipe == recipe]
            for name in names:
                self.remove(name)
            return names

    def remove_older_than(self, hours: float) -> None:
        """Removes trials of more than ``hours``; 0 keeps all of them until the host ends."""
        if hours <= 0:
            return
        limit = time.time() - hours * 3600
        with self._lock:
            for trial in list(self._trials.values()):
                if trial.created < limit:
                    self.remove(trial.name)

    def remove_all(self) -> None:
        """Removes every trial and the folder; called when the process ends."""
        with self._lock:
            for name in list(self._trials):
                self.remove(name)
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder = None


def remove_stale_folders() -> None:
    """Clears trial folders of hosts that ended without a chance to do it, as A1111 does on Ctrl+C."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_dir() and not folder.is_symlink() and not _in_use(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _in_use(folder: Path) -> bool:
    """Whether the process that made the folder may still run."""
    process = folder.name[len(PREFIX) :].partition("-")[0]
    if os.name != "posix" or not process.isdecimal():
        # Elsewhere os.kill(pid, 0) would end the process, so only age tells.
        return folder.stat().st_mtime > time.time() - STALE_SECONDS
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
