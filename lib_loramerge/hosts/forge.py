"""Forge, as its own code loads LoRAs."""

from __future__ import annotations

from ._base import (
    ALL,
    COMFY,
    COMFY_IGNORES,
    FLUX,
    FLUX_NORMS,
    FORGE_ENCODERS,
    KOHYA,
    LYCORIS,
    NO_FORMULA,
    NORMS_AND_QKV,
    ONETRAINER,
    PIPELINE,
    SD,
    SD3,
    UNETS,
    Host,
    some,
    under,
)

HOST = Host(
    "forge", "Forge", "", "dfdcbab6", SD | SD3 | FLUX,
    under(
        {KOHYA: ALL, COMFY: ALL}, UNETS,
        dict.fromkeys((PIPELINE, LYCORIS, ONETRAINER), some("flux1")),
    ),
    FORGE_ENCODERS, lost={**FLUX_NORMS, **NORMS_AND_QKV},
    kinds_missing=NO_FORMULA | {"oft", "boft"}, ignores=COMFY_IGNORES,
    endings=some("lora_B", "lora_B.default.weight"), unplaced_limit=12,
    kinds_differ={"dora": "its DoRA takes the norm of the unchanged weight"},
)  # fmt: skip
