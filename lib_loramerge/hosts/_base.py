"""What a record of a host says, and the pieces that records share.

All of it was read from the host's own code, at the version that its record states. ``tests/accepted_names``
holds the complete lists that this code gives; a test compares.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..models import ARCHITECTURES, canonical_path, component, diffusers_layers, layer_path

# --- Base models ---------------------------------------------------------------------------

SD = frozenset({"sd1", "sd2", "sdxl", "sdxl_refiner"})
SD3 = frozenset({"sd3", "sd3_large"})
FLUX = frozenset({"flux1", "chroma"})
ALL = frozenset(set(ARCHITECTURES) - {"unknown"})

# --- Names ---------------------------------------------------------------------------------

# A form of names: how they begin, and whose path follows, the checkpoint's or diffusers'. Where the
# beginning ends with an underscore, the dots of the path have become underscores too.
Form = tuple[str, str]
CHECKPOINT, DIFFUSERS = "checkpoint", "diffusers"
# diffusers spells the attention of a U-Net also by attention processors; not every host reads both.
PROCESSOR, ATTENTION = "processor", "attention"
# Any other spelling of the path that we read, such as that of the model's own code.
ALIAS = "alias"

PREFIXES = (
    "lora_unet_", "oft_unet_", "lora_prior_unet_", "lora_transformer_", "lycoris_", "diffusion_model.",
    "transformer.", "unet.base_model.model.", "unet.", "base_model.model.", "",
)  # fmt: skip
KOHYA, KOHYA_DIFFUSERS = ("lora_unet_", CHECKPOINT), ("lora_unet_", DIFFUSERS)
COMFY, COMFY_DIFFUSERS = ("diffusion_model.", CHECKPOINT), ("diffusion_model.", DIFFUSERS)
BARE, BARE_OWN = ("", DIFFUSERS), ("", CHECKPOINT)
PIPELINE, PIPELINE_OWN = ("transformer.", DIFFUSERS), ("transformer.", CHECKPOINT)
PEFT, PEFT_OWN = ("base_model.model.", DIFFUSERS), ("base_model.model.", CHECKPOINT)
LYCORIS, LYCORIS_OWN = ("lycoris_", DIFFUSERS), ("lycoris_", CHECKPOINT)
ONETRAINER = ("lora_transformer_", DIFFUSERS)


def forms(architecture: str, layer: str, name: str) -> set[Form]:
    """The forms that a name of a denoiser's layer has; none where it is not the layer's path by any.

    Args:
        layer: Canonical name.
        name: As a file has it, without the slot.
    """
    prefix = next(prefix for prefix in PREFIXES if name.startswith(prefix))
    rest = name[len(prefix) :]
    theirs = {_flat(path) for path, _ in diffusers_layers(architecture, layer)}
    if ".processor." in rest:
        flat = _flat(rest.replace(".processor.", "."))
        return {(prefix, PROCESSOR)} if theirs & {flat, f"{flat}_0"} else set()
    found = set()
    if _flat(rest) == layer_path(layer) or not layer.startswith("lora_"):
        found.add((prefix, CHECKPOINT))
    if _flat(rest) in theirs:
        apart = architecture in SD and ".to_" in rest
        found.add((prefix, ATTENTION if apart else DIFFUSERS))
    if not found and canonical_path(architecture, "unet", _flat(rest)) is not None:
        found.add((prefix, ALIAS))
    return found


def _flat(path: str) -> str:
    return path.replace(".", "_").replace("-", "_")


# Text encoder by component, to how names of its layers begin; "" stands for every base model not listed.
Encoders = Mapping[str, Mapping[str, tuple[str, ...]]]
ONE_CLIP = {"te": ("lora_te_", "lora_te1_", "text_encoder.")}
FIRST, SECOND = ("lora_te_", "lora_te1_", "text_encoder."), ("lora_te2_", "text_encoder_2.")
# A larger CLIP without a smaller one beside it.
CLIP_G_ALONE = ("lora_prior_te_", "lora_te2_text_projection")
COMFY_CLIPS: Encoders = {
    "sd1": ONE_CLIP,
    "sd2": ONE_CLIP,
    "sdxl": {"te1": FIRST, "te2": SECOND},
    "sdxl_refiner": {"te": ("lora_te_", "text_encoder.", *CLIP_G_ALONE)},
    "sd3": {"te1": FIRST, "te2": SECOND, "te3": ("lora_te3_",)},
    "sd3_large": {"te1": FIRST, "te2": SECOND, "te3": ("lora_te3_",)},
    "flux1": {"te1": FIRST, "te3": ("lora_te2_", "lora_te3_")},
    "chroma": {"te1": ("lora_te1_",), "te3": ("lora_te1_",)},
}
COMFY_ENCODERS: Encoders = {
    **COMFY_CLIPS,
    "stable_cascade": {"te": ("lora_te_", "text_encoder.", *CLIP_G_ALONE)},
    "wan": {},
    "auraflow": {},
    "": {"te": ("lora_te_",), "te1": FIRST, "te2": SECOND, "te3": ("lora_te3_",)},
}
T5_BY_ANY_NUMBER = ("lora_te1_", "lora_te2_", "lora_te3_")
FORGE_ENCODERS: Encoders = {
    **COMFY_CLIPS,
    "flux1": {"te1": FIRST, "te3": T5_BY_ANY_NUMBER},
    "chroma": {"te1": T5_BY_ANY_NUMBER, "te3": T5_BY_ANY_NUMBER},
    "sd3": {"te1": FIRST, "te2": SECOND, "te3": T5_BY_ANY_NUMBER},
    "sd3_large": {"te1": FIRST, "te2": SECOND, "te3": T5_BY_ANY_NUMBER},
}
# What ComfyUI's code and its copies know of a CLIP by the names of LoRAs.
CLIP_LEAVES = re.compile(
    r".*_(?:self_attn_(?:[qkv]|out)_proj|mlp_fc[12])|lora_te[12]_text_projection|lora_te_text_projection"
)


@dataclass(frozen=True)
class Host:
    """One program, as its own code was read.

    Attributes:
        id: How ``--for`` names it.
        label: What people call it.
        version: Release, empty where there is none.
        commit: The commit that it was read from, in short; empty for a release.
        base_models: Base models whose LoRAs it loads.
        names: Form of names to the base models whose denoiser it finds under them.
        encoders: Beginnings of the names of text encoders.
        comfy_encoders: The names that it knows in ``text_encoders.NAME.``; ``"*"`` is any.
        clip_in_part: Of a CLIP it finds attention and feed-forward alone.
        lost: Base model to names that its code loses although their form is right.
        dialects: Base model to the dialect that it reads best, where that is not the usual one.
        kohya_endings: It takes dotted names only with ``lora_up.weight`` and ``alpha``.
        kinds_missing: Adapter kinds it has no formula for.
        ignores: Our slots that it does not read.
        endings: Endings of ``up`` that it does not read.
        whole_layers: It reads layers stored whole (``diff``), norms and biases.
        unplaced_limit: It refuses a file with more tensors than this that it cannot place.
        lone_biases: It loads a file in which a bias stands alone.
        biases_beside: It applies a bias (diff_b) beside a low-rank change.
        lone_norms: It loads a file with ``w_norm`` but no ``b_norm``.
        lone_alphas: It loads a file in which an alpha stands alone.
        placed_share: It refuses a file of whose tensors it cannot place this share; 0 if it never does.
        embeddings: It loads a file with bundled embeddings.
        attention_as_one: It applies q, k, v and out of an OpenCLIP encoder only when the file has all four.
        control_adapters: It knows BFL's control adapters, which it converts as a whole.
        flattened_alone: It takes names only in kohya's spelling.
        without_alpha: Base models that it takes only in the diffusers spelling without alpha.
        diffusers_alone: Base models that it takes only in the diffusers spelling.
        alpha_needed: Base models of which kohya's spelling needs an alpha in each layer.
        denoiser_alone: Base models of which it loads no file that changes a text encoder too.
        new_glora: It computes GLoRA of the order of factors that LyCORIS 2 has.
        kinds_differ: Adapter kind to how it computes that otherwise than trainers.
    """

    id: str
    label: str
    version: str
    commit: str
    base_models: frozenset[str]
    names: Mapping[Form, frozenset[str]]
    encoders: Encoders
    comfy_encoders: frozenset[str] = frozenset()
    clip_in_part: bool = True
    lost: Mapping[str, re.Pattern[str]] = field(default_factory=dict)
    dialects: Mapping[str, str] = field(default_factory=dict)
    kohya_endings: frozenset[str] = frozenset()
    kinds_missing: frozenset[str] = frozenset()
    ignores: frozenset[str] = frozenset()
    endings: frozenset[str] = frozenset()
    whole_layers: bool = True
    unplaced_limit: int | None = None
    lone_biases: bool = True
    biases_beside: bool = True
    lone_norms: bool = True
    lone_alphas: bool = True
    placed_share: float = 0.0
    embeddings: bool = True
    attention_as_one: bool = False
    control_adapters: bool = True
    flattened_alone: bool = False
    without_alpha: frozenset[str] = frozenset()
    diffusers_alone: frozenset[str] = frozenset()
    alpha_needed: frozenset[str] = frozenset()
    denoiser_alone: frozenset[str] = frozenset()
    new_glora: bool = True
    kinds_differ: Mapping[str, str] = field(default_factory=dict)

    @property
    def read_from(self) -> str:
        """Release and commit, as people are shown them."""
        return ", ".join(word for word in (self.version, self.commit) if word)

    def finds(self, architecture: str, layer: str, name: str) -> bool:
        """Whether it finds a layer under a name.

        Args:
            layer: Canonical name.
            name: As a file has it, without the slot.
        """
        lost = self.lost.get(architecture)
        if architecture not in self.base_models or (lost is not None and lost.fullmatch(name)):
            return False
        if component(layer) != "unet":
            return self._finds_encoder(architecture, layer, name)
        found = forms(architecture, layer, name)
        return any(architecture in self.names.get(form, ()) for form in found)

    def _finds_encoder(self, architecture: str, layer: str, name: str) -> bool:
        if name.startswith("text_encoders."):
            return bool(self.comfy_encoders & {"*", name.split(".")[1]})
        if name == "lora_te_text_projection":
            return False  # Every host has its projections under a number.
        known = self.encoders.get(architecture, self.encoders.get("", {})).get(component(layer), ())
        clip = self.clip_in_part and "_text_" in layer
        return name.startswith(known) and not (clip and not CLIP_LEAVES.fullmatch(layer))

    def dialect(self, architecture: str) -> str:
        """The dialect to write for it."""
        return self.dialects.get(architecture, "auto")


RESIDUAL = frozenset({"bias", "bias_indices", "bias_values", "bias_size"})
OWN_LAYERS = frozenset({"up_bias", "down_bias", "magnitude"})
COMFY_IGNORES = RESIDUAL | OWN_LAYERS | {"scale", "scalar", "lokr_t1", "bm"}
A1111_IGNORES = OWN_LAYERS | (RESIDUAL - {"bias"}) | {"scalar", "lokr_t1", "bm"}
NO_FORMULA = frozenset({"ia3", "oft_diag"})
RAW_ENCODERS = frozenset({"clip_h", "clip_l", "clip_g", "t5xxl", "qwen3_06b"})

UNETS = {
    KOHYA_DIFFUSERS: SD, LYCORIS: SD,
    **{(prefix, kind): SD for prefix in ("", "unet.") for kind in (DIFFUSERS, PROCESSOR)},
}  # fmt: skip


def under(*tables: Mapping[Form, frozenset[str]]) -> dict[Form, frozenset[str]]:
    """One table of forms; base models of a form that is in several are added up."""
    result: dict[Form, frozenset[str]] = {}
    for table in tables:
        for form, models in table.items():
            result[form] = result.get(form, frozenset()) | models
    return result


def some(*names: str) -> frozenset[str]:
    return frozenset(names)


FLUX_FAMILY = FLUX | {"flux2", "longcat"}
# All of its family are looked for by Flux.1's diffusers names, and by the newer ones of its feed-forward.
ALIASES_OF_FLUX = tuple((prefix, ALIAS) for prefix in ("", "transformer.", "lycoris_", "lora_transformer_"))
ALIASES = tuple((prefix, ALIAS) for prefix in ("", "diffusion_model.", "transformer.", "lycoris_"))
# Norms of the Flux family are no ``weight`` there, and known by their dotted names with ``scale`` alone.
FLUX_NORMS = dict.fromkeys(FLUX_FAMILY, re.compile(r"(?:lora_unet_|diffusion_model\.).*(?:query|key)_norm"))
QKV_OF_LINEAR1 = r"diffusion_model\..*\.linear1_qkv"
NORMS_AND_QKV = {"flux1": re.compile(rf"{FLUX_NORMS['flux1'].pattern}|{QKV_OF_LINEAR1}")}
OUTSIDE_BLOCKS = re.compile(
    r"lora_unet_(?!(?:double|single)_blocks_).*|lycoris_(?!(?:single_)?transformer_blocks_).*|"
    r".*(?:query|key)_norm"
)
# diffusers' encoder of Stable Diffusion 2 ends one layer before the checkpoint's.
LAST_OF_CLIP_H = r"lora_te_text_model_encoder_layers_23_.*"
TEXT_PROJECTION = re.compile(r"lora_te[12]?_text_projection")

PIPELINES = frozenset({
    *SD, *SD3, *FLUX, "flux2", "hunyuan_video", "hunyuan_video15", "lumina2", "zimage", "qwen_image",
    "wan", "anima", "cosmos_predict2", "ltx_video", "ltx2", "auraflow", "hidream", "mochi", "ace_step15",
    "krea2", "ideogram4", "ernie_image", "kandinsky5",
})  # fmt: skip
SDNEXT_OWN = frozenset({*SD, *SD3, *FLUX, "flux2", "zimage", "anima", "ernie_image", "krea2"})
