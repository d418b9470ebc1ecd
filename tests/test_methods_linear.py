"""The linear methods against dense float64 sums, and the laws that every exact method keeps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_loramerge.delta import Dense, LowRank, cut_layer
from lib_loramerge.errors import IncompatibleError
from lib_loramerge.methods import METHODS, LayerContext, merge_method
from tests.helpers.delta_cases import dense, dense_sum, low_rank, optimum, size, with_gauge

EXACT = [name for name, method in METHODS.items() if method.exact]
CONTEXT = LayerContext("a.layer")


def run(name, deltas, weights, dtype=torch.float32, rank=None):
    method = METHODS[name]
    params = {param.name: param.default for param in method.params}
    result = method.merge(deltas, weights, CONTEXT, **params)
    rule = (lambda spectrum: min(rank or spectrum.rank, spectrum.rank)) if method.uses_rank else None
    return cut_layer(result, dtype, rule)


def product(stored):
    return stored.alpha / stored.rank * (stored.up.double() @ stored.down.double())


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4), (2.5, 0.3), (-1.0, -1.0)])
def test_exact_methods_give_the_weighted_sum(name, weights):
    deltas = [
        low_rank(40, 60, 8, seed=1, alpha=4.0),
        low_rank(40, 60, 5, seed=2, alpha=1.0, dtype=torch.float16),
    ]
    whole = dense_sum(deltas, weights)
    assert size(product(run(name, deltas, weights)) - whole) <= 2e-7 * size(whole)


@pytest.mark.parametrize("name", ["svd", "concat", "add"])
@pytest.mark.parametrize("weight", [1.0, 0.5, -0.5, -1.0, 1.7])
def test_one_lora_alone_comes_out_at_its_strength(name, weight):
    """Not at the strength squared, nor without its sign, nor at the strength's root."""
    delta = low_rank(40, 60, 8, seed=1, alpha=4.0)
    assert size(product(run(name, [delta], [weight])) - weight * dense(delta)) <= 2e-7 * size(dense(delta))


@pytest.mark.parametrize("name", EXACT)
def test_a_strength_of_zero_takes_a_lora_out(name):
    a, b = low_rank(40, 60, 8, seed=1), low_rank(40, 60, 8, seed=2)
    got = product(run(name, [a, b], [0.6, 0.0]))
    assert size(got - 0.6 * dense(a)) <= 2e-7 * size(dense(a))


@pytest.mark.parametrize("name", EXACT)
def test_doubling_every_strength_doubles_the_delta(name):
    deltas = [low_rank(40, 60, 8, seed=1), low_rank(40, 60, 6, seed=2)]
    once, twice = product(run(name, deltas, [0.7, -0.3])), product(run(name, deltas, [1.4, -0.6]))
    assert size(twice - 2 * once) <= 1e-6 * size(twice)


@pytest.mark.parametrize("name", EXACT)
def test_input_order_does_not_matter_to_exact_methods(name):
    a, b = low_rank(40, 60, 8, seed=1, alpha=2.0), low_rank(40, 60, 6, seed=2)
    one, other = product(run(name, [a, b], [0.7, 0.2])), product(run(name, [b, a], [0.2, 0.7]))
    assert size(one - other) <= 1e-6 * size(one)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("rank", [None, 5])
def test_how_an_input_is_factored_does_not_matter_to_exact_methods(name, rank):
    a, b = low_rank(40, 60, 8, seed=1), low_rank(40, 60, 8, seed=2)
    plain = product(run(name, [a, b], [0.7, 0.5], rank=rank))
    other = product(run(name, [with_gauge(a, 3), with_gauge(b, 4)], [0.7, 0.5], rank=rank))
    assert size(plain - other) <= 1e-5 * size(plain)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_svd_error_is_that_of_eckart_and_young(rank):
    deltas = [low_rank(40, 60, 8, seed=1), low_rank(40, 60, 6, seed=2)]
    stored = run("svd", deltas, [1.0, 0.5], rank=rank)
    whole = dense_sum(deltas, [1.0, 0.5])
    assert size(product(stored) - whole) == pytest.approx(optimum(whole, rank)[1], rel=1e-8)
    assert stored.alpha == rank


@pytest.mark.parametrize("ranks", [(4, 4), (16, 2), (1, 12)])
def test_concat_keeps_all_ranks_and_the_first_alpha(ranks):
    deltas = [low_rank(40, 60, rank, seed=i, alpha=3.0 + i) for i, rank in enumerate(ranks)]
    stored = run("concat", deltas, [1.0, 1.0])
    assert (stored.rank, stored.alpha) == (sum(ranks), 3.0)


def test_a_copy_that_is_taken_away_leaves_no_noise_in_a_concatenation():
    """1e30 less itself is 0, whatever float64 makes of it; the same strengths twice stay side by side."""
    a, b = low_rank(40, 60, 4, seed=1, alpha=1e30), low_rank(40, 60, 2, seed=2)
    stored = run("concat", [a, b, a], [0.7, 1.0, -0.7])
    assert stored.rank == 2
    assert size(product(stored) - dense(b)) <= 2e-7 * size(dense(b))
    assert run("concat", [b, a, b], [0.7, 1e-30, 0.7]).rank == 8
    assert run("concat", [a, a], [1.0, -1.0]) is None


@pytest.mark.parametrize("name", EXACT)
def test_a_dense_input_joins_the_sum(name):
    a, b = (
        low_rank(40, 60, 8, seed=1),
        Dense(0.1 * torch.randn(40, 60, generator=torch.Generator().manual_seed(2))),
    )
    stored = cut_layer(METHODS[name].merge([a, b], [1.0, -0.5], CONTEXT), torch.float32, lambda s: s.rank)
    assert size(product(stored) - (dense(a) - 0.5 * b.weight.double())) <= 2e-7 * size(dense(a))


@settings(max_examples=30, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    alphas=st.lists(st.sampled_from([0.5, 1.0, 8.0, 64.0]), min_size=5, max_size=5),
    weights=st.lists(st.floats(-3, 3), min_size=5, max_size=5),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("name", EXACT)
def test_any_inputs_give_their_sum(name, ranks, alphas, weights, seed):
    deltas = [low_rank(30, 25, rank, seed=seed + i, alpha=alphas[i]) for i, rank in enumerate(ranks)]
    weights = weights[: len(deltas)]
    inputs = sum(abs(w) * size(dense(d)) for d, w in zip(deltas, weights))
    stored = run(name, deltas, weights)
    whole = dense_sum(deltas, weights)
    # Below the last term the squares that sizes are made of are 0 in float64.
    assert size((product(stored) if stored else 0 * whole) - whole) <= 3e-7 * inputs + 1e-150


def factor_sum(deltas, strengths, blocks):
    """The documented formula of ``add``, written out."""
    alpha = deltas[0].alpha
    roots = [math.sqrt(delta.alpha / alpha) for delta in deltas]
    up = sum(w * b * root * d.up.double() for w, b, root, d in zip(strengths, blocks, roots, deltas))
    down = sum(w * root * d.down.double() for w, root, d in zip(strengths, roots, deltas))
    return alpha / deltas[0].rank * (up @ down)


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.5, 0.5), (0.7, -0.4)])
@pytest.mark.parametrize("blocks", [(1.0, 1.0), (0.5, 1.0), (0.0, 2.0)])
def test_add_follows_its_formula(strengths, blocks):
    deltas = [low_rank(40, 60, 8, seed=1, alpha=4.0), low_rank(40, 60, 8, seed=2, alpha=1.0)]
    context = LayerContext("a.layer", strengths=strengths, block_weights=blocks)
    got = METHODS["add"].merge(deltas, [s * b for s, b in zip(strengths, blocks)], context)
    assert got.alpha == 4.0
    assert size(got.dense() - factor_sum(deltas, strengths, blocks)) <= 1e-12 * size(dense(deltas[0]))


def test_add_of_the_same_lora_is_its_sum():
    a = low_rank(40, 60, 8, seed=1, alpha=4.0)
    got = METHODS["add"].merge([a, a], [0.5, 0.5], CONTEXT)
    assert size(got.dense() - dense(a)) <= 1e-12 * size(dense(a))


def test_add_refuses_unequal_ranks_with_the_layer_the_ranks_and_the_modes_that_work():
    a, b = low_rank(40, 60, 8, seed=1), low_rank(40, 60, 4, seed=2)
    with pytest.raises(IncompatibleError, match=r"a\.layer has ranks 8, 4.*svd, concat"):
        METHODS["add"].merge([a, b], [1.0, 1.0], CONTEXT)
    with pytest.raises(IncompatibleError, match="8, none"):
        METHODS["add"].merge([a, Dense(dense(a))], [1.0, 1.0], CONTEXT)


@pytest.mark.parametrize("name", METHODS)
def test_no_method_changes_its_inputs(name):
    deltas = [low_rank(20, 30, 4, seed=i) for i in range(max(2, METHODS[name].minimum))]
    before = [(delta.up.clone(), delta.down.clone()) for delta in deltas]
    params = {param.name: param.default for param in METHODS[name].params}
    METHODS[name].merge(deltas, [0.5] * len(deltas), CONTEXT, **params)
    for delta, (up, down) in zip(deltas, before):
        assert torch.equal(delta.up, up)
        assert torch.equal(delta.down, down)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name):
    method = METHODS[name]
    assert method.label
    assert method.summary.endswith(".")
    assert method.formula
    assert method.source
    assert method.merge.__doc__


def test_registering_returns_the_function_and_refuses_a_second_of_the_name():
    with pytest.raises(ValueError, match="twice"):
        merge_method("svd", label="", summary="")(lambda deltas, weights, context: deltas[0])

    def first(deltas, weights, context):
        return LowRank(deltas[0].up, deltas[0].down, 1.0)

    try:
        assert merge_method("a_test_method", label="x", summary="x")(first) is first
        assert METHODS["a_test_method"].merge is first
    finally:
        METHODS.pop("a_test_method", None)
