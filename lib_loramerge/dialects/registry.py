"""The dialects: how each tool begins the names of its layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .slots import split_key


@dataclass(frozen=True)
class Dialect:
    """How one tool spells the names of layers.

    Attributes:
        name: Shown in reports.
        label: The tools that write it.
        pattern: Matched on the whole name of a layer, that is on a key without its slot; must
            define the groups ``part`` and ``path``. No name may match two dialects.
        parts: Spelling of ``part``, lower case, to a component; text encoders may still move once
            the base model is known.
        example: A key of it.
    """

    name: str
    label: str
    pattern: re.Pattern[str]
    parts: Mapping[str, str]
    example: str

    def parse(self, key: str) -> tuple[str, str, str] | None:
        """(component, path, slot) of a key, or None if the key is not of this dialect."""
        split = split_key(key)
        found = self.locate(split.layer) if split is not None else None
        if split is None or found is None:
            return None
        return (*found, split.slot)

    def locate(self, layer: str) -> tuple[str, str] | None:
        """(component, path) of a layer's name, or None."""
        match = self.pattern.fullmatch(layer)
        if match is None:
            return None
        spelled = match["part"].lower().rstrip("_.") if match["part"] else ""
        path = match["path"]
        if spelled.startswith("text_encoders."):
            return self.parts.get(spelled, "te"), path
        return (self.parts.get(spelled) or _component_by_path(path), path)


@dataclass
class RawLayer:
    """A layer as a file names it, before the base model is known.

    Attributes:
        dialect: Name of its dialect.
        part: Component as the file has it.
        path: Path in the component, flattened.
        slots: Our slot to key.
    """

    dialect: str
    part: str
    path: str
    slots: dict[str, str] = field(default_factory=dict)


def _component_by_path(path: str) -> str:
    """Component of a name that does not say it."""
    if path.startswith(("text_model.", "encoder.layers.", "text_projection")):
        return "te"
    if path.startswith(("encoder.block.", "encoder.final_layer_norm")):
        return "te3"
    return "unet"


_ENCODERS = {"text_encoder": "te1", "text_encoder_2": "te2", "text_encoder_3": "te3", "text_encoder_4": "te"}
_DENOISERS = {"unet": "unet", "transformer": "unet", "conditional_transformer": "unet", "prior": "unet"}
_COMPONENT = r"(?:unet|(?:conditional_)?transformer|prior|text_encoder(?:_[234])?)"
# The component stands before PEFT's own prefix, or after it when a whole pipeline or host model was wrapped.
_PEFT_PARTS = {
    name: part
    for component, part in {**_DENOISERS, **_ENCODERS}.items()
    for name in (f"{component}.base_model.model", f"base_model.model.{component}")
} | {f"base_model.model.{name}": "unet" for name in ("diffusion_model", "model.diffusion_model")}
_RAW_ENCODERS = {"clip_l": "te1", "clip_g": "te2", "t5": "te3", "t5xxl": "te3", "llama": "te", "qwen": "te"}
_XLABS = r"(?:double|single)_blocks\.\d+\.processor\."
_ANY_PREFIX = (
    r"lora_(?:unet|te[123]?|prior_unet|prior_te|transformer)_|oft_unet_|lycoris_|(?:model[._])?diffusion_model[._]|"
    r"(?:unet|(?:conditional_)?transformer|prior|text_encoder(?:_[234])?)\.|base_model\.model\.|text_encoders\.|"
    r"(?:clip_l|clip_g|t5|t5xxl|llama|qwen)\.|bundle_emb\.|lllite_|ip_adapter\.|"
) + _XLABS

_TABLE = (
    Dialect(
        "kohya", "kohya's sd-scripts, LyCORIS, OneTrainer for U-Nets",
        re.compile(
            r"(?P<part>lora_unet_+|lora_te[123]?_|oft_unet_|lora_prior_unet_|lora_prior_te_)(?P<path>[^.:]+)",
            re.I,
        ),
        {
            "lora_unet": "unet", "oft_unet": "unet", "lora_prior_unet": "prior_unet", "lora_te": "te",
            "lora_te1": "te1", "lora_te2": "te2", "lora_te3": "te3", "lora_prior_te": "prior_te",
        },
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight",
    ),
    Dialect(
        "onetrainer", "OneTrainer for transformers",
        re.compile(r"(?P<part>lora_transformer_)(?P<path>[^.:]+)", re.I),
        {"lora_transformer": "unet"},
        "lora_transformer_transformer_blocks_0_attn_to_q.lora_up.weight",
    ),
    Dialect(
        "lycoris", "SimpleTuner and LyCORIS around a diffusers model",
        re.compile(r"(?P<part>lycoris_)(?P<path>[^.:]+)", re.I),
        {"lycoris": "unet"},
        "lycoris_transformer_blocks_0_attn_to_q.lokr_w1",
    ),
    Dialect(
        "slider", "NTC sliders",
        re.compile(r"(?P<part>(?:model_)?diffusion_model_)(?P<path>[^.:]+)", re.I),
        {"diffusion_model": "unet", "model_diffusion_model": "unet"},
        "diffusion_model_input_blocks_1_1_proj_in.lora_up.weight",
    ),
    Dialect(
        "diffusers", "diffusers, ai-toolkit, OneTrainer's own format",
        re.compile(
            rf"(?P<part>{_COMPONENT}\.)(?!base_model\.model\.)(?P<path>.+)",
            re.I,
        ),
        {**_DENOISERS, **_ENCODERS},
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    ),
    Dialect(
        "peft", "PEFT's save_pretrained",
        re.compile(
            rf"(?P<part>(?:{_COMPONENT}\.)?base_model\.model\."
            rf"(?:{_COMPONENT}\.(?!resblocks\.)|(?:model\.)?diffusion_model\.)?)(?P<path>.+)",
            re.I,
        ),
        _PEFT_PARTS,
        "base_model.model.down_blocks.0.attentions.0.proj_in.lora_A.weight",
    ),
    Dialect(
        "comfy", "ComfyUI, musubi-tuner, ai-toolkit for newer models",
        re.compile(
            r"(?P<part>(?:model\.)?diffusion_model\.|text_encoders\.[a-z0-9_]+\.)(?!(?:double|single)_blocks\.\d+\.processor\.)"
            r"(?P<path>.+)",
            re.I,
        ),
        {
            "diffusion_model": "unet", "model.diffusion_model": "unet", "text_encoders.clip_l": "te1",
            "text_encoders.clip_g": "te2", "text_encoders.t5xxl": "te3",
        },
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
    ),
    Dialect(
        "omi", "OneTrainer's raw format",
        re.compile(r"(?P<part>(?:clip_l|clip_g|t5|t5xxl|llama|qwen)\.)(?P<path>.+)", re.I),
        _RAW_ENCODERS,
        "clip_l.text_model.encoder.layers.0.mlp.fc1.lora_up.weight",
    ),
    Dialect(
        "xlabs", "XLabs, USO",
        re.compile(rf"(?P<part>(?:diffusion_model\.)?)(?P<path>{_XLABS}\w+)"),
        {"diffusion_model": "unet"},
        "double_blocks.0.processor.qkv_lora1.down.weight",
    ),
    Dialect(
        "cloneofsimo", "cloneofsimo's lora",
        re.compile(r"(?P<part>unet|text_encoder):(?P<path>\d+)"),
        {"unet": "unet", "text_encoder": "te"},
        "unet:0:up",
    ),
    Dialect(
        "bare", "names of the model itself, without a prefix: BFL, early diffusers, PEFT's state",
        re.compile(rf"(?P<part>)(?!(?:{_ANY_PREFIX}))(?P<path>[^:]+)", re.I),
        {},
        "double_blocks.0.img_attn.qkv.lora_A.weight",
    ),
)  # fmt: skip

DIALECTS: dict[str, Dialect] = {entry.name: entry for entry in _TABLE}
