"""The hashes by which hosts know a LoRA: of its tensors' bytes, whatever its metadata says."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LEGACY_START, LEGACY_END = 0x100000, 0x110000
"""The bytes that the legacy hash covers, counted from the start of a file."""

CHUNK = 4_000_000


class Hashes:
    """Both hashes, taken in a thread of their own while the next bytes are written.

    Attributes:
        legacy_head: The header that the legacy hash imagines: only the ``ss_`` texts in it.
    """

    def __init__(self, legacy_head: bytes) -> None:
        self._model = hashlib.sha256()
        self._legacy = hashlib.sha256(legacy_head[LEGACY_START:LEGACY_END])
        self._place = len(legacy_head)
        self._error: Exception | None = None
        self._batch: list[memoryview] = []
        self._batched = 0
        self._work: queue.Queue[list[memoryview] | None] = queue.Queue(maxsize=8)
        self._thread = threading.Thread(target=self._run, name="loramerge-hash", daemon=True)
        self._thread.start()

    def add(self, data: memoryview) -> None:
        """Hash these bytes after all before them. They must not change until the end."""
        start, stop = LEGACY_START - self._place, LEGACY_END - self._place
        if stop > 0 and start < len(data):
            self._legacy.update(data[max(start, 0) : stop])
        self._place += len(data)
        self._batch.append(data)
        self._batched += len(data)
        if self._batched >= CHUNK:
            self._work.put(self._batch)
            self._batch, self._batched = [], 0

    def results(self) -> tuple[str, str]:
        """Model hash and legacy hash of everything added."""
        self._work.put(self._batch)
        self._batch = []
        self.close()
        if self._error is not None:
            raise self._error
        return self._model.hexdigest(), self._legacy.hexdigest()[:8]

    def close(self) -> None:
        """End the thread."""
        if self._thread.is_alive():
            self._work.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (batch := self._work.get()) is not None:
            try:
                # One call for many small ones: each call gives up and retakes the interpreter lock.
                for data in [b"".join(batch)] if sum(map(len, batch)) < 2 * CHUNK else batch:
                    self._model.update(data)
            except Exception as error:  # Told by results(); the queue must go on being emptied.
                self._error = error


@contextmanager
def hashing(legacy_head: bytes) -> Iterator[Hashes]:
    hashes = Hashes(legacy_head)
    try:
        yield hashes
    finally:
        hashes.close()


def model_hash(path: str | os.PathLike[str], stop: Callable[[], None] | None = None) -> str:
    """Hex SHA-256 of the bytes after the header: what ``sshs_model_hash`` should say.

    Of a ``.pt`` or ``.ckpt``, which has no header, all bytes are taken, as A1111 does.

    Args:
        stop: Called often; what it raises ends the reading.

    Raises:
        FileError: If the file cannot be read or is no safetensors file.
    """
    from lib_loramerge.files.read import open_file  # Which needs the function below.

    with open_file(path) as file:
        digest = file.model_hash(stop)
        file.check_unchanged()
        return digest


def hash_from(
    read_at: Callable[[int, memoryview], None], size: int, stop: Callable[[], None] | None = None
) -> str:
    """Hex SHA-256 of ``size`` bytes that ``read_at`` gives from a place on."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(CHUNK, size)))
    for place in range(0, size, CHUNK):
        chunk = buffer[: size - place]
        read_at(place, chunk)
        digest.update(chunk)
        if stop is not None:
            stop()
    return digest.hexdigest()
