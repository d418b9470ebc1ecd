"""Cuts that share out what is kept: --fair and --keep, judged by dense float64 sums."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_loramerge.errors import RecipeError
from tests.helpers import format_files as ff
from tests.helpers.fixtures import SD1_LAYERS, dense_deltas, make_loras, sample_data

LAYERS = {name: (min(out, 64), in_) for name, (out, in_) in list(SD1_LAYERS.items())[1:5]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_loras(tmp_path_factory.mktemp("fair"), "abc", LAYERS, rank=4, alpha=4)


def shares(folder, weights, got):
    """What a file keeps of each LoRA, and the relative error of the sum."""
    deltas = {name: dense_deltas(folder / f"{name}.safetensors") for name in weights}
    kept, error_sq, exact_sq = {}, 0.0, 0.0
    rest = {}
    for layer in deltas[next(iter(weights))]:
        total = sum(weight * deltas[name][layer] for name, weight in weights.items())
        rest[layer] = total - got[layer] if layer in got else total
        error_sq, exact_sq = error_sq + rest[layer].square().sum(), exact_sq + total.square().sum()
    for name, weight in weights.items():
        lost = sum((rest[layer] * weight * delta).sum() for layer, delta in deltas[name].items())
        own = sum((weight * delta).square().sum() for delta in deltas[name].values())
        kept[name] = float(1 - lost / own)
    return kept, float((error_sq / exact_sq) ** 0.5)


def merged(folder, weights, **fields):
    (folder / "out.safetensors").unlink(missing_ok=True)
    report = ff.merge(folder, *(f"{name}:{weight}" for name, weight in weights.items()), **fields)
    kept, error = shares(folder, weights, dense_deltas(folder / "out.safetensors"))
    assert {entry.name: entry.kept for entry in report.inputs} == pytest.approx(kept, abs=1e-5)
    assert report.error == pytest.approx(error, rel=1e-4, abs=1e-6)
    return min(kept.values()), report


@pytest.mark.parametrize("ratio", [10, 30, 100])
@pytest.mark.parametrize("rank", [2, 4])
def test_the_weaker_of_two_keeps_clearly_more(folder, ratio, rank):
    weights = {"a": 1.0, "b": 1 / ratio}
    plain, cut = merged(folder, weights, rank=rank)
    fair, report = merged(folder, weights, rank=rank, fair=True)
    assert fair > plain + 0.1
    assert report.size_bytes <= cut.size_bytes + 64
    by_size, sized = merged(folder, weights, size=cut.size_bytes / 1e6, fair=True)
    assert by_size > plain + 0.1
    assert sized.size_bytes <= cut.size_bytes


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": -0.9, "c": 1.1}, {"a": 0.5}])
@pytest.mark.parametrize("rank", [2, 5, 12])
def test_nothing_is_lost_where_norms_are_alike(folder, weights, rank):
    plain, _ = merged(folder, weights, rank=rank)
    fair, _ = merged(folder, weights, rank=rank, fair=True)
    assert fair >= plain - 1e-3


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 1.0, "b": 0.05}, {"a": 1.0, "b": -0.4, "c": 0.1}])
def test_every_lora_keeps_what_was_asked(folder, weights, keep):
    least, report = merged(folder, weights, keep=keep)
    assert least >= keep - 1e-5
    whole, everything = merged(folder, weights)
    assert whole == pytest.approx(1, abs=1e-6)
    assert report.size_bytes <= everything.size_bytes + 512


@pytest.mark.parametrize(("keep", "other"), [(0.6, 0.0), (0.9, 0.0), (0.6, 0.2)])
def test_no_choice_of_ranks_by_singular_values_is_clearly_smaller(folder, keep, other):
    """Against all choices of ranks of the plain cut."""
    weights = {"a": 1.0, **({"b": other} if other else {})}
    _, report = merged(folder, weights, keep=keep)
    deltas = {name: dense_deltas(folder / f"{name}.safetensors") for name in weights}
    layers = list(deltas["a"])
    cuts = []
    for layer in layers:
        parts = {name: weight * deltas[name][layer] for name, weight in weights.items()}
        u, s, vh = torch.linalg.svd(sum(parts.values()), full_matrices=False)
        pieces = [s[k] * torch.outer(u[:, k], vh[k]) for k in range(8)]
        adds = torch.tensor([[float((piece * part).sum()) for part in parts.values()] for piece in pieces])
        cuts.append(torch.cat([torch.zeros(1, len(parts)), adds.cumsum(0)]))
    own = torch.tensor(
        [sum(float((w * d).square().sum()) for d in deltas[n].values()) for n, w in weights.items()]
    )
    costs = [4 * sum(deltas["a"][layer].shape) for layer in layers]
    best = min(
        sum(rank * cost for rank, cost in zip(choice, costs))
        for choice in itertools.product(range(9), repeat=len(layers))
        if bool((sum(cut[rank] for cut, rank in zip(cuts, choice)) >= keep * own).all())
    )
    ranks = sum(rank * count for rank, count in report.ranks.items())
    assert ranks * min(costs) <= best + 2 * max(costs)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_lora_that_looks_like_a_stronger_one_keeps_what_was_asked(folder, sign):
    """Its inner product with the sum is many times its own square, or less than nothing."""
    a, own = load_file(folder / "a.safetensors"), load_file(folder / "b.safetensors")
    for layer in LAYERS:
        up, down = f"{layer}.lora_up.weight", f"{layer}.lora_down.weight"
        own[up] = torch.cat([own[up], a[up] * sign / 3], dim=1)
        own[down] = torch.cat([own[down], a[down]])
        own[f"{layer}.alpha"] = torch.tensor(8.0)
    save_file(own, folder / "like.safetensors")
    for keep in (0.5, 0.9):
        least, report = merged(folder, {"a": 1.0, "like": 0.05}, keep=keep, dtype="float32")
        assert least >= keep - 1e-5
        # No rank of every layer keeps as much in a clearly smaller file.
        for rank in range(1, max(report.ranks)):
            fair, other = merged(folder, {"a": 1.0, "like": 0.05}, rank=rank, fair=True, dtype="float32")
            assert fair < keep or other.size_bytes > 0.95 * report.size_bytes


def bound(pairs, rank, steps=400):
    """An upper bound of the least share that any directions can keep, by the dual problem, and its minimum.

    Args:
        pairs: For each layer the weighted deltas.
    """
    own = [sum(float(parts[i].square().sum()) for parts in pairs) for i in range(len(pairs[0]))]
    kernels = []
    for parts in pairs:
        total = sum(parts)
        with_sum = [(total @ part.mT + part @ total.mT) / 2 for part in parts]
        alone = [part @ part.mT for part in parts]
        kernels.append([kernel / own[i % len(own)] for i, kernel in enumerate([*with_sum, *alone])])
    shift = [
        1 - sum(float((sum(parts) * parts[i]).sum()) for parts in pairs) / own[i] for i in range(len(own))
    ]
    shift = torch.tensor([*shift, *([0.0] * len(own))])
    logs, best, step = torch.zeros(len(shift), dtype=torch.float64), 1.0, 1.0
    for _ in range(steps):
        weights = logs.softmax(0)
        shares, value = shift.clone().double(), float((weights * shift).sum())
        for kernel in kernels:
            values, vectors = torch.linalg.eigh(sum(w * k for w, k in zip(weights, kernel)))
            value += float(values[-rank:].clamp(min=0).sum())
            first = vectors[:, -rank:]
            shares += torch.tensor([float((first * (k @ first)).sum()) for k in kernel])
        best, apart = min(best, value), shares.mean() - shares
        logs, step = logs + step * apart / apart.abs().max().clamp(min=1e-12), step * 0.98
    return best


@pytest.mark.parametrize(("rank", "weights"), [(1, (1.0, 0.1)), (2, (1.0, 0.02)), (3, (1.0, -0.3, 0.05))])
def test_no_directions_keep_clearly_more_of_the_lora_that_is_kept_least(folder, rank, weights):
    weights = dict(zip("abc", weights))
    deltas = {name: dense_deltas(folder / f"{name}.safetensors") for name in weights}
    pairs = [[weight * deltas[name][layer] for name, weight in weights.items()] for layer in deltas["a"]]
    fair, _ = merged(folder, weights, rank=rank, fair=True, dtype="float32")
    assert fair >= bound(pairs, rank) - 0.01


@pytest.mark.parametrize("fields", [{"rank": 2, "fair": True}, {"keep": 0.8}])
def test_neither_order_nor_how_a_file_is_factored_changes_what_is_kept(folder, fields):
    other = load_file(folder / "b.safetensors")
    for layer in LAYERS:
        other[f"{layer}.lora_up.weight"] = other[f"{layer}.lora_up.weight"].flip(1) * 8
        other[f"{layer}.lora_down.weight"] = other[f"{layer}.lora_down.weight"].flip(0) / 8
    save_file(other, folder / "b2.safetensors")
    one, _ = merged(folder, {"a": 1.0, "b": 0.05}, dtype="float32", **fields)
    two, _ = merged(folder, {"b2": 0.05, "a": 1.0}, dtype="float32", **fields)
    assert one == pytest.approx(two, abs=2e-3)


def test_what_cannot_be_shared_is_a_sentence(folder):
    for fields in ({"fair": True}, {"rank": "full", "fair": True}, {"retain": 0.9, "fair": True}):
        with pytest.raises(RecipeError, match="fair"):
            ff.plan(folder, "a", "b", **fields)
    with pytest.raises(RecipeError, match="mode svd"):
        ff.plan(folder, "a", "b", mode="ties", keep=0.9)
    with pytest.raises(RecipeError, match="exclude each other"):
        ff.plan(folder, "a", "b", rank=4, keep=0.9)


@pytest.mark.skipif(sample_data() is None, reason="the sample data is not beside this checkout")
@pytest.mark.parametrize(("rank", "share"), [(1, 0.50), (2, 0.76), (3, 0.90), (4, 0.97)])
def test_the_weaker_of_two_real_loras(tmp_path, rank, share):
    from lib_loramerge.merge import run_merge

    inputs = ("analog_sd15_kohya:0.8", "disney_sd15_kohya:0.7")
    plan = ff.plan(sample_data(), *inputs, rank=rank, fair=True)
    report = run_merge(plan, tmp_path / "out.safetensors")
    assert min(entry.kept for entry in report.inputs) >= share
