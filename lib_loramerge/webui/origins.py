"""Whether a LoRA is still the file that a recipe was made with, without reading it whole.

A stored recipe names the hash of every source. A merge computes the hashes anyway; until then a file's own
metadata tells.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import Sentence
from ..recipe import LoraInput

Stamp = tuple[int, int]


class SourceHashes:
    """Hashes that merges have computed, each as long as its file stays as it is."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[Stamp, str]] = {}
        self._lock = threading.Lock()

    def remember(self, path: Path, stamp: Stamp | None, digest: str) -> None:
        """Keeps what was computed of a file that had ``stamp`` before."""
        if stamp is not None and digest:
            with self._lock:
                self._known[path] = (stamp, digest)

    def find(self, path: Path, metadata: Mapping[str, str]) -> str:
        """``sshs_model_hash`` of a file: computed, else as it says of itself, else empty."""
        with self._lock:
            kept = self._known.get(path)
        if kept is not None and kept[0] == stamp_of(path):
            return kept[1]
        return str(metadata.get("sshs_model_hash", "")).lower()


def stamp_of(path: Path) -> Stamp | None:
    """What changes when a file does; None when it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_size, status.st_mtime_ns)


def changed_sources(found: Iterable[tuple[LoraInput, Path, str]]) -> list[str]:
    """A sentence for every (input, file, hash of the file) that is not what the recipe was made with."""
    return [
        Sentence("{file} is not the file this recipe was made with: its contents have changed.", path.name)
        for given, path, digest in found
        if given.hash and digest and not digest.startswith(given.hash)
    ]
