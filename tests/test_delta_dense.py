"""Truncation of dense deltas against the dense singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from lib_loramerge.delta import Dense, cut_layer, decompose_dense, truncate
from tests.helpers.delta_cases import dense, low_rank, optimum, size


def trimmed(out, in_, rank, decay, seed=0):
    """A sum of two low-rank deltas with the smaller half of each one's elements set to zero."""
    total = torch.zeros(out, in_, dtype=torch.float64)
    for i in range(2):
        whole = dense(low_rank(out, in_, rank, seed=seed + i, decay=decay))
        total += whole * (whole.abs() >= whole.abs().median())
    return total.float()


@pytest.mark.parametrize(("out", "in_"), [(300, 300), (260, 500), (500, 260)])
@pytest.mark.parametrize("decay", [0.0, 1.0])
@pytest.mark.parametrize("start", [True, False])
def test_the_fast_way_misses_the_optimum_by_less_than_a_hundred_thousandth(out, in_, decay, start):
    weight = trimmed(out, in_, 8, decay)
    rows = low_rank(out, in_, 8, seed=0, decay=decay).down.mT if start else None
    spectrum = decompose_dense(Dense(weight, (), rows), 8)
    assert spectrum.rank < min(out, in_) / 2, "the fast way was not taken"
    least = optimum(weight, 8)[1]
    got = truncate(spectrum, 8)
    assert size(dense(got) - weight) <= least * (1 + 1e-5)
    assert spectrum.tail(8) ** 0.5 == pytest.approx(size(dense(got) - weight), rel=1e-6)
    assert spectrum.energy == pytest.approx(size(weight) ** 2, rel=1e-9)


@pytest.mark.parametrize(("out", "in_", "rank"), [(24, 16, 1), (300, 260, 4), (260, 300, 8)])
@pytest.mark.parametrize("factor", [1.0, 1e24])
def test_a_dense_delta_of_low_rank_keeps_the_digits_of_its_dtype(out, in_, rank, factor):
    """Judged by the matrix itself: its products in float32 would leave 1e-7."""
    weight = dense(low_rank(out, in_, rank, seed=3)).double() * factor
    spectrum = decompose_dense(Dense(weight), rank)
    assert spectrum.rank < min(out, in_) / 2, "the fast way was not taken"
    true = size(dense(truncate(spectrum, rank)).double() - weight)
    assert true < 1e-13 * size(weight)
    assert spectrum.tail(rank) ** 0.5 < 1e-13 * size(weight)


def test_pure_noise_is_the_hardest_and_is_cut_as_well():
    weight = torch.randn(500, 500, generator=torch.Generator().manual_seed(1))
    got = truncate(decompose_dense(Dense(weight), 8), 8)
    assert size(dense(got) - weight) <= optimum(weight, 8)[1] * (1 + 1e-5)


@pytest.mark.parametrize(("out", "in_"), [(40, 60), (60, 40), (1, 9), (9, 1)])
def test_all_singular_values_are_those_of_the_dense_decomposition(out, in_):
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(1))
    spectrum = decompose_dense(Dense(weight))
    torch.testing.assert_close(spectrum.values, torch.linalg.svdvals(weight.double()))
    alone = decompose_dense(Dense(weight), vectors=False)
    torch.testing.assert_close(alone.values, spectrum.values)
    assert alone.source is None, "the values would keep the whole matrix alive"
    for rank in (1, 7, 40):
        assert size(dense(truncate(spectrum, rank)) - weight) <= optimum(weight, rank)[1] + 1e-12


def test_the_result_is_the_same_each_time_and_leaves_the_random_state_alone():
    delta = Dense(trimmed(300, 300, 6, 1.0))
    before = torch.get_rng_state()
    first, second = (truncate(decompose_dense(delta, 6), 6) for _ in range(2))
    assert torch.equal(first.up, second.up)
    assert torch.equal(first.down, second.down)
    assert torch.equal(before, torch.get_rng_state())


def test_a_written_dense_layer_shows_what_the_rank_costs():
    weight = trimmed(300, 260, 6, 0.0)
    stored = cut_layer(Dense(weight), torch.float16, lambda spectrum: 6, most=6)
    error = size(stored.delta().dense() - weight)
    assert stored.error_sq**0.5 == pytest.approx(error, rel=1e-4)
    assert cut_layer(Dense(torch.zeros(8, 9)), torch.float16, lambda spectrum: spectrum.rank) is None
