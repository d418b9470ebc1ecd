"""SD.Next's list of checkpoints, and what it remembers of a file's metadata."""

import os

from modules import paths_internal

checkpoints_list = {}
checkpoint_aliases = {}
sd_metadata = {}


class CheckpointInfo:
    def __init__(self, filename):
        self.filename = filename
        self.title = os.path.basename(filename)


def list_models():
    checkpoints_list.clear()
    folder = os.path.join(paths_internal.models_path, "Stable-diffusion")
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    # Models that can be downloaded are listed, too, and so are folders of Diffusers.
    for filename in [*(os.path.join(folder, name) for name in names), "stabilityai/not-downloaded"]:
        info = CheckpointInfo(filename)
        checkpoints_list[info.title] = info


def read_metadata_from_safetensors(filename):
    """By file name alone: a file that was replaced keeps its old metadata."""
    if filename not in sd_metadata:
        from modules.lora import network

        sd_metadata[filename] = network.read_metadata(filename)
    return sd_metadata[filename]
