"""The elementwise methods against the papers' formulas in dense float64, and against PEFT's functions."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from peft.utils import merge_utils as peft

from lib_loramerge.cli import main
from lib_loramerge.delta import Dense, LowRank, decompose_dense, truncate
from lib_loramerge.methods import METHODS, LayerContext, sparsify
from tests.helpers.delta_cases import dense, low_rank, optimum, size
from tests.helpers.fixtures import SDXL_LAYERS, dense_deltas, make_lora

DENSE = ["ties", "dare_linear", "dare_ties", "della", "breadcrumbs", "magnitude_prune", "sce"]


def run(name, deltas, weights, *, seed=0, layer="a.layer", **given):
    method = METHODS[name]
    params = {param.name: param.default for param in method.params} | given
    return method.merge(deltas, weights, LayerContext(layer, seed=seed), **params)


def three(seed: int = 0) -> list[LowRank]:
    return [low_rank(50, 70, 4 + i, seed=seed + i, alpha=4.0) for i in range(3)]


def whole(matrix) -> Dense:
    return Dense(torch.as_tensor(matrix, dtype=torch.float32))


def trimmed(matrix, density):
    """The top elements by a full sort, float64."""
    kept = matrix.abs().flatten().argsort(descending=True)[: int(density * matrix.numel())]
    mask = torch.zeros(matrix.numel(), dtype=torch.float64)
    mask[kept] = 1
    return matrix * mask.view_as(matrix)


def elected(votes, normalize=True, importance=None):
    """TIES from the paper: sgn of the sum, then the mean of those with that sign."""
    votes = torch.stack(votes)
    importance = torch.ones(len(votes)) if importance is None else importance
    agree = (votes.sign() == votes.sum(0).sign()) & (votes != 0)
    counts = agree * importance.double().view(-1, 1, 1)
    total = (votes * counts).sum(0)
    return total / counts.sum(0).clamp(min=1e-300) if normalize else total


def close(got, wanted, tolerance=2e-6):
    assert size(got.dense() - wanted) <= tolerance * size(wanted)


# TIES and pruning


@pytest.mark.parametrize("density", [0.05, 0.3, 0.9, 1.0])
@pytest.mark.filterwarnings("ignore:The density 1.0")
def test_ties_at_strengths_of_1_equals_that_of_peft(density):
    deltas = three()
    wanted = peft.ties([dense(d).float() for d in deltas], torch.ones(3), density)
    close(run("ties", deltas, [1.0, 1.0, 1.0], density=density), wanted)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, -0.7)])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
@pytest.mark.filterwarnings("ignore:The density 1.0")
def test_magnitude_pruning_equals_that_of_peft(weights, density):
    deltas = three()
    wanted = peft.magnitude_prune([dense(d).float() for d in deltas], torch.tensor(weights), density)
    close(run("magnitude_prune", deltas, list(weights), density=density), wanted)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_ties_elects_among_any_number_of_loras(count, normalize):
    deltas = [low_rank(50, 70, 3, seed=i, alpha=4.0) for i in range(count)]
    weights = [0.7, -0.4, 1.2, 0.0, 0.5, -0.9][:count]
    votes = [w * trimmed(dense(d), 0.4) for d, w in zip(deltas, weights)]
    close(run("ties", deltas, weights, density=0.4, normalize=normalize), elected(votes, normalize))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.2), (1.0, -0.8, 0.6)])
def test_ties_follows_the_paper_with_weighted_votes(weights, normalize):
    deltas = three()
    votes = [w * trimmed(dense(d), 0.4) for d, w in zip(deltas, weights)]
    got = run("ties", deltas, list(weights), density=0.4, normalize=normalize, **{"lambda": 0.5})
    close(got, 0.5 * elected(votes, normalize))


def test_a_negative_strength_votes_the_other_way():
    a, b = whole([[1.0, -2.0, 3.0]]), whole([[2.0, 1.0, 1.0]])
    assert run("ties", [a, b], [1.0, -1.0], density=1.0).dense().tolist() == [[-2.0, -1.5, 3.0]]


def test_a_stronger_lora_has_a_louder_vote():
    a, b = whole([[1.0]]), whole([[-2.0]])
    assert run("ties", [a, b], [1.0, 1.0], density=1.0).dense().item() == -2.0
    assert run("ties", [a, b], [3.0, 1.0], density=1.0).dense().item() == 3.0


def test_a_strength_scales_what_one_lora_has_alone():
    """mergekit divides by the strengths of the winners, after which 0.3 would count as 1."""
    a, b = whole([[1.0, 0.0]]), whole([[0.0, 2.0]])
    assert run("ties", [a, b], [0.25, 0.5], density=1.0).dense().tolist() == [[0.25, 1.0]]


@pytest.mark.parametrize("name", ["ties", "dare_ties", "della"])
def test_a_lora_and_its_negative_give_nothing(name):
    """A draw elects neither sign; counted as plus it would give the absolute values."""
    a = low_rank(50, 70, 4, seed=1)
    assert not run(name, [a, a], [1.0, -1.0], density=1.0).dense().any()


def test_loras_of_different_elements_are_united():
    a, b = dense(low_rank(50, 70, 4, seed=1)), dense(low_rank(50, 70, 4, seed=2))
    a[:, 35:], b[:, :35] = 0, 0
    close(run("ties", [whole(a), whole(b)], [1.0, 1.0], density=1.0), a + b)


@pytest.mark.parametrize("name", ["ties", "sce", "dare_ties", "della"])
def test_the_same_lora_twice_gives_that_lora(name):
    a = low_rank(50, 70, 4, seed=1)
    given = {"select_topk": 1.0} if name == "sce" else {"density": 1.0}
    close(run(name, [a, a], [1.0, 1.0], **given), dense(a))


def test_trimming_keeps_all_elements_as_large_as_the_least_one_kept():
    matrix = torch.tensor([[3.0, -1.0, 1.0], [1.0, 0.5, -1.0]])
    sparsify.keep_largest(matrix, 0.5)
    assert matrix.tolist() == [[3.0, -1.0, 1.0], [1.0, 0.0, -1.0]]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (2, 3)])
@pytest.mark.parametrize("name", ["ties", "magnitude_prune", "breadcrumbs", "sce"])
def test_the_smallest_density_never_empties_a_layer(name, shape):
    deltas = [low_rank(*shape, 1, seed=1), low_rank(*shape, 1, seed=2)]
    given = {"select_topk": 0.01} if name == "sce" else {"density": 0.01}
    assert bool(run(name, deltas, [1.0, 0.5], **given).dense().any())


# DARE and DELLA


@pytest.mark.parametrize("density", [1 - 1e-10, 0.999999])
@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della"])
def test_a_density_next_to_1_drops_next_to_nothing(name, density):
    deltas = [whole(dense(low_rank(30, 20, 2, seed=i))) for i in range(2)]
    nothing_dropped = run(name, deltas, [1.0, -0.6], density=1.0).dense()
    close(run(name, deltas, [1.0, -0.6], density=density), nothing_dropped)


def test_dare_is_the_exact_sum_on_average():
    """Within 4 standard errors, for every element, over 2000 seeds."""
    deltas, weights, density = [whole(dense(low_rank(5, 8, 2, seed=i))) for i in range(2)], [1.0, -0.6], 0.3
    results = torch.stack(
        [run("dare_linear", deltas, weights, seed=s, density=density).dense() for s in range(2000)]
    )
    terms = [w * d.dense() for d, w in zip(deltas, weights)]
    deviation = (sum(term**2 for term in terms) * (1 - density) / density).sqrt()
    assert bool(((results.mean(0) - sum(terms)).abs() <= 4 * deviation / 2000**0.5).all())
    spread = results.var(0) / deviation**2
    assert float((spread - 1).abs().max()) < 0.25


def test_della_keeps_a_delta_on_average_and_large_elements_more_often():
    matrix = torch.linspace(0.1, 1.0, 10).repeat(6, 1)[:, [3, 9, 0, 5, 1, 8, 2, 7, 6, 4]]
    kept, total = torch.zeros(6, 10), torch.zeros(6, 10)
    for seed in range(2000):
        drawn = matrix.clone()
        sparsify.drop_small_and_rescale(drawn, 0.5, 0.3, sparsify.Draws(seed, "a.layer", 0))
        kept += drawn != 0
        total += drawn
    chance = 0.2 + 0.6 * (matrix - 0.1) / 0.9
    assert float((kept / 2000 - chance).abs().max()) <= 4 * 0.5 / 2000**0.5
    deviation = matrix * ((1 - chance) / chance).sqrt()
    assert bool(((total / 2000 - matrix).abs() <= 4 * deviation / 2000**0.5).all())


@pytest.mark.parametrize("density", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("epsilon", [0.0, 0.15, 0.5])
def test_dropping_keeps_the_wanted_fraction_whatever_epsilon(density, epsilon):
    matrix = torch.randn(300, 400, generator=torch.Generator().manual_seed(1))
    sparsify.drop_small_and_rescale(matrix, density, epsilon, sparsify.Draws(1, "a.layer", 0))
    deviation = (density * (1 - density) / matrix.numel()) ** 0.5
    assert abs(float((matrix != 0).float().mean()) - density) <= 4 * deviation


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, -0.7)])
def test_della_without_epsilon_is_dare_with_ties(weights):
    """Not only in distribution: the random numbers are the same."""
    deltas = three()
    wanted = run("dare_ties", deltas, list(weights), density=0.4).dense()
    close(run("della", deltas, list(weights), density=0.4, epsilon=0.0), wanted)
    assert size(run("della", deltas, list(weights), density=0.4, epsilon=0.3).dense() - wanted) > 0.01


def masks(seed, layer, count, shape, density):
    """What the documented generator gives, element by element."""
    found = []
    for stream in range(count):
        key = hashlib.blake2b(f"{seed}\n{layer}\n{stream}".encode(), digest_size=16).digest()
        words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(shape[0] * shape[1])
        numbers = words.view(np.uint32)[: shape[0] * shape[1]].reshape(shape)
        found.append(torch.from_numpy(numbers.astype(np.float64) / 2**32 < density))
    return found


def test_dare_ties_follows_its_formula_with_the_documented_random_numbers():
    """So that a recipe gives the same file in every later version."""
    deltas, weights = three(), [0.5, 2.0, -0.7]
    order = sorted(range(3), key=lambda i: size(dense(deltas[i])))
    drawn = masks(7, "a.layer", 3, (50, 70), 0.4)
    votes = [weights[i] * dense(deltas[i]) * drawn[order.index(i)] / 0.4 for i in range(3)]
    close(run("dare_ties", deltas, weights, seed=7, density=0.4), elected(votes))
    close(run("dare_linear", deltas, weights, seed=7, density=0.4), sum(votes))


def test_the_random_numbers_of_large_layers_go_on_across_pieces(monkeypatch):
    matrix = torch.ones(30, 50)
    monkeypatch.setattr(sparsify, "_PIECE", 64)
    for drop in (
        lambda m: sparsify.drop_and_rescale(m, 0.4, sparsify.Draws(3, "x", 1)),
        lambda m: sparsify.drop_small_and_rescale(m, 0.4, 0.0, sparsify.Draws(3, "x", 1)),
    ):
        got = matrix.clone()
        drop(got)
        assert torch.equal(got != 0, sparsify_mask((30, 50), 0.4))


def sparsify_mask(shape, density):
    key = hashlib.blake2b(b"3\nx\n1", digest_size=16).digest()
    numbers = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(750).view(np.uint32)
    return torch.from_numpy(numbers.reshape(shape).astype(np.float64) / 2**32 < density)


def test_loras_draw_apart_from_each_other():
    """One mask for all would drop the same elements of each."""
    matrix = torch.ones(40, 40)
    masks = []
    for stream in range(2):
        drawn = matrix.clone()
        sparsify.drop_and_rescale(drawn, 0.5, sparsify.Draws(0, "a.layer", stream))
        masks.append(drawn != 0)
    assert 0.4 < float((masks[0] == masks[1]).float().mean()) < 0.6


def test_dare_summed_is_farther_from_the_sum_than_svd_at_the_same_rank():
    deltas = [low_rank(60, 80, 6, seed=i) for i in range(2)]
    exact = dense(deltas[0]) + dense(deltas[1])
    merged = run("dare_linear", deltas, [1.0, 1.0], density=0.5)
    dare = truncate(decompose_dense(merged, 6), 6).dense()
    assert size(dare - exact) > 1.1 * optimum(exact, 6)[1]


# Breadcrumbs


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.01), (0.3, 0.2), (0.9, 0.5), (0.5, 0.0)])
def test_breadcrumbs_follows_its_formula(density, gamma):
    deltas, weights = three(), [0.5, 2.0, -0.7]
    wanted = 0
    for delta, weight in zip(deltas, weights):
        matrix = dense(delta)
        order = matrix.abs().flatten().argsort()
        keep = int(density * matrix.numel())
        top = min(int(gamma * matrix.numel()), matrix.numel() - keep)
        mask = torch.zeros(matrix.numel(), dtype=torch.float64)
        mask[order[matrix.numel() - top - keep : matrix.numel() - top]] = 1
        wanted = wanted + weight * matrix * mask.view_as(matrix)
    close(run("breadcrumbs", deltas, weights, density=density, gamma=gamma), wanted)


@pytest.mark.parametrize("gamma", [1e-6, 0.01, 0.5])
def test_breadcrumbs_of_a_few_elements_keeps_some(gamma):
    """Less than one element to drop at the top is none, not all."""
    delta = whole([[3.0, -1.0, 0.5]])
    assert bool(run("breadcrumbs", [delta, delta], [1.0, 1.0], density=0.7, gamma=gamma).dense().any())
    sparse = torch.zeros(30, 30)
    sparse[4, 7] = 2.0
    assert bool(run("breadcrumbs", [whole(sparse)], [1.0], density=0.5, gamma=gamma).dense().any())


# SCE


def sce_formula(votes, select):
    stacked = torch.stack(votes)
    if select < 1:
        variance = stacked.var(0, unbiased=False)
        count = int(select * int(variance.count_nonzero()))
        mask = torch.zeros(variance.numel(), dtype=torch.float64)
        mask[variance.flatten().argsort(descending=True)[:count]] = 1
        stacked = stacked * mask.view_as(variance)
    energy = stacked.square().mean((1, 2))
    return elected(list(stacked), importance=energy / energy.sum())


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.2), (1.0, -0.8, 0.6)])
@pytest.mark.parametrize("select", [0.1, 0.5, 1.0])
def test_sce_follows_its_formula(weights, select):
    deltas = three()
    votes = [w * dense(d) for d, w in zip(deltas, weights)]
    close(run("sce", deltas, list(weights), select_topk=select), sce_formula(votes, select))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4)])
def test_sce_selects_by_variance_where_two_loras_nearly_agree_in_many_elements(weights):
    """A count of differing elements that rounding has made too small would keep too few."""
    deltas = [low_rank(300, 400, 4, seed=seed) for seed in (1, 2)]
    votes = [weight * dense(delta) for delta, weight in zip(deltas, weights)]
    got = run("sce", deltas, list(weights), select_topk=0.3).dense()
    # One element in a million may be at the threshold.
    assert float(((got - sce_formula(votes, 0.3)).abs() > 1e-6 * got.abs().max()).sum()) <= 2


def test_sce_of_deltas_of_one_sign_is_their_mean_by_energy():
    a, b = dense(low_rank(50, 70, 4, seed=1)).abs(), dense(low_rank(50, 70, 4, seed=2)).abs()
    energy = a.square().mean(), b.square().mean()
    wanted = (energy[0] * a + energy[1] * b) / (energy[0] + energy[1])
    close(run("sce", [whole(a), whole(b)], [1.0, 1.0], select_topk=1.0), wanted)


@pytest.mark.parametrize("select", [0.01, 0.5, 1.0])
def test_sce_of_one_lora_keeps_it_all(select):
    a = low_rank(50, 70, 4, seed=1)
    close(run("sce", [a], [0.7], select_topk=select), 0.7 * dense(a))
    close(run("sce", [a, a, a], [0.7] * 3, select_topk=select), 0.7 * dense(a))


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_sce_does_not_depend_on_how_large_deltas_are(scale):
    """mergekit takes energies below 1e-6 for nothing, where the deltas of most LoRAs are."""
    deltas = [LowRank(d.up * scale, d.down, d.alpha) for d in three()]
    wanted = scale * sce_formula([dense(d) for d in three()], 0.5)
    close(run("sce", deltas, [1.0] * 3, select_topk=0.5), wanted)


# What all have in common


@pytest.mark.parametrize("name", DENSE)
def test_large_layers_are_merged_in_pieces_like_small_ones(name, monkeypatch):
    deltas = three()
    once = run(name, deltas, [0.5, 2.0, -0.7])
    monkeypatch.setattr(sparsify, "_PIECE", 256)
    close(run(name, deltas, [0.5, 2.0, -0.7]), once.dense(), 1e-6)


@pytest.mark.parametrize("name", DENSE)
def test_results_come_with_the_row_space_of_the_sum(name):
    deltas = three()[:2]
    given = {"select_topk": 0.5} if name == "sce" else {}
    result = run(name, deltas, [1.0, -0.5], **given)
    assert isinstance(result, Dense)
    assert result.weight.dtype == torch.float32
    basis = torch.linalg.qr(result.start.double()).Q
    assert result.start.shape == (70, 9)
    for delta in deltas:
        rows = delta.down.double()
        assert size(rows - rows @ basis @ basis.mT) <= 1e-5 * size(rows)


@pytest.mark.parametrize("name", ["dare_linear", "breadcrumbs", "magnitude_prune"])
def test_summing_methods_that_drop_nothing_are_the_exact_sum_of_low_rank(name):
    deltas = three()
    result = run(name, deltas, [0.5, 2.0, -0.7], density=1.0)
    assert isinstance(result, LowRank)
    close(result, sum(w * dense(d) for d, w in zip(deltas, [0.5, 2.0, -0.7])), 1e-12)


def test_unknown_parameters_are_refused_beside_lambda():
    with pytest.raises(TypeError, match="unexpected parameters: gamma"):
        run("ties", three(), [1.0, 1.0, 1.0], gamma=0.1)


def test_the_command_line_hands_density_and_lambda_to_ties(tmp_path, capsys):
    layer = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    shapes = {layer: SDXL_LAYERS[layer]}
    paths = [make_lora(tmp_path / f"{name}.safetensors", shapes, seed=i) for i, name in enumerate("ab")]
    output = tmp_path / "merged.safetensors"
    options = [
        "--mode",
        "ties",
        "--density",
        "0.4",
        "--lambda",
        "0.5",
        "--rank",
        "full",
        "--dtype",
        "float32",
    ]
    assert main(["merge", *map(str, paths), "-o", str(output), *options]) == 0
    capsys.readouterr()
    (votes_a,), (votes_b,), (got,) = (dense_deltas(path).values() for path in (*paths, output))
    wanted = 0.5 * elected([trimmed(votes_a, 0.4), trimmed(votes_b, 0.4)])
    assert size(got - wanted) <= 1e-5 * size(wanted)
