"""Which block of the block-weight lists a layer is in, and what its weight looks like."""

from __future__ import annotations

import re
from functools import cache, lru_cache

from .base import MANY_LAYERS, component, layer_path
from .block_lists import stacks
from .dit import dotted_path
from .records import ARCHITECTURES
from .text_encoders import CLIP_ATTENTION, OPEN_CLIPS, paths
from .unet import UNETS, by_ldm, unet_layers

_UNET_BLOCK = re.compile(r"(input|output)_blocks_(\d+)_")
_DIFFUSERS_UNET_BLOCK = re.compile(
    r"(down|up)_blocks_(\d)_(resnets|attentions|downsamplers|upsamplers)_(\d)_"
)
_NUMBERED_BLOCK = re.compile(
    r"(?:double_blocks|single_blocks|joint_blocks|transformer_blocks|single_transformer_blocks|layers|blocks|"
    r"double_layers|single_layers|double_stream_blocks|single_stream_blocks|visual_transformer_blocks|"
    r"joint_transformer_blocks|vace_blocks|decoder_layers)_(\d+)_"
)
_INPUTS = (
    "img_in", "txt_in", "time_in", "vector_in", "guidance_in", "x_embedder", "t_embedder", "y_embedder",
    "context_embedder", "cap_embedder", "patch_embedding", "text_embedding", "time_embedding",
    "time_projection", "img_emb", "noise_refiner", "context_refiner", "time_text_embed", "byt5_in",
    "p_embedder", "caption_projection", "patchify_proj", "adaln_single", "vision_in", "input_proj",
    "llm_cond", "t_embedding", "first", "tmlp", "tproj", "txtmlp", "txtfusion", "cond_seq_linear",
    "init_x_linear", "text_proj", "visual_embeddings", "time_embeddings", "pooled_text", "time_r_in",
    "text_transformer_blocks", "ref_image_refiner", "time_caption_embed", "t5_y", "t_block", "csize_embedder",
    "ar_embedder", "mlp_t5", "pooler", "extra_embedder",
)  # fmt: skip
_OUTPUTS = (
    "final_layer", "proj_out", "norm_out", "head_", "last_", "final_linear", "final_norm", "out_layer",
    "modF", "audio_proj_out", "decoder_proj_out", "decoder_norm_out", "scale_shift_table",
    "audio_scale_shift_table",
    "decoder_scale_shift_table", "projectors_", "clf_",
)  # fmt: skip
# Makes the modulation of all blocks; sd-webui-lora-block-weight leaves it at 1.
_IN_NO_BLOCK = ("distilled_guidance_layer",)


@lru_cache(maxsize=MANY_LAYERS)
def block(architecture_id: str, layer: str) -> str | None:
    """Block id of a layer, or None for layers that no block weight reaches.

    U-Nets use the ids of the 26 list, Flux and Chroma those of the 61 list. Of the other diffusion
    transformers the record names the numbered blocks; what stands before them is ``IN``, what comes after
    them ``OUT``.
    """
    part = component(layer)
    path = layer_path(layer) if layer.startswith("lora_") else layer.replace(".", "_")
    if part != "unet":
        if "T5" not in ARCHITECTURES[architecture_id].blocks:
            return "BASE"
        return "T5" if "encoder_block_" in path or "encoder_final" in path else "CLIP"
    if architecture_id in UNETS:
        return _unet_block(path)
    if architecture_id == "unknown":
        return _unet_block(path) or _diffusers_unet_block(path) or _transformer_block(path)
    return _listed_block(architecture_id, path)


def _listed_block(architecture_id: str, path: str) -> str | None:
    """Block of a layer by the record of its model; None for layers that no table has."""
    for stack in stacks(architecture_id):
        root = stack.root.replace(".", "_") + "_"
        if path.startswith(root):
            number = path[len(root) :].partition("_")[0]
            if number.isdigit():
                return f"{stack.letters}{int(number):02}"
    if path.startswith(_IN_NO_BLOCK):
        return None
    if path.startswith(_OUTPUTS):
        return "OUT"
    return "IN" if dotted_path(architecture_id, path) is not None else None


def _unet_block(path: str) -> str | None:
    match = _UNET_BLOCK.match(path)
    if match is not None:
        return f"{'IN' if match[1] == 'input' else 'OUT'}{int(match[2]):02}"
    return "M00" if path.startswith("middle_block_") else None


def _diffusers_unet_block(path: str) -> str | None:
    """Block of a layer by its diffusers name, for files that fit several U-Nets."""
    if path.startswith("mid_block_"):
        return "M00"
    if path.startswith("conv_in"):
        return "IN00"
    match = _DIFFUSERS_UNET_BLOCK.match(path)
    if match is None:
        return None
    level, number = int(match[2]), int(match[4])
    if match[1] == "down":
        return f"IN{3 * level + (3 if match[3] == 'downsamplers' else 1 + number):02}"
    return f"OUT{3 * level + (2 if match[3] == 'upsamplers' else number):02}"


def _transformer_block(path: str) -> str | None:
    if path.startswith(_INPUTS):
        return "IN"
    if path.startswith(_OUTPUTS):
        return "OUT"
    match = _NUMBERED_BLOCK.match(path)
    return f"B{int(match[1]):02}" if match is not None else None


def kernel(architecture_id: str, layer: str) -> tuple[int, int] | None:
    """Kernel of a convolution of a known U-Net; None for linear layers and unknown ones."""
    if architecture_id not in UNETS or not layer.startswith("lora_unet_"):
        return None
    known = by_ldm(architecture_id).get(layer_path(layer))
    return known.kernel if known is not None else None


def is_conv(architecture_id: str, layer: str) -> bool:
    """Whether the base model has a convolution here, so that factors are stored 4-D."""
    return kernel(architecture_id, layer) is not None


def open_clip_attention(architecture_id: str, layer: str) -> tuple[str, ...]:
    """q, k, v and out of an OpenCLIP text encoder's attention, of which the layer is one; () for others."""
    part = OPEN_CLIPS.get(architecture_id)
    if part is None or component(layer) != part:
        return ()
    stem, found, projection = layer.rpartition("_self_attn_")
    if not found or projection not in CLIP_ATTENTION:
        return ()
    return tuple(f"{stem}_self_attn_{name}" for name in CLIP_ATTENTION)


@cache
def layers(architecture_id: str) -> tuple[str, ...]:
    """Every layer of a base model by canonical name; () where we have no complete list.

    The models with a U-Net have one, their text encoders included.
    """
    if architecture_id not in UNETS:
        return ()
    denoiser = [f"lora_unet_{entry.ldm_flat}" for entry in unet_layers(architecture_id)]
    encoders = [f"lora_{part}_{path}" for part, known in paths(architecture_id).items() for path in known]
    return (*denoiser, *encoders)
