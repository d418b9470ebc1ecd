"""Layers written many at once are the layers written one by one."""

from __future__ import annotations

import gc

import pytest
import torch

from lib_loramerge.delta import LowRank, cut_layer, cut_layers, stack, storing
from lib_loramerge.errors import OutputError
from lib_loramerge.merge import run_merge
from tests.helpers import format_files as ff
from tests.helpers.delta_cases import dense_sum, low_rank, optimum, size
from tests.helpers.fixtures import SDXL_LAYERS, make_lora, weighted_sum

Summands = tuple[list[LowRank], list[float]]


def cases() -> dict[str, Summands]:
    """Two deltas of one shape and their weights: ordinary ones, and all that is hard to take together."""
    a, b = low_rank(64, 96, 8, seed=1), low_rank(64, 96, 8, seed=2)
    gone = LowRank(b.up, b.down * torch.arange(8).clamp(max=1)[:, None], b.alpha)
    tiny = [LowRank(delta.up * 1e-9, delta.down, delta.alpha) for delta in (a, b)]
    return {
        "ordinary": ([a, b], [0.8, -0.5]),
        "another": ([b, low_rank(64, 96, 8, seed=3)], [1.0, 2.0]),
        "one twice": ([a, a], [1.0, 0.5]),
        "cancelled": ([a, a], [1.0, -1.0]),
        "nearly cancelled": ([a, LowRank(a.up, a.down * (1 + 1e-4), a.alpha)], [1.0, -1.0]),
        "a row of zeros": ([a, gone], [1.0, 1.0]),
        "no strength": ([a, b], [0.0, 0.0]),
        "very small": (tiny, [1.0, 1.0]),
        "unbalanced": ([LowRank(a.up * 1e6, a.down * 1e-6, a.alpha), b], [1.0, 1.0]),
    }


def sums() -> list[LowRank]:
    return [stack(*case) for case in cases().values()]


@pytest.fixture
def batches(monkeypatch) -> list[int]:
    """How many deltas went together, each time."""
    counts: list[int] = []
    original = storing.decompose_all

    def counting(deltas: list[LowRank], **options: object) -> object:
        counts.append(len(deltas))
        return original(deltas, **options)

    monkeypatch.setattr(storing, "decompose_all", counting)
    return counts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [5, 8, 16])
def test_a_batch_gives_what_single_layers_give(batches, dtype, rank):
    deltas = sums()
    rules = [lambda spectrum: min(rank, spectrum.rank)] * len(deltas)
    found = cut_layers(deltas, dtype, rules)
    assert batches == [len(deltas)]
    for name, delta, one in zip(cases(), deltas, found, strict=True):
        other = cut_layer(delta, dtype, rules[0])
        if other is None:
            assert one is None, name
            continue
        assert (one.rank, one.alpha, one.up.dtype) == (other.rank, other.alpha, dtype), name
        assert one.error_sq == pytest.approx(other.error_sq, rel=1e-3, abs=1e-12 * other.exact_sq), name
        assert one.exact_sq == pytest.approx(other.exact_sq, rel=1e-9), name
        coarse = 4 * torch.finfo(dtype).eps
        assert size(one.delta().dense() - other.delta().dense()) <= coarse * size(other.delta().dense()), name


@pytest.mark.parametrize("name", ["ordinary", "another", "one twice", "unbalanced"])
def test_a_layer_of_a_batch_is_the_best_approximation_and_its_error_is_the_distance(name):
    """By the singular value decomposition of the whole matrix."""
    found = cut_layers(sums(), torch.float32, [lambda s: min(5, s.rank)] * len(cases()))
    stored = found[list(cases()).index(name)]
    whole = dense_sum(*cases()[name])
    distance = size(stored.delta().dense() - whole)
    assert distance == pytest.approx(optimum(whole, 5)[1], rel=1e-6)
    assert stored.error_sq**0.5 == pytest.approx(distance, rel=1e-5)


def test_each_layer_of_a_batch_keeps_the_rank_of_its_own_rule(batches):
    deltas = sums()[:3]
    found = cut_layers(deltas, torch.float16, [lambda s: 3, lambda s: 7, lambda s: 0])
    assert batches == [3]
    assert [stored and stored.rank for stored in found] == [3, 7, None]


def test_a_layer_that_is_too_large_is_named(batches):
    a, b = low_rank(64, 96, 8, seed=1), low_rank(64, 96, 8, seed=2)
    deltas = [stack([a, b], [1.0, 1.0]), stack([LowRank(a.up * 1e30, a.down, a.alpha), b], [1e30, 1.0])]
    with pytest.raises(OutputError, match=r"^second: .*too large to be saved as float16"):
        cut_layers(deltas, torch.float16, [lambda s: 16] * 2, names=["first", "second"], fixed_alpha=True)
    assert batches == [2, 1, 1]


@pytest.mark.parametrize("workers", [2, 5])
def test_whole_files_are_the_exact_sum_and_the_same_bytes_from_any_number_of_threads(tmp_path, workers):
    make_lora(tmp_path / "a.safetensors", SDXL_LAYERS, rank=4, alpha=2, seed=1)
    make_lora(tmp_path / "b.safetensors", SDXL_LAYERS, rank=6, alpha=6, seed=2)
    plan = ff.plan(tmp_path, "a:0.8", "b:-0.5", rank="full", dtype="float32")
    for folder, threads in (("alone", 1), ("together", workers)):
        (tmp_path / folder).mkdir()
        run_merge(plan, tmp_path / folder / "out.safetensors", workers=threads)
    alone, result = (tmp_path / folder / "out.safetensors" for folder in ("alone", "together"))
    assert alone.read_bytes() == result.read_bytes()
    wanted = weighted_sum([(tmp_path / "a.safetensors", 0.8), (tmp_path / "b.safetensors", -0.5)])
    got, _ = ff.written(result)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        ff.assert_close(got[name], tensor, 1e-6)


@pytest.mark.parametrize("mode", ["svd", "ties", "knots"])
def test_a_batch_frees_its_tensors_without_the_collector(tmp_path, mode):
    """Tensors that hang on a cycle stay until Python's collector comes by: a gigabyte of them for SDXL."""
    make_lora(tmp_path / "a.safetensors", SDXL_LAYERS, rank=4, alpha=2, seed=1)
    make_lora(tmp_path / "b.safetensors", SDXL_LAYERS, rank=6, alpha=6, seed=2)
    plan = ff.plan(tmp_path, "a:0.8", "b:0.5", mode=mode)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        run_merge(plan, tmp_path / "out.safetensors", workers=1)
        gc.collect()
        kept = [entry.shape for entry in gc.garbage if isinstance(entry, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.enable()
        gc.garbage.clear()
    assert kept == []
