"""For ComfyUI alone: a checkout in ``custom_nodes`` is a node pack. Nothing else loads this file."""

import sys
from pathlib import Path

if "folder_paths" in sys.modules:  # ComfyUI's; a test runner that imports every folder has none.
    _HERE = str(Path(__file__).resolve().parent)
    # The library imports itself by its own name; once it is loaded, the path is not needed any more.
    sys.path.insert(0, _HERE)
    try:
        from lib_loramerge.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
    finally:
        sys.path.remove(_HERE)

    WEB_DIRECTORY = "./lib_loramerge/comfyui/web"
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
