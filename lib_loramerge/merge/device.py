"""Which device does the arithmetic."""

from __future__ import annotations

import torch

from ..errors import RecipeError
from .input_notes import WITHOUT_DOUBLE


def compute_device(name: str) -> torch.device:
    """The torch device that does the arithmetic for a recipe's ``device``.

    ``auto`` is the CPU: the arithmetic is small there, exact, and leaves the
    graphics memory to the model that is loaded. It also stands in for devices
    that have no float64, and a note of the plan says so.

    Raises:
        RecipeError: Not a device, or none that this machine has.
    """
    if name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"There is no device {name!r}. Use auto, cpu, cuda, cuda:N, mps or xpu.") from error
    if device.type != "cpu" and name.partition(":")[0] not in {
        entry.partition(":")[0] for entry in devices()
    }:
        raise RecipeError(f"This machine has no {name}. It has {', '.join(devices())}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(f"This machine has no {name}. It has {', '.join(devices())}.")
    return torch.device("cpu") if device.type in WITHOUT_DOUBLE else device


def devices() -> list[str]:
    """Devices of this machine, the CPU first."""
    found = ["cpu"]
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        found += ["cuda"] if count == 1 else [f"cuda:{index}" for index in range(count)]
    xpu = getattr(torch, "xpu", None)
    if xpu is not None and xpu.is_available():
        found.append("xpu")
    mps = getattr(torch.backends, "mps", None)
    if mps is not None and mps.is_available():
        found.append("mps")
    return found
