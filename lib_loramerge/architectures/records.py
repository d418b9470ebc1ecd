"""Every base model, in one table."""

from __future__ import annotations

from . import models_flux, models_image, models_sd, models_video
from .base import Architecture

UNKNOWN = Architecture("unknown", "unknown base model", opaque=True, resolution="")

ARCHITECTURES: dict[str, Architecture] = {
    record.id: record
    for record in (
        *models_sd.RECORDS, *models_flux.RECORDS, *models_image.RECORDS, *models_video.RECORDS, UNKNOWN,
    )
}  # fmt: skip
