"""What the rest of the extension may ask of a host, and the answers that need none."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ... import blocks
from ...errors import FileError, IncompatibleError, LoraMergeError, OutputError, RecipeError, Sentence, mapped
from ...recipe import LoraInput, MergeRecipe, nearest
from ..labels import Label, Labels
from ..listing import FoundFile, Listing, readable, scan, subfolders
from ..origins import SourceHashes, stamp_of
from ..settings import Settings
from .checkpoints import CheckpointFolder
from .refusals import ConflictError, UnknownNameError

if TYPE_CHECKING:
    from ...merge import MergePlan

# At least so long between two looks through the folders for names that are not known.
RESCAN_SECONDS = 0.2
TEMPORARY = Path(tempfile.gettempdir())
DEVICES = {"cpu": "CPU", "cuda": "GPU (CUDA)", "xpu": "GPU (XPU)", "mps": "GPU (Apple)"}


class LoraEntry(NamedTuple):
    """One LoRA of the list. All texts come from file names and metadata: escape them in HTML.

    Attributes:
        name: What a recipe calls it: the stem, or ``sub/stem`` when several files have that stem.
        subfolder: Below its LoRA folder, with ``/``; empty at the top.
        alias: The name that the host puts into prompts.
        base: Base model in a few letters, empty while unknown.
        rank: ``32`` or ``8-64``, empty while unknown.
        broken: The file cannot be read.
    """

    name: str
    path: Path
    subfolder: str
    alias: str
    base: str = ""
    rank: str = ""
    broken: bool = False

    @property
    def label(self) -> str:
        """As shown in a list."""
        shown = f"{self.subfolder}/{readable(self.path.stem)}" if self.subfolder else self.name
        return " · ".join([shown, *Label(self.base, self.rank, self.broken).words])


def without(folder_words: Sequence[tuple[str, str]], text: str) -> str:
    """A sentence with the names of files in place of their paths, see :meth:`Host.folder_words`."""

    def named(text: str) -> str:
        for known, name in folder_words:
            if text == known:
                return Sentence(name)
            text = text.replace(known + os.sep, "").replace(known, name)
        return text

    return mapped(text, named) if os.sep in text else text


class Host(CheckpointFolder):
    """What the rest of the extension may ask; this base class answers as if there were no WebUI."""

    is_webui = False
    name = ""
    # Its record in lib_loramerge.hosts; None where the page is not in one.
    record: str | None = None
    # elem_id of the prompts that a LoRA may go into: the first one in view, else the first.
    prompts: tuple[str, ...] = ()
    can_try = False
    # Whether it has an X/Y/Z plot that our axes stand in, on the page of its prompt.
    can_plot = False
    # What a fresh page has in its rows.
    first_inputs: tuple[LoraInput, ...] = ()

    def __init__(self) -> None:
        self._listing: Listing | None = None
        self._scan_began = self._scan_ended = -RESCAN_SECONDS
        self._look_lock = threading.Lock()
        self._scan_lock = threading.Lock()
        self._labels = Labels(self._metadata_of)
        self._reads_headers = True
        self._entries: tuple[tuple[int, int], list[LoraEntry]] | None = None
        self._presets: tuple[object, blocks.Presets] | None = None
        self.source_hashes = SourceHashes()

    # Folders and LoRAs

    def write_dir(self) -> Path:
        return self.lora_dirs()[0]

    def subfolders(self) -> list[str]:
        """Folders below the one we write to, ``""`` first."""
        return ["", *subfolders(self.write_dir())]

    def listing(self) -> Listing:
        with self._scan_lock:
            if self._listing is None:
                self._rescan()
            return self._listing  # type: ignore[return-value]

    def loras(self) -> list[LoraEntry]:
        """Every LoRA, in natural order, from memory; what cannot be read comes last. Never raises."""
        listing = self.listing()
        stamp = (id(listing), self._labels.version)
        kept = self._entries
        if kept is None or kept[0] != stamp:
            entries = [self._entry(file) for file in listing.files]
            kept = (stamp, sorted(entries, key=lambda entry: entry.broken))
            self._entries = kept
        return list(kept[1])

    def refresh(self) -> None:
        """Looks at the folders again, and makes the host do the same."""
        with self._scan_lock:
            self._rescan()

    def refresh_labels_async(self) -> None:
        """Starts finding base model and rank of the files that have no label yet, now and from now on."""
        self._reads_headers = True
        self._labels.fill(self.listing().files)

    def labels_state(self) -> str:
        """``busy`` while base model and rank are being found; another text each time more is known."""
        return "busy" if self._labels.busy else str(self._labels.version)

    def wait_for_labels(self, timeout: float = 10.0) -> bool:
        return self._labels.wait(timeout)

    def find(self, name: str, strict: bool = False) -> Path:
        """The file that a recipe means by ``name``.

        Args:
            strict: Refuse links that lead out of the LoRA folders, as for requests from elsewhere.

        Raises:
            UnknownNameError: No LoRA has that name; the message has the nearest names.
            IncompatibleError: Several LoRAs have it.
            FileError: The file is a link to somewhere else, and ``strict`` is on.
        """
        if not isinstance(name, str) or not name.strip():
            raise RecipeError("A LoRA name is missing.")
        found = self._look_up(name)
        if not found or not found[0].path.is_file():
            self._look_again()
            found = self._look_up(name)
        if not found:
            raise UnknownNameError(self._unknown_text(name))
        if len(found) > 1:
            names = " and ".join(file.name for file in found)
            raise IncompatibleError(
                "Several LoRAs are called {name}: {files}. Give the name with its folder.", name, names
            )
        path = found[0].path
        if readable(str(path)) != str(path):
            raise FileError(
                "{file}: no page or recipe can hold this file's name. Rename the file, or merge it on the "
                "command line.",
                found[0].name,
            )
        if strict and not self.inside(path):
            raise FileError(
                "{name} is a link that leads out of the LoRA folder, so it is not read here.", name
            )
        return path

    def _look_up(self, name: str) -> tuple[FoundFile, ...]:
        return self.listing().find(name)

    def _unknown_text(self, name: str) -> str:
        close = nearest(name, [file.name for file in self.listing().files])
        hint = (
            Sentence("Did you mean {names}?", " or ".join(close))
            if close
            else Sentence("Refresh the list if it was just added.")
        )
        return Sentence("There is no LoRA called {name} in the LoRA folder. {hint}", name, hint)

    def inside(self, path: Path) -> bool:
        """Whether a file lies in the LoRA folders, links followed."""
        real = path.resolve()
        return any(real.is_relative_to(folder.resolve()) for folder in self.lora_dirs())

    def _look_again(self) -> None:
        """Looks through the folders for a name that is not in the list, as it may be new.

        All who ask meanwhile share one look, and a storm of wrong names waits between two.
        """
        asked = time.monotonic()
        with self._look_lock:
            if self._scan_began >= asked or self.listing().holds_still():
                return
            rest = self._scan_ended + RESCAN_SECONDS - time.monotonic()
            if rest > 0:
                time.sleep(rest)
            with self._scan_lock:
                self._rescan()

    def _rescan(self) -> None:
        self._scan_began = time.monotonic()
        self._listing = scan(self.lora_dirs(), self._lists_hidden())
        self._labels.fill(self._listing.files, read=self._reads_headers)
        self._scan_ended = time.monotonic()

    def _lists_hidden(self) -> bool:
        return True

    def _entry(self, file: FoundFile) -> LoraEntry:
        label: Label = self._labels.get(file)
        return LoraEntry(file.name, file.path, file.subfolder, readable(self._alias_of(file)), *label)

    def _alias_of(self, file: FoundFile) -> str:
        return file.path.stem

    def _file_of_alias(self, alias: str) -> FoundFile | None:
        return None

    def _metadata_of(self, file: FoundFile) -> Mapping[str, object]:
        return {}

    # What is allowed

    def frozen_settings(self) -> bool:
        return False

    def api_users(self) -> str | None:
        """``user:password`` pairs, separated by commas, of whom REST lets in; None for everybody."""
        return None

    def shown(self, text: str) -> str:
        """A sentence for the page: without the folders of this machine where others may see it."""
        return text if self.paths_allowed() else self.without_folders(text)

    def shown_path(self, path: Path) -> str:
        """A file as the page may name it: its name inside the LoRA folder where others may see it."""
        if self.paths_allowed():
            return str(path)
        folder = self.write_dir()
        return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name

    def without_folders(self, text: str) -> str:
        """A sentence with the names of LoRA files in place of their paths."""
        return without(self.folder_words(), text)

    def folder_words(self) -> list[tuple[str, str]]:
        """Every spelling of a folder of this machine that a sentence may hold, and what stands for it."""
        words = {
            **dict.fromkeys(self.checkpoint_dirs(), "the checkpoint folder"),
            **dict.fromkeys(self.lora_dirs(), "the LoRA folder"),
            TEMPORARY: "the temporary folder",
        }
        return [
            (known, name)
            for folder, name in words.items()
            for known in sorted({str(folder), os.path.realpath(folder)})
        ]

    def file_link(self, path: Path) -> str | None:
        """Where a merged file can be downloaded, relative to the page; None where it cannot."""
        return None

    # Settings, presets, devices

    def settings(self) -> Settings:
        return Settings()

    def devices(self) -> list[tuple[str, str]]:
        """(label, value) of the devices of this machine, the CPU first."""
        if "torch" not in sys.modules:  # A WebUI's start imports it when it needs it.
            return [("CPU", "cpu")]
        from ...delta.device import devices

        named = [(name, *name.partition(":")) for name in devices()]
        found = [(f"{DEVICES[kind]} {index}".rstrip(), name) for name, kind, _, index in named]
        return [*found, ("Automatic", "auto")]

    def preset_path(self) -> Path:
        """The file that presets are saved to."""
        return blocks.bundled_preset_path()

    def preset_paths(self) -> list[Path]:
        """Files that presets are read from; the earlier wins on equal names."""
        return [self.preset_path()]

    def presets(self) -> blocks.Presets:
        """All presets, read again when a file has changed."""
        paths = [path for path in self.preset_paths() if path.is_file()]
        stamp = tuple((str(path), stamp_of(path)) for path in paths)
        if self._presets is None or self._presets[0] != stamp:
            self._presets = (stamp, blocks.load_presets(paths))
        return self._presets[1]

    # Merging

    def plan(
        self,
        recipe: MergeRecipe,
        strict: bool = False,
        check_hashes: bool = False,
        stop: Callable[[], None] | None = None,
    ) -> MergePlan:
        """What a merge would do, from headers alone.

        Args:
            check_hashes: Compare the files with the hashes of a stored recipe, which reads them whole.
            stop: Called often meanwhile; what it raises ends the planning.

        Raises:
            LoraMergeError: Whatever stops this merge.
        """
        from ...merge import plan_merge  # Not at the WebUI's start, see extension.py.

        return plan_merge(
            recipe,
            find=lambda name: self.find(name, strict),
            presets=self.presets(),
            base=self.base_path(recipe.base, strict),
            check_hashes=check_hashes,
            stop=stop,
        )

    def check_name(self, name: str, subfolder: str = "", overwrite: bool = False) -> Path:
        """Where a merged file of this name would be written.

        Raises:
            OutputError: The name or the subfolder cannot be used.
            ConflictError: The name is taken.
        """
        from ...files import output_path  # Not at the WebUI's start, see extension.py.

        if subfolder and self.hide_dirs():
            raise OutputError("This WebUI does not let folders be chosen (--hide-ui-dir-config).")
        path = output_path(self.write_dir(), name, subfolder)
        if path.exists() and not overwrite:
            raise ConflictError(
                "{file} exists already. Choose another name, or allow overwriting.", path.name
            )
        alias = self._file_of_alias(path.stem)
        for other in (*self.listing().by_stem.get(path.stem, ()), *([alias] if alias else [])):
            if other.path != path and other.path.exists() and not _same_file(other.path, path):
                raise ConflictError(
                    "A LoRA called {name} is in {folder} already, and the name alone must tell LoRAs apart "
                    "in a prompt. Choose another name.",
                    path.stem,
                    other.subfolder or Sentence("the LoRA folder"),
                )
        return path

    def propose_name(self, inputs: Sequence[LoraInput]) -> str:
        """A free name made of the inputs' names."""
        stems = [
            re.sub(r'[\\/:*?"<>|,\x00-\x1f]+', " ", entry.name.rpartition("/")[2]).strip(" .")
            for entry in inputs
        ]
        start = "+".join(stem for stem in stems if stem)[:80].strip(" .+") or "merged"
        taken = {file.path.stem.casefold() for file in self.listing().files}
        name, number = start, 1
        while name.casefold() in taken or self._file_of_alias(name) is not None:
            number += 1
            name = f"{start}-{number}"
        return name

    def free_bytes(self, folder: Path | None = None) -> int | None:
        """Free space where merged files go, or in another folder; None where the system does not tell."""
        from ...files.place import free_space  # Not at the WebUI's start, see extension.py.

        return free_space(folder or self.write_dir())

    # What only a WebUI can do

    def queue_lock(self) -> AbstractContextManager[object] | None:
        """The host's lock around picture generation; None when there is none."""
        return None

    def announce(self, path: Path) -> None:
        """Makes host and lists know a file that was just written."""
        self.refresh()

    def after_overwrite(self, path: Path) -> str:
        """Makes the host forget a file whose contents have changed; what to tell the user."""
        self.refresh()
        return ""

    def register_trial(self, name: str, path: Path) -> None:
        """Makes a LoRA outside the LoRA folder usable under ``name``."""
        raise LoraMergeError("Trying a merge without saving it needs a WebUI.")

    def unregister_trial(self, name: str) -> None:
        """Makes the host forget a trial."""

    def close(self) -> None:
        """Ends our threads and takes back what was changed in the host."""
        self._labels.close()

    def log(self, message: str, error: BaseException | None = None) -> None:
        """Writes to the console, with the traceback of ``error``."""
        print(f"LoRA Merge: {message}", file=sys.stderr)
        if error is not None:
            traceback.print_exception(type(error), error, error.__traceback__, file=sys.stderr)


def _same_file(one: Path, other: Path) -> bool:
    """Whether both names mean one file, as on systems that do not tell upper from lower case."""
    try:
        return one.samefile(other)
    except OSError:
        return False
