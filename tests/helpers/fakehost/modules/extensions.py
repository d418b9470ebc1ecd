import os

from modules import paths_internal
from modules.shared_cmd_options import cmd_opts


def active():
    """Folders of the extensions, built-in ones first."""
    folders = [
        os.path.join(paths_internal.extensions_builtin_dir, name)
        for name in sorted(os.listdir(paths_internal.extensions_builtin_dir))
        if not (cmd_opts.sdnext and name == "Lora")
    ]
    return folders + [os.path.abspath(folder) for folder in cmd_opts.extension]
