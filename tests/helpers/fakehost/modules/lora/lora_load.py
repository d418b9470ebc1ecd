"""SD.Next's LoRA list, and the caches between a LoRA file and a picture."""

import hashlib
import os

from modules import modeldata, prompt_parser_diffusers, shared
from modules.lora import extra_networks_lora, lora_diffusers, network

__all__ = ["extra_networks_lora"]

lora_cache = {}
available_networks = {}
available_network_aliases = {}
forbidden_network_aliases = {}
available_network_hash_lookup = {}


def list_available_networks():
    available_networks.clear()
    available_network_aliases.clear()
    for filename in shared.walk_files(shared.cmd_opts.lora_dir, [".pt", ".ckpt", ".safetensors"]):
        stem = os.path.splitext(os.path.basename(filename))[0]
        # A dot in a name becomes something else; prompts may still have it, and the folder, but no alias.
        entry = network.NetworkOnDisk(stem.replace(".", "_"), filename)
        available_networks[entry.name] = entry
        available_network_aliases[entry.name] = entry
        available_network_aliases[entry.fullname] = entry
        available_network_aliases.setdefault(stem, entry)
    return available_networks


def picture(tags):
    """(name, multiplier, digests of what denoiser and text encoder use) of each LoRA of a prompt."""
    if any(name not in available_network_aliases for name, _ in tags):
        list_available_networks()
    entries = [(available_network_aliases.get(name), name, multiplier) for name, multiplier in tags]
    applied = _diffusers(entries) if shared.opts.lora_force_diffusers else _native(entries)
    encoded = prompt_parser_diffusers.encode(str(tags), applied)
    return [
        (name, multiplier, digest and f"{digest} {prompt[2]}")
        for (name, multiplier, digest), prompt in zip(applied, encoded)
    ]


def _native(entries):
    model = modeldata.model_data.sd_model
    nets = [(name, multiplier, entry and _load(name, entry).content) for entry, name, multiplier in entries]
    asked = [(name, multiplier) for name, multiplier, _ in nets]
    if model.loaded_loras.get("all") != asked:
        model.loaded_loras["all"] = asked
        for layer in model.network_layer_mapping.values():
            if layer.network_current_names != tuple(asked):
                layer.network_current_names, layer.content = tuple(asked), tuple(nets)
    return model.network_layer_mapping["layer"].content


def _diffusers(entries):
    """An adapter whose name the pipeline has is not loaded again."""
    nets = []
    for entry, name, multiplier in entries:
        if entry is not None:
            lora_diffusers.adapters.setdefault(name, _digest(entry.filename))
            lora_diffusers.diffuser_loaded.append(name)
        nets.append((name, multiplier, lora_diffusers.adapters.get(name)))
    return tuple(nets)


def _load(name, entry):
    """By the name in the prompt; the date of the file is not looked at."""
    if name not in lora_cache:
        lora_cache[name] = network.Network(name, entry, _digest(entry.filename))
    return lora_cache[name]


def _digest(filename):
    with open(filename, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()[:16]
