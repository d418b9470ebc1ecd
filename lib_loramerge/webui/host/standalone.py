"""The host of the tab alone in a browser."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from ...recipe import LoraInput
from ..listing import FoundFile, Listing, natural_key
from .base import Host

FILES = "loramerge/file/"
CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt")


class StandaloneHost(Host):
    """The tab alone in a browser: folders are given, and nothing waits for pictures.

    Args:
        lora_dirs: The first one is written to.
        base_dirs: Folders whose checkpoints are offered as base.
        preset_path: Another file for presets than ours.
        first_inputs: What a fresh page has in its rows.
        shared: Whether others than the owner may use the page.
        checkpoint_dir: Folder of checkpoints, read and written; without one nothing is baked or extracted.

    Attributes:
        serves_files: Whether the page gives out merged files below ``FILES``.
    """

    def __init__(
        self,
        lora_dirs: Sequence[Path],
        base_dirs: Sequence[Path] = (),
        preset_path: Path | None = None,
        first_inputs: Sequence[LoraInput] = (),
        shared: bool = False,
        checkpoint_dir: Path | None = None,
    ) -> None:
        super().__init__()
        self._lora_dirs = tuple(Path(folder).absolute() for folder in lora_dirs)
        self._base_dirs = tuple(Path(folder).absolute() for folder in base_dirs)
        self._preset_path = preset_path
        self.first_inputs = tuple(first_inputs)
        self.serves_files = False
        self._shared = shared
        self._stored: tuple[Listing, Mapping[str, tuple[FoundFile, ...]]] | None = None
        self._checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir).absolute()

    def lora_dirs(self) -> tuple[Path, ...]:
        return self._lora_dirs

    def _look_up(self, name: str) -> tuple[FoundFile, ...]:
        """By file name, or as the command line does: by ``ss_output_name``."""
        return super()._look_up(name) or self._stored_names().get(name, ())

    def _stored_names(self) -> Mapping[str, tuple[FoundFile, ...]]:
        from ...files.header import stored_name  # Not at the WebUI's start, see extension.py.

        listing = self.listing()
        if self._stored is None or self._stored[0] is not listing:
            found: dict[str, tuple[FoundFile, ...]] = {}
            for file in listing.files:
                name = stored_name(file.path) if file.path.suffix.lower() == ".safetensors" else None
                if name:
                    found[name] = (*found.get(name, ()), file)
            self._stored = (listing, found)
        return self._stored[1]

    def file_link(self, path: Path) -> str | None:
        folder = self.write_dir()
        if not self.serves_files or not path.is_relative_to(folder):
            return None
        return FILES + quote(path.relative_to(folder).as_posix())

    def preset_path(self) -> Path:
        return self._preset_path or super().preset_path()

    def restricted(self) -> bool:
        return self._shared

    folder_option = "--base-dir"

    def base_path(self, text: str | None, strict: bool = False) -> Path | None:
        """As of every host, and no link that leads out of the folders that were given."""
        path = super().base_path(text, strict)
        if path is not None:
            self._check_base_folder(path)
        return path

    def base_folders(self) -> list[Path]:
        own = [] if self._checkpoint_dir is None else [self._checkpoint_dir]
        return [*own, *self._base_dirs, *self._lora_dirs]

    def checkpoint_dirs(self) -> tuple[Path, ...]:
        return () if self._checkpoint_dir is None else (self._checkpoint_dir, *self._base_dirs)

    def checkpoints(self) -> list[str]:
        return list(self._checkpoint_files())

    def _listed_checkpoint(self, title: str) -> Path | None:
        return self._checkpoint_files().get(title)

    def _checkpoint_files(self) -> dict[str, Path]:
        """By name, those of the folder of checkpoints with their subfolder."""
        files: dict[str, Path] = {}
        own = self._checkpoint_dir
        if own is not None:
            found = [Path(folder, name) for folder, _, names in os.walk(own) for name in names]
            for path in sorted(found, key=lambda path: natural_key(path.relative_to(own).as_posix())):
                if _is_checkpoint(path):
                    files[path.relative_to(own).as_posix()] = path
        for folder in self._base_dirs:
            if folder.is_dir():
                for path in sorted(folder.iterdir(), key=lambda path: natural_key(path.name)):
                    if _is_checkpoint(path):
                        files.setdefault(path.name, path)
        return files


def _is_checkpoint(path: Path) -> bool:
    name = path.name.lower()
    return name.endswith(CHECKPOINT_SUFFIXES) and not name.startswith(".") and path.is_file()
