"""From layers and slots to the keys of the file we write."""

from __future__ import annotations

from ..errors import UnsupportedError
from ..models import (
    ARCHITECTURES,
    COMFY,
    DIFFUSERS,
    Rows,
    comfy_layer,
    component,
    diffusers_layers,
    has_dotted_name_alone,
)
from .slots import KOHYA_STYLE, PEFT_STYLE, ending_for, writes_alpha


def spelling_of(architecture_id: str, dialect: str = "auto") -> str:
    """How the layers of a base model are spelled in a dialect: ``KOHYA``, ``COMFY`` or ``DIFFUSERS``."""
    return ARCHITECTURES[architecture_id].spelling if dialect == "auto" else dialect


def output_style(architecture_id: str, dialect: str = "auto", style: str | None = None) -> str:
    """Name of the way that slots are spelled in the file we write."""
    if style is not None or ARCHITECTURES[architecture_id].opaque:
        return style or KOHYA_STYLE
    return PEFT_STYLE if spelling_of(architecture_id, dialect) in (COMFY, DIFFUSERS) else KOHYA_STYLE


def has_alpha(architecture_id: str, dialect: str = "auto", style: str | None = None) -> bool:
    """Whether the file we write has ``alpha``; if not, the scale must be put into the factors first."""
    return writes_alpha(output_style(architecture_id, dialect, style))


def output_parts(
    architecture_id: str, layer: str, dialect: str = "auto", style: str | None = None
) -> tuple[tuple[str, Rows | None], ...]:
    """Names under which a layer is written, each with the rows of the layer that go there.

    One name with None for all rows, unless the dialect splits a fused layer.

    Raises:
        UnsupportedError: The dialect has no name for this layer.
    """
    del style
    if ARCHITECTURES[architecture_id].opaque:
        return ((layer, None),)
    spelling = spelling_of(architecture_id, dialect)
    if spelling == DIFFUSERS:
        return _diffusers(architecture_id, layer)
    if spelling == COMFY or has_dotted_name_alone(architecture_id, layer):
        # A layer that is in no table keeps the name that it came with.
        return ((comfy_layer(architecture_id, layer) or layer, None),)
    record = ARCHITECTURES[architecture_id]
    if layer in record.own_names:
        return ((record.own_names[layer], None),)
    if record.diffusers_under_kohya and component(layer) == "unet":
        return tuple(
            (f"lora_unet_{name.replace('.', '_')}", rows)
            for name, rows in diffusers_layers(architecture_id, layer)
        ) or ((layer, None),)
    return ((layer, None),)


def _diffusers(architecture_id: str, layer: str) -> tuple[tuple[str, Rows | None], ...]:
    members = diffusers_layers(architecture_id, layer)
    prefix = ARCHITECTURES[architecture_id].place_in_pipeline(component(layer))
    if not members or prefix is None:
        raise UnsupportedError(
            f"The diffusers dialect has no name for the layer {layer} of "
            f"{ARCHITECTURES[architecture_id].label}. Write it in the kohya dialect."
        )
    return tuple((f"{prefix}.{name}", rows) for name, rows in members)


def output_key(prefix: str, slot: str, dialect: str = "auto", style: str | None = None) -> str:
    """Key of one tensor.

    Args:
        prefix: Name that ``output_parts`` gave.
        slot: Ours.
        dialect: As given to ``output_parts``.
        style: As ``output_style`` gave it; that of the dialect by default.
    """
    chosen = style or (PEFT_STYLE if dialect == DIFFUSERS else KOHYA_STYLE)
    return f"{prefix}.{ending_for(slot, chosen)}"
