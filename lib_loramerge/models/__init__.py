"""What base models look like: their layers, how to recognise them, their blocks.

A layer's canonical name is its path in the checkpoint, flattened as kohya's
trainer does: ``lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q``,
``lora_te1_text_model_encoder_layers_0_mlp_fc1``, ``lora_unet_double_blocks_0_img_attn_qkv``.
Layers of base models that we know nothing about keep the name their file gives them.
"""

from __future__ import annotations

from .base import (
    COMFY,
    COMPONENTS,
    DIFFUSERS,
    KOHYA,
    Architecture,
    Rows,
    Size,
    component,
    layer_name,
    layer_path,
    plain_path,
)
from .block_lists import EDGES, SD_FULL, TEXT_ENCODERS, UNET_LISTS, BlockList, BlockMap, block_map, in_ranges
from .blocks import block, is_conv, kernel, layers, open_clip_attention
from .checkpoints import CheckpointKey, bias_place, checkpoint_keys, numbered_layers
from .compatible import encoder_part
from .detect import Detection, Measured, Model, detect
from .dit import fused
from .names import canonical_path, comfy_layer, diffusers_layers, has_dotted_name_alone
from .records import ARCHITECTURES

__all__ = [
    "ARCHITECTURES",
    "COMFY",
    "COMPONENTS",
    "DIFFUSERS",
    "EDGES",
    "KOHYA",
    "SD_FULL",
    "TEXT_ENCODERS",
    "UNET_LISTS",
    "Architecture",
    "BlockList",
    "BlockMap",
    "CheckpointKey",
    "Detection",
    "Measured",
    "Model",
    "Rows",
    "Size",
    "bias_place",
    "block",
    "block_map",
    "canonical_path",
    "checkpoint_keys",
    "comfy_layer",
    "component",
    "detect",
    "diffusers_layers",
    "encoder_part",
    "fused",
    "has_dotted_name_alone",
    "in_ranges",
    "is_conv",
    "kernel",
    "layer_name",
    "layer_path",
    "layers",
    "numbered_layers",
    "open_clip_attention",
    "plain_path",
]
