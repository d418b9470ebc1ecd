"""Names that we write, looked up among those that the hosts accept (``tests/accepted_names``)."""

from __future__ import annotations

import pytest

from tests.accepted import HOSTS, MODELS, accepted
from tests.names_judge import fate, known, spellings

MODELS_OF_COMFYUI = [(architecture, model) for architecture, models in MODELS.items() for model in models]


@pytest.mark.parametrize(("architecture", "model"), MODELS_OF_COMFYUI, ids=lambda value: str(value))
def test_what_is_read_in_any_spelling_is_written_where_the_host_finds_the_same_parameter(architecture, model):
    """What is known to be lost or refused is listed in ``data/names_known.json``: the list may only shrink.

    ``python -m tests.names_judge --renew`` writes it anew.
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
