"""Rank rules of one layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_loramerge import ranks
from lib_loramerge.delta import LowRank, Spectrum, decompose
from lib_loramerge.recipe import LoraInput, MergeRecipe


def spectrum(values):
    values = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    return Spectrum(values, float(values.square().sum()), 1.0)


def recipe(**rule):
    return MergeRecipe((LoraInput("a"),), **rule)


EIGHT = spectrum([8.0, 7, 6, 5, 4, 3, 2, 1])


def test_the_default_keeps_all_where_the_rank_is_bounded_and_that_of_the_inputs_elsewhere():
    assert ranks.choose(recipe(), EIGHT, same=4, bounded=True) == 8
    assert ranks.choose(recipe(), EIGHT, same=4, bounded=False) == 4
    assert ranks.choose(recipe(rank="full"), EIGHT, same=4, bounded=False) == 8


@pytest.mark.parametrize(
    ("rule", "same", "conv", "wanted"),
    [
        ({}, 4, False, 8),
        ({"rank": "same"}, 4, False, 4),
        ({"rank": "same"}, 32, False, 8),
        ({"rank": 3}, 4, False, 3),
        ({"rank": 320}, 4, True, 8),
        ({"rank": "full"}, 4, False, 8),
        ({"rank": 6, "conv_rank": 2}, 4, True, 2),
        ({"rank": 6, "conv_rank": 2}, 4, False, 6),
        ({"retain": 1.0}, 4, False, 8),
    ],
)
def test_each_rule_gives_its_rank_and_never_more_than_there_is(rule, same, conv, wanted):
    assert ranks.choose(recipe(**rule), EIGHT, same=same, conv=conv) == wanted


@pytest.mark.parametrize("rule", [{}, {"rank": 3}, {"rank": "full"}, {"retain": 0.5}, {"conv_rank": 4}])
def test_a_layer_that_cancelled_has_no_rank(rule):
    assert ranks.choose(recipe(**rule), spectrum([]), same=8, conv=True) == 0


@given(
    values=st.lists(st.floats(1e-6, 100), min_size=1, max_size=40),
    fraction=st.floats(0.01, 1.0),
)
def test_retain_is_the_smallest_rank_that_keeps_the_fraction_of_the_norm(values, fraction):
    layer = spectrum(values)
    rank = ranks.choose(recipe(retain=fraction), layer, same=4)
    kept = layer.values.square().cumsum(0).sqrt() / layer.values.norm()
    assert kept[rank - 1] >= fraction * (1 - 1e-9)
    assert rank == 1 or kept[rank - 2] < fraction * (1 + 1e-9)


@pytest.mark.parametrize(("true_rank", "fraction"), [(1, 0.999), (3, 1.0), (12, 1.0), (16, 0.9999999)])
def test_retain_finds_a_true_rank_without_one_too_many(true_rank, fraction):
    basis = torch.linalg.qr(torch.randn(40, true_rank, generator=torch.Generator().manual_seed(1))).Q
    delta = LowRank(basis, torch.eye(true_rank, 50), float(true_rank))
    assert ranks.choose(recipe(retain=fraction), decompose(delta), same=99) == true_rank
