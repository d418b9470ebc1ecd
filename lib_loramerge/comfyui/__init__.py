"""ComfyUI nodes: load LoRAs for merging, merge them, apply or save the result, report on it.

The only folder that imports ComfyUI's modules (``comfy``, ``folder_paths``). Nothing else imports it
but the ``__init__.py`` at the top of the checkout, which ComfyUI loads.
"""

from __future__ import annotations

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
