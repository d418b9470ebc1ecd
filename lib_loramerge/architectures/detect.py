"""Which base model a file was made for, told from its layer names and shapes.

Names alone decide between families; where families share names, a width does.
Metadata is asked last, because it is often wrong or copied.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from .base import ARCHITECTURES, Architecture, component, layer_path
from .dit import resolve

Shape = tuple[int, ...]
Slots = Mapping[str, Shape]


@dataclass(frozen=True)
class Detection:
    """The base model of a file, and the sentence that says how we know."""

    architecture: Architecture
    reason: str


def in_features(slots: Slots) -> int | None:
    """Input width of a linear layer, from an adapter of any kind; None if its tensors do not tell."""
    width = _width(slots, "down", 1) or _width(slots, "hada_w1_b", 1) or _width(slots, "diff", 1)
    if width:
        return width
    outer = _width(slots, "lokr_w1", 1) or _width(slots, "lokr_w1_b", 1)
    inner = _width(slots, "lokr_w2", 1) or _width(slots, "lokr_w2_b", 1)
    if outer and inner:
        return outer * inner
    return _glora_widths(slots)[1]


def out_features(slots: Slots) -> int | None:
    """Output width of a layer, like :func:`in_features`."""
    width = (
        _width(slots, "up", 0)
        or _width(slots, "hada_w1_a", 1 if "hada_t1" in slots else 0)
        or _width(slots, "diff", 0)
    )
    if width:
        return width
    outer = _width(slots, "lokr_w1", 0) or _width(slots, "lokr_w1_a", 0)
    inner = _width(slots, "lokr_w2", 0) or _width(slots, "lokr_w2_a", 1 if "lokr_t2" in slots else 0)
    if outer and inner:
        return outer * inner
    blocks = slots.get("oft_blocks") or slots.get("oft_diag")
    if blocks and len(blocks) >= 3:
        return blocks[-3] * blocks[-2]
    return _glora_widths(slots)[0]


def _width(slots: Slots, slot: str, axis: int) -> int | None:
    shape = slots.get(slot)
    return shape[axis] if shape is not None and len(shape) > axis else None


def _glora_widths(slots: Slots) -> tuple[int | None, int | None]:
    """(out, in) of a GLoRA layer; its two generations store the factors in opposite orders."""
    shapes = [slots.get(name, ()) for name in ("a1", "a2", "b1", "b2")]
    if any(len(shape) < 2 for shape in shapes):
        return None, None
    a1, a2, b1, b2 = shapes
    if b1[1] == b2[0] == a1[1] == a2[0]:
        return b1[0], b2[1]
    return b2[0], b1[1]


class Layers:
    """The layers of one file, prepared for the tests below.

    Names may be spelled in any flattened way; slots may be of any adapter kind.
    """

    def __init__(self, layers: Mapping[str, Slots]):
        self.slots = layers
        self.denoiser: list[str] = []
        self.encoders: list[str] = []
        for name in layers:
            (self.denoiser if component(name) == "unet" else self.encoders).append(name)
        self._text = "\n".join(self.denoiser)

    def has(self, *needles: str) -> bool:
        """Some denoiser layer's name contains one of the texts."""
        return any(needle in self._text for needle in needles)

    def search(self, pattern: str) -> bool:
        """Some denoiser layer's name matches."""
        return re.search(pattern, self._text, re.MULTILINE) is not None

    def highest(self, root: str) -> int:
        """Highest block number after ``root``; -1 if there is none."""
        return max((int(n) for n in re.findall(rf"unet_{root}_(\d+)_", self._text)), default=-1)

    def width(self, pattern: str, measure: Callable[[Slots], int | None] = in_features) -> int | None:
        """Width of the first denoiser layer that matches and whose tensors tell it."""
        return _first_width(self.slots, self.denoiser, pattern, measure)

    def encoder_width(self, pattern: str) -> int | None:
        """Input width of the first matching text encoder layer."""
        return _first_width(self.slots, self.encoders, pattern, in_features)


def _first_width(
    slots: Mapping[str, Slots], names: Iterable[str], pattern: str, measure: Callable[[Slots], int | None]
) -> int | None:
    for name in names:
        if re.search(pattern, name):
            width = measure(slots[name])
            if width:
                return width
    return None


# Layers of a Flux-like transformer that read its hidden width.
_HIDDEN = (
    r"(?:img|txt)_attn_(?:qkv|proj)$|_attn_to_[qkv]$|_attn_add_[qkv]_proj$|_linear1$|_(?:img|txt)_mlp_(?:0|fc1)$|"
    r"_mod_lin(?:ear)?$|modulation_lin(?:ear)?$|_qkv_lora\d?$|_proj_mlp$|_norm1_linear$|_to_out_0$"
)


def _flux_like(layers: Layers, metadata: Mapping[str, str]) -> tuple[str, str] | None:
    if layers.has("double_stream_modulation", "single_stream_modulation", "to_qkv_mlp_proj", "ff_linear_in"):
        return "flux2", "its blocks share their modulation, as those of Flux.2 do"
    if layers.has("distilled_guidance_layer"):
        return "chroma", "it has a distilled guidance layer"
    flux_blocks = layers.has("double_blocks_", "single_blocks_")
    if not flux_blocks and not layers.has("single_transformer_blocks_"):
        return None
    if layers.has("joint_transformer_blocks_", "double_stream_blocks"):
        return None
    hidden = layers.width(_HIDDEN)
    return (
        _flux2_by_width(layers, hidden)
        or _hunyuan(layers, hidden, flux_blocks)
        or _flux1_or_chroma(layers, metadata)
    )


def _flux2_by_width(layers: Layers, hidden: int | None) -> tuple[str, str] | None:
    if hidden in (4096, 6144):
        return "flux2", f"double and single blocks of width {hidden}"
    wide = layers.width(r"single_blocks_\d+_linear1$")
    rows = layers.width(r"single_blocks_\d+_linear1$", out_features)
    if wide and rows == 9 * wide:
        return "flux2", "linear1 of the single blocks has nine times as many rows as columns"
    return None


def _hunyuan(layers: Layers, hidden: int | None, flux_blocks: bool) -> tuple[str, str] | None:
    if hidden == 3584:
        return "hunyuan_image", "double and single blocks of width 3584"
    if layers.has("individual_token_refiner", "token_refiner_refiner_blocks"):
        return "hunyuan_video", "it has a token refiner"
    if layers.search(r"(?:img|txt)_mlp_fc[12]$|(?:img|txt)_mod_linear$|_modulation_linear$"):
        return "hunyuan_video", "double blocks with fc1 and fc2, of width 3072"
    roots = (
        ("double_blocks", "single_blocks")
        if flux_blocks
        else ("transformer_blocks", "single_transformer_blocks")
    )
    if layers.highest(roots[0]) > 18 or layers.highest(roots[1]) > 37:
        return "hunyuan_video", "it has more blocks than Flux.1, which has 19 double and 38 single ones"
    return None


def _flux1_or_chroma(layers: Layers, metadata: Mapping[str, str]) -> tuple[str, str]:
    if layers.has(
        "_mod_lin", "modulation_lin", "norm1_linear", "norm1_context_linear", "guidance_in", "vector_in"
    ):
        return "flux1", "double and single blocks with their own modulation"
    said = _from_metadata(metadata)
    if said is not None and said[0] == "chroma":
        return "chroma", f"double and single blocks; {said[1]}"
    return "flux1", "double and single blocks"


# Layers of a joint transformer block that read its hidden width.
_JOINT_HIDDEN = (
    r"_attn2?_(?:qkv|proj|to_[qkv]|to_out_0)$|_attn_add_[qkv]_proj$|"
    r"adaLN_modulation_1$|norm1_linear$|_mlp_fc1$"
)


def _joint(layers: Layers, metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """Transformers whose blocks attend to picture and text together."""
    if layers.has("img_mlp_net_", "_img_mod_1", "_txt_mod_1"):
        return "qwen_image", "its blocks have img_mlp and txt_mlp"
    native = layers.has("joint_blocks_")
    diffusers = layers.search(
        r"unet_transformer_blocks_\d+_attn_(?:to_[qkv]|add_[qkv]_proj|to_add_out|to_out)"
    )
    if not (native or diffusers):
        return None
    hidden = layers.width(_JOINT_HIDDEN)
    if native or hidden in (1536, 2432):
        large = hidden == 2432 or (hidden is None and layers.highest("joint_blocks") > 23)
        width = f" of width {hidden}" if hidden else ""
        return ("sd3_large" if large else "sd3"), f"joint blocks{width}"
    if hidden in (3072, None) and layers.search(r"attn_add_[qkv]_proj|attn_to_add_out|ff_context"):
        if layers.has("_ff_net_", "ff_context") or 0 <= layers.highest("transformer_blocks") <= 18:
            said = _from_metadata(metadata)
            if said is not None and said[0] in ("qwen_image", "chroma"):
                return said[0], f"joint blocks of width 3072; {said[1]}"
            return "flux1", "double blocks of width 3072"
        return "qwen_image", "more than 19 joint blocks of width 3072"
    return None


def _lumina_like(layers: Layers, metadata: Mapping[str, str]) -> tuple[str, str] | None:
    attention = (
        r"(?:layers|noise_refiner|context_refiner)_\d+_(?:attention|attn)_(?:qkv|to_[qkv]|out|to_out_0)$"
    )
    if not layers.search(
        r"(?:noise_refiner|context_refiner|unet_layers)_\d+_(?:att|feed_forward|adaLN|norm1)"
    ):
        return None
    width = layers.width(attention) or layers.width(r"_feed_forward_(?:w1|linear_1|w3|linear_3)$")
    if width == 3840:
        return "zimage", "blocks of width 3840 with refiners"
    if width == 2304:
        return "lumina2", "blocks of width 2304 with refiners"
    if layers.search(r"_attention_to_[qkv]"):
        return "zimage", "blocks named as those of Z-Image"
    said = _from_metadata(metadata)
    return said if said is not None and said[0] in ("lumina2", "zimage") else None


def _video_like(layers: Layers, metadata: Mapping[str, str]) -> tuple[str, str] | None:
    del metadata
    if layers.width(r"unet_blocks_\d+_attn[12]_to_[qkv]$") == 1408:
        return "hunyuan_dit", "blocks of width 1408"
    if layers.search(r"_blocks_\d+_(?:self|cross)_attn_(?:q|k|v|o|k_img|v_img)$") or layers.search(
        r"unet_blocks_\d+_(?:attn[12]_(?:to_[qkv]|add_[kv]_proj|to_out_0)|ffn_(?:0|2|net_0_proj|net_2))$"
    ):
        return "wan", "blocks with self_attn, cross_attn and ffn"
    if layers.search(
        r"blocks_\d+_(?:(?:self|cross)_attn_(?:[qkv]|output)_proj|mlp_layer[12]|adaln_modulation_)"
    ) or (layers.has("llm_adapter_blocks_")):
        return "anima", "blocks with q_proj, mlp.layer1 and adaln_modulation"
    if layers.search(r"transformer_blocks_\d+_norm[123]_linear_[12]$"):
        return "anima", "blocks whose norms have two linear layers"
    return None


# Names that only one base model has; their layers are kept as they are spelled.
_OPAQUE = (
    (r"blocks_\d+_attn1_Wqkv|default_modulation", "hunyuan_dit", "attention named Wqkv"),
    (r"lora_prior_unet_", "stable_cascade", "layers of a prior"),
    (r"joint_transformer_blocks_\d+_", "auraflow", "joint transformer blocks"),
    (r"double_stream_blocks_\d+_", "hidream", "double stream blocks"),
    (r"unet_blocks_\d+_(?:attn_qkv_[xy]|attn_proj_[xy])", "mochi", "attention named qkv_x and qkv_y"),
    (r"adaln_single|caption_projection_linear", "pixart", "one adaLN for all blocks"),
    (r"lyric_encoder|speaker_embedder", "ace_step", "a lyric encoder"),
)  # fmt: skip


def _opaque(layers: Layers, metadata: Mapping[str, str]) -> tuple[str, str] | None:
    del metadata
    for pattern, name, reason in _OPAQUE:
        if layers.search(pattern):
            return name, reason
    return None


_CONTEXT = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl_refiner"}
_UNET_ROOTS = (
    "unet_input_blocks_", "unet_output_blocks_", "unet_middle_block_", "unet_down_blocks_", "unet_up_blocks_",
    "unet_mid_block_",
)  # fmt: skip
_UNET_EDGES = (
    "unet_conv_in",
    "unet_conv_out",
    "unet_time_embed",
    "unet_label_emb",
    "unet_add_embedding",
    "unet_out_",
)


def _unet(layers: Layers, metadata: Mapping[str, str]) -> tuple[str, str] | None:
    if not layers.has(*_UNET_ROOTS) or layers.has("lora_prior_unet_"):
        return None
    context = layers.width(r"_attn2_to_[kv]$")
    if context in _CONTEXT:
        return _CONTEXT[context], f"cross-attention keys read {context} channels"
    if context is not None:
        return None
    return _unet_without_context(layers, metadata)


# Places that some of these U-Nets have and others do not.
_FOUR_LEVELS = r"(?:input|output)_blocks_(?:9|10|11)_|(?:down|up)_blocks_3_"
_ATTENTION_AT_FULL_RESOLUTION = (
    r"down_blocks_0_attentions_|up_blocks_3_attentions_|input_blocks_[12]_1_|output_blocks_(?:9|10|11)_1_"
)
_ATTENTION_AT_THE_LOWEST = r"up_blocks_0_attentions_|output_blocks_[012]_1_(?:proj|norm|transformer)"


def _unet_without_context(layers: Layers, metadata: Mapping[str, str]) -> tuple[str, str] | None:
    if layers.search(_ATTENTION_AT_FULL_RESOLUTION):
        return _sd1_or_sd2(layers, metadata, "attention at the full resolution")
    if layers.search(_ATTENTION_AT_THE_LOWEST) or layers.search(r"transformer_blocks_[4-9]_"):
        return "sdxl", "attention where only this U-Net has it"
    four = layers.search(_FOUR_LEVELS)
    if layers.search(r"transformer_blocks_[1-3]_") or layers.has("label_emb", "add_embedding"):
        return (
            "sdxl_refiner" if four else "sdxl"
        ), f"{'four' if four else 'three'} levels with deep attention"
    if four:
        return _sd1_or_sd2(layers, metadata, "four levels of resolution")
    encoder = _by_text_encoder(layers)
    if encoder is not None:
        return encoder
    said = _from_metadata(metadata)
    if said is not None and said[0] in _CONTEXT.values():
        return said
    return None


def _sd1_or_sd2(layers: Layers, metadata: Mapping[str, str], reason: str) -> tuple[str, str]:
    """Version 1 or 2; the metadata decides only where no tensor does."""
    encoder = _by_text_encoder(layers)
    if encoder is not None and encoder[0] in ("sd1", "sd2"):
        return encoder[0], f"{reason}, and {encoder[1]}"
    for name in layers.denoiser:
        down = layers.slots[name].get("down")
        if down is not None and re.search(r"(?<!attn)_proj_(?:in|out)$", name):
            kind = ("sd1", "a convolution") if len(down) == 4 else ("sd2", "linear")
            return kind[0], f"{reason}, and {name[10:]} is {kind[1]}"
    said = _from_metadata(metadata)
    if said is not None and said[0] in ("sd1", "sd2"):
        return said[0], f"{reason}, and {said[1]}"
    return "sd1", reason


_ENCODER_READS = r"encoder_layers_\d+_(?:self_attn_[qkv]_proj|self_attn_out_proj|mlp_fc1)$"


# Widths of Qwen3 0.6B and Gemma 2 2B.
_LANGUAGE_MODELS = {1024: "anima", 2304: "lumina2"}


def _by_text_encoder(layers: Layers) -> tuple[str, str] | None:
    """The base model by the text encoders alone."""
    if not layers.encoders:
        return None
    if any(name.startswith("lora_te2_") and "_block_" not in name for name in layers.encoders):
        if any(name.startswith("lora_te3_") for name in layers.encoders):
            return "sd3", "three text encoders"
        return "sdxl", "a second text encoder of CLIP's kind"
    if any("_encoder_block_" in name for name in layers.encoders):
        return "flux1", "a T5 text encoder"
    language = layers.encoder_width(r"^lora_te_(?:transformer_)?(?:model_)?layers_\d+_self_attn_[qkv]_proj$")
    if language in _LANGUAGE_MODELS:
        return _LANGUAGE_MODELS[language], f"a language model of width {language} as text encoder"
    width = layers.encoder_width(_ENCODER_READS)
    deep = any(re.search(r"encoder_layers_(?:1[2-9]|2\d|3[01])_", name) for name in layers.encoders)
    if width == 768 and not deep:
        return "sd1", "a text encoder of width 768"
    if width == 1024:
        return "sd2", "a text encoder of width 1024"
    if width == 1280:
        return "sdxl_refiner", "a single text encoder of width 1280"
    return None


# Base models that have the text encoder by which the first one was guessed.
_SHARED_ENCODERS = {
    "sd1": ("sd1", "sdxl", "sd3", "sd3_large", "flux1"),
    "sdxl": ("sdxl", "sd3", "sd3_large"),
    "sdxl_refiner": ("sdxl_refiner", "sdxl"),
    "flux1": ("flux1", "chroma", "sd3", "sd3_large"),
}


def _text_encoder_alone(layers: Layers, metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """Base model of a file without a denoiser; several share their text encoders, so metadata may choose."""
    found = _by_text_encoder(layers)
    if found is None:
        return None
    said = _from_metadata(metadata)
    return said if said is not None and said[0] in _SHARED_ENCODERS.get(found[0], ()) else found


# How ``ss_base_model_version`` and ``modelspec.architecture`` begin; underscores count as hyphens.
_METADATA: dict[str, tuple[str, ...]] = {
    "sd1": ("sd-v1", "stable-diffusion-v1"),
    "sd2": ("sd-v2", "stable-diffusion-v2"),
    "sdxl": ("sdxl-", "stable-diffusion-xl"),
    "sdxl_refiner": ("sdxl-refiner", "stable-diffusion-xl-v1-refiner"),
    "sd3": ("sd3", "medium", "5-medium", "stable-diffusion-3"),
    "sd3_large": (
        "sd3-5-large",
        "sd3.5-large",
        "5-large",
        "stable-diffusion-3-5-large",
        "stable-diffusion-3.5-large",
    ),
    "flux1": ("flux",),
    "flux2": ("flux2", "flux-2", "klein"),
    "chroma": ("chroma",),
    "lumina2": ("lumina",),
    "zimage": ("zimage", "z-image"),
    "qwen_image": ("qwen",),
    "wan": ("wan",),
    "anima": ("anima",),
    "hunyuan_image": ("hunyuan-image",),
    "hunyuan_video": ("hunyuan-video",),
    "stable_cascade": ("stable-cascade",),
}
_BY_START = sorted(
    ((start, name) for name, starts in _METADATA.items() for start in starts), key=lambda row: -len(row[0])
)


def _from_metadata(metadata: Mapping[str, str]) -> tuple[str, str] | None:
    for key in ("ss_base_model_version", "modelspec.architecture"):
        value = str(metadata.get(key, ""))
        for start, name in _BY_START:
            if value.lower().replace("_", "-").startswith(start):
                return name, f"its metadata says {value!r}"
    if str(metadata.get("ss_v2", "")).lower() == "true":
        return "sd2", "its metadata says version 2"
    return None


# The U-Net comes first because most files are for one, and nothing else has its names.
_TESTS = (_unet, _flux_like, _opaque, _joint, _lumina_like, _video_like)


def detect(layers: Mapping[str, Slots], metadata: Mapping[str, str] | None = None) -> Detection:
    """Recognise the base model of a file.

    Args:
        layers: Flattened layer name, in any spelling and with a ``lora_unet_`` or
            ``lora_te..._`` prefix, to the shapes of its slots.
        metadata: The file's metadata, asked when names and shapes leave it open.

    Returns:
        The architecture, ``unknown`` if nothing fits, and why.
    """
    metadata = metadata or {}
    prepared = Layers(layers)
    for test in _TESTS:
        found = test(prepared, metadata)
        if found is not None:
            return Detection(ARCHITECTURES[found[0]], found[1])
    encoder = _text_encoder_alone(prepared, metadata)
    if encoder is not None and (not prepared.denoiser or encoder[0] in _LANGUAGE_MODELS.values()):
        return Detection(ARCHITECTURES[encoder[0]], encoder[1])
    said = _from_metadata(metadata)
    if said is not None:
        is_unet = prepared.has(*_UNET_EDGES, *_UNET_ROOTS)
        if not prepared.denoiser or (is_unet and said[0] in _CONTEXT.values()):
            return Detection(ARCHITECTURES[said[0]], said[1])
        # A file of a few layers that several models have: the metadata choose, if that model has all of them.
        if all(resolve(said[0], layer_path(name)) is not None for name in prepared.denoiser):
            return Detection(ARCHITECTURES[said[0]], f"{said[1]}, and it has all of these layers")
    return Detection(ARCHITECTURES["unknown"], "neither its layer names nor its metadata are known to us")
