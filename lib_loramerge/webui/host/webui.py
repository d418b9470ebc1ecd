"""A1111, Forge and their forks: the only module that knows what is inside them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ...errors import LoraMergeError
from .. import settings
from ..listing import FoundFile, path_key
from ..settings import Settings
from .base import Host

PEER_PRESETS = ("lbwpresets.txt", "elempresets.txt")


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

    def file_link(self, path: Path) -> str | None:
        """By the host's own route, which serves some folders only and tells their names."""
        from .. import compat

        if self.hide_dirs() or not compat.may_serve(getattr(_module("shared"), "demo", None), path):
            return None
        folder = Path.cwd()
        shown = path.relative_to(folder) if path.is_relative_to(folder) else path
        if shown.is_absolute() and not self.paths_allowed():
            return None
        return compat.FILE_ROUTE + quote(shown.as_posix(), safe="/:")

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
        A1111 compares only names and multipliers of what is applied; both keep the encoded prompt for as
        long as its text and its LoRA tags are the same. Without this the next picture is the old one, or
        has the old text encoder.
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
        _forget_prompts()
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


def _forget_prompts() -> None:
    """Empties the host's caches of encoded prompts, in place: running code holds the lists themselves."""
    processing = _module("processing")
    for owner in ("StableDiffusionProcessing", "StableDiffusionProcessingTxt2Img"):
        for attribute in ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc"):
            cache = getattr(getattr(processing, owner, None), attribute, None)
            if isinstance(cache, list):
                cache[:] = [None] * len(cache)


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
