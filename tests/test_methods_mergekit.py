"""Merged files against what mergekit's published functions make of the same dense deltas.

mergekit merges whole models; with a base of zeros its inputs are the deltas themselves. Where our
definition is another one the test says how, and compares the part that is the same. Ours at equal
votes for plus and minus give 0, where mergekit counts a draw as plus; that takes elements that
cancel to the last bit, which these do not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from mergekit import sparsify as mergekit_sparsify
from mergekit.merge_methods import merge_tensors
from mergekit.merge_methods.generalized_task_arithmetic import get_mask
from mergekit.merge_methods.karcher import karcher_merge_tensors
from torch import Tensor

from lib_loramerge import MergeRecipe, plan_merge, run_merge
from lib_loramerge.blocks import bundled_preset_path, load_presets
from lib_loramerge.delta import Dense
from lib_loramerge.files import LoraFolder
from lib_loramerge.methods import sparsify
from lib_loramerge.recipe import LoraInput
from tests.helpers.fixtures import dense_deltas, make_lora, relative_error

# Of Stable Diffusion XL, where files name layers as we do: the random numbers go by our names.
LAYERS = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (64, 64),
    "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj": (96, 48),
    "lora_te1_text_model_encoder_layers_0_mlp_fc2": (64, 96),
}
PAIRS = [(1.0, 1.0), (0.8, 0.5), (1.2, -0.7)]
TRIPLES = [(1.0, 1.0, 1.0), (0.5, 2.0, 1.2), (1.0, -0.8, 0.6)]
SEED = 7
# Files in float32; a selection that took another element would be off by more than a thousandth.
EXACT = 1e-5

Deltas = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRAs a, b, c of three ranks and alphas; energies far from the 1e-6 below which mergekit sees none."""
    path = tmp_path_factory.mktemp("loras")
    for index, name in enumerate("abc"):
        make_lora(
            path / f"{name}.safetensors", LAYERS, rank=4 + index, alpha=2.0 + index, seed=index, scale=0.6
        )
    return path


def ours(folder: Path, mode: str, weights: Sequence[float], **params: float | bool) -> Deltas:
    """Deltas of the file that a merge writes, at full rank."""
    inputs = tuple(LoraInput(name, te=w, unet=w) for name, w in zip("abc", weights))
    recipe = MergeRecipe(inputs, mode=mode, params=params, rank="full", dtype="float32", seed=SEED)
    plan = plan_merge(recipe, find=LoraFolder([folder]).find, presets=load_presets([bundled_preset_path()]))
    output = folder / "merged.safetensors"
    run_merge(plan, output, overwrite=True)
    return dense_deltas(output)


def sources(folder: Path, count: int) -> dict[str, list[Tensor]]:
    files = [dense_deltas(folder / f"{name}.safetensors") for name in "abc"[:count]]
    return {layer: [file[layer] for file in files] for layer in files[0]}


def mergekit(method: str, deltas: Sequence[Tensor], **parameters: object) -> Tensor:
    """A mergekit method with a base of zeros before the deltas."""
    base = torch.zeros_like(deltas[0])
    return merge_tensors([base, *deltas], method, parameters=parameters, base_index=0)


def weighted(weights: Sequence[float]) -> dict[int, float]:
    """Weights by the place of each input; the base is 0."""
    return dict(enumerate(weights, start=1))


# Sums and means


@pytest.mark.parametrize("mode", ["svd", "concat"])
@pytest.mark.parametrize("weights", TRIPLES)
def test_exact_sums_equal_task_arithmetic(folder, mode, weights):
    wanted = {
        layer: mergekit("task_arithmetic", deltas, weight=weighted(weights))
        for layer, deltas in sources(folder, 3).items()
    }
    assert relative_error(ours(folder, mode, weights), wanted) <= EXACT


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.2)])
def test_average_equals_linear(folder, weights):
    """At positive strengths: ours divides by their sum without signs, mergekit's with them."""
    wanted = {
        layer: merge_tensors(deltas, "linear", parameters={"weight": list(weights)})
        for layer, deltas in sources(folder, 3).items()
    }
    assert relative_error(ours(folder, "average", weights), wanted) <= EXACT


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp_equals_that_of_mergekit(folder, t):
    """Away from nearly equal deltas, for which mergekit goes straight."""
    wanted = {
        layer: merge_tensors([a, b], "slerp", parameters={"t": t}, base_index=0)
        for layer, (a, b) in sources(folder, 2).items()
    }
    assert relative_error(ours(folder, "slerp", (1.0, 1.0), t=t), wanted) <= EXACT


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.8, 0.5), (0.1, 2.0)])
def test_slerp_by_strengths_equals_nuslerp(folder, weights):
    """At positive strengths: a negative one turns a delta round here, and goes beyond the end there."""
    wanted = {
        layer: merge_tensors([a, b], "nuslerp", parameters={"weight": list(weights)})
        for layer, (a, b) in sources(folder, 2).items()
    }
    assert relative_error(ours(folder, "slerp", weights), wanted) <= EXACT


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.2)])
def test_karcher_mean_equals_that_of_mergekit(folder, weights):
    """Iterated to the end, as ours is; mergekit stops after 10 steps or at 1e-5 unless told otherwise."""
    shares = [weight / sum(weights) for weight in weights]
    wanted = {
        layer: karcher_merge_tensors(deltas, shares, max_iter=500, tol=1e-10)
        for layer, deltas in sources(folder, 3).items()
    }
    assert relative_error(ours(folder, "karcher", weights), wanted) <= EXACT


# Trimming and votes


@pytest.mark.parametrize("weights", PAIRS)
@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
def test_magnitude_pruning_equals_the_sum_of_trimmed_deltas(folder, weights, density):
    wanted = {}
    for layer, deltas in sources(folder, 2).items():
        kept = [mergekit_sparsify.magnitude(delta, density) for delta in deltas]
        wanted[layer] = mergekit("task_arithmetic", kept, weight=weighted(weights))
    assert relative_error(ours(folder, "magnitude_prune", weights, density=density), wanted) <= EXACT


@pytest.mark.parametrize("weights", TRIPLES)
@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
def test_ties_that_adds_up_equals_that_of_mergekit(folder, weights, density):
    """At any strengths: trimming, weighted votes, the sum of the winners, lambda."""
    given = {"density": density, "lambda": 0.6, "normalize": False}
    wanted = {
        layer: mergekit("ties", deltas, weight=weighted(weights), **given)
        for layer, deltas in sources(folder, 3).items()
    }
    assert relative_error(ours(folder, "ties", weights, **given), wanted) <= EXACT


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
def test_ties_that_averages_equals_that_of_mergekit_times_a_common_strength(folder, strength, density):
    """mergekit divides by the winners' strengths, so that a common one is lost; ours by their number."""
    weights = (strength,) * 3
    wanted = {
        layer: strength * mergekit("ties", deltas, weight=weighted(weights), density=density)
        for layer, deltas in sources(folder, 3).items()
    }
    assert relative_error(ours(folder, "ties", weights, density=density), wanted) <= EXACT


@pytest.mark.parametrize("weights", TRIPLES)
def test_ties_averages_the_winners_of_the_vote_of_mergekit(folder, weights):
    """At different strengths the divisors differ; who wins where does not."""
    wanted = {}
    for layer, deltas in sources(folder, 3).items():
        votes = torch.stack(
            [w * mergekit_sparsify.magnitude(delta, 0.4) for delta, w in zip(deltas, weights)]
        )
        winners = get_mask(votes, "sum")
        wanted[layer] = (votes * winners).sum(0) / winners.sum(0).clamp(min=1)
    assert relative_error(ours(folder, "ties", weights, density=0.4), wanted) <= EXACT


@pytest.mark.parametrize("weights", PAIRS)
@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.01), (0.3, 0.2), (0.9, 0.5), (0.5, 0.0), (1.0, 0.1)])
def test_breadcrumbs_equals_that_of_mergekit(folder, weights, density, gamma):
    wanted = {
        layer: mergekit("breadcrumbs", deltas, weight=weighted(weights), density=density, gamma=gamma)
        for layer, deltas in sources(folder, 2).items()
    }
    got = ours(folder, "breadcrumbs", weights, density=density, gamma=gamma)
    assert relative_error(got, wanted) <= EXACT


@pytest.mark.parametrize("weights", TRIPLES)
@pytest.mark.parametrize("select", [0.1, 0.5, 1.0])
def test_sce_equals_that_of_mergekit_on_deltas_at_their_strengths(folder, weights, select):
    """mergekit's takes no strengths; ours multiplies the deltas by them first."""
    wanted = {}
    for layer, deltas in sources(folder, 3).items():
        votes = [weight * delta for delta, weight in zip(deltas, weights)]
        wanted[layer] = mergekit("sce", votes, select_topk=select)
    assert relative_error(ours(folder, "sce", weights, select_topk=select), wanted) <= EXACT


# Random ones, given the same masks


def drawn(deltas: Sequence[Tensor], layer: str, weights: Sequence[float], density: float) -> list[Tensor]:
    """The masks that our seed gives the inputs of a layer."""
    places = sparsify.streams([Dense(delta) for delta in deltas], weights)
    masks = []
    for delta, place in zip(deltas, places):
        mask = torch.ones(delta.shape)
        sparsify.drop_and_rescale(mask, density, sparsify.Draws(SEED, layer, place))
        masks.append((mask != 0).double())
    return masks


@pytest.mark.parametrize("weights", PAIRS)
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_dare_equals_that_of_mergekit_given_its_mask_and_factor(folder, weights, density):
    """Ours multiplies what is left by 1/density, mergekit by the ratio of the L1 norms, or not at all."""
    summed, voted = {}, {}
    for layer, deltas in sources(folder, 2).items():
        masks = drawn(deltas, layer, weights, density)
        left = [
            mergekit_sparsify.rescaled_masked_tensor(delta, mask, None) / density
            for delta, mask in zip(deltas, masks)
        ]
        summed[layer] = mergekit("task_arithmetic", left, weight=weighted(weights))
        voted[layer] = mergekit("ties", left, weight=weighted(weights), normalize=False)
    assert relative_error(ours(folder, "dare_linear", weights, density=density), summed) <= EXACT
    got = ours(folder, "dare_ties", weights, density=density, normalize=False)
    assert relative_error(got, voted) <= EXACT


def test_the_factor_of_dare_is_that_of_mergekit_on_average():
    """The ratio of L1 norms goes about 1/density; over many masks the two have one mean."""
    generator = torch.Generator().manual_seed(1)
    delta, density, count = torch.randn(40, 50, generator=generator), 0.3, 400
    ratios = []
    for seed in range(count):
        ours_left = delta.clone()
        sparsify.drop_and_rescale(ours_left, density, sparsify.Draws(seed, "a.layer", 0))
        mask = (ours_left != 0).float()
        theirs = mergekit_sparsify.rescaled_masked_tensor(delta, mask, mergekit_sparsify.RescaleNorm.l1)
        ratios.append(float(theirs.norm() / ours_left.norm()))
    spread = torch.tensor(ratios)
    assert 0.01 < float(spread.std()) < 0.1, "the factors are the same after all"
    assert abs(float(spread.mean()) - 1) <= 4 * float(spread.std()) / count**0.5 + 2e-3


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.3, 0.25)])
def test_della_keeps_each_element_with_the_probability_of_mergekit(folder, monkeypatch, density, epsilon):
    """What we keep is multiplied by one over its probability, so the probabilities can be read from it."""
    asked: list[Tensor] = []

    def recorded(chances: Tensor) -> Tensor:
        asked.append(chances)
        return torch.ones_like(chances)

    monkeypatch.setattr(torch, "bernoulli", recorded)
    for layer, (delta, _) in sources(folder, 2).items():
        kept = delta.float()
        sparsify.drop_small_and_rescale(kept, density, epsilon, sparsify.Draws(SEED, layer, 0))
        mergekit_sparsify.della_magprune(delta.float(), density, epsilon)
        here = kept != 0
        assert 0.5 * density < float(here.float().mean()) < 1.5 * density
        chances = (delta.float() / kept)[here]
        torch.testing.assert_close(chances, asked.pop()[here], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", PAIRS)
def test_della_votes_as_that_of_mergekit(folder, weights):
    """Given what is left of the deltas; mergekit brings it to the old L1 norm instead of dividing by q."""
    wanted = {}
    for layer, deltas in sources(folder, 2).items():
        places = sparsify.streams([Dense(delta) for delta in deltas], weights)
        left = [delta.float() for delta in deltas]
        for matrix, place in zip(left, places):
            sparsify.drop_small_and_rescale(matrix, 0.5, 0.15, sparsify.Draws(SEED, layer, place))
        votes = [matrix.double() for matrix in left]
        wanted[layer] = mergekit("ties", votes, weight=weighted(weights), normalize=False)
    got = ours(folder, "della", weights, density=0.5, epsilon=0.15, normalize=False)
    assert relative_error(got, wanted) <= EXACT
