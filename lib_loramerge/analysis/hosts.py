"""Which WebUI can load a file as it is, and what stops the others.

What is told here was read from the hosts' own loaders; a merged file is written
so that as many of them as possible take it. Forge, reForge and Forge Neo look for
names as ComfyUI does: each layer of the model has a few spellings, and a tensor
under any other is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..adapters.glora import is_old_order
from ..architectures import companions, component, diffusers_layers, layer_path
from ..dialects import DIALECTS, split_key
from ..merge.host_notes import FORGE_LIMIT
from ..merge.sources import Source, SourcePart

_SD = frozenset({"sd1", "sd2", "sdxl", "sdxl_refiner"})
_SD3 = frozenset({"sd3", "sd3_large"})
_NEWER = frozenset({"lumina2", "zimage", "qwen_image", "wan", "anima"})
_FLUX = frozenset({"flux1", "chroma"})
_FLATTENED = ("lora_unet_", "lora_te", "oft_unet_")


@dataclass(frozen=True)
class Host:
    """One WebUI.

    Attributes:
        base_models: Architectures whose LoRAs it knows.
        kinds_missing: Adapter kinds it has no formula for.
        finds: Whether it looks for the names of a layer at all.
        ignores: Our slots that it does not read.
        refuses: Why it would refuse the whole file, given how many tensors it cannot place; else None.
        remark: What else is worth knowing of a file that it loads; None if nothing is.
    """

    name: str
    base_models: frozenset[str]
    kinds_missing: frozenset[str]
    finds: Callable[[Source, SourcePart], bool]
    ignores: frozenset[str]
    refuses: Callable[[Source, int], str | None]
    remark: Callable[[Source], str | None]


def hosts_that_load(source: Source) -> dict[str, str]:
    """WebUI to "yes", to "yes, but ..." with what it leaves out, or to "no: ..." with the reason."""
    return {host.name: _verdict(host, source) for host in HOSTS}


def _verdict(host: Host, source: Source) -> str:
    if source.architecture.id == "unknown":
        return "no: which base model the file is for is not known"
    if source.architecture.id not in host.base_models:
        return f"no: it has no {source.architecture.label}"
    missing = sorted(host.kinds_missing & set(source.kinds))
    if missing:
        return f"no: it has no formula for {', '.join(missing)}"
    found = 0
    unread: list[str] = []
    ignored = host.ignores - {"up_bias"} if _is_control(source) else host.ignores
    for part in _parts(source):
        known = host.finds(source, part)
        found += known
        unread += [key for slot, key in part.part.slots.items() if not known or slot in ignored]
    unread += source.unknown
    # A limit on strange tensors is beside the point where every one of them is strange.
    reason = host.refuses(source, len(unread) if found else 0)
    if reason is not None:
        return f"no: {reason}"
    if source.layers and not found:
        return f"no: it does not look for names such as {unread[0]}"
    remarks = [] if not unread else [f"it leaves out {_tensors(len(unread))}, such as {unread[0]}"]
    remark = host.remark(source)
    if remark is not None:
        remarks.append(remark)
    return f"yes, but {'; '.join(remarks)}" if remarks else "yes"


def _parts(source: Source) -> Iterable[SourcePart]:
    return (part for parts in source.layers.values() for part in parts)


def _tensors(count: int) -> str:
    return f"{count} tensor{'' if count == 1 else 's'}"


# --- Names --------------------------------------------------------------------------------


def _is_control(source: Source) -> bool:
    """Whether ComfyUI's code takes it for a control adapter of BFL, which it converts as a whole."""
    return {"img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale"} <= source.header.tensors.keys()


_CLIP_LEAVES = ("_proj", "_mlp_fc1", "_mlp_fc2", "_text_projection")
_ADAPTER_NAME = re.compile(r"lora_[AB]\.([^.]+)\.weight")


def _dialect(spelling: str) -> str:
    """Dialect of the name of one layer; a file may mix them."""
    return next((name for name, entry in DIALECTS.items() if entry.locate(spelling)), "")


def _key(part: SourcePart) -> str:
    """A tensor of the layer that names it: its up factor, or whatever there is."""
    slots = part.part.slots
    return slots.get("up") or next(iter(slots.values()))


def _ending(part: SourcePart) -> str:
    split = split_key(_key(part))
    return split.ending if split is not None else ""


def _kohya_names(source: Source, layer: str) -> set[str]:
    """The spellings with kohya's prefixes that A1111 and ComfyUI know of a layer."""
    names = {layer}
    architecture = source.architecture.id
    if architecture in _SD:
        names |= {
            f"lora_{component(layer)}_{name.replace('.', '_')}"
            for name, _ in diffusers_layers(architecture, layer)
        }
    if component(layer) == "te" and architecture in ("sd1", "sd2"):
        names.add(f"lora_te1_{layer_path(layer)}")
    if component(layer) == "te3" and architecture == "flux1":
        names.add(f"lora_te2_{layer_path(layer)}")
    return names


@dataclass(frozen=True)
class _ComfyNames:
    """What a host with ComfyUI's lists of names knows beside kohya's and its own dotted names.

    Attributes:
        dialects: Dialect to the base models whose denoiser it knows under these names.
        text_encoders: It knows ``text_encoders.NAME.transformer.``.
        bare_factors: It reads ``lora_B`` without ``.weight``.
        default_adapter: It reads ``lora_B.default.weight``.
    """

    dialects: Mapping[str, frozenset[str]]
    text_encoders: bool = False
    bare_factors: bool = False
    default_adapter: bool = False

    def __call__(self, source: Source, part: SourcePart) -> bool:
        ending = _ending(part)
        if ending == "lora_B" and not self.bare_factors:
            return False
        adapter = _ADAPTER_NAME.fullmatch(ending)
        if adapter is not None and not (adapter[1] == "default" and self.default_adapter):
            return False
        if _is_control(source):
            return True
        if source.architecture.opaque:
            return self._knows(source, _dialect(part.part.spelling))
        if component(part.part.layer) == "unet":
            return self._denoiser(source, part)
        return self._text_encoder(source, part)

    def _knows(self, source: Source, dialect: str) -> bool:
        return source.architecture.id in self.dialects.get(dialect, ())

    def _denoiser(self, source: Source, part: SourcePart) -> bool:
        spelling, layer = part.part.spelling, part.part.layer
        dialect = _dialect(spelling)
        if dialect == "kohya":
            return spelling in _kohya_names(source, layer)
        if dialect == "comfy":
            native = "lora_unet_" + spelling.removeprefix("diffusion_model.").replace(".", "_")
            own = native == layer or (source.architecture.id in ("lumina2", "zimage") and "to_" in spelling)
            return spelling.startswith("diffusion_model.") and own
        if dialect in ("diffusers", "bare") and source.architecture.id in _SD:
            # Its attention is known by the names of attention processors alone.
            return ".to_" not in spelling or ".processor." in _key(part)
        if dialect == "bare" and source.architecture.id in _FLUX and "transformer_blocks" not in spelling:
            return False
        return self._knows(source, dialect)

    def _text_encoder(self, source: Source, part: SourcePart) -> bool:
        spelling, layer = part.part.spelling, part.part.layer
        if "_encoder_layers_" in layer and not layer.endswith(_CLIP_LEAVES):
            return False
        dialect = _dialect(spelling)
        if dialect == "comfy":
            return self.text_encoders
        if dialect == "diffusers":
            return component(layer) != "te3" and ".text_model." in spelling
        return dialect == "kohya" and spelling in _kohya_names(source, layer)


# A1111's converter has no entry for these names of diffusers.
_A1111_LOSES = re.compile(r"lora_unet_(?:conv_norm_out|add_embedding_linear_[12])$")


def _a1111_finds(source: Source, part: SourcePart) -> bool:
    spelling = part.part.spelling
    if source.architecture.id in _SD3:
        return _dialect(spelling) == "diffusers"
    if _A1111_LOSES.match(spelling) or spelling.endswith("_text_projection"):
        return False
    if source.architecture.id == "sdxl" and spelling == "lora_unet_up_blocks_0_upsamplers_0_conv":
        return False
    if spelling.startswith("oft_unet_"):
        spelling = f"lora_unet_{spelling.removeprefix('oft_unet_')}"
    if spelling not in _kohya_names(source, part.part.layer):
        return False
    together = companions(source.architecture.id, part.part.layer)
    return all(layer in source.layers for layer in together)


def _sdnext_finds(source: Source, part: SourcePart) -> bool:
    spelling = part.part.spelling
    dialect = _dialect(spelling)
    if dialect == "cloneofsimo":
        return False
    if dialect != "kohya":
        return True
    if _ending(part).startswith("lora_B"):
        return False
    return not (source.architecture.id == "sd1" and spelling == "lora_unet_output_blocks_2_1_conv")


# --- Whole files --------------------------------------------------------------------------


def _new_glora(source: Source) -> bool:
    """Some GLoRA layer has the factors in the order of LyCORIS 2."""
    for part in _parts(source):
        slots = part.part.slots
        if part.facts.kind == "glora":
            shapes = {slot: source.header.tensors[slots[slot]].shape for slot in ("a1", "a2", "b1", "b2")}
            if not is_old_order(shapes):
                return True
    return False


_NEW_GLORA = "it computes only GLoRA of the old order of factors"


def _a1111_refuses(source: Source, unplaced: int) -> str | None:
    del unplaced
    dotted = [_key(part) for part in _parts(source) if not part.part.spelling.startswith(_FLATTENED)]
    if source.architecture.id in _SD3:
        if any(key.endswith(".alpha") for key in source.header.tensors):
            return "it takes SD3 only in the diffusers spelling without alpha"
    elif dotted:
        return f"it takes names only in kohya's spelling (lora_unet_...), not {dotted[0]}"
    if source.orphans:
        return f"it refuses a file in which an alpha stands alone ({source.orphans[0]})"
    for part in _parts(source):
        if part.facts.kind == "bias":
            return f"it refuses a file in which a bias stands alone ({part.part.slots['diff_b']})"
        if part.facts.kind == "norm" and "b_norm" not in part.part.slots:
            return f"it refuses a file with w_norm but no b_norm ({part.part.slots['w_norm']})"
    return _NEW_GLORA if _new_glora(source) else None


def _a1111_remark(source: Source) -> str | None:
    if "dora" in source.kinds:
        return "its DoRA scales input columns, whatever the file was trained with"
    return None


def _forge_refuses(source: Source, unplaced: int) -> str | None:
    if source.architecture.id in _SD3 and "kohya" not in source.dialect:
        return "it takes SD3 only in kohya's spelling"
    unplaced += len(source.embeddings)
    if unplaced > FORGE_LIMIT:
        return f"it refuses a file with more than {FORGE_LIMIT} tensors it cannot place, here are {unplaced}"
    return None


def _forge_remark(source: Source) -> str | None:
    return "its DoRA takes the norm of the unchanged weight" if "dora" in source.kinds else None


def _neo_refuses(source: Source, unplaced: int) -> str | None:
    if (unplaced + len(source.embeddings)) * 2 > len(source.header.tensors):
        return "it refuses a file if it cannot place half of its tensors"
    return None


def _sdnext_refuses(source: Source, unplaced: int) -> str | None:
    del unplaced
    if source.architecture.id in _SD3 and source.dialect == "kohya":
        return "it takes SD3 only in the diffusers spelling"
    if source.architecture.id in _FLUX and source.dialect == "kohya":
        bare = [part for part in _parts(source) if "alpha" not in part.part.slots]
        if bare:
            return f"it takes this spelling only with an alpha in each layer, and {_key(bare[0])} has none"
    components = {component(layer) for layer in source.layers}
    if source.architecture.id == "flux1" and "unet" in components and len(components) > 1:
        return "it loads no Flux.1 LoRA that changes a text encoder too"
    return _NEW_GLORA if _new_glora(source) else None


def _nothing(source: Source, unplaced: int = 0) -> None:
    del source, unplaced


_RESIDUAL = frozenset({"bias", "bias_indices", "bias_values", "bias_size"})
_OWN_LAYERS = frozenset({"up_bias", "down_bias", "magnitude"})
_COMFY_IGNORES = _RESIDUAL | _OWN_LAYERS | {"scale", "scalar", "lokr_t1", "bm"}

HOSTS = (
    Host(
        "A1111", _SD | _SD3, frozenset(), _a1111_finds,
        _OWN_LAYERS | (_RESIDUAL - {"bias"}) | {"scalar", "lokr_t1", "bm"}, _a1111_refuses, _a1111_remark,
    ),
    Host(
        "Forge", _SD | _SD3 | _FLUX, frozenset({"ia3", "oft", "oft_diag", "boft"}),
        _ComfyNames({
            "lycoris": _SD | {"flux1"}, "onetrainer": frozenset({"flux1"}), "diffusers": frozenset({"flux1"}),
        }),
        _COMFY_IGNORES, _forge_refuses, _forge_remark,
    ),
    Host(
        "reForge", _SD | _SD3 | {"flux1", "hunyuan_dit", "auraflow", "pixart"},
        frozenset({"ia3", "oft_diag"}),
        _ComfyNames({
            "lycoris": _SD | _SD3 | {"flux1"},
            "onetrainer": _SD3 | {"flux1"},
            "diffusers": _SD3 | {"flux1", "auraflow", "pixart"},
            "peft": _SD3 | {"pixart", "hunyuan_dit"},
            "kohya": frozenset({"hunyuan_dit", "auraflow", "pixart"}),
            "comfy": frozenset({"hunyuan_dit", "auraflow", "pixart"}),
        }, text_encoders=True, bare_factors=True),
        _COMFY_IGNORES, _nothing, _nothing,
    ),
    Host(
        "Forge Neo", frozenset({"sd1", "sdxl"}) | _FLUX | _NEWER, frozenset({"ia3", "oft_diag"}),
        _ComfyNames({
            "lycoris": _SD | _FLUX | {"qwen_image", "lumina2", "zimage"},
            "onetrainer": _FLUX,
            "diffusers": _FLUX | {"qwen_image", "lumina2", "zimage"},
            "bare": _FLUX | {"qwen_image", "lumina2", "zimage"},
        }, text_encoders=True, bare_factors=True, default_adapter=True),
        _COMFY_IGNORES, _neo_refuses, _nothing,
    ),
    Host(
        "SD.Next", _SD | _SD3 | _NEWER | _FLUX | {"flux2"}, frozenset(), _sdnext_finds,
        _OWN_LAYERS | {"scalar", "lokr_t1", "bm"}, _sdnext_refuses, _nothing,
    ),
)  # fmt: skip
