"""Sums and row moves of deltas, without arithmetic that could round."""

from __future__ import annotations

import pytest
import torch

from lib_loramerge.delta import Dense, LowRank, place_rows, realize, scaled, stack, take_rows
from lib_loramerge.errors import IncompatibleError
from tests.helpers.delta_cases import dense, dense_sum, low_rank, size


@pytest.mark.parametrize("alphas", [(4.0, 8.0), (0.0, 2.0), (-4.0, 4.0)])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -1.3), (0.0, 2.0)])
def test_a_stack_is_the_exact_weighted_sum(alphas, weights):
    deltas = [low_rank(30, 40, 4, seed=1, alpha=alphas[0]), low_rank(30, 40, 6, seed=2, alpha=alphas[1])]
    whole = dense_sum(deltas, weights)
    stacked = stack(deltas, weights)
    assert (stacked.rank, stacked.parts) == (10, (4, 6))
    assert size(stacked.dense() - whole) <= 1e-14 * size(whole)
    assert size(dense(realize(stacked)) - whole) <= 1e-14 * size(whole)


def test_concatenated_factors_follow_the_documented_formula():
    a, b = low_rank(30, 40, 4, seed=1, alpha=2.0), low_rank(30, 40, 6, seed=2, alpha=5.0)
    got = realize(stack([a, b], [0.5, -0.3]))
    assert got.alpha == 2.0
    for delta, weight, columns in ((a, 0.5, slice(0, 4)), (b, -0.3, slice(4, 10))):
        root = (abs(weight) * delta.alpha / delta.rank * 10 / 2.0) ** 0.5
        sign = 1 if weight > 0 else -1
        torch.testing.assert_close(got.up[:, columns], sign * root * delta.up.double())
        torch.testing.assert_close(got.down[columns], root * delta.down.double())


def test_a_stack_of_stacks_remembers_all_its_parts():
    a, b, c = (low_rank(20, 30, 3, seed=i) for i in range(3))
    nested = stack([stack([a, b], [1.0, 2.0]), c], [0.5, 1.0])
    assert nested.parts == (3, 3, 3)
    assert size(nested.dense() - dense_sum([a, b, c], [0.5, 1.0, 1.0])) < 1e-12


def test_factors_of_mixed_dtypes_are_stacked_without_rounding():
    a, b = low_rank(20, 30, 3, seed=1, dtype=torch.bfloat16), low_rank(20, 30, 3, seed=2, dtype=torch.float16)
    whole = dense_sum([a, b], [1.0, 1.0])
    assert size(stack([a, b], [1.0, 1.0]).dense() - whole) <= 1e-14 * size(whole)


@pytest.mark.parametrize(
    "other",
    [low_rank(31, 40, 4), low_rank(30, 41, 4), LowRank(torch.ones(30, 4), torch.ones(4, 40), 4.0, (3, 3))],
)
def test_deltas_of_different_shapes_are_refused(other):
    with pytest.raises(IncompatibleError, match="30 x 40"):
        stack([low_rank(30, 40, 4), other], [1.0, 1.0])


@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_rows_of_a_split_layer_go_to_their_place_and_come_back(kind):
    delta = low_rank(12, 40, 4)
    delta = delta if kind == "low-rank" else Dense(dense(delta))
    spans = [(6, 14), (0, 4)]
    placed = place_rows(delta, spans, 18)
    assert type(placed) is type(delta)
    whole = placed.dense()
    assert whole.shape == (18, 40)
    torch.testing.assert_close(whole[6:14], delta.dense()[:8])
    torch.testing.assert_close(whole[:4], delta.dense()[8:])
    assert not whole[4:6].any()
    torch.testing.assert_close(take_rows(placed, spans).dense(), delta.dense())


def test_a_norm_layer_has_rows_and_no_rank():
    norm = Dense(torch.arange(6.0))
    assert (norm.out, norm.in_) == (6, 1)
    torch.testing.assert_close(scaled(norm, 2.0).weight, torch.arange(6.0) * 2)
    torch.testing.assert_close(scaled(low_rank(5, 6, 2), -0.5).dense(), -0.5 * dense(low_rank(5, 6, 2)))
