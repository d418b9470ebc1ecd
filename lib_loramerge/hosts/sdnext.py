"""SD.Next, as its own code loads LoRAs."""

from __future__ import annotations

import re

from ._base import (
    ATTENTION,
    BARE,
    COMFY,
    COMFY_DIFFUSERS,
    DIFFUSERS,
    KOHYA,
    KOHYA_DIFFUSERS,
    LAST_OF_CLIP_H,
    LYCORIS,
    ONETRAINER,
    OUTSIDE_BLOCKS,
    OWN_LAYERS,
    PEFT,
    PIPELINE,
    PIPELINES,
    SD,
    SD3,
    SDNEXT_OWN,
    Host,
    some,
    under,
)

_LOST = r"lora_unet_output_blocks_2_1_conv|lora_te_text_projection"

HOST = Host(
    "sdnext", "SD.Next", "", "058a7f0c", SDNEXT_OWN | PIPELINES,
    under(
        {KOHYA: SDNEXT_OWN - SD3, KOHYA_DIFFUSERS: SD | {"zimage", "ernie_image"}},
        {COMFY: some("chroma", "flux2", "zimage", "anima", "ernie_image", "krea2")},
        {("unet.", kind): SD for kind in (DIFFUSERS, ATTENTION)},
        {ONETRAINER: SDNEXT_OWN - SD, LYCORIS: SDNEXT_OWN - SD},
        {PIPELINE: PIPELINES - SD, PEFT: some("chroma", "flux2", "zimage")},
        {BARE: some("chroma", "flux2", "zimage"), COMFY_DIFFUSERS: some("zimage")},
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
    some("qwen3_06b"), clip_in_part=False,
    lost={
        **dict.fromkeys(SD, re.compile(_LOST)),
        "sd2": re.compile(rf"{_LOST}|{LAST_OF_CLIP_H}"),
        "sdxl": re.compile(r"lora_te1_text_projection"),
        **dict.fromkeys(SD3, re.compile(r"lycoris_(?!.*transformer).*")), "flux1": OUTSIDE_BLOCKS,
        "anima": re.compile(r"lora_unet_llm_adapter_.*"),
        "zimage": re.compile(
            r"(?:cap_embedder|t_embedder|all_x_embedder|all_final_layer)\..*|diffusion_model\..*_pad_token"
        ),
        "chroma": re.compile(r".*(?:query|key)_norm"), "flux2": re.compile(r".*(?:query|key)_norm"),
    },
    dialects={**dict.fromkeys(PIPELINES - SDNEXT_OWN, "diffusers"),
              **dict.fromkeys((*SD3, "krea2"), "diffusers")},
    kohya_endings=SD | SD3 | {"flux1"},
    ignores=OWN_LAYERS | {"scalar", "lokr_t1", "bm"},
    control_adapters=False, diffusers_alone=SD3, alpha_needed=some("flux1"),
    denoiser_alone=some("flux1"), new_glora=False,
)  # fmt: skip
