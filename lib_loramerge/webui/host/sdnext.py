"""SD.Next: what it does differently from the WebUIs that it comes from."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

from ..listing import FoundFile, path_key
from .webui import WebuiHost, _shared_options, forget_layers, host_module


class SdnextHost(WebuiHost):
    """SD.Next, whose LoRA list is a module of its own and no extension.

    It remembers more than the others of a file: its metadata, for ever; the LoRA by the name that a prompt
    gave it; what was asked of the model last; the encoded prompts. It looks at the date of none of them.
    """

    # Its plot is one of several on pages of their own.
    can_plot = False

    def _key_of(self, file: FoundFile) -> str:
        """A dot in a name separates keys elsewhere in SD.Next, so that it is not kept."""
        return file.path.stem.replace(".", "_")

    def _alias_of(self, file: FoundFile) -> str:
        """Its prompts name files; what a file calls itself inside is not looked for."""
        return self._key_of(file)

    def checkpoints(self) -> list[str]:
        """Only those that are one file: models are folders, too, or not yet downloaded."""
        return [title for title in super().checkpoints() if self._listed_checkpoint(title) is not None]

    def checkpoint_dirs(self) -> tuple[Path, ...]:
        """A setting there, and no option of the command line."""
        named = str(getattr(_shared_options(), "ckpt_dir", None) or "")
        return tuple(
            dict.fromkeys([*([Path(named).absolute()] if named else []), *super().checkpoint_dirs()])
        )

    def _checkpoint_lists(self) -> ModuleType | None:
        return host_module("sd_checkpoint")

    def _forget_contents(self, path: Path) -> None:
        _forget_metadata(path)
        lora_cache = getattr(self._networks(), "lora_cache", None) or {}
        for name, network in list(lora_cache.items()):
            on_disk = getattr(network, "network_on_disk", None)
            if path_key(getattr(on_disk, "filename", "")) == path_key(path):
                lora_cache.pop(name, None)
        # Not shared.sd_model: reading that may load a model.
        model = getattr(getattr(host_module("modeldata"), "model_data", None), "sd_model", None)
        model = getattr(model, "pipe", model)
        prompts = getattr(host_module("prompt_parser_diffusers"), "cache", None)
        for asked in (getattr(model, "loaded_loras", None), prompts):
            if asked:
                asked.clear()
        forget_layers(model)
        _unload_adapters()


def _forget_metadata(path: Path) -> None:
    known = getattr(host_module("sd_checkpoint"), "sd_metadata", None) or {}
    for name in [name for name in known if path_key(name) == path_key(path)]:
        known.pop(name, None)


def _unload_adapters() -> None:
    """Where Diffusers has loaded the LoRAs, it keeps those whose name it has."""
    loaded = getattr(sys.modules.get("modules.lora.lora_diffusers"), "diffuser_loaded", None)
    unload = getattr(sys.modules.get("modules.lora.extra_networks_lora"), "unload_diffusers", None)
    if loaded and unload is not None:
        unload()
