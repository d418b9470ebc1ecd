"""Merged LoRAs that live until the WebUI ends: "Try without saving".

A trial is an ordinary merged file in a folder of ours in the system's temporary folder. The host lists it
under a fresh name, so that ``<lora:that-name:1>`` works in the next picture; nothing is written to the
LoRA folder. Its name is never used again: hosts remember what they loaded under a name.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import FileError
from ..recipe import MergeRecipe
from .origins import Stamp, stamp_of

if TYPE_CHECKING:
    from ..report import MergeReport

MAX_TRIALS = 8
PREFIX = "loramerge-trial-"
NAME_PREFIX = "loramerge-try-"
# Where a process cannot be asked whether it runs, a folder is left alone for so long.
STALE_SECONDS = 2 * 24 * 3600


class Made(NamedTuple):
    """What a file was merged from: equal ones give equal tensors.

    Attributes:
        recipe: With presets and random entries resolved.
        files: Sources and base checkpoint as they were before.
    """

    recipe: MergeRecipe
    files: tuple[tuple[Path, Stamp | None], ...]


class Trial(NamedTuple):
    """One temporary merge that the host knows.

    Attributes:
        recipe: As it was asked for.
        stamp: Of the file as it was written.
    """

    name: str
    path: Path
    recipe: MergeRecipe
    made: Made
    report: MergeReport
    stamp: Stamp | None
    created: float

    def fits(self, name: str) -> bool:
        """Whether a file that had to fit a size still does under a longer name, which it holds twice."""
        size = self.made.recipe.size
        longer = 2 * len(json.dumps(name))
        return size is None or self.report.size_bytes + longer <= size * 1_000_000

    def save_as(self, path: Path, overwrite: bool, stop: Callable[[], None]) -> MergeReport | None:
        """Write the same tensors under a real name.

        Args:
            stop: What it raises stops the writing, and nothing is left.

        Returns:
            The trial's report for the new file; None when the trial is gone.

        Raises:
            OutputError: It cannot be written there.
        """
        # Not at the WebUI's start, see extension.py.
        from ..files import open_file, write_again
        from ..metadata import renamed

        start = time.perf_counter()
        try:
            source = open_file(self.path)
        except FileError:
            return None
        with source:
            written = write_again(
                path, source, renamed(source.metadata, path.stem), overwrite=overwrite, stop=stop
            )
        seconds = round(time.perf_counter() - start, 4)
        return replace(
            self.report,
            output=str(path),
            size_bytes=written.size,
            sshs_model_hash=written.model_hash,
            seconds={"write": seconds, "total": seconds},
        )


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

    def add(self, path: Path, recipe: MergeRecipe, made: Made, report: MergeReport) -> Trial:
        """Tells the host of a finished trial; the oldest ones make room."""
        with self._lock:
            trial = Trial(path.stem, path, recipe, made, report, stamp_of(path), time.time())
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

    def find(self, made: Made) -> Trial | None:
        """The last trial that was merged from the same, if its file is as it was written."""
        with self._lock:
            same = [trial for trial in self._trials.values() if trial.made == made]
            same = [trial for trial in same if trial.stamp and trial.stamp == stamp_of(trial.path)]
            return same[-1] if same else None

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
