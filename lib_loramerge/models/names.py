"""Every spelling of a layer to its canonical one, and back to diffusers'."""

from __future__ import annotations

from .base import Rows, component, layer_path
from .dit import diffusers_members, dotted_path, is_parameter, resolve
from .records import ARCHITECTURES
from .text_encoders import comfy_name, paths, spellings
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
        path = spellings(architecture_id).get(part, {}).get(flat)
        return (path, None) if path is not None else None
    if architecture_id in UNETS:
        layer = by_any_name(architecture_id).get(flat)
        return (layer.ldm_flat, None) if layer is not None else None
    return resolve(architecture_id, flat)


def comfy_layer(architecture_id: str, layer: str) -> str | None:
    """ComfyUI's own dotted name of a canonical layer; None where its place is not known."""
    if not layer.startswith("lora_"):
        return None
    part, path = component(layer), layer_path(layer)
    if part != "unet":
        return comfy_name(architecture_id, part, path)
    dotted = by_ldm(architecture_id)[path].ldm if path in by_ldm(architecture_id) else None
    dotted = dotted or dotted_path(architecture_id, path)
    return f"diffusion_model.{dotted}" if dotted is not None else None


_LINEAR = ("_proj", "_fc1", "_fc2", "text_projection")


def has_dotted_name_alone(architecture_id: str, layer: str) -> bool:
    """Whether hosts know a layer only by its dotted name, never by a flattened one."""
    part = component(layer)
    if not layer.startswith("lora_"):
        return True
    if part != "unet":
        record = ARCHITECTURES[architecture_id]
        encoder = record.encoders.get(part)
        if encoder is None or encoder.dotted:
            return encoder is not None
        # The hosts of transformers know of a CLIP only its linear layers by flattened names.
        return encoder.kind == "clip" and record.unet is None and not layer.endswith(_LINEAR)
    return is_parameter(architecture_id, layer_path(layer))


def diffusers_layers(architecture_id: str, layer: str) -> tuple[tuple[str, Rows | None], ...]:
    """Dotted diffusers names of a canonical layer inside its component, with the rows each one is.

    Several when diffusers splits the layer, () when it has no name for it.
    """
    if not layer.startswith("lora_"):
        return ()
    part, path = component(layer), layer_path(layer)
    if part != "unet":
        dotted = paths(architecture_id).get(part, {}).get(path)
        if dotted is None:
            return ()
        model = "model." if ARCHITECTURES[architecture_id].encoders[part].kind == "llama" else ""
        return ((model + dotted, None),)
    if architecture_id in UNETS:
        known = by_ldm(architecture_id).get(path)
        return ((known.diffusers, None),) if known is not None else ()
    return diffusers_members(architecture_id, path)
