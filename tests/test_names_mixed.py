"""Files that mix spellings, and metadata that contradict the layers: every layer is right, or is refused."""

from __future__ import annotations

import random

import pytest

from lib_loramerge.dialects import parse_file
from lib_loramerge.dialects.slots import split_key
from lib_loramerge.models import plain_path
from tests.helpers.accepted import MODELS
from tests.helpers.names_judge import finds_again, header, parameter, spellings

ENCODERS = ("lora_te", "lora_prior_te", "text_encoder")
METADATA = (
    {},
    {"ss_base_model_version": "sdxl_base_v1-0"},
    {"modelspec.architecture": "flux-1-dev/lora"},
    {"ss_base_model_version": "qwen_image", "ss_sd_model_name": "anima.safetensors"},
)
# ComfyUI gives Lumina 2 the names that diffusers has for Z-Image, whose own for it are others.
OTHERS = {"lumina2": {"zimage"}}


def forms(model: str) -> dict[str, dict[str, dict[str, str]]]:
    """Parameter to its spellings, each with its names of it; of the denoiser."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for spelling, names in spellings(model).items():
        if " " in spelling or spelling.startswith(ENCODERS):
            continue
        for name, target in names.items():
            # Early processors' names lose a word when they are read.
            if ".processor." not in name and not name.endswith("_lora"):
                found.setdefault(parameter(target), {}).setdefault(spelling, {})[name] = target
    return found


CASES = [(architecture, model) for architecture, models in MODELS.items() for model in models]


@pytest.mark.parametrize(("architecture", "model"), CASES)
def test_spellings_mixed_in_one_file_are_all_understood_or_listed(architecture, model):
    chance = random.Random(model)
    share = chance.choice((1.0, 0.5, 0.1))
    names: dict[str, str] = {}
    for each in forms(model).values():
        if chance.random() < share:
            names |= each[chance.choice(sorted(each))]
    tensors = header(model, names)
    parsed = parse_file(tensors, chance.choice(METADATA))
    found = parsed.architecture.id
    if found != architecture:
        fits = {name for name, _ in parsed.candidates} | OTHERS.get(architecture, set())
        assert architecture in fits or found in fits, (found, parsed.reason)
    spelled = {split_key(key).layer for key in tensors}
    style = parsed.style if parsed.architecture.opaque else None
    read = {part.spelling for part in parsed.parts}
    listed = {split_key(key).layer for key in parsed.unknown}
    assert spelled == read | listed
    lost = [
        part.spelling
        for part in parsed.parts
        for slot in [next((slot for slot in ("up", "w_norm", "diff") if slot in part.slots), "")]
        if not finds_again(found, model, part.layer, names[part.spelling], slot, style)
    ]
    assert not lost


@pytest.mark.parametrize(("architecture", "model"), CASES)
def test_a_layer_under_two_spellings_is_one_layer(architecture, model):
    chance = random.Random(model)
    names: dict[str, str] = {}
    for each in forms(model).values():
        for spelling in chance.sample(sorted(each), min(2, len(each))):
            names |= each[spelling]
    parsed = parse_file(header(model, names), {})
    layers: dict[str, set[str]] = {}
    for part in parsed.parts:
        layers.setdefault(parameter(names[part.spelling]), set()).add(part.layer)
    for found in layers.values():
        if len(found) > 1:  # of no table, so they keep their names: one path, which a merge refuses
            assert found <= set(parsed.unlisted)
            assert len({plain_path(layer) for layer in found}) == 1
