"""Which base model a file was made for, found from its layers, their shapes and its metadata.

Every base model is tried: it fits a file as far as it has the file's layers, that many blocks, and their
widths. Where several fit equally, the metadata
choose among them, and never beyond them, because they are often wrong or copied.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from ..errors import Sentence, joined
from .base import Architecture, Size, UNet, component
from .compatible import fitting, groups_of, with_encoders
from .records import ARCHITECTURES
from .unet import UNETS, UNetLayer, by_any_name, widths


class Measured(NamedTuple):
    """A layer's shape as its tensors show it; None for what they leave open.

    Attributes:
        convolution: Its down factor has the axes of a kernel.
    """

    out: int | None
    in_: int | None
    convolution: bool | None = None


# A base model and one of its sizes; the size's label is empty where there is but one.
Model = tuple[str, str]


@dataclass(frozen=True)
class Detection:
    """The base model of a file, and the sentence that says how we know.

    Attributes:
        architecture: The most likely one.
        size: The base model's size, where the file shows it.
        candidates: Every model and size that the file fits, the most likely one first. Where there are
            several, its layers fit all of them.
    """

    architecture: Architecture
    reason: str
    size: Size | None = None
    candidates: tuple[Model, ...] = ()


class Layers:
    """The layers of one file, prepared for the tests below.

    Names may be spelled in any flattened way.
    """

    def __init__(self, layers: Mapping[str, Measured], called: Collection[str]):
        self.shapes = layers
        self.called = called
        self.denoiser: list[str] = []
        self.encoders: list[str] = []
        for name in layers:
            (self.denoiser if component(name) == "unet" else self.encoders).append(name)
        self._text = "\n".join(self.denoiser)

    def has(self, *needles: str) -> bool:
        """Some denoiser layer's name contains one of the texts."""
        return any(needle in self._text for needle in needles)

    def reads(self, pattern: str) -> int | None:
        """Input width of the first matching denoiser layer whose tensors show it."""
        widths = (self.shapes[name].in_ for name in self.denoiser if re.search(pattern, name))
        return next((width for width in widths if width), None)


_CONTEXT = {unet.context: name for name, unet in UNETS.items()}


def _context(layers: Layers) -> tuple[Architecture, str] | None:
    """The U-Net whose cross-attention reads as many channels."""
    context = layers.reads(r"_attn2_to_[kv]$")
    if context not in _CONTEXT:
        return None
    return ARCHITECTURES[_CONTEXT[context]], Sentence("cross-attention keys read {count} channels", context)


def _fitting_unets(layers: Layers) -> list[Architecture]:
    """The U-Nets that have most of the layers, at least half, and contradict the fewest of their widths."""
    paths = {_denoiser_path(name): layers.shapes[name] for name in layers.denoiser}
    found: dict[str, tuple[int, int]] = {}
    for name, unet in UNETS.items():
        known = by_any_name(name)
        members = [(known[path], shape) for path, shape in paths.items() if path in known]
        found[name] = -len(members), sum(_contradicts(unet, entry, shape) for entry, shape in members)
    best = min(found.values())
    if -best[0] * 2 < max(1, len(paths)):
        return []
    if best[1]:
        others, _ = fitting(groups_of(_widths(layers)))
        if others and (others[0].found, -others[0].contradicted) > (-best[0], -best[1]):
            return []
    return [ARCHITECTURES[name] for name, fit in found.items() if fit == best]


def _contradicts(unet: UNet, entry: UNetLayer, shape: Measured) -> int:
    """How much of a layer's shape a U-Net does not have: its widths, and whether it is a convolution."""
    pairs = zip(widths(unet, entry), shape[:2])
    wrong = sum(ours is not None and theirs is not None and ours != theirs for ours, theirs in pairs)
    if shape.convolution is not None and entry.ldm.endswith(("proj_in", "proj_out")):
        wrong += shape.convolution != unet.convolution
    return wrong


def _said(metadata: Mapping[str, str]) -> tuple[str, str, str] | None:
    """Base model and size that the metadata name, and the sentence that says so."""
    for key in ("ss_base_model_version", "modelspec.architecture"):
        value = str(metadata.get(key, ""))
        for start, name, size in _by_start():
            if value.lower().replace("_", "-").startswith(start):
                return name, size, Sentence("its metadata says {value}", repr(value))
    if str(metadata.get("ss_v2", "")).lower() == "true":
        return "sd2", "", Sentence("its metadata says version 2")
    return None


_CHECKPOINT = ("ss_sd_model_name", "base_model", "base_model_name_or_path")


def _trained_on(
    metadata: Mapping[str, str], fits: Sequence[tuple[Architecture, Size | None]]
) -> tuple[str, str, str] | None:
    """As :func:`_said`, of the checkpoint's name, where it has the words of one of these models alone."""
    for key in _CHECKPOINT:
        value = str(metadata.get(key, ""))
        name = re.split(r"[/\\]", value.lower().replace("_", "-"))[-1]
        found = {
            record.id: size.label if size is not None and _has_word(name, size.words) else ""
            for record, size in fits
            if _has_word(name, record.words) or (size is not None and _has_word(name, size.words))
        }
        if len(found) == 1:
            [(model, label)] = found.items()
            return model, label, Sentence("its metadata says that it was trained on {value}", repr(value))
    return None


def _has_word(name: str, words: Iterable[str]) -> bool:
    return any(re.search(rf"(?<![a-z]){re.escape(word)}", name) for word in words)


@cache
def _by_start() -> tuple[tuple[str, str, str], ...]:
    """Beginnings of metadata that name a model and a size, the longest first."""
    rows = [(word, record.id, "") for record in ARCHITECTURES.values() for word in record.words]
    rows += [
        (word, record.id, size.label)
        for record in ARCHITECTURES.values()
        for size in record.sizes
        for word in size.words
    ]
    return tuple(sorted(rows, key=lambda row: -len(row[0])))


def detect(
    layers: Mapping[str, Measured],
    metadata: Mapping[str, str] | None = None,
    base_model: str | None = None,
    encoders: Collection[str] = (),
) -> Detection:
    """Recognise the base model of a file.

    Args:
        layers: Flattened layer name, in any spelling and with a ``lora_unet_`` or
            ``lora_te..._`` prefix, to its shape as its tensors show it.
        metadata: The file's metadata, asked when names and shapes leave it open.
        base_model: A base model's id that overrules all of this.
        encoders: ComfyUI's names of text encoders, where the file has such.

    Returns:
        The architecture, ``unknown`` if nothing fits, and why.
    """
    metadata = metadata or {}
    prepared = Layers(layers, encoders)
    if base_model is not None:
        return _overruled(prepared, base_model)
    return (
        _as_unet(prepared, metadata)
        or _as_transformer(prepared, metadata)
        or _as_encoders(prepared, metadata)
        or _as_said(prepared, metadata)
        or Detection(ARCHITECTURES["unknown"], "neither its layer names nor its metadata are known to us")
    )


def _as_unet(layers: Layers, metadata: Mapping[str, str]) -> Detection | None:
    """The U-Nets come first because most files are for one, and nothing else has their names."""
    if not layers.denoiser or layers.has("lora_prior_unet_"):
        return None
    fits = _fitting_unets(layers)
    if not fits:
        return None
    by_context = _context(layers)
    if by_context is not None:
        record, reason = by_context
        return Detection(record, reason, candidates=((record.id, ""),))
    if layers.reads(r"_attn2_to_[kv]$"):
        return None
    encoders = with_encoders(_reading_widths(layers))
    fits = [record for record in fits if record in encoders] or fits
    # Names number the text encoders of a model that has several.
    parts = {component(name) for name in layers.encoders}
    fits = [record for record in fits if parts <= set(record.encoders)] or fits
    reason = Sentence("its layers and their widths are those of {models}", fits[0].label)
    return _chosen([(record, None) for record in fits], reason, metadata)


def _widths(layers: Layers) -> dict[str, tuple[int | None, int | None]]:
    return {_denoiser_path(name): layers.shapes[name][:2] for name in layers.denoiser}


def _denoiser_path(name: str) -> str:
    return name.removeprefix("lora_prior_unet_").removeprefix("lora_unet_")


def _reading_widths(layers: Layers) -> dict[str, int | None]:
    return {name.replace("lora_prior_te_", "lora_te_"): layers.shapes[name].in_ for name in layers.encoders}


def _as_transformer(layers: Layers, metadata: Mapping[str, str]) -> Detection | None:
    if not layers.denoiser:
        return None
    if layers.has("lora_prior_unet_"):
        return Detection(
            ARCHITECTURES["stable_cascade"], "it has layers of a prior", candidates=(("stable_cascade", ""),)
        )
    fits, total = fitting(groups_of(_widths(layers)))
    if not fits:
        return None
    encoders = with_encoders(_reading_widths(layers))
    fits = [fit for fit in fits if fit.architecture in encoders] or fits
    first = fits[0]
    if first.found < total:
        reason = Sentence(
            "{count} of its {total} layers are those of {models}",
            first.found,
            total,
            first.architecture.label,
        )
    elif first.contradicted:
        reason = Sentence("its layers are named as those of {models}", first.architecture.label)
    else:
        reason = Sentence("its layers and their widths are those of {models}", first.architecture.label)
    return _chosen([(fit.architecture, fit.size) for fit in fits], reason, metadata)


def _as_encoders(layers: Layers, metadata: Mapping[str, str]) -> Detection | None:
    """Base model of a file without a denoiser; several share their text encoders."""
    if layers.denoiser:
        return None
    fits = with_encoders(_reading_widths(layers), layers.called)
    if not fits:
        return None
    reason = Sentence("it changes text encoders alone, and {models} has these", fits[0].label)
    return _chosen([(record, size) for record in fits for size in record.sizes or (None,)], reason, metadata)


def _chosen(
    fits: list[tuple[Architecture, Size | None]], reason: str, metadata: Mapping[str, str]
) -> Detection:
    """The metadata's model of those that fit, or the first."""
    said = _said(metadata) or _trained_on(metadata, fits)
    if said is not None and len(fits) > 1:
        named = [fit for fit in fits if fit[0].id == said[0]]
        named = [fit for fit in named if fit[1] is not None and fit[1].label == said[1]] or named
        if named:
            others = {fit[0].id for fit in fits} - {said[0]}
            fits = named
            if others:
                reason = Sentence("{said}, and its layers fit {models}", said[2], named[0][0].label)
    names = list(dict.fromkeys(record.label for record, _ in fits))
    if len(names) > 1:
        reason = Sentence("its layers fit {models} alike", _listed(names))
    record, size = fits[0]
    alone = len([fit for fit in fits if fit[0] is record]) == 1
    return Detection(
        record,
        reason,
        size if alone else None,
        tuple((entry.id, entry_size.label if entry_size is not None else "") for entry, entry_size in fits),
    )


def _listed(names: list[str]) -> str:
    return joined(", ", names, " and ")


def _as_said(layers: Layers, metadata: Mapping[str, str]) -> Detection | None:
    """What the metadata say, where nothing contradicts them."""
    said = _said(metadata)
    if said is None:
        return None
    if layers.denoiser:
        return None
    return Detection(ARCHITECTURES[said[0]], said[2], candidates=((said[0], ""),))


def _overruled(layers: Layers, base_model: str) -> Detection:
    """The user's word."""
    record = ARCHITECTURES[base_model]
    size = None
    if record.names is not None and layers.denoiser:
        fits, _ = fitting(groups_of(_widths(layers)), (record,))
        sizes = [fit.size for fit in fits]
        size = sizes[0] if len(sizes) == 1 else None
        candidates = tuple((record.id, entry.label) for entry in sizes or record.sizes)
    else:
        candidates = tuple((record.id, entry.label) for entry in record.sizes) or ((record.id, ""),)
    return Detection(record, "as you chose", size, candidates)
