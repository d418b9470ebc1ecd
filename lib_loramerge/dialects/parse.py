"""From the keys of a file to layers and slots."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..adapters import measured
from ..errors import IncompatibleError, UnsupportedError
from ..models import (
    COMFY,
    Architecture,
    Detection,
    Model,
    Rows,
    Size,
    canonical_path,
    detect,
    encoder_part,
    fused,
    layer_name,
)
from .cloneofsimo import number_layers
from .refusals import refused
from .registry import DIALECTS, RawLayer
from .slots import ANYBODYS, DROPPED, KOHYA_STYLE, SLOTS, split_key, style_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """What a file says of one layer, or of some output rows of it.

    Attributes:
        layer: Canonical name.
        rows: The rows of the layer, when the file splits what the checkpoint fuses; None for all.
        slots: Our slot to the tensor's key in the file.
        spelling: The file's own name of the layer, for messages.
        take: The rows of what the file has that are this layer, where it joins several; None for all.
        joined: The layers that it joins, in order, each with the rows of it that are meant.
    """

    layer: str
    rows: Rows | None
    slots: Mapping[str, str]
    spelling: str
    take: Rows | None = None
    joined: tuple[tuple[str, Rows | None], ...] = ()


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
        dropped: Keys that every host leaves out.
        unlisted: Layers that the base model's table lacks; they keep the names that the file gives them.
        size: The base model's size, where the file shows it.
        candidates: Every model and size that the file fits.
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
    dropped: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()
    size: Size | None = None
    candidates: tuple[Model, ...] = ()


def parse_file(
    tensors: Mapping[str, Shape],
    metadata: Mapping[str, str] | None = None,
    *,
    where: str = "",
    base_model: str | None = None,
) -> ParsedFile:
    """Read the names of a file.

    A layer under two spellings has overlapping parts; whether they say the same is for
    the caller to find out, who can read their numbers.

    Args:
        tensors: Key to shape, as the header has them.
        metadata: The header's metadata.
        where: Name of the file, for messages.
        base_model: A base model's id that overrules what the file looks like.

    Raises:
        UnsupportedError: The file is of a kind that cannot be merged.
        IncompatibleError: A file has one tensor of a layer twice.
    """
    metadata = metadata or {}
    start = f"{where}: " if where else ""
    reading = _Reading(start)
    for key in tensors:
        reading.add(key)
    reading.drop_plain_weights()
    reading.refuse(tensors)
    layers = reading.layers
    if reading.numbered:
        layers = {**layers, **number_layers(reading.numbered, tensors, start)}
    detection = _detect(layers, tensors, metadata, base_model)
    unlisted: list[str] = []
    parts: list[Part] = []
    orphans: list[str] = []
    for spelling, raw in layers.items():
        if raw.slots.keys() == {"alpha"}:
            orphans.append(raw.slots["alpha"])
            continue
        joined = _joined(detection.architecture, raw, spelling)
        if joined:
            parts.extend(joined)
            continue
        place = _place(detection.architecture, raw, spelling)
        if place is None and _may_stay(detection.architecture, raw, spelling):
            place = spelling, None
            unlisted.append(spelling)
        if place is None:
            reading.unknown.extend(raw.slots.values())
        else:
            parts.append(Part(place[0], place[1], raw.slots, spelling))
    parts.sort(key=lambda part: (part.layer, part.rows.parts if part.rows is not None else ()))
    return ParsedFile(
        dialect=_dialect(layers),
        architecture=detection.architecture,
        reason=detection.reason,
        parts=tuple(parts),
        embeddings=reading.embeddings,
        unknown=tuple(reading.unknown),
        orphans=tuple(orphans),
        style=reading.style(),
        dropped=tuple(reading.dropped),
        unlisted=tuple(sorted(unlisted)),
        size=detection.size,
        candidates=detection.candidates,
    )


_COMPILED = re.compile(r"_orig_mod[._]|(?:^|(?<=\.))module\.")
_EMBEDDING = "bundle_emb."
_NAKED = "bare"
_PROCESSOR = re.compile(r"(?<!blocks)\.processor(?=\.)")
_XLABS = re.compile(r"(?:double|single)_blocks[._]\d+[._]processor[._]")

# They are an adapter's only beside slots of an adapter's own.
_PLAIN = ANYBODYS | {"alpha"}


class _Reading:
    """The layers of one file, while its keys come in."""

    def __init__(self, start: str):
        self.start = start
        self.layers: dict[str, RawLayer] = {}
        self.numbered: dict[str, dict[str, str]] = {}
        self.embeddings: dict[str, str] = {}
        self.unknown: list[str] = []
        self.dropped: list[str] = []
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
        if slot in DROPPED:
            self.dropped.append(key)
            return
        slots = self._slots.get(layer)
        if slots is None:
            slots = self._slots[layer] = self._open(layer)
        if slot in slots:
            raise IncompatibleError(
                "{start}{layer} has the same tensor twice, as {first} and as {second}. Remove one of them.",
                self.start,
                layer,
                slots[slot],
                key,
            )
        slots[slot] = key
        if slot == "up":
            self._endings[ending] = self._endings.get(ending, 0) + 1

    def _open(self, layer: str) -> dict[str, str]:
        """Slots of a layer that is met for the first time."""
        for index, dialect in enumerate(self._recent):
            found = dialect.locate(layer)
            if found is None or (dialect.name == _NAKED and _begins_otherwise(layer)):
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
        """Report plain model weights and biases as unknown keys."""
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

    def refuse(self, keys: Iterable[str]) -> None:
        """Stop at a file that is something else than a LoRA."""
        kind = refused(keys, self.unknown, len(self.layers) + len(self.numbered))
        if kind is not None:
            raise UnsupportedError("{start}{sentence}.", self.start, kind.sentence)

    def style(self) -> str:
        """The way this file spells most of its slots."""
        if not self._endings:
            return KOHYA_STYLE
        ending = max(self._endings, key=self._endings.__getitem__)
        return style_of(ending, any("alpha" in raw.slots for raw in self.layers.values()))


def _detect(
    layers: Mapping[str, RawLayer],
    tensors: Mapping[str, Shape],
    metadata: Mapping[str, str],
    base_model: str | None,
) -> Detection:
    shapes = {
        layer_name(raw.part, raw.path): measured({slot: tensors[key] for slot, key in raw.slots.items()})
        for raw in layers.values()
    }
    encoders = {name for name in map(_encoder, layers) if name is not None}
    detection = detect(shapes, metadata, base_model, encoders)
    if detection.architecture.id == "unknown":
        # Some tool may have changed the case of the names; no two layers differ in that alone.
        lower = {name.lower(): shape for name, shape in shapes.items()}
        detection = detect(lower, metadata, base_model, encoders)
    return detection


def _encoder(spelling: str) -> str | None:
    """ComfyUI's name of the text encoder that a layer is in; None where its name does not say."""
    root, _, rest = spelling.partition(".")
    name = rest.partition(".")[0]
    return name if root == "text_encoders" and name not in ("transformer", "model") else None


def _begins_otherwise(layer: str) -> bool:
    """Whether a name that could stand without a prefix has the prefix of some other dialect."""
    return any(entry.locate(layer) is not None for name, entry in DIALECTS.items() if name != _NAKED)


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
    part: str | None = "unet"
    if not raw.part.endswith("unet"):
        part = encoder_part(architecture, raw.part.removeprefix("prior_"), raw.path)
    if part is None:
        return None
    found = canonical_path(architecture.id, part, raw.path)
    found = found or canonical_path(architecture.id, part, raw.path.lower())
    return (layer_name(part, found[0]), found[1]) if found is not None else None


def _joined(architecture: Architecture, raw: RawLayer, spelling: str) -> list[Part]:
    """The layers that one name of a file joins, as diffusers does when it fuses projections."""
    if not raw.part.endswith("unet"):
        return []
    found = fused(architecture.id, raw.path)
    layers = tuple((layer_name("unet", path), rows) for path, rows, _ in found)
    return [
        Part(name, rows, raw.slots, spelling, take, layers)
        for (name, rows), (_, _, take) in zip(layers, found, strict=True)
    ]


# Names that hosts look for whatever the layer is, as long as the model has it.
_GENERIC = ("diffusion_model.", "text_encoders.", "lora_unet_", "lora_prior_unet_")


def _may_stay(architecture: Architecture, raw: RawLayer, spelling: str) -> bool:
    """Whether a layer that is not in the base model's table may keep the name that its file gives it.

    Models have relatives with more layers. Such a name is written as it came, never another one.
    """
    if architecture.names is None:
        return False
    return spelling.startswith(_GENERIC) or (raw.dialect == "bare" and architecture.spelling == COMFY)


def overlap(first: Rows | None, second: Rows | None) -> bool:
    """Whether two parts of one layer claim the same rows of it."""
    if first is None or second is None or first.of != second.of:
        return True
    return any(a < d and c < b for a, b in first.parts for c, d in second.parts)


def _dialect(layers: Mapping[str, RawLayer]) -> str:
    """The dialect of most layers of the denoiser, or of all if there is no denoiser."""
    denoiser = [raw.dialect for raw in layers.values() if raw.part.endswith("unet")]
    counts = Counter(denoiser or [raw.dialect for raw in layers.values()])
    return counts.most_common(1)[0][0] if counts else "kohya"
