"""Which device does the arithmetic, and which there are."""

from __future__ import annotations

import torch

from ..errors import RecipeError

# Devices whose arithmetic ends at float32.
WITHOUT_DOUBLE = ("mps", "xpu")


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
        raise RecipeError(
            "There is no device {name}. Use auto, cpu, cuda, cuda:N, mps or xpu.", repr(name)
        ) from error
    if device.type != "cpu" and name.partition(":")[0] not in {
        entry.partition(":")[0] for entry in devices()
    }:
        raise RecipeError("This machine has no {name}. It has {devices}.", name, ", ".join(devices()))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError("This machine has no {name}. It has {devices}.", name, ", ".join(devices()))
    return torch.device("cpu") if device.type in WITHOUT_DOUBLE else device


def devices() -> list[str]:
    """Devices of this machine, as a recipe names them, the CPU first."""
    found = ["cpu"]
    for kind in ("cuda", "xpu", "mps"):
        count = _count(kind)
        found += [kind] if count == 1 else [f"{kind}:{index}" for index in range(count)]
    return found


def _count(kind: str) -> int:
    try:
        if kind == "mps":
            return int(torch.backends.mps.is_available())
        backend = getattr(torch, kind, None)  # Older versions of torch have no xpu.
        return int(backend.device_count()) if backend is not None and backend.is_available() else 0
    except Exception:  # A broken driver is as good as no device.
        return 0
