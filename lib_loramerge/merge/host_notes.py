"""Which WebUI will leave out something of the file that a merge writes, and what can be done about it.

A merged file is written so that as many hosts as possible take all of it. Where that cannot
be, the plan says so before any work.

Source: the hosts' own loaders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import dialects
from ..errors import LoraMergeError
from ..hosts import HOSTS
from ..models import Architecture
from .host_target import Spelling, bias_alone

if TYPE_CHECKING:
    from .layout import LayerPlan

# Base models whose names A1111 takes in kohya's spelling alone.
_A1111 = HOSTS["a1111"]
_FLATTENED = _A1111.base_models - _A1111.without_alpha


def host_notes(
    architecture: Architecture,
    spelling: Spelling,
    host: str | None,
    layers: Sequence[LayerPlan],
    embeddings: int,
) -> list[str]:
    """Sentences for the plan's warnings.

    Args:
        spelling: In which the file will be written.
        host: The one that the file is for; what others make of it is then nobody's concern.
        embeddings: Number of bundled embedding tensors.
    """
    dialect = spelling.dialect
    if host is not None:
        if architecture.id == "unknown":
            return [
                f"The base model is not known, so neither is what {HOSTS[host].label} reads of this file. "
                "Names are kept as they are."
            ]
        beside = sum(layer.bias for layer in layers if layer.rank is not None and not bias_alone(layer))
        if host == "a1111" and beside:
            return [f"A bias (diff_b) changes too in {_layers(beside)}: A1111 ignores it."]
        return []
    notes = [*_spelling(architecture, dialect, layers), *_biases(architecture, dialect, layers)]
    whole = sum(layer.rank is None and not bias_alone(layer) for layer in layers)
    if whole and dialect == "diffusers":
        notes.append(
            f"{_layers(whole)} will be stored whole (diff, w_norm), which diffusers does not read from a "
            "LoRA. Use the kohya dialect, or a rank rule for those that have a rank."
        )
    limit = HOSTS["forge"].unplaced_limit or 0
    if embeddings > limit:
        notes.append(
            f"{embeddings} embedding tensors are kept; Forge refuses a LoRA with more than {limit} "
            "tensors that it does not know."
        )
    return [*notes, *_unread_by_diffusers(architecture, spelling, layers)]


def _unread_by_diffusers(
    architecture: Architecture, spelling: Spelling, layers: Sequence[LayerPlan]
) -> list[str]:
    """Said where a base model is mostly used in diffusers, which has no converter for kohya's names of it."""
    host = HOSTS["diffusers"]
    if spelling.dialect != "auto" or architecture.id not in host.base_models or architecture.id in _FLATTENED:
        return []
    for layer in layers:
        try:
            names = dialects.output_parts(architecture.id, layer.layer, spelling.dialect)
        except LoraMergeError:
            continue
        if not all(host.finds(architecture.id, layer.layer, name) for name, _ in names):
            return [
                "diffusers cannot read the names of this file; for diffusers write it with --for diffusers."
            ]
    return []


def _spelling(architecture: Architecture, dialect: str, layers: Sequence[LayerPlan]) -> list[str]:
    notes = []
    if dialect == "diffusers" and architecture.id in _FLATTENED:
        notes.append(
            "The diffusers dialect is for diffusers: A1111 cannot load its names for "
            f"{architecture.label}. For a WebUI use the dialect auto."
        )
    if architecture.id in ("sd3", "sd3_large"):
        if dialect == "diffusers":
            notes.append("Forge takes SD3 LoRAs only in the kohya dialect.")
        else:
            notes.append(
                "A1111 takes SD3 LoRAs only in the diffusers dialect (--dialect diffusers), Forge only in "
                "this one."
            )
    components = {layer.component for layer in layers}
    alone = [host.label for host in HOSTS.values() if architecture.id in host.denoiser_alone]
    if alone and "unet" in components and len(components) > 1:
        notes.append(
            f"{', '.join(alone)} does not load a {architecture.label} LoRA that changes a text encoder too; "
            "for it, merge once more with a text encoder strength of 0."
        )
    return notes


def _biases(architecture: Architecture, dialect: str, layers: Sequence[LayerPlan]) -> list[str]:
    """A1111 takes a bias only beside a whole weight, and refuses a file with one that stands alone."""
    if architecture.id not in _FLATTENED or dialect == "diffusers":
        return []
    notes = []
    low_rank = [layer for layer in layers if layer.rank is not None and not bias_alone(layer)]
    beside = sum(layer.bias for layer in low_rank)
    if beside:
        notes.append(f"A bias (diff_b) changes too in {_layers(beside)}: Forge applies it, A1111 ignores it.")
    alone = sum(bias_alone(layer) for layer in layers)
    if alone:
        notes.append(
            f"A bias alone changes in {_layers(alone)}, whose width is unknown: Forge applies that, "
            "A1111 refuses the whole file. With the base model (--base CHECKPOINT) both will load it."
        )
    return notes


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"
