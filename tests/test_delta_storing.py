"""What is written of a layer: the rounding, and that its error is told as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_loramerge.delta import Grams, LowRank, cut_layer, decompose, round_cut, round_uncut, stack, truncate
from lib_loramerge.delta.rounding import rounding_error
from lib_loramerge.errors import OutputError
from tests.helpers.delta_cases import dense, dense_sum, low_rank, optimum, size

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
BOUND = {torch.float16: 4e-4, torch.bfloat16: 3.2e-3, torch.float32: 1e-7}


def written(stored):
    """The delta of the written tensors, by the formula every host uses."""
    assert stored.up.dtype == stored.down.dtype
    return (
        torch.tensor(stored.alpha, dtype=torch.float32).double()
        / stored.down.shape[0]
        * (stored.up.double() @ stored.down.double())
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [4, 12, 24])
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_stated_error_is_that_of_the_written_tensors(dtype, rank, decay):
    deltas = [
        low_rank(70, 90, 12, seed=1, decay=decay, dtype=torch.float16),
        low_rank(70, 90, 12, seed=2, alpha=6.0),
    ]
    whole = dense_sum(deltas, [0.7, -0.6])
    stored = round_cut(decompose(stack(deltas, [0.7, -0.6])), rank, dtype)
    assert stored.up.dtype == dtype
    error = size(written(stored) - whole)
    assert stored.error_sq**0.5 == pytest.approx(error, rel=2e-3 if rank == 24 else 1e-6)
    assert stored.exact_sq == pytest.approx(size(whole) ** 2, rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_written_product_is_as_near_to_the_optimum_as_the_dtype_allows(dtype):
    deltas = [low_rank(200, 300, 16, seed=1, dtype=torch.float16), low_rank(200, 300, 16, seed=2, decay=1.0)]
    whole = dense_sum(deltas, [1.0, 0.8])
    stored = round_cut(decompose(stack(deltas, [1.0, 0.8])), 16, dtype)
    best, _ = optimum(whole, 16)
    assert size(written(stored) - best) <= BOUND[dtype] * size(best)


def test_an_error_of_a_hundred_millionth_is_still_right():
    deltas = [low_rank(80, 60, 8, seed=1), low_rank(80, 60, 8, seed=2)]
    whole = dense_sum(deltas, [1.0, 1.0])
    stored = cut_layer(stack(deltas, [1.0, 1.0]), torch.float32, lambda spectrum: spectrum.rank)
    error = size(written(stored) - whole)
    assert 1e-9 < error / size(whole) < 1e-7
    assert stored.error_sq**0.5 == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("side", ["up", "down", "both"])
@pytest.mark.parametrize(
    "damage", ["one element", "all zero", "scaled", "a column swapped", "truncated bits"]
)
def test_a_damaged_factor_shows_in_the_error(side, damage):
    delta = stack([low_rank(50, 70, 6, seed=1), low_rank(50, 70, 6, seed=2)], [1.0, 0.5])
    spectrum = decompose(delta)
    exact = truncate(spectrum, 12, torch.float32)
    up, down = exact.up.half(), exact.down.half()

    def harm(factor, ranks_last):
        factor = factor.clone()
        turned = factor if ranks_last else factor.mT
        if damage == "one element":
            turned[3, 2] += 0.5
        elif damage == "all zero":
            turned.zero_()
        elif damage == "scaled":
            turned *= 1.001
        elif damage == "a column swapped":
            turned[:, [0, 1]] = turned[:, [1, 0]].clone()
        else:
            factor = (factor.view(torch.int16) & -16).view(torch.float16)
        return factor

    up = harm(up, True) if side != "down" else up
    down = harm(down, False) if side != "up" else down
    told = rounding_error(exact, up, down, Grams(spectrum.values, spectrum.values)) ** 0.5
    true = size(up.double() @ down.double() - dense(exact))
    assert told == pytest.approx(true, rel=0.03)


@pytest.mark.parametrize("dtype", DTYPES)
def test_concatenation_shows_its_rounding_and_keeps_the_first_alpha(dtype):
    deltas = [low_rank(70, 90, 12, seed=1, alpha=6.0), low_rank(70, 90, 4, seed=2, alpha=1.0)]
    whole = dense_sum(deltas, [0.7, -0.6])
    stored = cut_layer(stack(deltas, [0.7, -0.6]), dtype)
    assert stored.rank == 16
    assert stored.alpha == 6.0
    error = size(written(stored) - whole)
    assert stored.error_sq**0.5 == pytest.approx(error, rel=1e-3)
    assert error <= BOUND[dtype] * size(whole) * 1.5
    assert stored.exact_sq == pytest.approx(size(whole) ** 2, rel=1e-12)


def test_a_layer_of_nothing_is_absent():
    a = low_rank(20, 30, 4)
    assert cut_layer(stack([a], [0.0]), torch.float16) is None
    assert cut_layer(stack([a, a], [1.0, -1.0]), torch.float16, lambda spectrum: spectrum.rank) is None


@pytest.mark.parametrize("scale", [1e-12, 1e-8, 1e-4, 1.0, 1e4, 1e8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_very_small_and_very_large_layers_lose_no_digits(scale, dtype):
    a = low_rank(40, 50, 6, seed=1)
    a = replace(a, alpha=6.0 * scale)
    for stored in (
        cut_layer(stack([a], [1.0]), dtype, lambda spectrum: spectrum.rank),
        cut_layer(stack([a], [1.0]), dtype),
        round_uncut(replace(a, up=a.up * scale, alpha=6.0), dtype),
        round_uncut(replace(a, up=a.up * 1e5, down=a.down * 1e-5), dtype),
    ):
        exact = dense(a)
        if abs(stored.exact_sq**0.5 / size(exact) - 1) > 1e-6:
            exact = exact / scale
        assert size(written(stored) - exact) <= BOUND[dtype] * size(exact) * 1.5
        assert stored.error_sq**0.5 == pytest.approx(size(written(stored) - exact), rel=1e-3)


def test_alpha_is_the_rank_unless_the_factors_would_leave_the_range_of_the_dtype():
    a = low_rank(40, 50, 6, seed=1)
    rule = lambda spectrum: spectrum.rank  # noqa: E731
    assert cut_layer(stack([a], [1.0]), torch.float16, rule).alpha == 6.0
    tiny = cut_layer(stack([a], [1e-9]), torch.float16, rule)
    assert tiny.alpha / 6.0 < 1
    assert torch.tensor(tiny.alpha / 6.0).log2().frac() == 0
    assert cut_layer(stack([a], [1e-9]), torch.float32, rule).alpha == 6.0


def test_what_no_scale_can_hold_is_refused_with_the_way_out():
    a = low_rank(10, 10, 2, dtype=torch.float64)
    wide = torch.diag(torch.tensor([1e-14, 1e14], dtype=torch.float64))
    huge = LowRank(torch.cat([a.up, a.up]) @ wide, a.down, 1e38)
    with pytest.raises(OutputError, match="Save as float32"):
        round_uncut(replace(huge, down=huge.down * 1e30), torch.float16)


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(2, 40),
    in_=st.integers(2, 40),
    ranks=st.lists(st.integers(1, 10), min_size=1, max_size=3),
    weights=st.lists(st.floats(-2, 2).filter(lambda w: abs(w) > 1e-3), min_size=3, max_size=3),
    dtype=st.sampled_from(DTYPES),
    keep=st.integers(1, 24),
    decay=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 99),
)
def test_any_written_layer_shows_its_error(out, in_, ranks, weights, dtype, keep, decay, seed):
    deltas = [low_rank(out, in_, rank, seed=seed + i, decay=decay) for i, rank in enumerate(ranks)]
    weights = weights[: len(deltas)]
    whole = dense_sum(deltas, weights)
    stored = cut_layer(stack(deltas, weights), dtype, lambda spectrum: min(keep, spectrum.rank))
    error = size(written(stored) - whole)
    assert error <= optimum(whole, keep)[1] + 2 * BOUND[dtype] * size(whole)
    assert stored.error_sq**0.5 == pytest.approx(error, rel=0.2, abs=1e-8 * size(whole))


@pytest.mark.parametrize("rule", [None, lambda spectrum: spectrum.rank])
def test_without_alpha_tensors_the_scale_stays_in_the_factors(rule):
    """Readers of files without alpha take it to be the rank; only balancing is left for small layers."""
    a = low_rank(40, 50, 6, seed=1)
    for scale in (1.0, 1e-3):
        uneven = LowRank(a.up * 1e4, a.down * 1e-4 * scale, 6.0)
        stored = cut_layer(stack([uneven], [1.0]), torch.float16, rule, fixed_alpha=True)
        assert stored.alpha == 6.0
        assert size(written(stored) - scale * dense(a)) <= 4e-4 * scale * size(dense(a)) * 1.5
    with pytest.raises(OutputError):
        cut_layer(stack([a], [1e14]), torch.float16, rule, fixed_alpha=True)
