"""What REST's routes on checkpoints do, as functions from JSON to a job's request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..recipe import SETTINGS
from . import schema
from .checkpoint_jobs import AnalysisRequest, BakeRequest, ExtractRequest

if TYPE_CHECKING:
    from .fields import Fields


def bake_request(fields: Fields) -> BakeRequest:
    """A bake as a client asks for it."""
    return BakeRequest(
        recipe=fields.recipe(),
        base=fields.text("base"),
        name=fields.name("name"),
        overwrite=fields.flag("overwrite"),
        rounding=fields.choice("rounding", schema.ROUNDINGS),
        dtype=fields.choice("dtype", schema.BAKED_DTYPES),
        drop_ema=fields.flag("drop_ema"),
        hashed=fields.flag("hash", True),
        strict=True,
    )


def extract_request(fields: Fields) -> ExtractRequest | AnalysisRequest:
    """An extraction, or its dry run, as a client asks for it; absent settings are the library's own."""
    settings: dict[str, object] = {
        "vectors": fields.choice("vectors", schema.VECTORS),
        "dtype": fields.choice("dtype", schema.EXTRACTED_DTYPES),
        "skip_unsupported": fields.flag("skip_unsupported"),
        "dialect": fields.choice("dialect", tuple(SETTINGS["dialect"].words)),
        "hashed": fields.flag("hash", True),
    }
    read: Mapping[str, Callable[[str], object]] = {
        "rank": fields.rank,
        "conv_rank": fields.whole,
        "max_rank": fields.whole,
        "retain": fields.number,
        "size": fields.number,
        "parts": fields.texts,
    }
    settings |= {name: get(name) for name, get in read.items() if fields.given(name)}
    if sum(map(fields.given, ("rank", "retain", "size"))) > 1:
        from ..checkpoints.differing import ONE_RULE  # Not at the WebUI's start, see extension.py.

        fields.refuse(ONE_RULE)
    dry_run = fields.flag("dry_run")
    request = ExtractRequest(
        tuned=fields.text("tuned"),
        base=fields.text("base"),
        settings=tuple(settings.items()),
        name=fields.text("name") if dry_run else fields.name("name"),
        subfolder=fields.text("subfolder"),
        overwrite=fields.flag("overwrite"),
        strict=True,
    )
    return AnalysisRequest(request) if dry_run else request
