"""sd-webui-lora-block-weight's own loop, written down again, beside ours on every layer.

The loop goes by the names the WebUI keeps layers under: the last entry of a list
of name parts that fits decides the block, then each rule in turn may set the ratio.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cache

import pytest

from lib_loramerge import models
from lib_loramerge.blocks import BLOCK_IDS, bundled_preset_path, load_presets, resolve
from lib_loramerge.recipe import LoraInput

SD_PARTS = [
    ("encoder", "BASE"),
    *((f"diffusion_model_input_blocks_{n}_", f"IN{n:02}") for n in range(12)),
    ("diffusion_model_middle_block_", "M00"),
    *((f"diffusion_model_output_blocks_{n}_", f"OUT{n:02}") for n in range(12)),
    ("embedders", "BASE"),
    ("transformer_resblocks", "BASE"),
]
PRESETS = load_presets([bundled_preset_path()])
RULES = [
    "",
    "IN05-OUT05:attn:0",
    "OUT05-IN05:attn1 ff:0.3,IN01:attn1 ff_net:0.4",
    "NOT IN00-IN05:NOT attn:2",
    "BASE:mlp:0.5,M00:proj:-1,:to_q:0.25",
    "::0.125",
    ":emb:0,:out_:3",
    "IN0:transformer_blocks_1:4,IN04:attn2:5,NOT OUT:to_k:6",
    "NOT:norm:9",
]
FLUX_RULES = ["", "D00-D05:img:0", "S37-S00:linear1:0.5,NOT D:mod:2", "IN:_in:3,CLIP T5:attn:0.1", "::7"]


def lbw_ratio(key: str, ratios: Sequence[float], rules: str, *, flux: bool) -> float:
    """What the extension multiplies the layer ``key`` with; ``ratios`` has 26 or 61 entries."""
    ids = list(BLOCK_IDS[61 if flux else 26])
    ratio, block = 1.0, ""
    if flux:
        block = lbw_flux_block(key)
        if block in ids:
            ratio = ratios[ids.index(block)]
    else:
        for part, name in SD_PARTS:
            if part in key:
                ratio, block = ratios[ids.index(name)], name
    searched = key + block
    for rule in rules.split(","):
        if rule.count(":") != 2:
            continue
        block_text, element_text, value = rule.split(":")
        if lbw_picks(lbw_ranges(block_text, ids), searched) and lbw_picks(element_text, searched):
            ratio = float(value)
    return ratio


def lbw_ranges(text: str, ids: list[str]) -> str:
    words = []
    for word in text.split(" "):
        if "-" in word:
            low, high = sorted(ids.index(end) for end in word.split("-"))
            words += ids[low : high + 1]
        else:
            words.append(word)
    return " ".join(words)


def lbw_picks(text: str, searched: str) -> bool:
    words = text.split(" ")
    negated = words[0] == "NOT"
    found = any(word in searched for word in (words[1:] if negated else words))
    return not found if negated else found


def lbw_flux_block(key: str) -> str:
    if "t5xxl" in key or "clip_" in key:
        return "T5" if "t5xxl" in key else "CLIP"
    number = re.search(r"_(\d+)_", key)
    for part, letter in (("double_blocks", "D"), ("single_blocks", "S")):
        if part in key:
            return f"{letter}{number[1]:0>2}"
    return "IN" if "_in" in key else "OUT" if "final_layer" in key else ""


def host_key(layer: str, *, sd2: bool, flux: bool) -> str:
    """The name under which the WebUI keeps a layer; an independent writing of its rules."""
    component, path = re.fullmatch(r"lora_(unet|te\d?)_(.+)", layer).groups()
    if component == "unet":
        return "diffusion_model_" + path
    if flux:
        return ("t5xxl_transformer_" if component == "te3" else "clip_l_transformer_") + path
    if component == "te2" or sd2:
        path = path.replace("text_model_encoder_layers", "model_transformer_resblocks")
        for ours, theirs in (("mlp_fc1", "mlp_c_fc"), ("mlp_fc2", "mlp_c_proj"), ("self_attn", "attn")):
            path = path.replace(ours, theirs)
        return ("1_" if component == "te2" else "") + path
    return ("0_transformer_" if component == "te1" else "transformer_") + path


@cache
def all_layers(architecture: str) -> tuple[str, ...]:
    if architecture != "flux1":
        # LoRAs change layers of the text encoders' blocks; their embeddings are in no LoRA.
        return tuple(n for n in models.layers(architecture) if "unet" in n or "encoder_layers" in n)
    layers = [
        f"lora_unet_{name}"
        for name in ("img_in", "txt_in", "final_layer_linear", "final_layer_adaLN_modulation_1")
    ]
    layers += [
        f"lora_unet_{n}_in_{end}_layer" for n in ("time", "vector", "guidance") for end in ("in", "out")
    ]
    for n in range(19):
        for side in ("img", "txt"):
            parts = ("attn_qkv", "attn_proj", "mlp_0", "mlp_2", "mod_lin")
            layers += [f"lora_unet_double_blocks_{n}_{side}_{part}" for part in parts]
    for n in range(38):
        layers += [f"lora_unet_single_blocks_{n}_{part}" for part in ("linear1", "linear2", "modulation_lin")]
    for n in range(12):
        layers += [
            f"lora_te1_text_model_encoder_layers_{n}_{part}"
            for part in ("self_attn_q_proj", "mlp_fc1", "mlp_fc2")
        ]
    return (*layers, *(f"lora_te3_encoder_block_{n}_layer_0_SelfAttention_q" for n in range(24)))


def distinct(count: int, seed: int) -> list[float]:
    """Weights all different, so that a layer in a neighbour's block is seen."""
    values = [round(0.01 * n - 0.3, 2) for n in range(count)]
    random.Random(seed).shuffle(values)
    return values


def spread(values: Sequence[float], count: int) -> list[float]:
    """A list of any length as the 26 (or 61) that the extension's loop takes."""
    if count == 61:
        return list(values)
    named = dict(zip(BLOCK_IDS[count], values, strict=True))
    return [named.get(block, 0) for block in BLOCK_IDS[26]]


@pytest.mark.parametrize("architecture", ["sd1", "sd2", "sdxl", "flux1"])
def test_every_layer_gets_what_lora_block_weight_gives_it(architecture):
    flux, sd2 = architecture == "flux1", architecture == "sd2"
    checked = 0
    for count in (61,) if flux else (12, 17, 20, 26):
        for seed, rules in enumerate(FLUX_RULES if flux else RULES):
            values = distinct(count, seed)
            given = LoraInput("a", lbw=",".join(map(str, values)), lbwe=rules or None)
            found = resolve(given, PRESETS, rng=random.Random(0))
            ratios = spread(values, count)
            for layer in all_layers(architecture):
                component = models.component(layer)
                block = models.block(architecture, layer)
                theirs = lbw_ratio(host_key(layer, sd2=sd2, flux=flux), ratios, rules, flux=flux)
                assert found.weight(component, block, layer) == theirs, (count, rules, layer)
                checked += 1
    assert checked > 1000


@pytest.mark.parametrize("name", sorted(n for n, t in PRESETS.weights.items() if not set("@:") & set(t)))
def test_every_shipped_preset_gives_every_layer_what_lora_block_weight_gives_it(name):
    values = [float(entry) for entry in PRESETS.weights[name].split(",")]
    flux = len(values) == 61
    found = resolve(LoraInput("a", lbw=name), PRESETS, rng=random.Random(0))
    for architecture in ("flux1",) if flux else ("sd1", "sdxl"):
        ratios = spread(values, len(values))
        for layer in all_layers(architecture):
            block = models.block(architecture, layer)
            theirs = lbw_ratio(host_key(layer, sd2=False, flux=flux), ratios, "", flux=flux)
            assert found.weight(models.component(layer), block, layer) == theirs, layer
