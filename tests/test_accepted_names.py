"""Names that we write, looked up among those that the hosts accept (``tests/accepted_names``)."""

from __future__ import annotations

import re
from functools import cache

import pytest

from lib_loramerge.dialects import parse_file
from lib_loramerge.errors import LoraMergeError
from lib_loramerge.hosts import HOSTS as RECORDS
from tests.helpers.accepted import HOSTS, MODELS, accepted
from tests.helpers.names_judge import company, fate, header, known, spellings

MODELS_OF_COMFYUI = [(architecture, model) for architecture, models in MODELS.items() for model in models]


@pytest.mark.parametrize(("architecture", "model"), MODELS_OF_COMFYUI, ids=lambda value: str(value))
def test_what_is_read_in_any_spelling_is_written_where_the_host_finds_the_same_parameter(architecture, model):
    """What is known to be lost or refused is listed in ``data/names_known.json``: the list may only shrink.

    ``python -m tests.helpers.names_judge --renew`` writes it anew.
    """
    found = {}
    for spelling in spellings(model):
        fates = fate(architecture, model, spelling)
        if fates:
            found[f"{model} {spelling}"] = fates
    expected = {case: fates for case, fates in known().items() if case.split(" ")[0] == model}
    assert found == expected


@pytest.mark.parametrize("host", HOSTS)
def test_the_facts_say_where_they_are_from_and_hold_complete_models(host):
    facts = accepted(host).facts
    assert facts["host"]
    assert len(facts["commit"]) == 40
    assert "/" in facts["source"]
    for model in accepted(host).models:
        assert len(accepted(host).names(model)) > 90, model


def test_every_model_of_the_table_is_one_that_the_facts_have():
    assert {model for models in MODELS.values() for model in models} <= set(accepted("comfyui").models)


# Names on which record and facts differ, and why that is right.
EXCUSED: dict[tuple[str, str], tuple[str, str]] = {
    ("sd3", "sdnext"): (
        "lora_unet_.*",
        "it takes them, but gives context_block's q, k, v to the other stream",
    ),
    ("sd3_large", "sdnext"): ("lora_unet_.*", "the same"),
    ("flux1", "sdnext"): ("lora_te1_text_projection", "a layer that no trainer changes"),
    ("flux2", "sdnext"): ("norm_out.linear|proj_out|.*_embedder", "no trainer changes these alone"),
    ("lumina2", "comfyui"): ("(?!lora_unet_).*", "names of Z-Image, which its code gives to Lumina 2 too"),
    ("lumina2", "neo"): ("(?!lora_unet_).*", "names of Z-Image, which its code gives to Lumina 2 too"),
    ("ernie_image", "sdnext"): (r".*layers[._](?:2[4-9]|3[0-5])[._].*", "its facts are of a smaller size"),
}


@cache
def layers_by_name(architecture: str, model: str) -> dict[str, str]:
    """Every name of a model that we read, to its layer."""
    found: dict[str, str] = {}
    for spelling, names in spellings(model).items():
        if spelling.endswith(" bias"):
            continue
        try:
            parsed = parse_file(header(model, {**company(model, spelling), **names}), {})
        except LoraMergeError:
            continue
        if parsed.architecture.id == architecture:
            found |= {part.spelling: part.layer for part in parsed.parts}
    return found


@pytest.mark.parametrize(("architecture", "model"), MODELS_OF_COMFYUI, ids=lambda value: str(value))
def test_the_record_of_a_host_knows_the_names_that_its_code_knows(architecture, model):
    for host in HOSTS:
        if model not in accepted(host).models:
            continue
        pattern, _ = EXCUSED.get((architecture, host), ("", ""))
        names, record = accepted(host).names(model), RECORDS[host]
        differ = [
            name for name, layer in layers_by_name(architecture, model).items()
            if (name in names) != record.finds(architecture, layer, name)
            and not re.fullmatch(rf"{pattern}|lora_prior_te_text_projection", name)
        ]  # fmt: skip
        assert differ == [], host
