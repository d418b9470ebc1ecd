"""The core on layers of two real LoRAs, where they lie beside the checkout."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from lib_loramerge.delta import LowRank, decompose, round_cut, stack, truncate
from tests.helpers.delta_cases import dense, dense_sum, optimum, size
from tests.helpers.fixtures import sample_data

FOLDER = sample_data()
pytestmark = pytest.mark.skipif(FOLDER is None, reason="the sample data is not beside this checkout")
FILES = ("analog_sd15_kohya.safetensors", "disney_sd15_kohya.safetensors")


def shared_layers():
    """A few layers that both files have, of different shapes."""
    if FOLDER is None:
        return []
    shapes = {}
    with safe_open(FOLDER / FILES[0], "pt") as a, safe_open(FOLDER / FILES[1], "pt") as b:
        other = set(b.keys())
        for key in sorted(a.keys()):
            shape = tuple(a.get_slice(key).get_shape())
            if key.endswith("lora_down.weight") and key in other:
                shapes.setdefault(shape, key.removesuffix(".lora_down.weight"))
    return list(shapes.values())[:6]


def read(file, layer):
    with safe_open(FOLDER / file, "pt") as tensors:
        down = tensors.get_tensor(f"{layer}.lora_down.weight").flatten(1)
        up = tensors.get_tensor(f"{layer}.lora_up.weight").flatten(1)
        alpha = tensors.get_tensor(f"{layer}.alpha") if f"{layer}.alpha" in tensors.keys() else down.shape[0]  # noqa: SIM118
    return LowRank(up, down, float(alpha))


@pytest.mark.parametrize("layer", shared_layers())
def test_a_sum_of_real_layers_is_cut_as_well_as_a_dense_decomposition_cuts_it(layer):
    deltas = [read(file, layer) for file in FILES]
    whole = dense_sum(deltas, [0.8, -0.6])
    spectrum = decompose(stack(deltas, [0.8, -0.6]))
    for rank in (4, 16):
        best, least = optimum(whole, rank)
        assert size(dense(truncate(spectrum, rank)) - whole) <= least * (1 + 1e-8)
        stored = round_cut(spectrum, rank, torch.float16)
        assert size(stored.delta().dense() - best) <= 4e-4 * size(best)
        assert stored.error_sq**0.5 == pytest.approx(size(stored.delta().dense() - whole), rel=1e-4)


@pytest.mark.parametrize("layer", shared_layers())
def test_a_real_layer_minus_itself_is_nothing(layer):
    delta = read(FILES[0], layer)
    assert decompose(stack([delta, delta], [1.0, -1.0])).rank == 0
