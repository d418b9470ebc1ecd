import os

from modules import paths_internal
from modules.shared_cmd_options import cmd_opts

checkpoints_list = {}
checkpoint_aliases = {}
model_path = os.path.join(paths_internal.models_path, "Stable-diffusion")


class CheckpointInfo:
    def __init__(self, filename):
        self.filename = filename
        self.name = os.path.basename(filename)
        self.title = self.name
        self.name_for_extra = os.path.splitext(self.name)[0]


def list_models():
    checkpoints_list.clear()
    checkpoint_aliases.clear()
    for folder in (model_path, cmd_opts.ckpt_dir):
        for name in sorted(os.listdir(folder)) if folder and os.path.isdir(folder) else ():
            if name.endswith((".safetensors", ".ckpt")):
                info = CheckpointInfo(os.path.join(folder, name))
                checkpoints_list[info.title] = info
                checkpoint_aliases[info.name_for_extra] = info


class Layer:
    """A layer of A1111: reapplies LoRAs only when their names or multipliers change."""

    def __init__(self):
        self.network_current_names = ()
        self.content = ()


class LoraLoader:
    """What Forge patches into UNet or CLIP: refreshed only when the list of patches changes."""

    def __init__(self):
        self.loaded_hash = "[]"
        self.content = ()


class _Patcher:
    def __init__(self):
        self.lora_loader = LoraLoader()


class _Clip:
    def __init__(self):
        self.patcher = _Patcher()


class _ForgeObjects:
    def __init__(self):
        self.unet = _Patcher()
        self.clip = _Clip()


class A1111Model:
    def __init__(self):
        self.network_layer_mapping = {"layer": Layer()}


class ForgeModel:
    def __init__(self):
        self.current_lora_hash = "[]"
        self.forge_objects_original = _ForgeObjects()


class _ModelData:
    sd_model = ForgeModel() if cmd_opts.forge else A1111Model()


model_data = _ModelData()
