"""Block weights: sd-webui-lora-block-weight's grammar, its block ids, and presets.

A LoRA's layers belong to blocks (``BASE`` are the text encoders, ``IN04`` is in
the denoiser's first half, ...). A list of weights gives each block a factor;
elemental rules then set the factor of layers picked by name.
"""

from __future__ import annotations

from lib_loramerge.blocks.elements import WORDS, elements_of
from lib_loramerge.blocks.ids import BLOCK_IDS, blocks_help
from lib_loramerge.blocks.presets import (
    Presets,
    bundled_preset_path,
    delete_preset,
    load_presets,
    save_preset,
)
from lib_loramerge.blocks.rules import ElementRule, parse_rules
from lib_loramerge.blocks.weights import BlockWeights, check_reach, fitting, resolve

__all__ = [
    "BLOCK_IDS",
    "WORDS",
    "BlockWeights",
    "ElementRule",
    "Presets",
    "blocks_help",
    "bundled_preset_path",
    "check_reach",
    "delete_preset",
    "elements_of",
    "fitting",
    "load_presets",
    "parse_rules",
    "resolve",
    "save_preset",
]
