"""A1111, Forge and their forks: this module and :mod:`.sdnext` alone know what is inside a WebUI."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from urllib.parse import quote

from ...errors import LoraMergeError
from .. import settings
from ..listing import FoundFile, path_key
from ..settings import Settings
from .base import Host
from .known import Known, recognise

CHECKPOINTS = "Stable-diffusion"
PEER_PRESETS = ("lbwpresets.txt", "elempresets.txt")


class WebuiHost(Host):
    """A1111, Forge, reForge and others of the family.

    One module of theirs holds the LoRA list. It is looked up when needed: importing it would rely on the
    order in which the host loads extensions.

    Args:
        known: Which of them it is; found out when left out.
    """

    is_webui = True
    can_try = True
    can_plot = True

    def __init__(self, known: Known | None = None) -> None:
        super().__init__()
        self._known = known or recognise()
        self.name = self._known.name
        self.record = self._known.record
        self.prompts = self._known.prompts
        self._trials: dict[str, Path] = {}
        # Not while the WebUI starts; see extension.warm_up().
        self._reads_headers = False

    # Folders and LoRAs

    def lora_dirs(self) -> tuple[Path, ...]:
        """``--lora-dir``, and what else the host has of the kind, as far as it exists."""
        return self._folders(self._known.lora_dirs, "Lora")

    @staticmethod
    def _folders(options: Sequence[str], usual: str) -> tuple[Path, ...]:
        """Folders that options name; the first one or the usual one, then the others as far as they exist."""
        first, *others = options
        folders = [str(option(first) or os.path.join(_models_path(), usual))]
        for other in others:
            named = option(other)
            more = named if isinstance(named, (list, tuple)) else [named] if named else []
            folders += [folder for folder in map(str, more) if os.path.isdir(folder)]
        return tuple(dict.fromkeys(Path(os.path.abspath(folder)) for folder in folders))

    def refresh(self) -> None:
        try:
            self._list_again()
        except Exception as error:  # The host's code; our own list does not depend on it.
            self.log("the WebUI could not list its LoRA folder", error)
        super().refresh()

    def _list_again(self) -> None:
        list_files = getattr(self._networks(), "list_available_networks", None)
        if list_files is not None:
            list_files()

    def _networks(self) -> ModuleType | None:
        """The module with the LoRA list; None before it is loaded or when LoRAs are switched off."""
        return sys.modules.get(self._known.networks)

    def _lists_hidden(self) -> bool:
        return getattr(_shared_options(), "list_hidden_files", True) is not False

    def _look_up(self, name: str) -> tuple[FoundFile, ...]:
        """By file name, or by the alias that the host writes into prompts."""
        found = super()._look_up(name)
        if found:
            return found
        listed = self._file_of_alias(name)
        return (listed,) if listed is not None else ()

    def _file_of_alias(self, alias: str) -> FoundFile | None:
        entry = (getattr(self._networks(), "available_network_aliases", None) or {}).get(alias)
        return None if entry is None else self.listing().by_path.get(path_key(getattr(entry, "filename", "")))

    def _host_entry(self, file: FoundFile) -> object:
        """The host's own object of a file; None when it does not list it."""
        entry = (getattr(self._networks(), "available_networks", None) or {}).get(self._key_of(file))
        same = entry is not None and path_key(getattr(entry, "filename", "")) == path_key(file.path)
        return entry if same else None

    def _key_of(self, file: FoundFile) -> str:
        """What the host's list has a file under."""
        return file.path.stem

    def _alias_of(self, file: FoundFile) -> str:
        alias = getattr(self._host_entry(file), "alias", None)
        return alias if isinstance(alias, str) and alias else file.path.stem

    def _metadata_of(self, file: FoundFile) -> Mapping[str, object]:
        metadata = getattr(self._host_entry(file), "metadata", None)
        return metadata if isinstance(metadata, Mapping) else {}

    # Checkpoints

    def checkpoint_dirs(self) -> tuple[Path, ...]:
        """``--ckpt-dir``, where A1111's own merger writes, too, and the usual folder."""
        named = self._folders(self._known.ckpt_dirs, CHECKPOINTS)
        usual = Path(os.path.abspath(os.path.join(_models_path(), CHECKPOINTS)))
        return tuple(dict.fromkeys([*named, usual]))

    def current_checkpoint(self) -> str:
        title = str(getattr(_shared_options(), "sd_model_checkpoint", None) or "")
        listed = self._checkpoint_info(title)
        return "" if listed is None else str(getattr(listed, "title", title))

    def refresh_checkpoints(self) -> None:
        list_models = getattr(self._checkpoint_lists(), "list_models", None)
        if list_models is not None:
            list_models()

    def checkpoints(self) -> list[str]:
        return [str(title) for title in (getattr(self._checkpoint_lists(), "checkpoints_list", None) or {})]

    def _checkpoint_lists(self) -> ModuleType | None:
        return host_module("sd_models")

    def _listed_checkpoint(self, title: str) -> Path | None:
        name = getattr(self._checkpoint_info(title), "filename", None)
        path = Path(str(name)) if name is not None else None
        return path if path is not None and path.is_file() else None

    def _checkpoint_info(self, title: str) -> object:
        """The host's own object of a checkpoint, by its title or a shorter name of it; None without one."""
        lists = self._checkpoint_lists()
        listed = getattr(lists, "checkpoints_list", None) or {}
        aliases = getattr(lists, "checkpoint_aliases", None) or {}
        return listed.get(title) or aliases.get(title)

    def checkpoint_sha256(self, title: str) -> str:
        info, ask = self._checkpoint_info(title), getattr(host_module("hashes"), "sha256_from_cache", None)
        if info is None or not callable(ask):
            return ""
        try:
            found = str(ask(info.filename, f"checkpoint/{info.name}") or "")  # type: ignore[attr-defined]
        except Exception:  # A host's cache may be of another make; the file is hashed then.
            return ""
        return found if len(found) == 64 else ""

    # What is allowed

    def restricted(self) -> bool:
        return bool(option("disable_extension_access"))

    def hide_dirs(self) -> bool:
        return bool(option("hide_ui_dir_config"))

    def file_link(self, path: Path) -> str | None:
        """By the host's own route, which serves some folders only and tells their names."""
        from .. import compat

        if self.hide_dirs() or not compat.may_serve(getattr(host_module("shared"), "demo", None), path):
            return None
        folder = Path.cwd()
        shown = path.relative_to(folder) if path.is_relative_to(folder) else path
        if shown.is_absolute() and not self.paths_allowed():
            return None
        return compat.FILE_ROUTE + quote(shown.as_posix(), safe="/:")

    def frozen_settings(self) -> bool:
        return bool(option(self._known.frozen))

    def api_users(self) -> str | None:
        """``user:password`` pairs, separated by commas, of whom REST lets in; None for everybody."""
        pairs = [str(option(name) or "") for name in self._known.users]
        for name in self._known.user_files:
            path = option(name)
            if path:
                pairs += Path(str(path)).read_text(encoding="utf-8").splitlines()
        entries = [entry.strip(' "\t\r\n') for pair in pairs for entry in pair.split(",")]
        return ",".join(entry for entry in entries if entry) or None

    def settings(self) -> Settings:
        return settings.read(_shared_options())

    def preset_paths(self) -> list[Path]:
        """Ours, then those of sd-webui-lora-block-weight, wherever that is installed."""
        found = [self.preset_path()]
        paths = host_module("paths_internal") or host_module("paths")
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

    def queue_lock(self) -> AbstractContextManager[object] | None:
        return getattr(host_module("call_queue"), "queue_lock", None)

    def announce(self, path: Path) -> None:
        """Lists a new file without listing all others again, where the host can do that."""
        by_name = getattr(self._networks(), "update_available_networks_by_names", None)
        if by_name is not None:
            by_name([path.stem])
        else:
            self._list_again()
        super().refresh()

    def after_overwrite(self, path: Path) -> str:
        """Clears what the host remembers of a LoRA's contents; what to tell the user."""
        lock = self.queue_lock()
        with lock or nullcontext():
            self._forget_contents(path)
            self._list_again()
        super().refresh()
        return (
            "The file was replaced. If the next picture still shows the old one, change the prompt once "
            "or restart the WebUI."
        )

    def _forget_contents(self, path: Path) -> None:
        """Makes the host read a file again that it has used.

        Forge keeps the file's tensors, the list of LoRAs applied, and what is patched into UNet and CLIP;
        A1111 compares only names and multipliers of what is applied; both keep the encoded prompt for as
        long as its text and its LoRA tags are the same. Without this the next picture is the old one, or
        has the old text encoder.
        """
        clear = getattr(getattr(self._networks(), "load_lora_state_dict", None), "cache_clear", None)
        if clear is not None:
            clear()
        # Not shared.sd_model: reading that may load a model.
        model = getattr(getattr(host_module("sd_models"), "model_data", None), "sd_model", None)
        if model is not None and hasattr(model, "current_lora_hash"):
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
        forget_layers(model)
        _forget_prompts()

    def register_trial(self, name: str, path: Path) -> None:
        """Puts an entry of the host's own class into its dictionaries, and keeps it there.

        The host clears the dictionaries whenever it lists its folders, so its listing function is followed
        by ours while there are trials.
        """
        networks = self._networks()
        if networks is None or not hasattr(networks, "available_networks"):
            raise LoraMergeError(
                "This WebUI has no LoRA support switched on, so a merge cannot be tried without saving."
            )
        self._trials[name] = path
        _follow(networks, self._put_trials_back)
        self._put_trials_back()

    def _put_trials_back(self) -> None:
        networks, network = self._networks(), sys.modules.get(self._known.network)
        if networks is None or network is None:
            return
        for name, path in list(self._trials.items()):
            known = networks.available_networks.get(name)
            entry = known if known is not None else network.NetworkOnDisk(name, str(path))
            networks.available_networks[name] = entry
            networks.available_network_aliases[name] = entry

    def unregister_trial(self, name: str) -> None:
        self._trials.pop(name, None)
        networks = self._networks()
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
        networks = self._networks()
        if networks is not None:
            for name in self._trials:
                networks.available_networks.pop(name, None)
                networks.available_network_aliases.pop(name, None)
            _unfollow(networks)
        super().close()

    def log(self, message: str, error: BaseException | None = None) -> None:
        report = getattr(host_module("errors"), "report", None)
        if error is not None and report is not None:
            # The host's report prints the exception being handled.
            try:
                raise error
            except BaseException:
                report(f"LoRA Merge: {message}", exc_info=True)
        else:
            super().log(message, error)


def forget_layers(model: object) -> None:
    """Makes the host apply anew what a model's layers have, as it compares names and multipliers alone."""
    for module in (getattr(model, "network_layer_mapping", None) or {}).values():
        if getattr(module, "network_current_names", ()) != ():
            module.network_current_names = (("stale", 0, 0, None),)


def _forget_prompts() -> None:
    """Empties the host's caches of encoded prompts, in place: running code holds the lists themselves."""
    processing = host_module("processing")
    for owner in ("StableDiffusionProcessing", "StableDiffusionProcessingTxt2Img"):
        for attribute in ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc"):
            cache = getattr(getattr(processing, owner, None), attribute, None)
            if isinstance(cache, list):
                cache[:] = [None] * len(cache)


def _follow(networks: ModuleType, after: Callable[[], None]) -> None:
    """Makes ``after`` run whenever the host has listed its LoRA files.

    ``process_network_files`` is what both of the host's listing functions call by its global name; a fork
    without it has ``list_available_networks``.
    """
    attribute = next(a for a in ("process_network_files", "list_available_networks") if hasattr(networks, a))
    original = getattr(networks, attribute)
    if hasattr(original, "loramerge_original"):
        original.loramerge_after = after
        return

    def listed(*args: object, **kwargs: object) -> object:
        result: object = original(*args, **kwargs)
        listed.loramerge_after()  # type: ignore[attr-defined]
        return result

    listed.loramerge_original = original  # type: ignore[attr-defined]
    listed.loramerge_after = after  # type: ignore[attr-defined]
    setattr(networks, attribute, listed)


def _unfollow(networks: ModuleType) -> None:
    """Undoes :func:`_follow`; a wrapper that somebody put around ours stays and ours does nothing."""
    for attribute in ("process_network_files", "list_available_networks"):
        current = getattr(networks, attribute, None)
        original = getattr(current, "loramerge_original", None)
        if original is not None:
            setattr(networks, attribute, original)


def host_module(name: str) -> ModuleType | None:
    """A module of the host that it has imported itself; None otherwise."""
    return sys.modules.get(f"modules.{name}")


def option(name: str) -> object:
    """A command line option of the host; None where the host does not have it."""
    options = getattr(host_module("shared"), "cmd_opts", None)
    if options is None:
        options = getattr(host_module("shared_cmd_options"), "cmd_opts", None)
    return getattr(options, name, None)


def _shared_options() -> object:
    return getattr(host_module("shared"), "opts", None)


def _models_path() -> str:
    paths = host_module("paths") or host_module("paths_internal")
    return str(getattr(paths, "models_path", "models"))
