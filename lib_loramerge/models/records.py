"""Every base model, in one table."""

from __future__ import annotations

from ..errors import Sentence
from . import flux, image, sd, video
from .base import Architecture

UNKNOWN = Architecture("unknown", Sentence("unknown base model"), opaque=True, resolution="")

ARCHITECTURES: dict[str, Architecture] = {
    record.id: record
    for record in (
        *sd.RECORDS, *flux.RECORDS, *image.RECORDS, *video.RECORDS, UNKNOWN,
    )
}  # fmt: skip
