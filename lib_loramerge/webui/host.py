"""Every access to the WebUI: folders, LoRA list, refresh, queue lock, caches, options.

:class:`Host` is what the tab, the jobs and REST speak to. :class:`WebuiHost` asks A1111, Forge and their
forks, always at the time of the call and never at import; :class:`StandaloneHost` is the same without one.
The facts about the hosts that this file relies on are in the docstrings.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import blocks
from ..errors import FileError, IncompatibleError, LoraMergeError, OutputError, RecipeError
from ..files import output_path
from ..recipe import LoraInput, MergeRecipe, nearest
from . import settings
from .labels import Label, Labels
from .listing import FoundFile, Listing, natural_key, path_key, scan, subfolders
from .settings import Settings

if TYPE_CHECKING:
    from ..merge import MergePlan

RESCAN_SECONDS = 2.0
CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt")
PEER_PRESETS = ("lbwpresets.txt", "elempresets.txt")


class ConflictError(OutputError):
    """What is asked for collides with a file or a job that is there already."""


class UnknownNameError(FileError):
    """A LoRA or a checkpoint of that name is not in the host's lists."""


@dataclass(frozen=True)
class LoraEntry:
    """One LoRA of the list. All texts come from file names and metadata: escape them in HTML.

    Attributes:
        name: What a recipe calls it: the stem, or ``sub/stem`` when several files have that stem.
        subfolder: Below its LoRA folder, with ``/``; empty at the top.
        alias: The name that the host puts into prompts.
        base: Base model in a few letters, empty while unknown.
        rank: ``32`` or ``8-64``, empty while unknown.
    """

    name: str
    path: Path
    subfolder: str
    alias: str
    base: str = ""
    rank: str = ""

    @property
    def label(self) -> str:
        """As shown in a list."""
        shown = f"{self.subfolder}/{self.path.stem}" if self.subfolder else self.name
        return " · ".join(part for part in (shown, self.base, self.rank and f"rank {self.rank}") if part)


class Host:
    """What the rest of the extension may ask; this base class answers as if there were no WebUI."""

    is_webui = False
    name = ""
    prompt_elem_id: str | None = None
    can_try = False

    def __init__(self) -> None:
        self._listing: Listing | None = None
        self._scanned = 0.0
        self._scan_lock = threading.Lock()
        self._labels = Labels(self._metadata_of)
        self._reads_headers = True
        self._entries: tuple[tuple[int, int], list[LoraEntry]] | None = None
        self._presets: tuple[object, blocks.Presets] | None = None

    # Folders and LoRAs

    def lora_dirs(self) -> tuple[Path, ...]:
        """Folders that LoRAs are read from; the first one is written to."""
        raise NotImplementedError

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
        """Every LoRA, in natural order, from memory. Never raises."""
        listing = self.listing()
        stamp = (id(listing), self._labels.version)
        kept = self._entries
        if kept is None or kept[0] != stamp:
            kept = (stamp, [self._entry(file) for file in listing.files])
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

    def wait_for_labels(self, timeout: float = 10.0) -> bool:
        return self._labels.wait(timeout)

    def find(self, name: str, strict: bool = False) -> Path:
        """The file that a recipe means by ``name``.

        Args:
            strict: Refuse links that lead out of the LoRA folders, as for requests from elsewhere.

        Raises:
            UnknownNameError: No LoRA has that name; the nearest names are told.
            IncompatibleError: Several LoRAs have it.
            FileError: The file is a link to somewhere else, and ``strict`` is on.
        """
        if not isinstance(name, str) or not name.strip():
            raise RecipeError("A LoRA name is missing.")
        found = self._look_up(name)
        if not found or not found[0].path.is_file():
            self._rescan_if_old()
            found = self._look_up(name)
        if not found:
            raise UnknownNameError(self._unknown_text(name))
        if len(found) > 1:
            names = " and ".join(file.name for file in found)
            raise IncompatibleError(
                f"Several LoRAs are called {name}: {names}. Give the name with its folder."
            )
        path = found[0].path
        if strict and not self._inside(path):
            raise FileError(f"{name} is a link that leads out of the LoRA folder, so it is not read here.")
        return path

    def _look_up(self, name: str) -> tuple[FoundFile, ...]:
        return self.listing().find(name.strip())

    def _unknown_text(self, name: str) -> str:
        close = nearest(name, [file.name for file in self.listing().files])
        hint = f"Did you mean {' or '.join(close)}?" if close else "Refresh the list if it was just added."
        return f"There is no LoRA called {name} in the LoRA folder. {hint}"

    def _inside(self, path: Path) -> bool:
        real = path.resolve()
        return any(real.is_relative_to(folder.resolve()) for folder in self.lora_dirs())

    def _rescan_if_old(self) -> None:
        """A name that is not in the list may be new; a storm of wrong names must not rescan each time."""
        with self._scan_lock:
            if time.monotonic() - self._scanned > RESCAN_SECONDS:
                self._rescan()

    def _rescan(self) -> None:
        self._listing = scan(self.lora_dirs(), self._lists_hidden())
        self._scanned = time.monotonic()
        self._labels.fill(self._listing.files, read=self._reads_headers)

    def _lists_hidden(self) -> bool:
        return True

    def _entry(self, file: FoundFile) -> LoraEntry:
        label: Label = self._labels.get(file)
        return LoraEntry(file.name, file.path, file.subfolder, self._alias_of(file), label.base, label.rank)

    def _alias_of(self, file: FoundFile) -> str:
        return file.path.stem

    def _file_of_alias(self, alias: str) -> FoundFile | None:
        return None

    def _metadata_of(self, file: FoundFile) -> Mapping[str, object]:
        return {}

    # Checkpoints

    def checkpoints(self) -> list[str]:
        """Titles of the checkpoints that a merge may take as base."""
        return []

    def base_path(self, text: str | None, strict: bool = False) -> Path | None:
        """The checkpoint file that a title, or a path where those are allowed, means.

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
                return path
        close = nearest(text, self.checkpoints())
        raise UnknownNameError(
            f"There is no checkpoint called {text}. "
            + (f"Did you mean {' or '.join(close)}?" if close else "")
        )

    def _listed_checkpoint(self, title: str) -> Path | None:
        return None

    # What is allowed

    def restricted(self) -> bool:
        """Whether others than the owner may use the page."""
        return False

    def hide_dirs(self) -> bool:
        """Whether the owner wants no folder shown or chosen in the page."""
        return False

    def frozen_settings(self) -> bool:
        return False

    def paths_allowed(self) -> bool:
        """Whether a path may be typed where a name is expected."""
        return not self.restricted() and not self.hide_dirs()

    def without_folders(self, text: str) -> str:
        """A sentence with the names of LoRA files in place of their paths."""
        for folder in self.lora_dirs():
            for known in {str(folder), os.path.realpath(folder)}:
                text = text.replace(known + os.sep, "").replace(known, "the LoRA folder")
        return text

    # Settings, presets, devices

    def settings(self) -> Settings:
        return Settings()

    def devices(self) -> list[tuple[str, str]]:
        """(label, value) of the devices of this machine, the CPU first."""
        torch = sys.modules.get("torch")
        found = [("CPU", "cpu")]
        if torch is None:
            return found
        for kind, label in (("cuda", "GPU (CUDA)"), ("xpu", "GPU (XPU)"), ("mps", "GPU (Apple)")):
            count = _device_count(torch, kind)
            if count == 1:
                found.append((label, kind))
            else:
                found += [(f"{label} {index}", f"{kind}:{index}") for index in range(count)]
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
        stamp = tuple((str(path), _stamp(path)) for path in paths)
        if self._presets is None or self._presets[0] != stamp:
            self._presets = (stamp, blocks.load_presets(paths))
        return self._presets[1]

    # Merging

    def plan(self, recipe: MergeRecipe, strict: bool = False, check_hashes: bool = False) -> MergePlan:
        """What a merge would do, from headers alone.

        Args:
            check_hashes: Compare the files with the hashes of a stored recipe, which reads them whole.

        Raises:
            LoraMergeError: Whatever stops this merge.
        """
        from ..merge import plan_merge  # Not at the WebUI's start, see the package's docstring.

        return plan_merge(
            recipe,
            find=lambda name: self.find(name, strict),
            presets=self.presets(),
            base=self.base_path(recipe.base, strict),
            check_hashes=check_hashes,
        )

    def check_name(self, name: str, subfolder: str = "", overwrite: bool = False) -> Path:
        """Where a merged file of this name would be written.

        Raises:
            OutputError: The name or the subfolder cannot be used.
            ConflictError: The name is taken.
        """
        if subfolder and self.hide_dirs():
            raise OutputError("This WebUI does not let folders be chosen (--hide-ui-dir-config).")
        path = output_path(self.write_dir(), name, subfolder)
        if path.exists() and not overwrite:
            raise ConflictError(f"{path.name} exists already. Choose another name, or allow overwriting.")
        alias = self._file_of_alias(path.stem)
        for other in (*self.listing().by_stem.get(path.stem, ()), *([alias] if alias else [])):
            if other.path != path and other.path.exists() and not _same_file(other.path, path):
                raise ConflictError(
                    f"A LoRA called {path.stem} is in {other.subfolder or 'the LoRA folder'} already, "
                    "and the name alone must tell LoRAs apart in a prompt. Choose another name."
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

    def prompt_tag(self, name: str, strength: float = 1.0) -> str:
        return f"<lora:{name}:{strength:g}>"

    def free_bytes(self) -> int | None:
        """Free space where merged files go; None where the system does not tell."""
        try:
            return shutil.disk_usage(self.write_dir()).free
        except OSError:
            return None

    # What only a WebUI can do

    def queue_lock(self) -> Any:
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


class StandaloneHost(Host):
    """The tab alone in a browser: folders are given, and nothing waits for pictures.

    Args:
        lora_dirs: The first one is written to.
        base_dirs: Folders whose checkpoints are offered as base.
        preset_path: Another file for presets than ours.
    """

    def __init__(
        self, lora_dirs: Sequence[Path], base_dirs: Sequence[Path] = (), preset_path: Path | None = None
    ) -> None:
        super().__init__()
        self._lora_dirs = tuple(Path(folder).absolute() for folder in lora_dirs)
        self._base_dirs = tuple(Path(folder).absolute() for folder in base_dirs)
        self._preset_path = preset_path

    def lora_dirs(self) -> tuple[Path, ...]:
        return self._lora_dirs

    def preset_path(self) -> Path:
        return self._preset_path or super().preset_path()

    def checkpoints(self) -> list[str]:
        return list(self._checkpoint_files())

    def _listed_checkpoint(self, title: str) -> Path | None:
        return self._checkpoint_files().get(title)

    def _checkpoint_files(self) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for folder in self._base_dirs:
            if folder.is_dir():
                for path in sorted(folder.iterdir(), key=lambda path: natural_key(path.name)):
                    if path.suffix.lower() in CHECKPOINT_SUFFIXES and path.is_file():
                        files.setdefault(path.name, path)
        return files


class WebuiHost(Host):
    """A1111, Forge, reForge and others of the family.

    The module ``networks`` of their built-in Lora extension holds the LoRA list. It is looked up when
    needed: importing it would rely on the order in which the host loads extensions.
    """

    is_webui = True
    prompt_elem_id = "txt2img_prompt"
    can_try = True

    def __init__(self) -> None:
        super().__init__()
        self._trials: dict[str, Path] = {}
        # Not while the WebUI starts; see extension.warm_up().
        self._reads_headers = False

    @property
    def name(self) -> str:  # type: ignore[override]
        return "Forge" if "modules_forge" in sys.modules else "Stable Diffusion WebUI"

    # Folders and LoRAs

    def lora_dirs(self) -> tuple[Path, ...]:
        """``--lora-dir`` and A1111's ``--lyco-dir-backcompat``, options of the built-in Lora extension."""
        folders = [_option("lora_dir") or os.path.join(_models_path(), "Lora")]
        lycoris = _option("lyco_dir_backcompat")
        if lycoris and os.path.isdir(lycoris):
            folders.append(lycoris)
        return tuple(Path(os.path.abspath(folder)) for folder in folders)

    def refresh(self) -> None:
        try:
            networks = _networks()
            if hasattr(networks, "list_available_networks"):
                networks.list_available_networks()
        except Exception as error:  # The host's code; our own list does not depend on it.
            self.log("the WebUI could not list its LoRA folder", error)
        super().refresh()

    def _lists_hidden(self) -> bool:
        return getattr(_shared_options(), "list_hidden_files", True) is not False

    def _look_up(self, name: str) -> tuple[FoundFile, ...]:
        """By file name, or by the alias that the host writes into prompts."""
        found = super()._look_up(name)
        if found:
            return found
        listed = self._file_of_alias(name.strip())
        return (listed,) if listed is not None else ()

    def _file_of_alias(self, alias: str) -> FoundFile | None:
        entry = (getattr(_networks(), "available_network_aliases", None) or {}).get(alias)
        return None if entry is None else self.listing().by_path.get(path_key(getattr(entry, "filename", "")))

    def _host_entry(self, file: FoundFile) -> Any:
        """The host's own object of a file; None when it does not list it."""
        entry = (getattr(_networks(), "available_networks", None) or {}).get(file.path.stem)
        same = entry is not None and path_key(getattr(entry, "filename", "")) == path_key(file.path)
        return entry if same else None

    def _alias_of(self, file: FoundFile) -> str:
        alias = getattr(self._host_entry(file), "alias", None)
        return alias if isinstance(alias, str) and alias else file.path.stem

    def _metadata_of(self, file: FoundFile) -> Mapping[str, object]:
        metadata = getattr(self._host_entry(file), "metadata", None)
        return metadata if isinstance(metadata, Mapping) else {}

    # Checkpoints

    def checkpoints(self) -> list[str]:
        return [str(title) for title in (getattr(_module("sd_models"), "checkpoints_list", None) or {})]

    def _listed_checkpoint(self, title: str) -> Path | None:
        sd_models = _module("sd_models")
        listed = getattr(sd_models, "checkpoints_list", None) or {}
        aliases = getattr(sd_models, "checkpoint_aliases", None) or {}
        info = listed.get(title) or aliases.get(title)
        path = Path(str(info.filename)) if info is not None else None
        return path if path is not None and path.is_file() else None

    # What is allowed

    def restricted(self) -> bool:
        return bool(_option("disable_extension_access"))

    def hide_dirs(self) -> bool:
        return bool(_option("hide_ui_dir_config"))

    def frozen_settings(self) -> bool:
        return bool(_option("freeze_settings"))

    def settings(self) -> Settings:
        return settings.read(_shared_options())

    def preset_paths(self) -> list[Path]:
        """Ours, then those of sd-webui-lora-block-weight, wherever that is installed."""
        found = [self.preset_path()]
        paths = _module("paths_internal") or _module("paths")
        for attribute in ("extensions_dir", "extensions_builtin_dir"):
            folder = getattr(paths, attribute, None)
            if not folder:
                continue
            for file_name in PEER_PRESETS:
                try:
                    found += sorted(Path(folder).glob(f"*/scripts/{file_name}"))
                except OSError:
                    continue
        return found

    # What only a WebUI can do

    def queue_lock(self) -> Any:
        return getattr(_module("call_queue"), "queue_lock", None)

    def announce(self, path: Path) -> None:
        """Lists a new file without listing all others again, where the host can do that."""
        networks = _networks()
        by_name = getattr(networks, "update_available_networks_by_names", None)
        if by_name is not None:
            by_name([path.stem])
        elif hasattr(networks, "list_available_networks"):
            networks.list_available_networks()
        super().refresh()

    def after_overwrite(self, path: Path) -> str:
        """Clears what the hosts remember of a LoRA's contents.

        Forge keeps the file's tensors, the list of LoRAs applied, and what is patched into UNet and CLIP;
        A1111 compares only names and multipliers of what is applied. Without this the next picture is the
        old one.
        """
        lock = self.queue_lock()
        if lock is None:
            self._forget_contents()
        else:
            with lock:
                self._forget_contents()
        super().refresh()
        return (
            "The file was replaced. If the next picture still shows the old one, change the prompt once "
            "or restart the WebUI."
        )

    def _forget_contents(self) -> None:
        networks = _networks()
        cached: Any = getattr(networks, "load_lora_state_dict", None)
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
        # Not shared.sd_model: reading that may load a model.
        model: Any = getattr(getattr(_module("sd_models"), "model_data", None), "sd_model", None)
        if hasattr(model, "current_lora_hash"):
            model.current_lora_hash = None
        objects = getattr(model, "forge_objects_original", None)
        if objects is not None:
            for patcher in (
                getattr(objects, "unet", None),
                getattr(getattr(objects, "clip", None), "patcher", None),
            ):
                loader = getattr(patcher, "lora_loader", None)
                if loader is not None:
                    loader.loaded_hash = None
        for module in (getattr(model, "network_layer_mapping", None) or {}).values():
            if getattr(module, "network_current_names", ()) != ():
                module.network_current_names = (("stale", 0, 0, None),)
        if hasattr(networks, "list_available_networks"):
            networks.list_available_networks()

    def register_trial(self, name: str, path: Path) -> None:
        """Puts an entry of the host's own class into its dictionaries, and keeps it there.

        The host clears the dictionaries whenever it lists its folders, so its listing function is followed
        by ours while there are trials.
        """
        networks = _networks()
        if networks is None or not hasattr(networks, "available_networks"):
            raise LoraMergeError(
                "This WebUI has no LoRA support switched on, so a merge cannot be tried without saving."
            )
        self._trials[name] = path
        _follow(networks, self._put_trials_back)
        self._put_trials_back()

    def _put_trials_back(self) -> None:
        networks, network = _networks(), sys.modules.get("network")
        if networks is None or network is None:
            return
        for name, path in list(self._trials.items()):
            known = networks.available_networks.get(name)
            entry = known if known is not None else network.NetworkOnDisk(name, str(path))
            networks.available_networks[name] = entry
            networks.available_network_aliases[name] = entry

    def unregister_trial(self, name: str) -> None:
        self._trials.pop(name, None)
        networks = _networks()
        if networks is None:
            return
        for attribute in ("available_networks", "available_network_aliases"):
            (getattr(networks, attribute, None) or {}).pop(name, None)
        lookup = getattr(networks, "available_network_hash_lookup", None) or {}
        for key in [key for key, entry in list(lookup.items()) if getattr(entry, "name", None) == name]:
            lookup.pop(key, None)
        if not self._trials:
            _unfollow(networks)

    def close(self) -> None:
        networks = _networks()
        if networks is not None:
            for name in self._trials:
                networks.available_networks.pop(name, None)
                networks.available_network_aliases.pop(name, None)
            _unfollow(networks)
        super().close()

    def log(self, message: str, error: BaseException | None = None) -> None:
        report = getattr(_module("errors"), "report", None)
        if error is not None and report is not None:
            # The host's report prints the exception being handled.
            try:
                raise error
            except BaseException:
                report(f"LoRA Merge: {message}", exc_info=True)
        else:
            super().log(message, error)


def _follow(networks: Any, after: Callable[[], None]) -> None:
    """Makes ``after`` run whenever the host has listed its LoRA files.

    ``process_network_files`` is what both of the host's listing functions call by its global name; a fork
    without it has ``list_available_networks``.
    """
    attribute = next(a for a in ("process_network_files", "list_available_networks") if hasattr(networks, a))
    original = getattr(networks, attribute)
    if hasattr(original, "loramerge_original"):
        original.loramerge_after = after
        return

    def listed(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        listed.loramerge_after()  # type: ignore[attr-defined]
        return result

    listed.loramerge_original = original  # type: ignore[attr-defined]
    listed.loramerge_after = after  # type: ignore[attr-defined]
    setattr(networks, attribute, listed)


def _unfollow(networks: Any) -> None:
    """Undoes :func:`_follow`; a wrapper that somebody put around ours stays and ours does nothing."""
    for attribute in ("process_network_files", "list_available_networks"):
        current = getattr(networks, attribute, None)
        original = getattr(current, "loramerge_original", None)
        if original is not None:
            setattr(networks, attribute, original)


def _networks() -> Any:
    """The module of the built-in Lora extension; None before it is loaded or when it is switched off."""
    return sys.modules.get("networks")


def _module(name: str) -> Any:
    """A module of the host that it has imported itself; None otherwise."""
    return sys.modules.get(f"modules.{name}")


def _option(name: str) -> Any:
    """A command line option of the host; None where the host does not have it."""
    options = getattr(_module("shared"), "cmd_opts", None)
    if options is None:
        options = getattr(_module("shared_cmd_options"), "cmd_opts", None)
    return getattr(options, name, None)


def _shared_options() -> Any:
    return getattr(_module("shared"), "opts", None)


def _models_path() -> str:
    paths = _module("paths") or _module("paths_internal")
    return str(getattr(paths, "models_path", "models"))


def _device_count(torch: Any, kind: str) -> int:
    try:
        if kind == "mps":
            return int(torch.backends.mps.is_available())
        backend = getattr(torch, kind, None)
        return int(backend.device_count()) if backend is not None and backend.is_available() else 0
    except Exception:  # A broken driver must not hide the tab.
        return 0


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return (status.st_size, status.st_mtime_ns)


def _same_file(one: Path, other: Path) -> bool:
    """Whether both names mean one file, as on systems that do not tell upper from lower case."""
    try:
        return one.samefile(other)
    except OSError:
        return False
