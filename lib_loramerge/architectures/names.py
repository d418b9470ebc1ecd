"""Every spelling of a layer to its canonical one, and back to diffusers'."""

from __future__ import annotations

from .base import Rows, component, layer_path
from .dit import diffusers_members, resolve
from .text_encoders import paths, spellings
from .unet import UNETS, by_any_name, by_ldm


def canonical_path(architecture_id: str, part: str, flat: str) -> tuple[str, Rows | None] | None:
    """Flattened checkpoint path of a layer, for any flattened spelling of it.

    Args:
        architecture_id: The base model.
        part: Canonical component: ``"unet"``, ``"te"``, ``"te1"``...
        flat: Path after the component, dots already turned into underscores.

    Returns:
        The path, and which of its output rows the spelling means when it names a member of a
        fused layer; None if the base model has no such layer.
    """
    if part != "unet":
        known = spellings(architecture_id).get(part)
        if known is None:
            # No list of this text encoder: the name is kept.
            return flat, None
        path = known.get(flat)
        return (path, None) if path is not None else None
    if architecture_id in UNETS:
        layer = by_any_name(architecture_id).get(flat)
        return (layer.ldm_flat, None) if layer is not None else None
    return resolve(architecture_id, flat)


def diffusers_layers(architecture_id: str, layer: str) -> tuple[tuple[str, Rows | None], ...]:
    """Dotted diffusers names of a canonical layer inside its component, with the rows each one is.

    Several when diffusers splits the layer, () when it has no name for it.
    """
    part, path = component(layer), layer_path(layer)
    if part != "unet":
        dotted = paths(architecture_id).get(part, {}).get(path)
        return ((dotted, None),) if dotted is not None else ()
    if architecture_id in UNETS:
        known = by_ldm(architecture_id).get(path)
        return ((known.diffusers, None),) if known is not None else ()
    return diffusers_members(architecture_id, path)
