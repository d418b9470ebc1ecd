"""Norm layers and biases in a merge: vectors that go through the same method as every other delta."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_loramerge.cli import main
from lib_loramerge.methods import METHODS
from tests.helpers.fixtures import SD1_LAYERS, lora_tensors
from tests.test_methods_elementwise import elected, trimmed

LAYER = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
NORM = "lora_te_text_model_encoder_layers_0_layer_norm1"
KEYS = (f"{NORM}.w_norm", f"{NORM}.b_norm", f"{LAYER}.diff_b")
WEIGHTS = (0.7, -0.4)


def write(path, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = lora_tensors({LAYER: SD1_LAYERS[LAYER]}, seed=seed)
    tensors |= {key: torch.randn(768, generator=generator) for key in KEYS}
    save_file(tensors, str(path))
    return path


@pytest.fixture
def files(tmp_path):
    return [write(tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate("ab")]


def merged(files, *options):
    """The merged vectors, float64, and those of the inputs as rows times their strengths."""
    inputs = [f"{path}:{weight}" for path, weight in zip(files, WEIGHTS)]
    output = files[0].with_name("merged.safetensors")
    arguments = ["merge", *inputs, "-o", str(output), "--overwrite", "--dtype", "float32", *options]
    assert main(arguments) == 0
    got = {key: tensor.double() for key, tensor in load_file(str(output)).items() if key in KEYS}
    rows = {key: [load_file(str(path))[key].double()[None] for path in files] for key in KEYS}
    return got, rows


def weighted(rows):
    return [weight * row for weight, row in zip(WEIGHTS, rows)]


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_trims_elects_and_scales_vectors_by_lambda(files, density):
    got, rows = merged(files, "--mode", "ties", "--density", str(density), "--lambda", "0.5")
    for key in KEYS:
        wanted = 0.5 * elected(weighted([trimmed(row, density) for row in rows[key]]))[0]
        assert torch.allclose(got[key], wanted, rtol=1e-6, atol=1e-7), key


def test_magnitude_prune_keeps_the_largest_elements_of_vectors(files):
    got, rows = merged(files, "--mode", "magnitude_prune", "--density", "0.2")
    for key in KEYS:
        wanted = sum(weighted([trimmed(row, 0.2) for row in rows[key]]))[0]
        assert torch.allclose(got[key], wanted, rtol=1e-6, atol=1e-7), key


def test_dare_drops_elements_of_each_vector_by_itself_and_scales_the_rest(files):
    got, rows = merged(files, "--mode", "dare_linear", "--density", "0.5", "--lambda", "2.0")
    patterns = []
    for key in KEYS:
        a, b = (2.0 * row[0] / 0.5 for row in weighted(rows[key]))
        choices = torch.stack([torch.zeros_like(a), a, b, a + b])
        distance, choice = (choices - got[key]).abs().min(0)
        assert float(distance.max()) <= 1e-5
        assert choice.bincount(minlength=4).min() > 768 / 8
        patterns.append(choice)
    assert not torch.equal(patterns[0], patterns[1])  # else one draw would decide for both


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.elementwise])
def test_other_methods_add_vectors_up_the_means_by_shares(files, name):
    got, rows = merged(files, "--mode", name)
    total = sum(abs(weight) for weight in WEIGHTS) if name in ("average", "slerp", "karcher") else 1.0
    for key in KEYS:
        assert torch.allclose(got[key], sum(weighted(rows[key]))[0] / total, rtol=1e-6, atol=1e-7), key
