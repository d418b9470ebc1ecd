"""reForge, as its own code loads LoRAs."""

from __future__ import annotations

from ._base import (
    ALL,
    COMFY,
    COMFY_ENCODERS,
    COMFY_IGNORES,
    DIFFUSERS,
    FLUX_NORMS,
    KOHYA,
    LYCORIS,
    NO_FORMULA,
    NORMS_AND_QKV,
    ONETRAINER,
    PEFT,
    PEFT_OWN,
    PIPELINE,
    RAW_ENCODERS,
    SD,
    SD3,
    UNETS,
    Host,
    some,
    under,
)

HOST = Host(
    "reforge", "reForge", "", "3b56b268",
    SD | SD3 | {"flux1", "hunyuan_dit", "auraflow", "pixart"},
    under(
        {KOHYA: ALL, COMFY: ALL}, UNETS,
        {PIPELINE: SD3 | {"flux1", "auraflow", "pixart"}, LYCORIS: SD3 | {"flux1"}},
        {ONETRAINER: SD3 | {"flux1"}, PEFT: SD3 | {"pixart"}},
        {PEFT_OWN: some("hunyuan_dit"), ("unet.base_model.model.", DIFFUSERS): some("pixart")},
    ),
    COMFY_ENCODERS, RAW_ENCODERS | {"hydit_clip", "mt5xl", "pile_t5xl"},
    lost={**FLUX_NORMS, **NORMS_AND_QKV},
    kinds_missing=NO_FORMULA, ignores=COMFY_IGNORES, endings=some("lora_B.default.weight"),
)  # fmt: skip
