"""What base models look like: their layers, how to recognise them, their blocks.

A layer's canonical name is its path in the checkpoint, flattened as kohya's
trainer does: ``lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q``,
``lora_te1_text_model_encoder_layers_0_mlp_fc1``, ``lora_unet_double_blocks_0_img_attn_qkv``.
Layers of base models that we know nothing about keep the name their file gives them.
"""

from __future__ import annotations

from .base import ARCHITECTURES, COMPONENTS, Architecture, Rows, component, layer_name, layer_path
from .blocks import block, companions, is_conv, kernel, layers
from .checkpoints import CheckpointKey, checkpoint_keys
from .detect import Detection, detect, in_features, out_features
from .names import canonical_path, diffusers_layers

__all__ = [
    "ARCHITECTURES",
    "COMPONENTS",
    "Architecture",
    "CheckpointKey",
    "Detection",
    "Rows",
    "block",
    "canonical_path",
    "checkpoint_keys",
    "companions",
    "component",
    "detect",
    "diffusers_layers",
    "in_features",
    "is_conv",
    "kernel",
    "layer_name",
    "layer_path",
    "layers",
    "out_features",
]
