"""The built-in Lora extension: lists, and the caches between a LoRA file and a picture."""

import functools
import hashlib
import os

import network
from modules import processing, sd_models, shared

available_networks = {}
available_network_aliases = {}
available_network_hash_lookup = {}
forbidden_network_aliases = {}
loaded = {}


def process_network_files(names=None):
    candidates = list(shared.walk_files(shared.cmd_opts.lora_dir, [".pt", ".ckpt", ".safetensors"]))
    if not shared.cmd_opts.forge:
        candidates += shared.walk_files(shared.cmd_opts.lyco_dir_backcompat, [".pt", ".ckpt", ".safetensors"])
    for filename in candidates:
        name = os.path.splitext(os.path.basename(filename))[0]
        if names and name not in names:
            continue
        try:
            entry = network.NetworkOnDisk(name, filename)
        except OSError:
            continue
        available_networks[name] = entry
        if entry.alias in available_network_aliases:
            forbidden_network_aliases[entry.alias.lower()] = 1
        available_network_aliases[name] = entry
        available_network_aliases[entry.alias] = entry


def update_available_networks_by_names(names):
    process_network_files(names)


def list_available_networks():
    for known in (
        available_networks,
        available_network_aliases,
        available_network_hash_lookup,
        forbidden_network_aliases,
    ):
        known.clear()
    os.makedirs(shared.cmd_opts.lora_dir, exist_ok=True)
    process_network_files()


def _digest(filename):
    """Of the tensors alone, as a picture knows nothing of names and metadata."""
    with open(filename, "rb") as file:
        content = file.read()
    start = 8 + int.from_bytes(content[:8], "little")
    return hashlib.sha256(content[start:] if start < len(content) else content).hexdigest()[:16]


def picture(tags):
    """What the model would be changed by: digests of the files as the host remembers them.

    Args:
        tags: (name, multiplier) pairs of the prompt.

    Returns:
        (name, multiplier, digests of what denoiser and text encoder use) of each LoRA applied; None in
        place of the digests when it is not found.
    """
    missing = [name for name, _ in tags if name not in available_network_aliases]
    if missing:
        update_available_networks_by_names(missing)
    if any(name not in available_network_aliases for name, _ in tags):
        list_available_networks()
    entries = [(available_network_aliases.get(name), name, multiplier) for name, multiplier in tags]
    model = sd_models.model_data.sd_model
    applied = _forge(model, entries) if shared.cmd_opts.forge else _a1111(model, entries)
    encoded = processing.encode(str(tags), applied)
    return [
        (name, multiplier, digest and f"{digest} {prompt[2]}")
        for (name, multiplier, digest), prompt in zip(applied, encoded)
    ]


def _a1111(model, entries):
    nets = []
    for entry, name, multiplier in entries:
        if entry is None:
            nets.append((name, multiplier, None))
            continue
        mtime = os.stat(entry.filename).st_mtime_ns
        if name not in loaded or mtime > loaded[name][0]:
            loaded[name] = (mtime, _digest(entry.filename))
        nets.append((name, multiplier, loaded[name][1]))
    for layer in model.network_layer_mapping.values():
        wanted = tuple((name, multiplier, multiplier, None) for name, multiplier, _ in nets)
        if layer.network_current_names != wanted:
            layer.network_current_names, layer.content = wanted, tuple(nets)
    return model.network_layer_mapping["layer"].content


if shared.cmd_opts.forge:

    @functools.lru_cache(maxsize=5)
    def load_lora_state_dict(filename):
        return _digest(filename)


def _forge(model, entries):
    targets = str([(entry and entry.filename, multiplier) for entry, _, multiplier in entries])
    if model.current_lora_hash != targets:
        model.current_lora_hash = targets
        model.patches = [
            (name, multiplier, load_lora_state_dict(entry.filename) if entry else None)
            for entry, name, multiplier in entries
        ]
    objects = model.forge_objects_original
    for patcher in (objects.unet, objects.clip.patcher):
        keys = str([(entry and entry.filename, multiplier) for entry, _, multiplier in entries])
        if patcher.lora_loader.loaded_hash != keys:
            patcher.lora_loader.loaded_hash, patcher.lora_loader.content = keys, tuple(model.patches)
    assert objects.unet.lora_loader.content == objects.clip.patcher.lora_loader.content
    return objects.unet.lora_loader.content


list_available_networks()
