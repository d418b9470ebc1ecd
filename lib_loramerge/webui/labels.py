"""Base model and rank of LoRA files, in the few letters that fit a list.

The host has read the metadata of every LoRA when it started, so most labels cost nothing. For the others
a background thread reads headers, slowly on purpose: it shares the interpreter with the host.
"""

from __future__ import annotations

import re
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import LoraMergeError
from .background import Worker
from .listing import FoundFile

PAUSE_SECONDS = 0.005
MAX_LABELS = 50_000

_SHORT = {
    "sd1": "SD 1",
    "sd2": "SD 2",
    "sdxl": "SDXL",
    "sdxl_refiner": "SDXL refiner",
    "sd3": "SD 3",
    "flux1": "Flux",
    "unknown": "",
}
_BY_VERSION = (("sdxl", "SDXL"), ("sd_v1", "SD 1"), ("sd_v2", "SD 2"), ("flux1", "Flux"), ("sd3", "SD 3"))


BROKEN = "broken"


class Label(NamedTuple):
    """Base model and rank as shown; empty when not known.

    Attributes:
        broken: The file cannot be read.
    """

    base: str = ""
    rank: str = ""
    broken: bool = False

    @property
    def words(self) -> list[str]:
        """What a list shows behind the name."""
        if self.broken:
            return [BROKEN]
        return [word for word in (self.base, self.rank and f"rank {self.rank}") if word]


def is_label(words: Sequence[str]) -> bool:
    """Whether texts may be :attr:`Label.words`."""
    last = words[-1] if words else ""
    return last == BROKEN or last in _SHORT.values() or bool(re.fullmatch("rank [0-9]+(-[0-9]+)?", last))


def from_metadata(metadata: Mapping[str, object]) -> Label | None:
    """A label from what the trainer wrote; None when that does not name the base model."""
    version = str(metadata.get("ss_base_model_version", ""))
    base = next((name for start, name in _BY_VERSION if version.startswith(start)), "")
    rank = str(metadata.get("ss_network_dim", ""))
    if not base or not rank.isdecimal():
        return None
    return Label(base, rank[:6])


def from_file(path: Path) -> Label:
    """A label from the header of a file; empty for what cannot be understood."""
    if path.suffix.lower() != ".safetensors":
        return Label(broken=path.stat().st_size == 0)
    # Not at the WebUI's start, see extension.py.
    from ..dialects import parse_file
    from ..files import read_header

    try:
        header = read_header(path)
    except LoraMergeError:
        return Label(broken=path.exists())
    try:
        shapes = {key: info.shape for key, info in header.tensors.items()}
        parsed = parse_file(shapes, header.metadata)
    except LoraMergeError:
        return Label()
    ranks = Counter(
        shapes[part.slots["down"]][0]
        for part in parsed.parts
        if "down" in part.slots and shapes[part.slots["down"]]
    )
    return Label(_SHORT.get(parsed.architecture.id, parsed.architecture.label), _rank_text(ranks))


def _rank_text(ranks: Mapping[int, int]) -> str:
    if not ranks:
        return ""
    return str(min(ranks)) if len(ranks) == 1 else f"{min(ranks)}-{max(ranks)}"


class Labels:
    """Labels known so far, and the thread that finds the missing ones."""

    def __init__(self, metadata_of: Callable[[FoundFile], Mapping[str, object]]) -> None:
        self._metadata_of = metadata_of
        self._known: OrderedDict[tuple[str, tuple[int, int]], Label] = OrderedDict()
        self._waiting: deque[FoundFile] = deque()
        self._worker: Worker[FoundFile] = Worker("loramerge-labels", self._next, self._read)
        self.version = 0

    def get(self, file: FoundFile) -> Label:
        return self._known.get((str(file.path), file.stamp), Label())

    def fill(self, files: Iterable[FoundFile], read: bool = True) -> None:
        """Labels what the host's memory tells, and leaves the rest to the background thread.

        Args:
            read: False leaves the rest without labels for now.
        """
        missing = []
        for file in files:
            if (str(file.path), file.stamp) in self._known:
                continue
            label = from_metadata(self._metadata_of(file))
            if label is not None:
                self._keep(file, label)
            else:
                missing.append(file)
        with self._worker.changed:
            self._waiting = deque(missing if read else ())
            if self._waiting:
                self._worker.wake()

    def close(self, timeout: float = 2.0) -> None:
        """Ends the background thread."""
        with self._worker.changed:
            self._waiting.clear()
        self._worker.join(timeout)

    @property
    def busy(self) -> bool:
        """Whether files are still being read."""
        return self._worker.busy

    def wait(self, timeout: float) -> bool:
        """Blocks until nothing is left to read, for tests; False after ``timeout``."""
        return self._worker.wait_for(lambda: not self._worker.busy, timeout)

    def _keep(self, file: FoundFile, label: Label) -> None:
        with self._worker.changed:
            self._known[str(file.path), file.stamp] = label
            self.version += 1
            while len(self._known) > MAX_LABELS:
                self._known.popitem(last=False)

    def _next(self) -> FoundFile | None:
        return self._waiting.popleft() if self._waiting else None

    def _read(self, file: FoundFile) -> None:
        try:
            label = from_file(file.path)
        except Exception:  # A label is decoration: whatever a strange file does, the list stays.
            label = Label()
        self._keep(file, label)
        time.sleep(PAUSE_SECONDS)
