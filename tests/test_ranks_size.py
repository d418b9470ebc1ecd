"""Ranks allotted to layers for a file of limited size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_loramerge.errors import OutputError
from lib_loramerge.ranks import LayerCost, allot, least_bytes, smallest


def bytes_of(layers, ranks):
    return sum(layer.fixed + layer.per_rank * rank for layer, rank in zip(layers, ranks) if rank)


def lost(layers, ranks):
    return sum(float(np.square(layer.values[rank:]).sum()) for layer, rank in zip(layers, ranks))


def random_layers(seed, count, per_rank=None, fixed=0):
    random = np.random.default_rng(seed)
    return [
        LayerCost(
            sorted((random.random(8) * 10.0 ** random.uniform(-2, 1)).tolist(), reverse=True),
            per_rank or int(random.integers(50, 400)),
            fixed,
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(6))
def test_no_other_choice_of_ranks_is_better_when_all_ranks_cost_the_same(seed):
    layers = random_layers(seed, 4, per_rank=100)
    budget = 1250
    found = allot(layers, budget)
    assert bytes_of(layers, found) <= budget
    least = min(
        lost(layers, choice)
        for choice in itertools.product(range(9), repeat=4)
        if bytes_of(layers, choice) <= budget
    )
    assert lost(layers, found) == pytest.approx(least)


@pytest.mark.parametrize("fixed", [0, 150])
@pytest.mark.parametrize("seed", range(4))
def test_with_unequal_costs_the_choice_misses_the_best_by_less_than_one_component(seed, fixed):
    layers = random_layers(seed, 4, fixed=fixed)
    budget = 3000
    found = allot(layers, budget)
    assert bytes_of(layers, found) <= budget
    choices = [c for c in itertools.product(range(9), repeat=4) if bytes_of(layers, c) <= budget]
    best = min(choices, key=lambda choice: lost(layers, choice))
    largest = max(layer.per_rank + layer.fixed for layer in layers)
    near = min(lost(layers, c) for c in choices if bytes_of(layers, c) <= budget - largest)
    assert lost(layers, best) <= lost(layers, found) <= near


def sdxl_like(seed=0):
    random = np.random.default_rng(seed)
    shapes = [(640, 640), (1280, 1280), (1280, 2048), (10240, 1280), (1280, 5120), (768, 768)]
    layers = []
    for index in range(120):
        out, in_ = shapes[index % len(shapes)]
        fall = random.uniform(0, 1.5)
        values = random.uniform(0.1, 2) * np.arange(1, 65) ** -fall
        layers.append(LayerCost(values.tolist(), (out + in_) * 2, 260))
    return layers


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_the_budget_is_kept_and_used(share):
    layers = sdxl_like()
    budget = int(share * bytes_of(layers, [64] * len(layers)))
    used = bytes_of(layers, allot(layers, budget))
    assert 0.93 * budget <= used <= budget


@pytest.mark.parametrize("uniform", [4, 8, 16, 32])
def test_it_beats_one_rank_for_all_at_the_same_bytes(uniform):
    layers = sdxl_like()
    same = [uniform] * len(layers)
    assert lost(layers, allot(layers, bytes_of(layers, same))) < 0.95 * lost(layers, same)


def test_a_budget_for_everything_keeps_everything():
    layers = sdxl_like()
    assert allot(layers, bytes_of(layers, [64] * len(layers))) == [64] * len(layers)
    assert allot(layers, 10**12) == [64] * len(layers)


def test_no_budget_keeps_nothing_but_what_must_be_there():
    layers = [
        LayerCost([3.0, 2.0], 100, 10),
        LayerCost([1.0], 100, 10, least=1),
        LayerCost([], 100, 10, least=1),
    ]
    assert allot(layers, 110) == [0, 1, 0]
    assert allot(layers, 220) == [1, 1, 0]
    with pytest.raises(OutputError, match="too small"):
        allot(layers, 109)
    assert allot([], 100) == []


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.lists(st.floats(0, 10), max_size=6), st.integers(1, 500), st.integers(0, 300)),
        max_size=8,
    ),
    budget=st.integers(0, 6000),
    more=st.integers(0, 2000),
)
def test_any_allotment_fits_and_more_bytes_never_lose_a_layer_more_than_rounding(rows, budget, more):
    layers = [LayerCost(sorted(values, reverse=True), cost, fixed) for values, cost, fixed in rows]
    few, many = allot(layers, budget), allot(layers, budget + more)
    assert bytes_of(layers, few) <= budget
    assert all(0 <= rank <= len(layer.values) for layer, rank in zip(layers, few))
    left = budget - bytes_of(layers, few)
    for layer, rank in zip(layers, few):
        if rank and rank < len(layer.values):
            assert layer.per_rank > left, "another component would have fitted"
    assert bytes_of(layers, many) <= budget + more


@pytest.mark.parametrize("one_rank", [False, True])
@pytest.mark.parametrize("error", [0.05, 0.5, 0.9])
@pytest.mark.parametrize(
    "layers",
    [
        [LayerCost([1.0] * 32, 256, 260)] * 200,  # flat: the first component costs more than the others
        sdxl_like(),
        random_layers(1, 6, fixed=150),
        [LayerCost([3.0, 2.0, 1e-3], 100, 10), LayerCost([0.1], 100, 10, least=1), LayerCost([], 100, 10)],
    ],
)
def test_the_bytes_foretold_for_an_error_are_enough_for_it_and_hardly_more(layers, error, one_rank):
    allowed = error**2 * sum(float(np.square(layer.values).sum()) for layer in layers)
    size, least = smallest(layers, allowed, one_rank=one_rank), least_bytes(layers, one_rank=one_rank)
    assert size >= least
    assert lost(layers, allot(layers, size, one_rank=one_rank)) <= allowed * (1 + 1e-9)
    steps = [layer.per_rank for layer in layers]
    step = sum(steps) if one_rank else max(s * len(x.values) + x.fixed for s, x in zip(steps, layers))
    if size - step >= least:
        assert lost(layers, allot(layers, size - step, one_rank=one_rank)) > allowed


def test_one_rank_for_all_counts_layers_that_have_fewer():
    layers = [LayerCost([3.0, 2.0, 1.0], 100, 10), LayerCost([1.0], 50, 10)]
    assert allot(layers, 2 * 150 + 20, one_rank=True) == [2, 2]
    assert least_bytes(layers, one_rank=True) == 170
    with pytest.raises(OutputError, match="one rank"):
        allot(layers, 169, one_rank=True)
