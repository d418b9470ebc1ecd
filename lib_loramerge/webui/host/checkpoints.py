"""A host's checkpoints: their names, the files behind them, and the folder that baked ones go to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import FileError, RecipeError, Sentence
from ...recipe import nearest
from .refusals import ClosedError, ConflictError, UnknownNameError

CLOSED = (
    "Baking and extracting are closed while others may use this page (--listen, --share), as they can fill "
    "the disk. A WebUI opens them with --enable-insecure-extension-access."
)


class CheckpointFolder:
    """The part of a host that has to do with checkpoints; this class answers as if there were none."""

    # What the host is started with to have one more folder of checkpoints.
    folder_option = "--ckpt-dir"

    def lora_dirs(self) -> tuple[Path, ...]:
        """Folders that LoRAs are read from; the first one is written to."""
        raise NotImplementedError

    def checkpoint_dirs(self) -> tuple[Path, ...]:
        """Folders that checkpoints are read from; the first one is written to. () where nothing is baked."""
        return ()

    def checkpoints(self) -> list[str]:
        """Titles of the checkpoints, as the host lists them."""
        return []

    def current_checkpoint(self) -> str:
        """Title of the one that the host makes pictures with; empty while unknown."""
        return ""

    def checkpoint_sha256(self, title: str) -> str:
        """Hex SHA-256 of a checkpoint, if the host keeps it and the file is no newer; empty otherwise."""
        return ""

    def refresh_checkpoints(self) -> None:
        """Makes the host list its checkpoints again."""

    def can_bake(self) -> bool:
        """Whether checkpoints may be read and written here."""
        return bool(self.checkpoint_dirs()) and not self.restricted()

    def _listed_checkpoint(self, title: str) -> Path | None:
        return None

    def restricted(self) -> bool:
        """Whether others than the owner may use the page."""
        return False

    def hide_dirs(self) -> bool:
        """Whether the owner wants no folder shown or chosen in the page."""
        return False

    def paths_allowed(self) -> bool:
        """Whether a path may be typed where a name is expected, and whole paths are shown."""
        return not self.restricted() and not self.hide_dirs()

    def base_path(self, text: str | None, strict: bool = False) -> Path | None:
        """The checkpoint file that a title means, or a path into the host's folders where paths are allowed.

        Args:
            strict: Only what is in the host's list.

        Raises:
            UnknownNameError: It is in no list, and is no file that may be named here.
        """
        if not text or not text.strip():
            return None
        listed = self._listed_checkpoint(text.strip())
        if listed is not None:
            return listed
        if self.paths_allowed() and not strict:
            path = Path(text.strip()).expanduser()
            if path.is_file():
                self._check_base_folder(path)
                return path
        close = nearest(text, self.checkpoints())
        hint = Sentence(" Did you mean {names}?", " or ".join(close)) if close else ""
        raise UnknownNameError("There is no checkpoint called {name}.{hint}", text, hint)

    def base_folders(self) -> list[Path]:
        """Folders whose files, subfolders included, may be named as base by their path."""
        listed = (self._listed_checkpoint(title) for title in self.checkpoints())
        return [*self.lora_dirs(), *dict.fromkeys(path.parent for path in listed if path is not None)]

    def _check_base_folder(self, path: Path) -> None:
        whole = path.resolve()
        if not any(whole.is_relative_to(folder.resolve()) for folder in self.base_folders()):
            option = self.folder_option
            raise UnknownNameError(
                "{file} is in no folder of checkpoints; start the page with {option} FOLDER.",
                path.name,
                option,
            )

    # Baking and extracting

    def check_open(self) -> None:
        """Refuses to read and write checkpoints where the owner has not opened that.

        Raises:
            ClosedError: Others may use the page, or there is no folder of checkpoints.
        """
        if not self.checkpoint_dirs():
            raise ClosedError("There is no checkpoint folder here. Start the page with --ckpt-dir FOLDER.")
        if self.restricted():
            raise ClosedError(CLOSED)

    def checkpoint_path(self, title: str, what: str, strict: bool = False) -> Path:
        """The checkpoint of a title of the host's list; no path is one.

        Args:
            what: It is for, in messages.
            strict: Refuse links that lead out of its folders, as for requests from elsewhere.

        Raises:
            RecipeError: No title is given.
            UnknownNameError: It is not in the list.
            FileError: The file is a link to somewhere else, and ``strict`` is on.
        """
        path = self.base_path(title, strict=True)
        if path is None:
            raise RecipeError("Choose {what}.", Sentence(what))
        real = path.resolve()
        if strict and not any(real.is_relative_to(folder.resolve()) for folder in self.checkpoint_dirs()):
            raise FileError(
                "{file} is a link that leads out of the checkpoint folder, so it is not read here.", title
            )
        return path

    def check_checkpoint_name(self, name: str, overwrite: bool = False) -> Path:
        """Where a baked checkpoint of this name would be written.

        Raises:
            OutputError: The name cannot be used.
            ConflictError: The name is taken.
        """
        from ...files import output_path  # Not at the WebUI's start, see extension.py.

        path = output_path(self.checkpoint_dirs()[0], name)
        if path.exists() and not overwrite:
            raise ConflictError(
                "{file} exists already. Choose another name, or allow overwriting.", path.name
            )
        return path

    def propose_checkpoint_name(self, base: Path, parts: Sequence[str]) -> str:
        """A free name made of the checkpoint's and of what goes into it."""
        start = "-".join([base.stem, *parts])[:100].strip(" .-+") or "baked"
        folder, name, number = self.checkpoint_dirs()[0], start, 1
        while (folder / f"{name}.safetensors").exists():
            number += 1
            name = f"{start}-{number}"
        return name
