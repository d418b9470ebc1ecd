"""The WebUIs of the family: how each is recognised, and what differs between them in a name or two.

What a WebUI does differently is in the adapters, :mod:`.webui` and :mod:`.sdnext`.
"""

from __future__ import annotations

import sys
from typing import NamedTuple


class Known(NamedTuple):
    """One WebUI.

    Attributes:
        name: As its users, the README and ``inspect`` call it.
        record: Its id in :mod:`lib_loramerge.hosts` and in recipes.
        marks: Modules that it alone has imported by the time it loads extensions.
        networks: Module with the LoRA list; in ``extensions-builtin`` where it has no dot.
        network: Module with the class ``NetworkOnDisk`` of the list's entries.
        prompts: ``elem_id`` of the prompts that a LoRA may go into: the first one in view, else the first.
        lora_dirs: Options that name LoRA folders; the first one is written to.
        ckpt_dirs: The same of checkpoints.
        frozen: Option that forbids changing settings.
        users: Options with ``user:password`` pairs that REST asks for.
        user_files: Options that name a file of such pairs, one a line.
    """

    name: str
    record: str
    marks: tuple[str, ...] = ()
    networks: str = "networks"
    network: str = "network"
    prompts: tuple[str, ...] = ("txt2img_prompt",)
    lora_dirs: tuple[str, ...] = ("lora_dir",)
    ckpt_dirs: tuple[str, ...] = ("ckpt_dir",)
    frozen: str = "freeze_settings"
    users: tuple[str, ...] = ("api_auth",)
    user_files: tuple[str, ...] = ()


A1111 = Known("A1111", "a1111", lora_dirs=("lora_dir", "lyco_dir_backcompat"))
FORGE_NEO = Known(
    "Forge Neo",
    "neo",
    ("modules_forge.packages.comfy", "modules_forge"),
    lora_dirs=("lora_dir", "lora_dirs"),
    ckpt_dirs=("ckpt_dir", "ckpt_dirs"),
)
REFORGE = Known(
    "reForge", "reforge", ("ldm_patched", "modules_forge"), lora_dirs=("lora_dir", "lyco_dir_backcompat")
)
FORGE = Known("Forge", "forge", ("modules_forge",), lora_dirs=("lora_dir", "lyco_dir_backcompat"))
# Its ModernUI, which is the default, shows our tab beside one of the pages that make pictures; the page of
# the logo, "control", is the one that it opens with.
SDNEXT = Known(
    "SD.Next",
    "sdnext",
    ("modules.scripts_manager", "modules.modeldata"),
    networks="modules.lora.lora_load",
    network="modules.lora.network",
    prompts=("txt2img_prompt", "control_prompt", "img2img_prompt", "video_prompt"),
    frozen="freeze",
    users=("auth", "api_auth"),
    user_files=("auth_file",),
)

# The first one whose marks are all there is it; the last one has none.
KNOWN = (SDNEXT, FORGE_NEO, REFORGE, FORGE, A1111)


def recognise() -> Known:
    """The WebUI that this process runs."""
    return next(known for known in KNOWN if all(mark in sys.modules for mark in known.marks))
