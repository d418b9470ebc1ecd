"""LoRA folders: names to files, and where a result may go."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib_loramerge.errors import FileError, OutputError, Sentence
from lib_loramerge.files.header import stored_name
from lib_loramerge.files.read import LORA_SUFFIXES
from lib_loramerge.recipe import nearest

NAME_BYTES = 255
"""Longest file name on Linux and macOS; Windows counts UTF-16 units, which are never more."""

LONGEST_SUFFIX = 15
"""Of what stands beside a LoRA under its name: .safetensors, .json, .preview.png, .civitai.info."""

FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]')
RESERVED = re.compile(r"(?:CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(?:COM|LPT)[0-9¹²³])\s*(?:\..*)?", re.IGNORECASE)
"""Names that Windows gives to devices, with any suffix."""


@dataclass(frozen=True)
class LoraPath:
    """One file of a LoRA folder.

    Attributes:
        path: Where it is.
        name: What a prompt calls it: the file name without its suffix.
        inside: Its path from the folder on, with ``/``, without the suffix.
    """

    path: Path
    name: str
    inside: str


class LoraFolder:
    """LoRA folders, seen as the WebUI sees them: recursive, one name per file.

    The folders are looked through at every call, so that new files are found at once.
    """

    def __init__(self, folders: Sequence[str | os.PathLike[str]], *, allow_paths: bool = False) -> None:
        """Name the folders.

        Args:
            folders: Their order is irrelevant: two files of one name are an error. A folder
                that does not exist holds nothing.
            allow_paths: Let :meth:`find` take paths to files anywhere. For the command line,
                never for a name that came over the network.
        """
        self.folders = tuple(Path(folder) for folder in folders)
        self.allow_paths = allow_paths

    def files(self) -> list[LoraPath]:
        """Every LoRA file, sorted by name; one that is reached twice is listed once."""
        seen: set[str] = set()
        found = []
        for folder in self.folders:
            for path in _walk(folder):
                real = os.path.realpath(path)
                if real not in seen:
                    seen.add(real)
                    inside = Path(os.path.relpath(path, folder)).with_name(path.stem).as_posix()
                    found.append(LoraPath(path, path.stem, inside))
        return sorted(found, key=lambda file: (file.name.casefold(), file.name, file.inside))

    def names(self) -> list[str]:
        """A name for each file that :meth:`find` takes; with its subfolder where two share one."""
        files = self.files()
        count: dict[str, int] = {}
        for file in files:
            count[file.name] = count.get(file.name, 0) + 1
        return list(dict.fromkeys(file.name if count[file.name] == 1 else file.inside for file in files))

    def find(self, name: str) -> Path:
        """The file of a LoRA name.

        Args:
            name: As in a prompt, ``"sub/name"``, either with or without its suffix, or the
                ``ss_output_name`` of one file, by which hosts know it too.

        Raises:
            FileError: If there is none (the message gives the nearest names) or more than one.
        """
        if self.allow_paths and (path := _as_path(name)) is not None:
            return path
        files = self.files()
        wanted = _plain(name)
        by_name = [file for file in files if _plain(file.name) == wanted]
        found = by_name or [file for file in files if wanted in (_plain(file.inside), *_full_names(file))]
        found = found or self._by_alias(name, files)
        if not found:
            raise self._unknown(name, files)
        if len(found) > 1:
            places = " and ".join(str(file.path) for file in found[:3])
            raise FileError(
                "{name} means {count} files: {files}; write the subfolder too, as in 'folder/{file}'.",
                repr(name),
                len(found),
                places,
                found[0].name,
            )
        return found[0].path

    def _by_alias(self, name: str, files: list[LoraPath]) -> list[LoraPath]:
        """Files whose ``ss_output_name`` is the name; prompts written by A1111 use it."""
        tensors = [file for file in files if file.path.suffix.lower() == ".safetensors"]
        return [file for file in tensors if stored_name(file.path) == name]

    def _unknown(self, name: str, files: list[LoraPath]) -> FileError:
        if self.allow_paths and _looks_like_path(name):
            return FileError("{name} does not exist.", name)
        places = ", ".join(str(folder) for folder in self.folders)
        if not self.folders:
            return FileError(
                "There is no LoRA {name}: no LoRA folder is set (--lora-dir), and it is no path to a file.",
                repr(name),
            )
        if not files:
            return FileError("There is no LoRA {name}: no LoRA file is in {places}.", repr(name), places)
        near = nearest(name, sorted({text for file in files for text in (file.name, file.inside)}))
        hint = Sentence(" Nearest: {near}.", ", ".join(near)) if near else ""
        return FileError("There is no LoRA {name} in {places}.{hint}", repr(name), places, hint)


def _walk(folder: Path) -> Iterator[Path]:
    """LoRA files in a folder and below, in a fixed order.

    Links to folders are followed, each folder is entered once, hidden ones not at all, as
    in the hosts. What vanishes or may not be read meanwhile is skipped.
    """
    entered: set[str] = set()
    for place, subfolders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:
            subfolders.clear()
            continue
        entered.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in LORA_SUFFIXES:
                yield Path(place, name)


def _plain(name: str) -> str:
    """A name for comparing: macOS spells accents in two ways, Windows folders with backslashes."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def _full_names(file: LoraPath) -> tuple[str, str]:
    return _plain(file.name + file.path.suffix), _plain(file.inside + file.path.suffix)


def _looks_like_path(name: str) -> bool:
    return os.path.isabs(name) or name.lower().endswith(LORA_SUFFIXES) or name.startswith((".", "~"))


def _as_path(name: str) -> Path | None:
    """The file that a path names, with or without ``.safetensors``; None if there is none."""
    try:
        for path in (Path(name), Path(name).expanduser()):
            if _looks_like_path(name) and path.exists():
                return path
            if path.with_name(path.name + ".safetensors").is_file():
                return path.with_name(path.name + ".safetensors")
    except (OSError, ValueError, RuntimeError):  # Too long, NUL, no home: not a path then.
        return None
    return None


def output_path(folder: str | os.PathLike[str], name: str, subfolder: str = "") -> Path:
    """Where a result of this name goes: always inside the folder.

    Args:
        folder: The LoRA folder.
        name: File name, with or without ``.safetensors``.
        subfolder: Folders below ``folder``, separated by ``/``; they need not exist.

    Returns:
        The path. Nothing is created, and an existing file is not looked at.

    Raises:
        OutputError: If the name would lead outside, or some system forbids it.
    """
    parts = [part for part in re.split(r"[/\\]", subfolder.strip()) if part]
    if subfolder.strip().startswith(("/", "\\")):
        raise OutputError(
            "The subfolder {subfolder} begins with a slash; it is inside the LoRA folder.", repr(subfolder)
        )
    for part in parts:
        _check_name(part, "subfolder")
    stem = name[: -len(".safetensors")] if name.lower().endswith(".safetensors") else name
    _check_name(stem, "name")
    if len(stem.encode()) > NAME_BYTES - LONGEST_SUFFIX:
        raise OutputError(
            "The name {start}... is too long: more than {most} UTF-8 bytes.",
            repr(stem[:40]),
            NAME_BYTES - LONGEST_SUFFIX,
        )
    root = Path(os.path.realpath(folder))
    place = root.joinpath(*parts)
    target = place / f"{stem}.safetensors"
    if Path(os.path.realpath(place)) != place and not Path(os.path.realpath(place)).is_relative_to(root):
        raise OutputError(
            "The subfolder {subfolder} is a link that leads out of the LoRA folder.", repr(subfolder)
        )
    if target.is_symlink():
        raise OutputError("{file} is a link to another file; choose another name.", target.name)
    return Path(folder).joinpath(*parts, target.name)


def _check_name(name: str, what: str) -> None:
    """Refuse a file or folder name that is not a plain name on every system.

    Raises:
        OutputError: With the reason.
    """
    if not name.strip():
        raise OutputError("The {what} is empty.", Sentence(what))
    if set(name) <= {".", " "}:
        raise OutputError(
            "The {what} {name} is not allowed: it would lead out of the folder.", Sentence(what), repr(name)
        )
    if bad := FORBIDDEN.search(name):
        raise OutputError(
            "The {what} {name} holds {characters}, which not every system allows in a file name.",
            Sentence(what),
            repr(name[:80]),
            repr(bad.group()),
        )
    if name[-1] in ". " or name[0] == " ":
        raise OutputError(
            "The {what} {name} begins or ends with a space or ends with a dot.", Sentence(what), repr(name)
        )
    if RESERVED.fullmatch(name):
        raise OutputError(
            "The {what} {name} belongs to a device on Windows; choose another.", Sentence(what), repr(name)
        )
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise OutputError("The {what} {name} is not valid text.", Sentence(what), f"{name!a}") from error
    if size > NAME_BYTES:
        raise OutputError("The {what} {name}... is too long.", Sentence(what), repr(name[:40]))
