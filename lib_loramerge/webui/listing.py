"""The LoRA files of the host's folders, under the names that a recipe calls them by."""

from __future__ import annotations

import os
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_HALVES = re.compile("[\ud800-\udfff]")
SUFFIXES = (".safetensors", ".pt", ".ckpt")
MAX_DEPTH = 32
TICK_NS = 2_500_000_000
"""Times of folders may be so coarse: on exFAT they count in steps of two seconds."""


class FoundFile(NamedTuple):
    """One LoRA file as a folder scan sees it.

    Attributes:
        name: The stem; ``sub/stem`` (``./stem`` at the top) when several files have that stem. One that
            is no text is marked, see :func:`readable`.
        relative: Path without suffix below its LoRA folder, with ``/``.
        stamp: Size and time of change, to notice another file under the same name.
    """

    name: str
    path: Path
    relative: str
    stamp: tuple[int, int]

    @property
    def subfolder(self) -> str:
        return self.relative.rpartition("/")[0]


class Listing(NamedTuple):
    """What a scan found, and the ways to look a file up.

    Attributes:
        folders: Every folder that was looked through, to its time of change in nanoseconds.
        looked: When that began, in nanoseconds since 1970.
    """

    files: tuple[FoundFile, ...]
    by_name: Mapping[str, FoundFile]
    by_stem: Mapping[str, tuple[FoundFile, ...]]
    by_path: Mapping[str, FoundFile]
    folders: Mapping[str, int]
    looked: int

    def holds_still(self) -> bool:
        """Whether no file has come or gone since, as far as the folders' times tell, which tick slowly."""
        try:
            changed = [(known, os.stat(folder).st_mtime_ns) for folder, known in self.folders.items()]
        except OSError:
            return False
        return all(known == now and now < self.looked - TICK_NS for known, now in changed)

    def find(self, name: str) -> tuple[FoundFile, ...]:
        """Every file that ``name`` may mean: none, one, or several of the same stem."""
        name = unicodedata.normalize("NFC", name.replace("\\", "/"))
        stem, suffix = os.path.splitext(name)
        for candidate in (name, stem) if suffix.lower() in SUFFIXES else (name,):
            if candidate in self.by_name:
                return (self.by_name[candidate],)
            if candidate in self.by_stem:
                return self.by_stem[candidate]
        return ()


def scan(folders: Sequence[Path], hidden: bool = True) -> Listing:
    """Lists the LoRA files of several folders, the first folder first.

    Links are followed as the hosts do, each folder once. Whatever cannot be read, or vanishes meanwhile,
    is skipped.

    Args:
        hidden: Whether to look into folders whose name starts with a dot.
    """
    raw: list[tuple[Path, Path, str, tuple[int, int]]] = []
    seen_folders: dict[str, int] = {}
    looked = time.time_ns()
    seen_files: set[str] = set()
    for folder in folders:
        for path, stamp in _walk(folder, hidden, seen_folders, MAX_DEPTH):
            if str(path) not in seen_files:
                seen_files.add(str(path))
                relative = readable(path.relative_to(folder).with_suffix("").as_posix())
                raw.append((folder, path, relative, stamp))
    return _listing(raw, seen_folders, looked)


def _listing(
    raw: Sequence[tuple[Path, Path, str, tuple[int, int]]], folders: Mapping[str, int], looked: int
) -> Listing:
    stems = Counter(path.stem for _, path, _, _ in raw)
    files: list[FoundFile] = []
    by_name: dict[str, FoundFile] = {}
    for folder, path, relative, stamp in raw:
        found = FoundFile(_free_name(folder, path, relative, stems, by_name), path, relative, stamp)
        by_name[found.name] = found
        files.append(found)
    files.sort(key=lambda file: (natural_key(file.subfolder), natural_key(file.path.stem)))
    by_stem: dict[str, list[FoundFile]] = {}
    for file in files:
        by_stem.setdefault(file.path.stem, []).append(file)
        if "/" in file.relative:
            by_stem.setdefault(file.relative, []).append(file)
    return Listing(
        files=tuple(files),
        by_name=by_name,
        by_stem={stem: tuple(group) for stem, group in by_stem.items()},
        by_path={path_key(file.path): file for file in files},
        folders=folders,
        looked=looked,
    )


def _free_name(
    folder: Path, path: Path, relative: str, stems: Counter[str], taken: Mapping[str, FoundFile]
) -> str:
    """The stem, or what tells files of one stem apart."""
    candidates = [readable(path.stem)] if stems[path.stem] == 1 else []
    candidates += [relative if "/" in relative else f"./{relative}", f"{readable(folder.name)}/{relative}"]
    for suffix in ("", path.suffix):
        for candidate in candidates:
            if candidate + suffix not in taken:
                return candidate + suffix
    return readable(str(path))


def readable(name: str) -> str:
    """A file name as text: bytes that are no UTF-8, which neither JSON nor a page can hold, marked."""
    if not _HALVES.search(name):
        return name
    return _HALVES.sub(lambda half: f"<{ord(half[0]) & 0xFF:02X}>", name) + " (name is not UTF-8)"


def _walk(
    folder: Path, hidden: bool, seen: dict[str, int], depth: int
) -> Iterable[tuple[Path, tuple[int, int]]]:
    try:
        real = os.path.realpath(folder)
        if real in seen or depth <= 0:
            return
        seen[real] = os.stat(real).st_mtime_ns
        with os.scandir(folder) as iterator:
            entries = sorted(iterator, key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        try:
            if entry.is_dir():
                if hidden or not entry.name.startswith("."):
                    yield from _walk(Path(entry.path), hidden, seen, depth - 1)
            elif entry.name.lower().endswith(SUFFIXES) and entry.is_file():
                status = entry.stat()
                yield Path(entry.path), (status.st_size, status.st_mtime_ns)
        except OSError:
            continue


def subfolders(folder: Path, limit: int = 2000) -> list[str]:
    """Folders below ``folder``, with ``/``; links that lead elsewhere are left out."""
    found: list[str] = []
    waiting = [(folder, "")]
    while waiting and len(found) < limit:
        current, prefix = waiting.pop()
        try:
            with os.scandir(current) as iterator:
                names = [
                    e.name
                    for e in iterator
                    if e.is_dir(follow_symlinks=False)
                    and not e.name.startswith(".")
                    and readable(e.name) == e.name
                ]
        except OSError:
            continue
        for name in names:
            found.append(prefix + name)
            waiting.append((current / name, f"{prefix}{name}/"))
    return sorted(found, key=natural_key)


def path_key(path: str | os.PathLike[str]) -> str:
    """One text for all spellings of a path, links apart."""
    return os.path.normcase(os.path.abspath(path))


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sorts ``lora2`` before ``lora10``, upper and lower case alike."""
    parts = re.split(r"([0-9]+)", text.casefold())
    return [
        (0, int(part), "") if part.isdigit() and part.isascii() else (1, 0, part) for part in parts if part
    ]
