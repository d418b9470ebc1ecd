"""Forge Neo, as its own code loads LoRAs."""

from __future__ import annotations

import re

from ._base import (
    ALIAS,
    ALIASES,
    ALIASES_OF_FLUX,
    ALL,
    BARE,
    BARE_OWN,
    COMFY,
    COMFY_CLIPS,
    COMFY_DIFFUSERS,
    COMFY_IGNORES,
    FLUX,
    FLUX_NORMS,
    KOHYA,
    LYCORIS,
    LYCORIS_OWN,
    NO_FORMULA,
    ONETRAINER,
    PIPELINE,
    PIPELINE_OWN,
    RAW_ENCODERS,
    TEXT_PROJECTION,
    UNETS,
    Host,
    some,
    under,
)

HOST = Host(
    "neo", "Forge Neo", "", "2d5fca41",
    FLUX | {"sd1", "sdxl", "sdxl_refiner", "flux2", "lumina2", "zimage", "anima", "wan",
             "qwen_image", "ernie_image", "krea2"},
    under(
        {KOHYA: ALL, COMFY: ALL}, UNETS,
        dict.fromkeys((PIPELINE, LYCORIS, ONETRAINER, BARE), FLUX | {"flux2"}),
        dict.fromkeys((COMFY_DIFFUSERS, PIPELINE, LYCORIS, BARE), some("zimage", "krea2")),
        dict.fromkeys((BARE_OWN, PIPELINE_OWN, LYCORIS_OWN), some("qwen_image")),
        {PIPELINE_OWN: some("ernie_image"), ("diffusion_model.", ALIAS): FLUX | {"flux2"}},
        dict.fromkeys(ALIASES, some("krea2")),
        dict.fromkeys(ALIASES_OF_FLUX, FLUX | {"flux2"}),
    ),
    {**COMFY_CLIPS, "anima": {"te": ("lora_te_",)}}, RAW_ENCODERS,
    lost={**FLUX_NORMS, "sd1": TEXT_PROJECTION, "sdxl": TEXT_PROJECTION,
          "sdxl_refiner": re.compile(r"lora_(?:prior_te|te2)_text_projection"),
          "anima": re.compile(
              r"lora_te_(?:embed_tokens|norm)|text_encoders\.qwen3_06b\.transformer\..*"
          ),
          "flux1": re.compile(rf"{FLUX_NORMS['flux1'].pattern}|{TEXT_PROJECTION.pattern}")},
    kinds_missing=NO_FORMULA, ignores=COMFY_IGNORES,
    placed_share=0.5,
)  # fmt: skip
