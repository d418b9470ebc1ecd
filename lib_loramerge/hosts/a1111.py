"""A1111, as its own code loads LoRAs."""

from __future__ import annotations

import re

from ._base import (
    A1111_IGNORES,
    CHECKPOINT,
    KOHYA,
    KOHYA_DIFFUSERS,
    LAST_OF_CLIP_H,
    PIPELINE,
    SD,
    Host,
    some,
    under,
)

_LOST = (
    r"lora_unet_(?:conv_norm_out|add_embedding_linear_[12])|.*_text_projection|.*te2?_text_model_"
    r"(?:embeddings|final).*"
)

HOST = Host(
    "a1111", "A1111", "1.10.1", "e61adddd", SD | {"sd3"},
    under(
        {KOHYA: SD, KOHYA_DIFFUSERS: SD, ("oft_unet_", CHECKPOINT): SD},
        {PIPELINE: some("sd3")},
    ),
    {
        "sd1": {"te": ("lora_te_", "lora_te1_")}, "sd2": {"te": ("lora_te_",)},
        "sdxl": {"te1": ("lora_te1_",), "te2": ("lora_te2_",)},
    },
    clip_in_part=False,
    lost={
        **dict.fromkeys(SD, re.compile(_LOST)),
        "sd2": re.compile(rf"{_LOST}|{LAST_OF_CLIP_H}"),
        "sdxl": re.compile(
            r"lora_unet_(?:conv_norm_out|add_embedding_linear_[12]|up_blocks_0_upsamplers_0_conv)|"
            r".*_text_projection|.*te2_text_model_(?:embeddings|final).*"
        ),
        "sd3": re.compile(r"(?!.*\.attn\.(?:to_[qkv]|to_out\.0)$).*"),
    },
    dialects={"sd3": "diffusers"}, ignores=A1111_IGNORES, lone_biases=False,
    biases_beside=False, lone_norms=False, lone_alphas=False, attention_as_one=True, control_adapters=False,
    flattened_alone=True, without_alpha=some("sd3"), new_glora=False,
    kinds_differ={
        "dora": "its DoRA scales input columns, whatever the file was trained with",
        "glora": "it ignores the alpha of GLoRA",
    },
)  # fmt: skip
