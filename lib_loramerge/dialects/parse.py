"""From the keys of a file to layers and slots."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from ..architectures import Architecture, Detection, Rows, canonical_path, detect, layer_name
from ..errors import IncompatibleError, UnsupportedError
from .cloneofsimo import number_layers
from .refusals import refusals
from .registry import DIALECTS, RawLayer
from .slots import KOHYA_STYLE, SLOTS, split_key, style_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """What a file says of one layer, or of some output rows of it.

    Attributes:
        layer: Canonical name.
        rows: The rows of the layer, when the file splits what the checkpoint fuses; None for all.
        slots: Our slot to the tensor's key in the file.
        spelling: The file's own name of the layer, for messages.
    """

    layer: str
    rows: Rows | None
    slots: Mapping[str, str]
    spelling: str


@dataclass(frozen=True)
class ParsedFile:
    """The layers of a file, under the names that all files of its base model share.

    Attributes:
        dialect: Name in ``DIALECTS``.
        architecture: The base model.
        reason: How we know it.
        parts: Sorted by layer, members of a fused layer in row order.
        embeddings: Bundled embedding's name to its key.
        unknown: Keys that nobody understands; the caller refuses or lists them.
        orphans: Keys of layers that have nothing but an ``alpha``; they change nothing.
        style: How the file spells its slots, to write the layers of an opaque base model again.
    """

    dialect: str
    architecture: Architecture
    reason: str
    parts: tuple[Part, ...]
    embeddings: Mapping[str, str]
    unknown: tuple[str, ...]
    orphans: tuple[str, ...]
    style: str


def parse_file(
    tensors: Mapping[str, Shape], metadata: Mapping[str, str] | None = None, *, where: str = ""
) -> ParsedFile:
    """Read the names of a file.

    Args:
        tensors: Key to shape, as the header has them.
        metadata: The header's metadata.
        where: Name of the file, for messages.

    Raises:
        UnsupportedError: The file is of a kind that cannot be merged.
        IncompatibleError: One layer is there twice, under two spellings.
    """
    metadata = metadata or {}
    start = f"{where}: " if where else ""
    reading = _Reading(start)
    for key in tensors:
        reading.add(key)
    reading.drop_plain_weights()
    reading.refuse()
    layers = reading.layers
    if reading.numbered:
        layers = {**layers, **number_layers(reading.numbered, tensors, start)}
    detection = _detect(layers, tensors, metadata)
    parts: list[Part] = []
    orphans: list[str] = []
    for spelling, raw in layers.items():
        if raw.slots.keys() == {"alpha"}:
            orphans.append(raw.slots["alpha"])
            continue
        place = _place(detection.architecture, raw, spelling)
        if place is None:
            reading.unknown.extend(raw.slots.values())
        else:
            parts.append(Part(place[0], place[1], raw.slots, spelling))
    parts.sort(key=lambda part: (part.layer, part.rows.parts if part.rows is not None else ()))
    _refuse_twice(parts, start)
    return ParsedFile(
        dialect=_dialect(layers),
        architecture=detection.architecture,
        reason=detection.reason,
        parts=tuple(parts),
        embeddings=reading.embeddings,
        unknown=tuple(reading.unknown),
        orphans=tuple(orphans),
        style=reading.style(),
    )


_COMPILED = re.compile(r"_orig_mod[._]|(?:^|(?<=\.))module\.")
_EMBEDDING = "bundle_emb."
_PROCESSOR = re.compile(r"(?<!blocks)\.processor(?=\.)")
_XLABS = re.compile(r"(?:double|single)_blocks[._]\d+[._]processor[._]")

# Slots that whole models have too. They are an adapter's only beside slots of an adapter's own.
_PLAIN = frozenset({"ia3_weight", "bias", "scale", "alpha"})


class _Reading:
    """The layers of one file, while its keys come in."""

    def __init__(self, start: str):
        self.start = start
        self.layers: dict[str, RawLayer] = {}
        self.numbered: dict[str, dict[str, str]] = {}
        self.embeddings: dict[str, str] = {}
        self.unknown: list[str] = []
        self._endings: dict[str, int] = {}
        self._slots: dict[str, dict[str, str]] = {}
        self._strangers: dict[str, dict[str, str]] = {}
        self._recent = list(DIALECTS.values())

    def add(self, key: str) -> None:
        """Take one key."""
        name = _COMPILED.sub("", key) if "_orig_mod" in key or "module." in key else key
        layer, _, ending = name.partition(".")
        slot = SLOTS.get(ending)
        if slot is None:
            split = split_key(name)
            if name.startswith(_EMBEDDING):
                self.embeddings[name[len(_EMBEDDING) :]] = key
                return
            if split is None:
                self.unknown.append(key)
                return
            layer, slot, ending = split
        slots = self._slots.get(layer)
        if slots is None:
            slots = self._slots[layer] = self._open(layer)
        if slot in slots:
            raise IncompatibleError(
                f"{self.start}{layer} has the same tensor twice, as {slots[slot]} and as {key}. "
                "Remove one of them."
            )
        slots[slot] = key
        if slot == "up":
            self._endings[ending] = self._endings.get(ending, 0) + 1

    def _open(self, layer: str) -> dict[str, str]:
        """Slots of a layer that is met for the first time."""
        for index, dialect in enumerate(self._recent):
            found = dialect.locate(layer)
            if found is None:
                continue
            if index:
                # The next layer of a file is nearly always of the same dialect.
                self._recent.insert(0, self._recent.pop(index))
            if dialect.name == "cloneofsimo":
                return self.numbered.setdefault(layer, {})
            spelling = _without_processor(layer)
            raw = self.layers.get(spelling)
            if raw is None:
                raw = self.layers[spelling] = RawLayer(dialect.name, found[0], _flatten(found[1]))
            return raw.slots
        return self._strangers.setdefault(layer, {})

    def drop_plain_weights(self) -> None:
        """Move tensors that are no adapter's to the unknown ones: weights and biases of a model."""
        for strangers in self._strangers.values():
            self.unknown.extend(strangers.values())
        for spelling in list(self.layers):
            slots = self.layers[spelling].slots
            if "ia3_weight" in slots and "on_input" not in slots:
                self.unknown.append(slots.pop("ia3_weight"))
            if "bias" in slots and slots.keys() <= _PLAIN:
                self.unknown.append(slots.pop("bias"))
            if not slots:
                del self.layers[spelling]

    def refuse(self) -> None:
        """Stop at a file that is something else than a LoRA."""
        found = refusals(self.unknown)
        if sum(len(refusal.keys) for refusal in found) >= max(1, len(self.layers) + len(self.numbered)):
            raise UnsupportedError(f"{self.start}{found[0].sentence}.")

    def style(self) -> str:
        """The way this file spells most of its slots."""
        if not self._endings:
            return KOHYA_STYLE
        ending = max(self._endings, key=self._endings.__getitem__)
        return style_of(ending, any("alpha" in raw.slots for raw in self.layers.values()))


def _detect(
    layers: Mapping[str, RawLayer], tensors: Mapping[str, Shape], metadata: Mapping[str, str]
) -> Detection:
    shapes = {
        layer_name(raw.part, raw.path): {slot: tensors[key] for slot, key in raw.slots.items()}
        for raw in layers.values()
    }
    detection = detect(shapes, metadata)
    if detection.architecture.id == "unknown":
        # Some tool may have changed the case of the names; no two layers differ in that alone.
        lower = {name.lower(): slots for name, slots in shapes.items()}
        detection = detect(lower, metadata)
    return detection


def _without_processor(layer: str) -> str:
    """Name of the layer under an attention processor of early diffusers."""
    if not layer.endswith("_lora") or _XLABS.search(layer):
        return layer
    return _PROCESSOR.sub("", layer[: -len("_lora")])


def _flatten(path: str) -> str:
    return _without_processor(path).replace(".", "_").replace("-", "_").lstrip("_")


def _place(architecture: Architecture, raw: RawLayer, spelling: str) -> tuple[str, Rows | None] | None:
    """Canonical name of a layer and its rows; None if this base model has no such layer."""
    if architecture.opaque:
        return spelling, None
    part: str | None = raw.part
    if raw.part != "unet":
        part = architecture.text_encoders.get(raw.part)
        if raw.path.startswith("encoder_block_") and "te3" in architecture.text_encoders.values():
            # OneTrainer calls the T5 of Flux te2, and its layers tell.
            part = "te3"
    if part is None:
        return None
    path = raw.path
    if part != "unet" and path.startswith("transformer_model_"):
        path = path[len("transformer_model_") :]
    found = canonical_path(architecture.id, part, path) or canonical_path(architecture.id, part, path.lower())
    return (layer_name(part, found[0]), found[1]) if found is not None else None


def _refuse_twice(parts: list[Part], start: str) -> None:
    for before, after in pairwise(parts):
        if before.layer == after.layer and _overlap(before.rows, after.rows):
            raise IncompatibleError(
                f"{start}one layer is there twice, as {before.spelling} and as {after.spelling}. "
                "Remove one of the two, or load each in a file of its own."
            )


def _overlap(first: Rows | None, second: Rows | None) -> bool:
    if first is None or second is None or first.of != second.of:
        return True
    return any(a < d and c < b for a, b in first.parts for c, d in second.parts)


def _dialect(layers: Mapping[str, RawLayer]) -> str:
    """The dialect of most layers of the denoiser, or of all if there is no denoiser."""
    denoiser = [raw.dialect for raw in layers.values() if raw.part.endswith("unet")]
    counts = Counter(denoiser or [raw.dialect for raw in layers.values()])
    return counts.most_common(1)[0][0] if counts else "kohya"
