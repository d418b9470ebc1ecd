"""The picture of a merge as a ComfyUI IMAGE, and as a file that the page shows on the node."""

from __future__ import annotations

import secrets
from pathlib import Path

import folder_paths
import torch
from torch import Tensor

from ..analysis import compare, inspect
from .merging import Merged


def of_merge(merged: Merged) -> Tensor:
    """Where the LoRAs agree or fight; for one LoRA alone, what the result is.

    Returns:
        (1, height, width, 3) float32, 0 to 1. One white pixel where matplotlib is missing.
    """
    try:
        from ..webui import plots

        figure = (
            plots.inspect_figure([inspect(merged.path)])
            if len(merged.plan.sources) == 1
            else plots.compare_figure(compare(merged.plan))
        )
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return torch.ones(1, 1, 1, 3)
    return _image(figure)


def shown(picture: Tensor) -> list[dict[str, str]]:
    """Write the picture into ComfyUI's temporary folder, and say where, as its preview nodes do."""
    from PIL import Image  # ComfyUI's own.

    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    name = f"loramerge-{secrets.token_hex(8)}.png"
    Image.fromarray((picture[0] * 255).round().byte().numpy()).save(folder / name)
    return [{"filename": name, "subfolder": "", "type": "temp"}]


def _image(figure: object) -> Tensor:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)  # type: ignore[no-untyped-call]
    canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return (pixels.reshape(height, width, 4)[None, :, :, :3].float() / 255).contiguous()
