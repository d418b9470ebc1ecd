import json
import os

from modules.options import OptionInfo, Options
from modules.shared_cmd_options import cmd_opts

__all__ = ["OptionInfo", "Options", "cmd_opts", "demo", "opts", "walk_files"]

opts = Options(
    {
        "localization": OptionInfo("None", "Localization"),
        "hidden_tabs": OptionInfo([], "Hidden tabs"),
        "lora_preferred_name": OptionInfo("Alias from file", "Lora name"),
        "list_hidden_files": OptionInfo(True, "Hidden files"),
        "lora_force_diffusers": OptionInfo(False, "LoRA load using Diffusers method"),
    },
    json.loads(cmd_opts.options),
)
demo = None


def walk_files(path, allowed_extensions=None):
    for root, _, files in sorted(os.walk(path, followlinks=True)):
        for name in sorted(files):
            if allowed_extensions is None or os.path.splitext(name)[1].lower() in allowed_extensions:
                yield os.path.join(root, name)
