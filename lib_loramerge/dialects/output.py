"""From layers and slots to the keys of the file we write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import UnsupportedError
from ..models import (
    ARCHITECTURES,
    COMFY,
    DIFFUSERS,
    KOHYA,
    Rows,
    comfy_layer,
    component,
    diffusers_layers,
    has_dotted_name_alone,
)
from .slots import KOHYA_STYLE, PEFT_STYLE, ending_for, writes_alpha

# Names of one layer, each with the rows of the layer that go there, None for all of them.
Parts = tuple[tuple[str, Rows | None], ...]


@dataclass(frozen=True)
class Written:
    """How one spelling is written.

    Attributes:
        style: Of the slots.
        names: Of a layer, by base model and layer.
    """

    style: str
    names: Callable[[str, str], Parts]


def spelling_of(architecture_id: str, dialect: str = "auto") -> str:
    """How the layers of a base model are spelled in a dialect, one of :data:`WRITTEN`."""
    return ARCHITECTURES[architecture_id].spelling if dialect == "auto" else dialect


def output_style(architecture_id: str, dialect: str = "auto", style: str | None = None) -> str:
    """Name of the way that slots are spelled in the file we write."""
    if style is not None or ARCHITECTURES[architecture_id].opaque:
        return style or KOHYA_STYLE
    return WRITTEN[spelling_of(architecture_id, dialect)].style


def has_alpha(architecture_id: str, dialect: str = "auto", style: str | None = None) -> bool:
    """Whether the file we write has ``alpha``; if not, the scale must be put into the factors first."""
    return writes_alpha(output_style(architecture_id, dialect, style))


def needs_one_rank(architecture_id: str, dialect: str = "auto", style: str | None = None) -> bool:
    """Whether all layers are written in one rank, the smaller ones filled up with zeros."""
    spelling = spelling_of(architecture_id, dialect)
    return spelling == DIFFUSERS and not has_alpha(architecture_id, dialect, style)


def output_parts(architecture_id: str, layer: str, dialect: str = "auto") -> Parts:
    """Names under which a layer is written, each with the rows of the layer that go there.

    One name with None for all rows, unless the dialect splits a fused layer.

    Raises:
        UnsupportedError: The dialect has no name for this layer.
    """
    if ARCHITECTURES[architecture_id].opaque:
        return ((layer, None),)
    return WRITTEN[spelling_of(architecture_id, dialect)].names(architecture_id, layer)


def _comfy(architecture_id: str, layer: str) -> Parts:
    # A layer that is in no table keeps the name that it came with.
    return ((comfy_layer(architecture_id, layer) or layer, None),)


def _kohya(architecture_id: str, layer: str) -> Parts:
    if has_dotted_name_alone(architecture_id, layer):
        return _comfy(architecture_id, layer)
    record = ARCHITECTURES[architecture_id]
    if layer in record.own_names:
        return ((record.own_names[layer], None),)
    if record.diffusers_under_kohya and component(layer) == "unet":
        return tuple(
            (f"lora_unet_{name.replace('.', '_')}", rows)
            for name, rows in diffusers_layers(architecture_id, layer)
        ) or ((layer, None),)
    return ((layer, None),)


def _diffusers(architecture_id: str, layer: str) -> Parts:
    members = diffusers_layers(architecture_id, layer)
    prefix = ARCHITECTURES[architecture_id].place_in_pipeline(component(layer))
    if not members or prefix is None:
        raise UnsupportedError(
            "The diffusers dialect has no name for the layer {layer} of {model}. Write it in the kohya "
            "dialect.",
            layer,
            ARCHITECTURES[architecture_id].label,
        )
    return tuple((f"{prefix}.{name}", rows) for name, rows in members)


# Spellings that files are written in.
WRITTEN = {
    KOHYA: Written(KOHYA_STYLE, _kohya),
    COMFY: Written(PEFT_STYLE, _comfy),
    DIFFUSERS: Written(PEFT_STYLE, _diffusers),
}


def output_key(prefix: str, slot: str, dialect: str = "auto", style: str | None = None) -> str:
    """Key of one tensor.

    Args:
        prefix: Name that ``output_parts`` gave.
        slot: Ours.
        dialect: As given to ``output_parts``.
        style: As ``output_style`` gave it; that of the dialect by default.
    """
    chosen = style or (WRITTEN[dialect].style if dialect in WRITTEN else KOHYA_STYLE)
    return f"{prefix}.{ending_for(slot, chosen)}"
