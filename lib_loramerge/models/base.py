"""The facts about base models that every other table of this package is keyed by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from ..errors import IncompatibleError


@dataclass(frozen=True)
class Rows:
    """A part of a fused layer's output rows, counted in equal units.

    The rows of the source go, in their order, to the unit ranges ``parts`` of
    the ``of`` units of the whole layer. Shapes do not matter: a unit is as many
    rows as the source has, divided by the units it covers.

    Attributes:
        parts: Half-open unit ranges of the fused layer, in source order.
        of: Number of units in the fused layer.

    Examples:
        q of a fused qkv is ``Rows(((0, 1),), 3)``; a projection whose two
        halves are swapped is ``Rows(((1, 2), (0, 1)), 2)``.
    """

    parts: tuple[tuple[int, int], ...]
    of: int

    @property
    def units(self) -> int:
        """How many units the source covers."""
        return sum(stop - start for start, stop in self.parts)

    def spans(self, source_rows: int) -> tuple[tuple[tuple[int, int], ...], int]:
        """Row ranges of the fused layer that the source rows fill, and its total rows.

        Raises:
            IncompatibleError: The rows cannot be divided into the units.
        """
        unit, rest = divmod(source_rows, self.units)
        if rest or not unit:
            raise IncompatibleError(
                "{rows} output rows cannot be divided into the {parts} equal parts that this part of a "
                "fused layer has.",
                source_rows,
                self.units,
            )
        return tuple((start * unit, stop * unit) for start, stop in self.parts), self.of * unit

    def cut(self, total_rows: int) -> tuple[tuple[int, int], ...]:
        """Row ranges of the whole layer that belong to this part, in the part's own order.

        Raises:
            IncompatibleError: The rows cannot be divided into the units.
        """
        unit, rest = divmod(total_rows, self.of)
        if rest or not unit:
            raise IncompatibleError(
                "{rows} output rows cannot be divided into the {parts} equal parts of a fused layer.",
                total_rows,
                self.of,
            )
        return tuple((start * unit, stop * unit) for start, stop in self.parts)


Members = tuple[tuple[str, Rows | None], ...]


@dataclass(frozen=True)
class Names:
    """Layer names of one kind of diffusion transformer; ``{}`` stands for a block's number.

    Attributes:
        layers: Checkpoint path to its diffusers members. With several, diffusers splits what the
            checkpoint fuses, and each member says which output rows it is.
        aliases: Other spellings to checkpoint path, and the rows of it that they mean.
        shapes: Checkpoint path to the shape, as ``table.measure`` reads it.
        counts: Root of numbered blocks to their number: digits, or a dimension's name.
        parameters: Checkpoint paths of tensors that are no module's ``weight``. Hosts know these by
            their dotted names alone.
    """

    layers: Mapping[str, Members]
    aliases: Mapping[str, tuple[str, Rows | None]] = field(default_factory=dict)
    shapes: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, str] = field(default_factory=dict)
    parameters: frozenset[str] = frozenset()


@dataclass(frozen=True)
class UNet:
    """What distinguishes one U-Net of Stable Diffusion's family from another.

    Attributes:
        widths: Channel multiplier of each level, from the full resolution down.
        depths: Transformer blocks per attention of each level; 0 for no attention.
        middle: Transformer blocks of the middle attention.
        context: Channels that cross-attention reads.
        channels: Of the full resolution.
        convolution: ``proj_in`` and ``proj_out`` are 1 x 1 convolutions, not linear.
        labels: Has a ``label_emb`` (size and crop conditioning).
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    middle: int
    context: int
    channels: int = 320
    convolution: bool = False
    labels: bool = False


@dataclass(frozen=True)
class Size:
    """One size of a base model; LoRAs of two sizes do not fit together.

    Attributes:
        label: What people call it, empty for a model of one size.
        dims: What the shapes and counts of the model's names are written in.
        words: How metadata begin that name this size; underscores count as hyphens.
        base_model_version, modelspec: As of the architecture, where this size has its own.
    """

    label: str
    dims: Mapping[str, int]
    words: tuple[str, ...] = ()
    base_model_version: str = ""
    modelspec: str = ""


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of a base model.

    Attributes:
        kind: ``"clip"``, ``"t5"`` or ``"llama"``: which names its layers have.
        comfy: ComfyUI's name of it, in ``text_encoders.NAME.transformer.``.
        layers: Number of layers.
        width: Width that its attention reads.
        dotted: Hosts know its layers only by dotted names.
        places: What stands before its layers' names in checkpoints, in Hugging Face's layout.
        open_clip: The same in OpenCLIP's layout.
        sizes: Encoders of the base model's other sizes in its place: ComfyUI's name to width.
    """

    kind: str
    comfy: str
    layers: int
    width: int
    dotted: bool = False
    places: tuple[str, ...] = ("text_encoder.",)
    open_clip: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)


KOHYA, COMFY, DIFFUSERS = "kohya", "comfy", "diffusers"


@dataclass(frozen=True)
class Architecture:
    """One kind of base model: all that is known of it, in one record.

    Attributes:
        id: Our name, such as ``"sdxl"``.
        label: What people call it.
        base_model_version: Value of ``ss_base_model_version`` that kohya's trainer writes.
        modelspec: Value of ``modelspec.architecture`` before ``/lora``; empty when there is no agreed one.
        implementation: Value of ``modelspec.implementation``.
        v2: Value of ``ss_v2``; true for Stable Diffusion 2 only.
        resolution: Native resolution, as ``modelspec.resolution`` has it.
        prediction_type: ``"epsilon"``, or empty for flow models, which have no such field.
        text_encoders: Where the text encoder that a file calls ``te``, ``te1``, ``te2`` or ``te3`` belongs.
        words: How ``ss_base_model_version`` and ``modelspec.architecture`` begin that name it;
            underscores count as hyphens.
        names: Of the denoiser's layers, for diffusion transformers.
        unet: The denoiser's form, for the U-Nets of Stable Diffusion.
        sizes: Sizes of the denoiser; the first is the most usual.
        encoders: Text encoders by component.
        spelling: How its layers are written by default: ``KOHYA``, ``COMFY`` or ``DIFFUSERS``.
        pipeline: Where a diffusers pipeline keeps a component, where that is not the usual place.
        diffusers_under_kohya: Hosts expect the denoiser by its diffusers names under kohya's prefix.
        own_names: Canonical layer to the name that hosts know, where that is not the usual form.
        opaque: Layer names are kept as the file spells them, because no second spelling is known.
        blocks: Blocks of the block weights in order, of a diffusion transformer: ``BASE IN double_blocks:D
            OUT``. ``root:LETTERS`` is one block for each number after a root of layer names, ``|40`` a
            number of them that the sizes do not say, and what comes after ``+`` has no place in lists.
    """

    id: str
    label: str
    base_model_version: str = ""
    modelspec: str = ""
    implementation: str = ""
    v2: bool = False
    resolution: str = "1024x1024"
    prediction_type: str = ""
    text_encoders: Mapping[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    names: Names | None = None
    unet: UNet | None = None
    sizes: tuple[Size, ...] = ()
    encoders: Mapping[str, TextEncoder] = field(default_factory=dict)
    spelling: str = KOHYA
    pipeline: Mapping[str, str] = field(default_factory=dict)
    diffusers_under_kohya: bool = False
    own_names: Mapping[str, str] = field(default_factory=dict)
    opaque: bool = False
    blocks: str = ""

    def place_in_pipeline(self, part: str) -> str | None:
        """Name of a component in a diffusers pipeline; None where it has none."""
        return self.pipeline.get(part) or _PIPELINE.get(part)


# Where a diffusers pipeline keeps a component.
_PIPELINE = {
    "unet": "transformer", "te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2",
    "te3": "text_encoder_3",
}  # fmt: skip

ONE = {"te": "te", "te1": "te"}
TWO = {"te": "te1", "te1": "te1", "te2": "te2"}
THREE = {"te": "te1", "te1": "te1", "te2": "te2", "te3": "te3"}
CLIP_AND_T5 = {"te": "te1", "te1": "te1", "te2": "te3", "te3": "te3"}
T5_ALONE = {"te": "te1", "te1": "te1", "te2": "te1", "te3": "te1"}
CLIP_AFTER = {"te": "te", "te1": "te1", "te2": "te1"}
SAME = {"te": "te", "te1": "te", "te2": "te2", "te3": "te3"}

CLIP_L = TextEncoder("clip", "clip_l", 12, 768)
CLIP_G = TextEncoder("clip", "clip_g", 32, 1280)
SECOND_CLIP_G = replace(CLIP_G, places=("text_encoder_2.",))
T5_XXL = TextEncoder("t5", "t5xxl", 24, 4096)

COMPONENTS = ("unet", "te", "te1", "te2", "te3")

MANY_LAYERS = 1 << 14
"""Layers whose names are remembered with what they say: a plan asks for the same a dozen times for each."""

# Spellings of a text encoder at the start of a layer name that was kept as a file has it.
_VERBATIM_TEXT_ENCODERS = (
    ("lora_te1_", "te1"), ("lora_te2_", "te2"), ("lora_te3_", "te3"), ("lora_te_", "te"),
    ("lora_prior_te_", "te"), ("text_encoder_2.", "te2"), ("text_encoder_3.", "te3"),
    ("text_encoder.", "te1"), ("text_encoders.", "te"), ("clip_l.", "te1"), ("clip_g.", "te2"),
    ("t5.", "te3"),
)  # fmt: skip


@lru_cache(maxsize=MANY_LAYERS)
def component(layer: str) -> str:
    """Part of the base model that a layer is in: ``"unet"`` for any denoiser, else ``"te"`` to ``"te3"``."""
    if layer.startswith("lora_unet_"):
        return "unet"
    for prefix, name in _VERBATIM_TEXT_ENCODERS:
        if layer.startswith(prefix):
            return name
    return "unet"


def layer_name(part: str, path: str) -> str:
    """Canonical name of a layer: component and flattened checkpoint path."""
    return f"lora_{part}_{path}"


def layer_path(layer: str) -> str:
    """Flattened path of a canonical name, without its component; of a kept dotted name the whole."""
    if not layer.startswith("lora_"):
        return layer.replace(".", "_")
    return layer[len(component(layer)) + len("lora__") :]


_PREFIXES = (
    "model_diffusion_model_",
    "diffusion_model_",
    "base_model_model_",
    "transformer_",
    "unet_",
    "lycoris_",
)


def plain_path(layer: str) -> str:
    """Flattened path of a layer by any name that was kept, with its component where it is a text encoder."""
    part = component(layer)
    path = layer.replace(".", "_")
    for prefix in (f"lora_{part}_", "lora_transformer_", *_PREFIXES):
        if path.startswith(prefix):
            path = path[len(prefix) :]
            break
    return path if part == "unet" else f"{part}:{path}"
