"""diffusers, as its own code loads LoRAs."""

from __future__ import annotations

import re

from ._base import (
    ATTENTION,
    COMFY,
    COMFY_IGNORES,
    DIFFUSERS,
    FLUX,
    KOHYA,
    KOHYA_DIFFUSERS,
    PIPELINE,
    PIPELINES,
    PROCESSOR,
    SD,
    Host,
    some,
    under,
)

HOST = Host(
    "diffusers", "diffusers", "0.42.1", "", PIPELINES,
    under(
        {PIPELINE: PIPELINES - SD, KOHYA_DIFFUSERS: SD},
        {("unet.", kind): SD for kind in (DIFFUSERS, ATTENTION, PROCESSOR)},
        # Its own converters make something of kohya's names for these alone.
        {KOHYA: some("sdxl", "flux1", "chroma", "flux2", "zimage", "qwen_image")},
        {COMFY: some("flux2", "zimage", "qwen_image", "anima", "ltx_video", "ltx2", "hidream",
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
    lost=dict.fromkeys(FLUX | {"flux2"}, re.compile(r"lora_unet_(?!(?:double|single)_blocks_).*")),
    dialects=dict.fromkeys(PIPELINES, "diffusers"),
    kinds_missing=some("ia3", "oft", "oft_diag", "boft", "glora"),
    ignores=COMFY_IGNORES, whole_layers=False,
    control_adapters=False, embeddings=False,
)  # fmt: skip
