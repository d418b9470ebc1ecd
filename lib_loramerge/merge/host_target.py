"""What a file must be like for the program that it is written for: its spelling, and what it leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import dialects
from ..dialects.slots import KOHYA_STYLE
from ..errors import LoraMergeError, Sentence, UnsupportedError, counted
from ..hosts import HOSTS, Host
from ..models import COMFY, Architecture

if TYPE_CHECKING:
    from .layout import LayerPlan

Embeddings = dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Spelling:
    """How names and slots are spelled.

    Attributes:
        style: As ``dialects.output_key`` takes it; None for the dialect's own.
    """

    dialect: str
    style: str | None


def spelling_for(name: str | None, dialect: str, architecture: Architecture, style: str) -> Spelling:
    """The spelling of a dialect, or the one that a host reads best where the dialect was not chosen.

    Args:
        name: The host, if the file is for one.
        style: Of the first input, kept for base models whose names are kept.

    Raises:
        UnsupportedError: The host has no such base model.
    """
    kept = style if architecture.opaque else None
    if name is None or architecture.id == "unknown":
        return Spelling(dialect, kept)
    host = HOSTS[name]
    if architecture.id not in host.base_models:
        others = [other.label for other in HOSTS.values() if architecture.id in other.base_models]
        known = (
            Sentence("These load it: {hosts}.", ", ".join(others))
            if others
            else Sentence("No program is known to load it.")
        )
        raise UnsupportedError(
            "{host} has no {model}. {others} Write the file for another program, or for any.",
            host.label,
            architecture.label,
            known,
        )
    dialect = host.dialect(architecture.id) if dialect in ("auto", COMFY) else dialect
    if dialect == "diffusers" and architecture.id in host.kohya_endings:
        kept = KOHYA_STYLE
    return Spelling(dialect, kept)


def for_the_host(
    name: str | None,
    spelling: Spelling,
    architecture: Architecture,
    layers: Sequence[LayerPlan],
    embeddings: Embeddings,
) -> tuple[tuple[LayerPlan, ...], Embeddings, list[str]]:
    """The layers and embeddings that the host loads, and a sentence for each kind of thing left out.

    Raises:
        UnsupportedError: It would load nothing of the file.
    """
    if name is None or architecture.id == "unknown":
        return tuple(layers), embeddings, []
    host, kept = HOSTS[name], []
    dropped: dict[str, list[str]] = {}
    alone = architecture.id in host.denoiser_alone and any(x.component == "unet" for x in layers)
    for layer in layers:
        why = _why_not(host, spelling, architecture.id, layer)
        if alone and layer.component != "unet":
            why = Sentence(
                "{host} loads no {model} LoRA that changes a text encoder too", host.label, architecture.label
            )
        if why is None:
            kept.append(layer)
        else:
            dropped.setdefault(why, []).append(layer.layer)
    texts: list[str] = [
        Sentence("{layers} left out: {why}.", some_layers(names), why) for why, names in dropped.items()
    ]
    if not kept:
        # Where several base models fit, the names depend on which it is.
        known = architecture.base_model_version
        hint = "" if known else Sentence(" Or name the base model (--base-model NAME).")
        raise UnsupportedError(
            "Nothing of this can be loaded by {host}. {why}{hint}", host.label, texts[0], hint
        )
    if host.unplaced_limit is not None and len(embeddings) > host.unplaced_limit:
        texts.append(
            Sentence(
                "{count} embedding tensors left out: {host} refuses a LoRA with more than {most} tensors "
                "that it does not know.",
                len(embeddings),
                host.label,
                host.unplaced_limit,
            )
        )
        embeddings = {}
    if embeddings and not host.embeddings:
        texts.append(
            counted(
                len(embeddings),
                "{count} embedding tensor left out: {host} refuses a LoRA with embeddings.",
                "{count} embedding tensors left out: {host} refuses a LoRA with embeddings.",
                host.label,
            )
        )
        embeddings = {}
    return tuple(kept), embeddings, texts


def _why_not(host: Host, spelling: Spelling, architecture: str, layer: LayerPlan) -> str | None:
    """Why a host does not load a layer as it would be written; None if it does."""
    whole = layer.rank is None or layer.vector or bias_alone(layer)
    if whole and not host.whole_layers:
        return Sentence("{host} reads no layer stored whole (diff, w_norm, diff_b) from a LoRA", host.label)
    if bias_alone(layer) and not host.lone_biases:
        return Sentence("{host} refuses a file in which a bias stands alone", host.label)
    try:
        names = dialects.output_parts(architecture, layer.layer, spelling.dialect)
    except LoraMergeError:
        return Sentence("{host} has no name for such layers", host.label)
    lost = [name for name, _ in names if not host.finds(architecture, layer.layer, name)]
    return Sentence("{host} does not look for such names", host.label) if lost else None


def bias_alone(layer: LayerPlan) -> bool:
    """Whether only a layer's bias changes, and its width is unknown."""
    return layer.in_ == 0 and not layer.vector


def some_layers(names: Sequence[str]) -> str:
    """How many there are, and one of them."""
    return counted(
        len(names), "{count} layer (such as {layer})", "{count} layers (such as {layer})", names[0]
    )
