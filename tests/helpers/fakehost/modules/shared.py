import json
import os

from modules.options import OptionInfo, Options
from modules.shared_cmd_options import cmd_opts

__all__ = ["OptionInfo", "Options", "cmd_opts", "demo", "opts", "prompt_styles", "state", "walk_files"]

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


class State:
    """Of the picture in the making."""

    interrupted = False
    job = ""


class StyleDatabase:
    """Styles that bring a LoRA each: what they make of the prompt, and of the negative prompt."""

    styles = {  # noqa: RUF012
        "with b": ("{prompt} <lora:b:0.5>", "blurred"),
        "with xl": ("{prompt} <lora:xl:0.5>", ""),
    }

    def apply_styles_to_prompt(self, prompt, styles):
        for name in styles:
            prompt = self.styles[name][0].replace("{prompt}", prompt)
        return prompt

    def apply_negative_styles_to_prompt(self, prompt, styles):
        return ", ".join([*([prompt] if prompt else []), *(self.styles[name][1] for name in styles)])


state = State()
prompt_styles = StyleDatabase()


def walk_files(path, allowed_extensions=None):
    for root, _, files in sorted(os.walk(path, followlinks=True)):
        for name in sorted(files):
            if allowed_extensions is None or os.path.splitext(name)[1].lower() in allowed_extensions:
                yield os.path.join(root, name)
