"""Spectra and truncations against a dense float64 singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_loramerge.delta import LowRank, decompose, stack, truncate
from tests.helpers.delta_cases import dense, dense_sum, low_rank, optimum, size, with_gauge

SHAPES = [(48, 80), (80, 48), (64, 64), (20, 200), (200, 20), (7, 5)]


def sum_of(deltas, weights):
    return decompose(stack(deltas, weights)), dense_sum(deltas, weights)


@pytest.mark.parametrize(("out", "in_"), SHAPES)
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_singular_values_are_those_of_the_dense_sum(out, in_, decay):
    deltas = [low_rank(out, in_, 12, seed=1, decay=decay), low_rank(out, in_, 5, seed=2, alpha=2.0)]
    spectrum, whole = sum_of(deltas, [0.7, -0.4])
    wanted = torch.linalg.svdvals(whole)[: spectrum.rank]
    torch.testing.assert_close(spectrum.values, wanted, rtol=1e-9, atol=1e-9 * float(wanted[0]))
    assert spectrum.rank == min(17, out, in_)
    assert spectrum.energy == pytest.approx(size(whole) ** 2, rel=1e-12)
    assert spectrum.size == pytest.approx(
        0.7 * size(dense(deltas[0])) + 0.4 * size(dense(deltas[1])), rel=1e-9
    )


@pytest.mark.parametrize(("out", "in_"), SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_truncation_is_the_best_of_its_rank(out, in_, rank):
    deltas = [low_rank(out, in_, 8, seed=3, dtype=torch.float16), low_rank(out, in_, 8, seed=4, decay=1.0)]
    spectrum, whole = sum_of(deltas, [1.0, 0.8])
    best, least = optimum(whole, rank)
    got = truncate(spectrum, rank)
    assert size(dense(got) - whole) <= least * (1 + 1e-8) + 1e-12 * size(whole)
    assert spectrum.tail(rank) ** 0.5 == pytest.approx(least, rel=1e-8, abs=1e-8 * size(whole))
    assert size(dense(got) - best) <= 1e-7 * size(whole)


def test_components_are_ordered_orthogonal_and_share_the_root_of_their_singular_value():
    spectrum, _ = sum_of([low_rank(60, 90, 10, seed=1), low_rank(60, 90, 6, seed=2)], [1.0, 1.0])
    got = truncate(spectrum, 9)
    assert got.alpha == 9
    assert bool((spectrum.values.diff() <= 0).all())
    wanted = torch.diag(spectrum.values[:9])
    torch.testing.assert_close(got.up.mT @ got.up, wanted, atol=1e-10, rtol=0)
    torch.testing.assert_close(got.down @ got.down.mT, wanted, atol=1e-10, rtol=0)


def test_first_components_alone_are_the_best_of_a_smaller_rank():
    spectrum, whole = sum_of([low_rank(40, 30, 8, seed=1), low_rank(40, 30, 8, seed=2)], [1.0, 0.5])
    got = truncate(spectrum, 10)
    for few in (1, 3, 7):
        first = got.up[:, :few] @ got.down[:few]
        assert size(first - whole) == pytest.approx(optimum(whole, few)[1], rel=1e-9)


def test_a_rank_above_the_numerical_rank_gives_a_smaller_delta_and_never_padding():
    spectrum, whole = sum_of([low_rank(40, 50, 6, seed=1)], [1.0])
    got = truncate(spectrum, 128)
    assert got.rank == 6
    assert got.alpha == 6
    assert size(dense(got) - whole) < 1e-12 * size(whole)


@pytest.mark.parametrize(("out", "in_"), [(64, 3072), (3072, 64), (64, 64)])
def test_ranks_above_the_sides_of_a_layer_keep_its_size_and_its_shape(out, in_):
    deltas = [low_rank(out, in_, 96, seed=1), low_rank(out, in_, 96, seed=2)]
    spectrum, whole = sum_of(deltas, [1.0, 1.0])
    got = truncate(spectrum, 128)
    assert (got.up.shape, got.down.shape) == ((out, 64), (64, in_))
    assert size(dense(got) - whole) < 1e-10 * size(whole)


def test_values_alone_are_the_same_as_with_vectors():
    for shape in [(40, 50), (10, 50)]:
        delta = stack([low_rank(*shape, 9, seed=1), low_rank(*shape, 9, seed=2)], [1.0, 0.5])
        torch.testing.assert_close(decompose(delta, vectors=False).values, decompose(delta).values)
        with pytest.raises(ValueError, match="without vectors"):
            truncate(decompose(LowRank(torch.eye(4), torch.eye(4), 4.0), vectors=False), 2)


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 40),
    in_=st.integers(1, 40),
    ranks=st.lists(st.integers(1, 24), min_size=1, max_size=4),
    weights=st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    alphas=st.lists(st.sampled_from([0.0, 0.5, 1.0, 4.0, 128.0]), min_size=4, max_size=4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    keep=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_any_sum_is_cut_to_any_rank_with_the_least_error(out, in_, ranks, weights, alphas, dtype, keep, seed):
    deltas = [
        low_rank(out, in_, rank, seed=seed + i, alpha=alphas[i], dtype=dtype) for i, rank in enumerate(ranks)
    ]
    weights = weights[: len(deltas)]
    spectrum, whole = sum_of(deltas, weights)
    inputs = sum(abs(weight) * size(dense(delta)) for delta, weight in zip(deltas, weights))
    got = truncate(spectrum, keep) if spectrum.rank else None
    error = size(whole - dense(got)) if got else size(whole)
    # Below the last term the squares that energies are made of are 0 in float64.
    assert error <= optimum(whole, keep)[1] * (1 + 1e-8) + 2e-7 * inputs + 1e-150
    assert spectrum.energy == pytest.approx(size(whole) ** 2, rel=1e-9, abs=1e-14 * inputs**2)


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 16), keep=st.integers(1, 20), seed=st.integers(0, 999))
def test_how_a_file_factors_its_delta_does_not_matter(rank, keep, seed):
    a, b = low_rank(40, 30, rank, seed=seed), low_rank(40, 30, 6, seed=seed + 1)
    plain = truncate(sum_of([a, b], [0.8, 0.6])[0], keep)
    other = truncate(decompose(stack([with_gauge(a, seed), with_gauge(b, seed + 1)], [0.8, 0.6])), keep)
    assert size(dense(plain) - dense(other)) <= 1e-5 * size(dense(plain))


def robust_cases() -> dict[str, tuple[list[LowRank], list[float]]]:
    a, b = low_rank(60, 80, 8, seed=1), low_rank(60, 80, 8, seed=2)
    near = LowRank(a.up + 1e-4 * b.up, a.down + 1e-4 * b.down, a.alpha)
    closer = LowRank(a.up.double() + 1e-7 * b.up, a.down.double(), a.alpha)
    half = LowRank(a.up * (torch.arange(8) % 2), a.down, a.alpha)
    no_row = LowRank(a.up, a.down * (torch.arange(8) % 2)[:, None], a.alpha)
    tilt = LowRank(a.up * 1e6, a.down * 1e-6, a.alpha)
    mixed = LowRank(
        a.up * 10.0 ** torch.arange(-6, 2), a.down * 10.0 ** torch.arange(6, -2, -1)[:, None], a.alpha
    )
    same_down = LowRank(b.up, a.down, 8.0)
    return {
        "plain": ([a, b], [1.0, 1.0]),
        "the same twice": ([a, a], [1.0, 1.0]),
        "the same three times": ([a, a, a], [1.0, 0.5, -0.25]),
        "two epochs of one run": ([a, near], [1.0, 1.0]),
        "difference of two epochs": ([a, near], [1.0, -1.0]),
        "difference of nearly the same": ([a, closer], [1.0, -1.0]),
        "zero up": ([LowRank(torch.zeros_like(a.up), a.down, 8.0), b], [1.0, 1.0]),
        "half of the columns zero": ([half, b], [1.0, 1.0]),
        "half of the rows zero": ([no_row, b], [1.0, 1.0]),
        "one factor a million times the other": ([tilt, b], [1.0, 1.0]),
        "components of all sizes": ([mixed, b], [1.0, 1.0]),
        "one LoRA a million times the other": ([a, b], [1e3, 1e-3]),
        "one down, two ups": ([a, same_down], [1.0, -1.0]),
        "more components than the side": (
            [low_rank(10, 80, 8, seed=1), low_rank(10, 80, 8, seed=2)],
            [1.0, 1.0],
        ),
    }


@pytest.mark.parametrize("case", robust_cases())
@pytest.mark.parametrize("keep", [3, 8, 16])
def test_hard_sums_are_right_to_a_ten_millionth_of_the_inputs(case, keep):
    deltas, weights = robust_cases()[case]
    spectrum, whole = sum_of(deltas, weights)
    inputs = sum(abs(weight) * size(dense(delta)) for delta, weight in zip(deltas, weights))
    error = size(dense(truncate(spectrum, keep)) - whole) if spectrum.rank else size(whole)
    assert error <= optimum(whole, keep)[1] * (1 + 1e-8) + 1.8e-7 * inputs


@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_cancels_exactly_leaves_nothing(rank, dtype):
    a = low_rank(90, 100, rank, seed=1, dtype=dtype)
    half = LowRank(a.up * 2, a.down, a.alpha)
    assert sum_of([a, a], [1.0, -1.0])[0].rank == 0
    assert sum_of([half, a], [0.5, -1.0])[0].rank == 0
    assert sum_of([with_gauge(a), a], [0.3, -0.3])[0].rank == 0
    assert sum_of([a], [0.0])[0].rank == 0


def test_what_remains_after_a_cancellation_is_kept_however_small():
    a, b = low_rank(60, 80, 8, seed=1), low_rank(60, 80, 4, seed=2, scale=1e-3)
    spectrum, _ = sum_of([a, b, a], [1.0, 1.0, -1.0])
    assert spectrum.rank == 4
    assert size(dense(truncate(spectrum, 8)) - dense(b)) <= 1e-6 * size(dense(b))


def test_order_of_the_inputs_does_not_matter():
    deltas = [low_rank(40, 50, 6, seed=i) for i in range(3)]
    one, _ = sum_of(deltas, [1.0, -0.5, 0.2])
    other, _ = sum_of(deltas[::-1], [0.2, -0.5, 1.0])
    assert size(dense(truncate(one, 7)) - dense(truncate(other, 7))) <= 1e-9 * one.energy**0.5


def test_leading_components_are_not_clamped():
    """Tools that clamp factors at a 0.99 quantile lose a tenth of the result, here and with steep spectra."""
    steep = LowRank(torch.eye(60, 16) * 10.0 ** torch.linspace(1, -2, 16), torch.eye(16, 80), 16.0)
    for delta in (steep, low_rank(60, 80, 16, seed=5)):
        spectrum, whole = sum_of([delta], [1.0])
        assert size(dense(truncate(spectrum, 16)) - whole) <= 1e-12 * size(whole)
