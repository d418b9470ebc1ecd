"""PEFT as the judge: its layers' forward pass against our delta of the state it saves."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from lib_loramerge.delta import LowRank
from tests.helpers.adapter_judges import CONV, LINEAR, assert_equal, base_layer, ours, randomise, seen_delta

SLOTS = {
    "lora_B.weight": "up",
    "lora_A.weight": "down",
    "lora_B.bias": "up_bias",
    "lora_magnitude_vector": "dora_scale",
}


class Net(nn.Module):
    """One layer, as PEFT wants it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def judged(config, shape, *, alpha: float, random: bool = True):
    """(saved slots with the alpha of the configuration, weight change, bias change, base weight)."""
    base = base_layer(shape).double()
    untouched = copy.deepcopy(base)
    model = get_peft_model(Net(base), config).double().eval()
    trained = {n: p for n, p in model.named_parameters() if "base_layer" not in n and "magnitude" not in n}
    if random:
        randomise(trained)
        for name, parameter in model.named_parameters():
            if "magnitude" in name:  # lengths: near their start, not around zero
                torch.manual_seed(3)
                parameter.data.mul_(torch.empty_like(parameter).uniform_(0.8, 1.25)).copy_(parameter.float())
    saved = {}
    for key, tensor in get_peft_model_state_dict(model).items():
        slot = key.removeprefix("base_model.model.layer.")
        saved[SLOTS.get(slot, slot)] = tensor.detach().clone()
    saved["alpha"] = torch.tensor(alpha)
    weight, bias = seen_delta(model, untouched, shape)
    return saved, weight, bias, untouched.weight.detach().float()


@pytest.mark.parametrize("random", [True, False], ids=["random", "initial"])
@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize("shape", [*LINEAR, *CONV])
def test_lora_and_rslora_equal_the_forward_pass_of_peft(shape, rslora, random):
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["layer"], use_rslora=rslora, init_lora_weights=True
    )
    saved, weight, _, _ = judged(config, shape, alpha=6 * math.sqrt(4) if rslora else 6, random=random)
    delta = ours(saved, shape)
    assert isinstance(delta.weight, LowRank)
    assert_equal(delta.weight.dense(), weight)
    assert bool(weight.any()) == random


# PEFT suspects its own one-dimensional lora_B.bias of being a torn tensor.
@pytest.mark.filterwarnings("ignore:.*invalid shape")
@pytest.mark.parametrize("shape", LINEAR)
def test_a_bias_of_the_lora_itself_is_scaled_as_peft_scales_it(shape):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], lora_bias=True)
    saved, weight, bias, _ = judged(config, shape, alpha=6)
    delta = ours(saved, shape)
    assert_equal(delta.weight.dense(), weight)
    assert_equal(delta.bias, bias)


@pytest.mark.parametrize("slot", ["dora_scale", "magnitude"])
@pytest.mark.parametrize("shape", [*LINEAR, *CONV])
def test_dora_equals_the_forward_pass_of_peft(shape, slot):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], use_dora=True)
    saved, weight, bias, base = judged(config, shape, alpha=6)
    saved[slot] = saved.pop("dora_scale")
    if slot == "dora_scale" and len(shape) == 4 and shape[0] == shape[1]:
        # (1, n, 1, 1) of a square convolution looks like LyCORIS's length per input.
        saved["dora_scale"] = saved["dora_scale"].reshape(-1, 1, 1, 1)
    assert_equal(ours(saved, shape, base=base).weight.dense(), weight)
    assert_equal(bias, torch.zeros_like(bias))


@pytest.mark.parametrize("effective", [False, True], ids=["flat", "tucker"])
@pytest.mark.parametrize("shape", [*LINEAR, *CONV])
def test_loha_equals_the_forward_pass_of_peft(shape, effective):
    config = LoHaConfig(r=2, alpha=6, target_modules=["layer"], use_effective_conv2d=effective)
    saved, weight, _, _ = judged(config, shape, alpha=6)
    assert_equal(ours(saved, shape).weight.dense(), weight)


@pytest.mark.parametrize("both", [False, True], ids=["w1 whole", "both factored"])
@pytest.mark.parametrize("effective", [False, True], ids=["flat", "tucker"])
@pytest.mark.parametrize("shape", [*LINEAR, *CONV])
def test_lokr_equals_the_forward_pass_of_peft(shape, effective, both):
    config = LoKrConfig(
        r=1, alpha=3, target_modules=["layer"], use_effective_conv2d=effective, decompose_both=both
    )
    saved, weight, _, _ = judged(config, shape, alpha=3)
    assert_equal(ours(saved, shape).weight.dense(), weight)
