"""What each program that uses LoRAs knows of their names and kinds: one record a host.

All of it was read from the host's own code, at the version that its record states. ``tests/accepted_names``
holds the complete lists that this code gives; a test compares.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .models import ARCHITECTURES, canonical_path, component, diffusers_layers, layer_path

# --- Base models ---------------------------------------------------------------------------

_SD = frozenset({"sd1", "sd2", "sdxl", "sdxl_refiner"})
_SD3 = frozenset({"sd3", "sd3_large"})
_FLUX = frozenset({"flux1", "chroma"})
_ALL = frozenset(set(ARCHITECTURES) - {"unknown"})

# --- Names ---------------------------------------------------------------------------------

# A form of names: how they begin, and whose path follows, the checkpoint's or diffusers'. Where the
# beginning ends with an underscore, the dots of the path have become underscores too.
Form = tuple[str, str]
CHECKPOINT, DIFFUSERS = "checkpoint", "diffusers"
# The attention of a U-Net has one more spelling in diffusers, by attention processors; hosts tell them apart.
PROCESSOR, ATTENTION = "processor", "attention"
# Any other spelling of the path that we read, such as that of the model's own code.
ALIAS = "alias"

_PREFIXES = (
    "lora_unet_", "oft_unet_", "lora_prior_unet_", "lora_transformer_", "lycoris_", "diffusion_model.",
    "transformer.", "unet.base_model.model.", "unet.", "base_model.model.", "",
)  # fmt: skip
_KOHYA, _KOHYA_DIFFUSERS = ("lora_unet_", CHECKPOINT), ("lora_unet_", DIFFUSERS)
_COMFY, _COMFY_DIFFUSERS = ("diffusion_model.", CHECKPOINT), ("diffusion_model.", DIFFUSERS)
_BARE, _BARE_OWN = ("", DIFFUSERS), ("", CHECKPOINT)
_PIPELINE, _PIPELINE_OWN = ("transformer.", DIFFUSERS), ("transformer.", CHECKPOINT)
_PEFT, _PEFT_OWN = ("base_model.model.", DIFFUSERS), ("base_model.model.", CHECKPOINT)
_LYCORIS, _LYCORIS_OWN = ("lycoris_", DIFFUSERS), ("lycoris_", CHECKPOINT)
_ONETRAINER = ("lora_transformer_", DIFFUSERS)


def forms(architecture: str, layer: str, name: str) -> set[Form]:
    """The forms that a name of a denoiser's layer has; none where it is not the layer's path by any.

    Args:
        layer: Canonical name.
        name: As a file has it, without the slot.
    """
    prefix = next(prefix for prefix in _PREFIXES if name.startswith(prefix))
    rest = name[len(prefix) :]
    theirs = {_flat(path) for path, _ in diffusers_layers(architecture, layer)}
    if ".processor." in rest:
        flat = _flat(rest.replace(".processor.", "."))
        return {(prefix, PROCESSOR)} if theirs & {flat, f"{flat}_0"} else set()
    found = set()
    if _flat(rest) == layer_path(layer) or not layer.startswith("lora_"):
        found.add((prefix, CHECKPOINT))
    if _flat(rest) in theirs:
        apart = architecture in _SD and ".to_" in rest
        found.add((prefix, ATTENTION if apart else DIFFUSERS))
    if not found and canonical_path(architecture, "unet", _flat(rest)) is not None:
        found.add((prefix, ALIAS))
    return found


def _flat(path: str) -> str:
    return path.replace(".", "_").replace("-", "_")


# Text encoder by component, to how names of its layers begin; "" stands for every base model not listed.
Encoders = Mapping[str, Mapping[str, tuple[str, ...]]]
_ONE_CLIP = {"te": ("lora_te_", "lora_te1_", "text_encoder.")}
_FIRST, _SECOND = ("lora_te_", "lora_te1_", "text_encoder."), ("lora_te2_", "text_encoder_2.")
_COMFY_CLIPS: Encoders = {
    "sd1": _ONE_CLIP,
    "sd2": _ONE_CLIP,
    "sdxl": {"te1": _FIRST, "te2": _SECOND},
    "sdxl_refiner": {"te": ("lora_te_", "text_encoder.", "lora_prior_te_")},
    "sd3": {"te1": _FIRST, "te2": _SECOND, "te3": ("lora_te3_",)},
    "sd3_large": {"te1": _FIRST, "te2": _SECOND, "te3": ("lora_te3_",)},
    "flux1": {"te1": _FIRST, "te3": ("lora_te2_", "lora_te3_")},
    "chroma": {"te1": ("lora_te1_",), "te3": ("lora_te1_",)},
}
_COMFY_ENCODERS: Encoders = {
    **_COMFY_CLIPS,
    "stable_cascade": {"te": ("lora_te_", "text_encoder.", "lora_prior_te_")},
    "wan": {},
    "auraflow": {},
    "": {"te": ("lora_te_",), "te1": _FIRST, "te2": _SECOND, "te3": ("lora_te3_",)},
}
_T5_BY_ANY_NUMBER = ("lora_te1_", "lora_te2_", "lora_te3_")
_FORGE_ENCODERS: Encoders = {
    **_COMFY_CLIPS,
    "flux1": {"te1": _FIRST, "te3": _T5_BY_ANY_NUMBER},
    "chroma": {"te1": _T5_BY_ANY_NUMBER, "te3": _T5_BY_ANY_NUMBER},
    "sd3": {"te1": _FIRST, "te2": _SECOND, "te3": _T5_BY_ANY_NUMBER},
    "sd3_large": {"te1": _FIRST, "te2": _SECOND, "te3": _T5_BY_ANY_NUMBER},
}
# What ComfyUI's code and its copies know of a CLIP by the names of LoRAs.
_CLIP_LEAVES = re.compile(
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
        return name.startswith(known) and not (clip and not _CLIP_LEAVES.fullmatch(layer))

    def dialect(self, architecture: str) -> str:
        """The dialect to write for it."""
        return self.dialects.get(architecture, "auto")


_RESIDUAL = frozenset({"bias", "bias_indices", "bias_values", "bias_size"})
_OWN_LAYERS = frozenset({"up_bias", "down_bias", "magnitude"})
_COMFY_IGNORES = _RESIDUAL | _OWN_LAYERS | {"scale", "scalar", "lokr_t1", "bm"}
_A1111_IGNORES = _OWN_LAYERS | (_RESIDUAL - {"bias"}) | {"scalar", "lokr_t1", "bm"}
_NO_FORMULA = frozenset({"ia3", "oft_diag"})
_RAW_ENCODERS = frozenset({"clip_h", "clip_l", "clip_g", "t5xxl", "qwen3_06b"})

_UNETS = {
    _KOHYA_DIFFUSERS: _SD, _LYCORIS: _SD,
    **{(prefix, kind): _SD for prefix in ("", "unet.") for kind in (DIFFUSERS, PROCESSOR)},
}  # fmt: skip


def _under(*tables: Mapping[Form, frozenset[str]]) -> dict[Form, frozenset[str]]:
    """One table of forms; base models of a form that is in several are added up."""
    result: dict[Form, frozenset[str]] = {}
    for table in tables:
        for form, models in table.items():
            result[form] = result.get(form, frozenset()) | models
    return result


def _models(*names: str) -> frozenset[str]:
    return frozenset(names)


_FLUX_FAMILY = _FLUX | {"flux2", "longcat"}
_ALIASES = tuple((prefix, ALIAS) for prefix in ("", "diffusion_model.", "transformer.", "lycoris_"))
# Norms of the Flux family are no ``weight`` there, and known by their dotted names with ``scale`` alone.
_FLUX_NORMS = dict.fromkeys(_FLUX_FAMILY, re.compile(r"(?:lora_unet_|diffusion_model\.).*(?:query|key)_norm"))
_QKV_OF_LINEAR1 = r"diffusion_model\..*\.linear1_qkv"
_NORMS_AND_QKV = {"flux1": re.compile(rf"{_FLUX_NORMS['flux1'].pattern}|{_QKV_OF_LINEAR1}")}
_OUTSIDE_BLOCKS = re.compile(
    r"lora_unet_(?!(?:double|single)_blocks_).*|lycoris_(?!(?:single_)?transformer_blocks_).*|"
    r".*(?:query|key)_norm"
)
_TEXT_PROJECTION = re.compile(r"lora_te[12]?_text_projection")

_PIPELINES = frozenset({
    *_SD, *_SD3, *_FLUX, "flux2", "hunyuan_video", "hunyuan_video15", "lumina2", "zimage", "qwen_image",
    "wan", "anima", "cosmos_predict2", "ltx_video", "ltx2", "auraflow", "hidream", "mochi", "ace_step15",
    "krea2", "ideogram4", "ernie_image", "kandinsky5",
})  # fmt: skip
_SDNEXT_OWN = frozenset({*_SD, *_SD3, *_FLUX, "flux2", "zimage", "anima", "ernie_image", "krea2"})

HOSTS: dict[str, Host] = {
    host.id: host
    for host in (
        Host(
            "a1111", "A1111", "1.10.1", "e61adddd", _SD | {"sd3"},
            _under(
                {_KOHYA: _SD, _KOHYA_DIFFUSERS: _SD, ("oft_unet_", CHECKPOINT): _SD},
                {_PIPELINE: _models("sd3")},
            ),
            {
                "sd1": {"te": ("lora_te_", "lora_te1_")}, "sd2": {"te": ("lora_te_",)},
                "sdxl": {"te1": ("lora_te1_",), "te2": ("lora_te2_",)},
            },
            clip_in_part=False,
            lost={
                **dict.fromkeys(_SD, re.compile(
                    r"lora_unet_(?:conv_norm_out|add_embedding_linear_[12])|.*_text_projection|.*te2?_text_model_"
                    r"(?:embeddings|final).*"
                )),
                "sdxl": re.compile(
                    r"lora_unet_(?:conv_norm_out|add_embedding_linear_[12]|up_blocks_0_upsamplers_0_conv)|"
                    r".*_text_projection|.*te2_text_model_(?:embeddings|final).*"
                ),
                "sd3": re.compile(r"(?!.*\.attn\.(?:to_[qkv]|to_out\.0)$).*"),
            },
            dialects={"sd3": "diffusers"}, ignores=_A1111_IGNORES, lone_biases=False,
        ),
        Host(
            "forge", "Forge", "", "dfdcbab6", _SD | _SD3 | _FLUX,
            _under(
                {_KOHYA: _ALL, _COMFY: _ALL}, _UNETS,
                dict.fromkeys((_PIPELINE, _LYCORIS, _ONETRAINER), _models("flux1")),
            ),
            _FORGE_ENCODERS, lost={**_FLUX_NORMS, **_NORMS_AND_QKV},
            kinds_missing=_NO_FORMULA | {"oft", "boft"}, ignores=_COMFY_IGNORES,
            endings=_models("lora_B", "lora_B.default.weight"), unplaced_limit=12,
        ),
        Host(
            "reforge", "reForge", "", "3b56b268",
            _SD | _SD3 | {"flux1", "hunyuan_dit", "auraflow", "pixart"},
            _under(
                {_KOHYA: _ALL, _COMFY: _ALL}, _UNETS,
                {_PIPELINE: _SD3 | {"flux1", "auraflow", "pixart"}, _LYCORIS: _SD3 | {"flux1"}},
                {_ONETRAINER: _SD3 | {"flux1"}, _PEFT: _SD3 | {"pixart"}},
                {_PEFT_OWN: _models("hunyuan_dit"), ("unet.base_model.model.", DIFFUSERS): _models("pixart")},
            ),
            _COMFY_ENCODERS, _RAW_ENCODERS | {"hydit_clip", "mt5xl", "pile_t5xl"},
            lost={**_FLUX_NORMS, **_NORMS_AND_QKV},
            kinds_missing=_NO_FORMULA, ignores=_COMFY_IGNORES, endings=_models("lora_B.default.weight"),
        ),
        Host(
            "neo", "Forge Neo", "", "2d5fca41",
            _FLUX | {"sd1", "sdxl", "sdxl_refiner", "flux2", "lumina2", "zimage", "anima", "wan",
                     "qwen_image", "ernie_image", "krea2"},
            _under(
                {_KOHYA: _ALL, _COMFY: _ALL}, _UNETS,
                dict.fromkeys((_PIPELINE, _LYCORIS, _ONETRAINER, _BARE), _FLUX | {"flux2"}),
                dict.fromkeys((_COMFY_DIFFUSERS, _PIPELINE, _LYCORIS, _BARE), _models("zimage", "krea2")),
                dict.fromkeys((_BARE_OWN, _PIPELINE_OWN, _LYCORIS_OWN), _models("qwen_image")),
                {_PIPELINE_OWN: _models("ernie_image"), ("diffusion_model.", ALIAS): _FLUX | {"flux2"}},
                dict.fromkeys(_ALIASES, _models("krea2")),
            ),
            {**_COMFY_CLIPS, "anima": {"te": ("lora_te_",)}}, _RAW_ENCODERS,
            lost={**_FLUX_NORMS, "sd1": _TEXT_PROJECTION, "sdxl": _TEXT_PROJECTION,
                  "sdxl_refiner": re.compile(r"lora_prior_te_text_projection"),
                  "anima": re.compile(
                      r"lora_te_(?:embed_tokens|norm)|text_encoders\.qwen3_06b\.transformer\..*"
                  ),
                  "flux1": re.compile(rf"{_FLUX_NORMS['flux1'].pattern}|{_TEXT_PROJECTION.pattern}")},
            kinds_missing=_NO_FORMULA, ignores=_COMFY_IGNORES,
        ),
        Host(
            "sdnext", "SD.Next", "", "058a7f0c", _SDNEXT_OWN | _PIPELINES,
            _under(
                {_KOHYA: _SDNEXT_OWN - _SD3, _KOHYA_DIFFUSERS: _SD | {"zimage", "ernie_image"}},
                {_COMFY: _models("chroma", "flux2", "zimage", "anima", "ernie_image", "krea2")},
                {("unet.", kind): _SD for kind in (DIFFUSERS, ATTENTION)},
                {_ONETRAINER: _SDNEXT_OWN - _SD, _LYCORIS: _SDNEXT_OWN - _SD},
                {_PIPELINE: _PIPELINES - _SD, _PEFT: _models("chroma", "flux2", "zimage")},
                {_BARE: _models("chroma", "flux2", "zimage"), _COMFY_DIFFUSERS: _models("zimage")},
            ),
            {
                "sd1": {"te": ("lora_te_",)}, "sd2": {"te": ("lora_te_",)},
                "sdxl": {"te1": ("lora_te1_",), "te2": ("lora_te2_",)},
                "sdxl_refiner": {"te": ("lora_te2_",)},
                "sd3": {"te1": ("lora_te1_",), "te2": ("lora_te2_",)},
                "sd3_large": {"te1": ("lora_te1_",), "te2": ("lora_te2_",)},
                "flux1": {"te1": ("lora_te1_",), "te3": ("lora_te2_",)},
                "anima": {"te": ("lora_te_",)},
            },
            _models("qwen3_06b"), clip_in_part=False,
            lost={
                **dict.fromkeys(_SD, re.compile(r"lora_unet_output_blocks_2_1_conv|lora_te_text_projection")),
                "sdxl": re.compile(r"lora_te1_text_projection"),
                **dict.fromkeys(_SD3, re.compile(r"lycoris_(?!.*transformer).*")), "flux1": _OUTSIDE_BLOCKS,
                "anima": re.compile(r"lora_unet_llm_adapter_.*"),
                "zimage": re.compile(r"(?:cap_embedder|t_embedder|all_x_embedder|all_final_layer)\..*"),
                "chroma": re.compile(r".*(?:query|key)_norm"), "flux2": re.compile(r".*(?:query|key)_norm"),
            },
            dialects={**dict.fromkeys(_PIPELINES - _SDNEXT_OWN, "diffusers"),
                      **dict.fromkeys((*_SD3, "krea2"), "diffusers")},
            kohya_endings=_SD | _SD3 | {"flux1"},
            ignores=_OWN_LAYERS | {"scalar", "lokr_t1", "bm"},
        ),
        Host(
            "comfyui", "ComfyUI", "0.29.0", "4f874c5e", _ALL,
            _under(
                {_KOHYA: _ALL, _COMFY: _ALL}, _UNETS,
                {("lora_prior_unet_", CHECKPOINT): _models("stable_cascade")},
                dict.fromkeys((_PIPELINE, _LYCORIS, _ONETRAINER, _BARE), _FLUX_FAMILY),
                dict.fromkeys((_PIPELINE, _PEFT, _ONETRAINER, _LYCORIS), _SD3),
                {_PEFT: _models("ace_step15")},
                {_PIPELINE: _models("auraflow", "pixart"), _PEFT: _models("pixart")},
                {_PEFT_OWN: _models("hunyuan_dit", "ace_step15")},
                {_BARE_OWN: _models("mochi", "ace_step", "omnigen2", "qwen_image", "kandinsky5", "ltx_video",
                                    "ltx2")},
                {_PIPELINE_OWN: _models("hidream", "qwen_image", "ernie_image", "kandinsky5", "hunyuan_video",
                                        "hunyuan_video15")},
                {_LYCORIS_OWN: _models("hidream", "qwen_image", "ace_step15")},
                dict.fromkeys((_COMFY_DIFFUSERS, _PIPELINE, _LYCORIS, _BARE), _models("zimage", "krea2")),
                dict.fromkeys(_ALIASES, _models("krea2")),
                {("diffusion_model.", ALIAS): _FLUX_FAMILY | {"hunyuan_video", "hunyuan_video15"}},
                {("transformer.", ALIAS): _models("hunyuan_video", "hunyuan_video15")},
                {("unet.base_model.model.", DIFFUSERS): _models("pixart")},
                dict.fromkeys([(prefix, ALIAS) for prefix in ("base_model.model.", "lycoris_")],
                              _models("ace_step15")),
            ),
            _COMFY_ENCODERS, _models("*"), kinds_missing=_NO_FORMULA, ignores=_COMFY_IGNORES,
        ),
        Host(
            "diffusers", "diffusers", "0.42.1", "", _PIPELINES,
            _under(
                {_PIPELINE: _PIPELINES - _SD, _KOHYA_DIFFUSERS: _SD},
                {("unet.", kind): _SD for kind in (DIFFUSERS, ATTENTION, PROCESSOR)},
                # Its own converters make something of kohya's names for these alone.
                {_KOHYA: _models("sdxl", "flux1", "chroma", "flux2", "zimage", "qwen_image")},
                {_COMFY: _models("flux2", "zimage", "qwen_image", "anima", "ltx_video", "ltx2", "hidream",
                                 "krea2")},
            ),
            {
                "sd1": {"te": ("text_encoder.", "lora_te_")}, "sd2": {"te": ("text_encoder.", "lora_te_")},
                "sdxl": {"te1": ("text_encoder.", "lora_te1_"), "te2": ("text_encoder_2.", "lora_te2_")},
                "sdxl_refiner": {"te": ("text_encoder_2.",)},
                "sd3": {"te1": ("text_encoder.",), "te2": ("text_encoder_2.",)},
                "sd3_large": {"te1": ("text_encoder.",), "te2": ("text_encoder_2.",)},
                "flux1": {"te1": ("text_encoder.", "lora_te1_")},
            },
            lost=dict.fromkeys(_FLUX | {"flux2"}, re.compile(r"lora_unet_(?!(?:double|single)_blocks_).*")),
            dialects=dict.fromkeys(_PIPELINES, "diffusers"),
            kinds_missing=_models("ia3", "oft", "oft_diag", "boft", "glora"),
            ignores=_COMFY_IGNORES, whole_layers=False,
        ),
    )
}  # fmt: skip
