"""The facts about base models that every other table of this package is keyed by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
                f"{source_rows} output rows cannot be divided into the {self.units} equal parts "
                "that this part of a fused layer has."
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
                f"{total_rows} output rows cannot be divided into the {self.of} equal parts of a fused layer."
            )
        return tuple((start * unit, stop * unit) for start, stop in self.parts)


@dataclass(frozen=True)
class Architecture:
    """One kind of base model, as metadata and messages name it.

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
        opaque: Layer names are kept as the file spells them, because no second spelling is known.
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
    opaque: bool = False


_SGM = "https://github.com/Stability-AI/generative-models"
_BFL = "https://github.com/black-forest-labs/flux"
_ONE = {"te": "te", "te1": "te"}
_TWO = {"te": "te1", "te1": "te1", "te2": "te2"}
_THREE = {"te": "te1", "te1": "te1", "te2": "te2", "te3": "te3"}
_CLIP_AND_T5 = {"te": "te1", "te1": "te1", "te2": "te3", "te3": "te3"}
_SAME = {"te": "te", "te1": "te", "te2": "te2", "te3": "te3"}

_TABLE = (
    Architecture("sd1", "Stable Diffusion 1", "sd_v1", "stable-diffusion-v1",
                 "https://github.com/CompVis/stable-diffusion", resolution="512x512",
                 prediction_type="epsilon", text_encoders=_ONE),
    Architecture("sd2", "Stable Diffusion 2", "sd_v2", "stable-diffusion-v2-512",
                 "https://github.com/Stability-AI/stablediffusion", v2=True, resolution="512x512",
                 prediction_type="epsilon", text_encoders=_ONE),
    Architecture("sdxl", "Stable Diffusion XL", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", _SGM,
                 prediction_type="epsilon", text_encoders=_TWO),
    Architecture("sdxl_refiner", "Stable Diffusion XL refiner", "sdxl_refiner_v1-0",
                 "stable-diffusion-xl-v1-refiner", _SGM, prediction_type="epsilon",
                 text_encoders={"te": "te", "te1": "te", "te2": "te"}),
    Architecture("sd3", "Stable Diffusion 3 / 3.5 medium", "sd3_medium", "stable-diffusion-3-medium",
                 "https://github.com/Stability-AI/sd3.5", text_encoders=_THREE),
    Architecture("sd3_large", "Stable Diffusion 3.5 large", "sd3_5-large", "stable-diffusion-3-5-large",
                 "https://github.com/Stability-AI/sd3.5", text_encoders=_THREE),
    Architecture("flux1", "Flux.1", "flux1", "flux-1-dev", _BFL, text_encoders=_CLIP_AND_T5),
    Architecture("chroma", "Chroma", "chroma", "chroma", "https://huggingface.co/lodestones/Chroma",
                 text_encoders={"te": "te3", "te1": "te3", "te2": "te3", "te3": "te3"}),
    Architecture("flux2", "Flux.2", "flux2", "flux-2-dev", "https://github.com/black-forest-labs/flux2",
                 text_encoders=_SAME),
    Architecture("lumina2", "Lumina Image 2", "lumina2", "lumina-2",
                 "https://github.com/Alpha-VLLM/Lumina-Image-2.0", text_encoders=_SAME),
    Architecture("zimage", "Z-Image", "zimage", "z-image", "https://github.com/Tongyi-MAI/Z-Image",
                 text_encoders=_SAME),
    Architecture("qwen_image", "Qwen-Image", "qwen_image", "qwen-image",
                 "https://github.com/QwenLM/Qwen-Image", text_encoders=_SAME),
    Architecture("wan", "Wan 2", "wan", "wan2.1", "https://github.com/Wan-Video/Wan2.1",
                 resolution="", text_encoders=_SAME),
    Architecture("anima", "Anima", "anima", "anima", "https://huggingface.co/circlestone-labs/Anima",
                 text_encoders=_SAME),
    Architecture("hunyuan_image", "HunyuanImage 2.1", "hunyuan-image-2.1", "hunyuan-image-2.1",
                 "https://github.com/Tencent-Hunyuan/HunyuanImage-2.1", resolution="2048x2048",
                 text_encoders=_SAME),
    Architecture("hunyuan_video", "HunyuanVideo", "hunyuan_video", "hunyuan-video",
                 "https://github.com/Tencent-Hunyuan/HunyuanVideo", resolution="", text_encoders=_SAME),
    Architecture("hunyuan_dit", "HunyuanDiT", "hunyuan_dit", "hunyuan-dit", opaque=True),
    Architecture("stable_cascade", "Stable Cascade", "stable_cascade", "stable-cascade-v1-prior",
                 "https://github.com/Stability-AI/StableCascade", opaque=True),
    Architecture("auraflow", "AuraFlow", "auraflow", "auraflow", opaque=True),
    Architecture("pixart", "PixArt", "pixart", "pixart", opaque=True),
    Architecture("hidream", "HiDream", "hidream", "hidream", opaque=True),
    Architecture("mochi", "Mochi", "mochi", "mochi", opaque=True),
    Architecture("ace_step", "ACE-Step", "ace_step", "ace-step", opaque=True),
    Architecture("unknown", "unknown base model", opaque=True, resolution=""),
)  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {entry.id: entry for entry in _TABLE}

COMPONENTS = ("unet", "te", "te1", "te2", "te3")

# Spellings of a text encoder at the start of a layer name that was kept as a file has it.
_VERBATIM_TEXT_ENCODERS = (
    ("lora_te1_", "te1"), ("lora_te2_", "te2"), ("lora_te3_", "te3"), ("lora_te_", "te"),
    ("lora_prior_te_", "te"), ("text_encoder_2.", "te2"), ("text_encoder_3.", "te3"),
    ("text_encoder.", "te1"), ("text_encoders.", "te"), ("clip_l.", "te1"), ("clip_g.", "te2"),
    ("t5.", "te3"),
)  # fmt: skip


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
    """Flattened path of a canonical name, without its component."""
    return layer[len(component(layer)) + len("lora__") :]
