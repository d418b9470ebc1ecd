"""Norms, inner products, distances and overlaps against dense matrices."""

from __future__ import annotations

import math

import pytest
import torch

from lib_loramerge.delta import (
    Dense,
    LowRank,
    conflict_of,
    inner,
    norm,
    overlaps,
    relative_error,
    sampled_rows,
    stack,
)
from tests.helpers.delta_cases import dense, dense_sum, low_rank, size


def sign_conflict(a, b):
    return conflict_of(sampled_rows(a), sampled_rows(b))


def pairs():
    a, b = low_rank(60, 80, 8, seed=1, alpha=3.0), low_rank(60, 80, 5, seed=2, dtype=torch.float16)
    full = Dense(torch.randn(60, 80, generator=torch.Generator().manual_seed(3)))
    stacked = stack([a, b], [0.5, -0.7])
    return {
        "two low-rank": (a, b, dense(a), dense(b)),
        "low-rank and dense": (a, full, dense(a), full.weight.double()),
        "dense and low-rank": (full, b, full.weight.double(), dense(b)),
        "dense": (full, full, full.weight.double(), full.weight.double()),
        "stacked": (stacked, a, dense_sum([a, b], [0.5, -0.7]), dense(a)),
    }


@pytest.mark.parametrize("case", pairs())
def test_products_norms_and_distances_are_those_of_the_dense_matrices(case):
    a, b, whole_a, whole_b = pairs()[case]
    assert inner(a, b) == pytest.approx(float((whole_a * whole_b).sum()), rel=1e-9, abs=1e-9)
    assert norm(a) == pytest.approx(size(whole_a), rel=1e-12)
    error_sq, exact_sq = relative_error(a, b)
    assert error_sq == pytest.approx(size(whole_a - whole_b) ** 2, rel=1e-9, abs=1e-18)
    assert exact_sq == pytest.approx(size(whole_a) ** 2, rel=1e-12)


@pytest.mark.parametrize("distance", [1e-3, 1e-6, 1e-9, 1e-12])
def test_small_distances_do_not_drown_in_cancellation(distance):
    a, b = low_rank(60, 80, 8, seed=1, dtype=torch.float64), low_rank(60, 80, 8, seed=2, dtype=torch.float64)
    moved = LowRank(torch.cat([a.up, distance * b.up], 1), torch.cat([a.down, b.down]), 16.0)
    error_sq, exact_sq = relative_error(a, moved)
    assert math.sqrt(error_sq / exact_sq) == pytest.approx(
        distance * size(dense(b)) / size(dense(a)), rel=1e-2
    )


def test_a_zero_delta_has_no_direction():
    a = low_rank(10, 12, 3)
    zero = LowRank(a.up * 0, a.down, 3.0)
    assert norm(zero) == 0
    assert inner(a, zero) == 0
    assert sign_conflict(a, zero) == 0
    assert overlaps([a, zero]).outputs[0, 1] == 0


def test_overlap_is_the_mean_squared_cosine_of_the_principal_angles():
    a, b = low_rank(60, 80, 8, seed=1), low_rank(60, 80, 5, seed=2)
    shared = LowRank(torch.cat([b.up, a.up[:, :3]], 1), torch.cat([b.down, a.down[:3]]), 8.0)
    got = overlaps([a, shared])
    for shares, first, second in ((got.inputs, a.down.mT, shared.down.mT), (got.outputs, a.up, shared.up)):
        q, p = torch.linalg.qr(first.double()).Q, torch.linalg.qr(second.double()).Q
        assert float(shares[0, 1]) == pytest.approx(
            float(torch.linalg.svdvals(q.mT @ p).square().mean()), rel=1e-9
        )
    assert float(got.products[0, 1]) == pytest.approx(float((dense(a) * dense(shared)).sum()), rel=1e-9)
    assert float(overlaps([a, a]).inputs[0, 1]) == pytest.approx(1)


def test_overlap_counts_only_directions_that_are_not_negligible():
    """A row that is zero, or is there twice, adds no direction."""
    a, b = low_rank(60, 80, 8, seed=1), low_rank(60, 80, 5, seed=2)
    twice = LowRank(torch.cat([b.up, b.up[:, :2]], 1), torch.cat([b.down, b.down[:2]]), 7.0)
    empty = LowRank(torch.cat([b.up, 0 * b.up[:, :2]], 1), torch.cat([b.down, 0 * b.down[:2]]), 7.0)
    for other in (twice, empty):
        got, wanted = overlaps([a, other]), overlaps([a, b])
        torch.testing.assert_close(got.inputs, wanted.inputs, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(got.outputs, wanted.outputs, rtol=1e-9, atol=1e-12)


def test_sign_conflict_is_nothing_with_itself_all_with_its_negative_and_half_with_a_stranger():
    a, b = low_rank(64, 300, 8, seed=1), low_rank(64, 300, 8, seed=2)
    assert sign_conflict(a, a) == 0
    assert sign_conflict(a, LowRank(-a.up, a.down, a.alpha)) == 1
    assert sign_conflict(a, b) == pytest.approx(0.5, abs=0.08)
    product = dense(a) * dense(b)
    assert sign_conflict(a, b) == pytest.approx(float(-product.clamp(max=0).sum() / product.abs().sum()))
