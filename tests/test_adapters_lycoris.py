"""LyCORIS as the judge: its modules' forward pass against our delta of the file they save."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule

from lib_loramerge.adapters import ADAPTERS, build
from lib_loramerge.delta import LowRank
from tests.helpers.adapter_judges import (
    CONV,
    LINEAR,
    WHERE,
    assert_equal,
    base_layer,
    ours,
    randomise,
    seen_delta,
)

logging.getLogger("LyCORIS").setLevel(logging.ERROR)

SLOTS = {
    "lora_up.weight": "up",
    "lora_down.weight": "down",
    "lora_mid.weight": "mid",
    "weight": "ia3_weight",
    **{f"{name}.weight": name for name in ("a1", "a2", "b1", "b2", "bm")},
}


def judged(module_class, shape, *, rank=4, alpha=2.0, random=True, dtype=torch.float64, **options):
    """(saved slots, weight change, bias change, base weight) of one LyCORIS module."""
    base = base_layer(shape).to(dtype)
    untouched = copy.deepcopy(base)
    module = module_class("layer", base, 1.0, rank, alpha, **options).to(dtype)
    if random:
        parameters = {
            name: p for name, p in module.named_parameters() if name not in ("dora_scale", "rescale")
        }
        randomise(parameters)
        for name, parameter in module.named_parameters():
            if name in ("dora_scale", "rescale"):  # lengths: near their start, not around zero
                torch.manual_seed(3)
                parameter.data.mul_(torch.empty_like(parameter).uniform_(0.8, 1.25)).copy_(parameter.float())
    module.apply_to()
    module.eval()
    saved = {SLOTS.get(key, key): tensor.detach().clone() for key, tensor in module.state_dict().items()}
    weight, bias = seen_delta(base, untouched, shape)
    return saved, weight, bias, untouched.weight.detach().float()


@pytest.mark.parametrize("random", [True, False], ids=["random", "initial"])
@pytest.mark.parametrize("rs_lora", [False, True], ids=["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize("module_class", [LoConModule, LohaModule, LokrModule])
@pytest.mark.parametrize("shape", [*LINEAR, *CONV])
def test_low_rank_kinds_equal_the_forward_pass_of_lycoris(module_class, shape, rs_lora, random):
    saved, weight, _, _ = judged(module_class, shape, rank=3, rs_lora=rs_lora, random=random)
    delta = ours(saved, shape)
    assert isinstance(delta.weight, LowRank)
    if rs_lora and {"lokr_w1", "lokr_w2"} <= saved.keys():
        # With both factors whole LyCORIS scales by rank / sqrt(rank), but the hosts apply them as they are.
        weight = weight / math.sqrt(3)
    assert_equal(delta.weight.dense(), weight)
    assert bool(weight.any()) == random


@pytest.mark.parametrize("module_class", [LoConModule, LohaModule, LokrModule])
@pytest.mark.parametrize("shape", CONV[:2])
def test_tucker_convolutions_equal_the_forward_pass_of_lycoris(module_class, shape):
    saved, weight, _, _ = judged(
        module_class, shape, rank=2 if module_class is LohaModule else 1, use_tucker=True
    )
    assert {"mid", "hada_t1", "lokr_t2"} & saved.keys()
    delta = ours(saved, shape, kernel=None)
    assert isinstance(delta.weight, LowRank)
    assert_equal(delta.weight.dense(), weight)


@pytest.mark.parametrize("wd", [False, True], ids=["plain", "DoRA"])
@pytest.mark.parametrize(
    ("module_class", "rank"),
    [(LoConModule, 16), (LohaModule, 8), (LohaModule, 32), (LokrModule, 8), (LokrModule, 64)],
)
@pytest.mark.parametrize("shape", [(320, 320), (320, 768), (320, 4, 3, 3), (4, 320, 3, 3), (320, 320, 1, 1)])
def test_layers_of_the_real_models_equal_the_forward_pass_of_lycoris(module_class, rank, shape, wd):
    saved, weight, _, base = judged(module_class, shape, rank=rank, weight_decompose=wd)
    assert_equal(ours(saved, shape, base=base if wd else None).weight.dense(), weight)


LOKR_FORMS = {
    "small whole, large factored": ({"rank": 1}, {"lokr_w1", "lokr_w2_a"}),
    "both factored": ({"rank": 1, "decompose_both": True}, {"lokr_w1_a", "lokr_w2_a"}),
    "both whole": ({"rank": 9, "full_matrix": True}, {"lokr_w1", "lokr_w2"}),
    "unbalanced": ({"rank": 1, "unbalanced_factorization": True, "factor": 2}, {"lokr_w1"}),
    "another factor": ({"rank": 1, "factor": 2}, {"lokr_w1", "lokr_w2_a"}),
}


@pytest.mark.parametrize("form", LOKR_FORMS)
@pytest.mark.parametrize("shape", [(24, 36), (36, 36), (12, 24, 3, 3), (24, 24, 1, 1)])
def test_every_form_of_lokr_equals_the_forward_pass_of_lycoris(form, shape):
    options, slots = LOKR_FORMS[form]
    saved, weight, _, _ = judged(LokrModule, shape, alpha=0.5, **options)
    assert slots <= saved.keys()
    assert_equal(ours(saved, shape).weight.dense(), weight)


def test_a_large_lokr_has_the_true_rank_of_its_factors():
    saved, *_ = judged(LokrModule, (96, 108), rank=9, full_matrix=True)
    w1 = saved["lokr_w1"]
    w1[:, 1:] = w1[:, :1] * torch.arange(1, w1.shape[1])  # rank 1 in truth
    delta = ours(saved, (96, 108)).weight
    assert delta.rank == min(saved["lokr_w2"].shape)
    assert_equal(delta.dense(), torch.kron(w1.double(), saved["lokr_w2"].double()))
    sizes = torch.linalg.vector_norm(delta.up, dim=0) * torch.linalg.vector_norm(delta.down, dim=1)
    assert bool((sizes[:-1] >= sizes[1:] * (1 - 1e-5)).all()), "ordered by size"


@pytest.mark.parametrize("wd_on_out", [True, False], ids=["per output", "per input"])
@pytest.mark.parametrize("module_class", [LoConModule, LohaModule, LokrModule])
@pytest.mark.parametrize("shape", [*LINEAR, *CONV])
@pytest.mark.parametrize("random", [True, False], ids=["random", "initial"])
def test_dora_equals_the_forward_pass_of_lycoris(module_class, shape, wd_on_out, random):
    saved, weight, _, base = judged(
        module_class, shape, rank=2, weight_decompose=True, wd_on_out=wd_on_out, random=random
    )
    delta = ours(saved, shape, base=base).weight
    if random:
        assert_equal(delta.dense(), weight)
    else:  # the magnitude is the length of the weight, so only rounding is left on either side
        assert torch.linalg.vector_norm(delta.dense()) < 1e-6 * torch.linalg.vector_norm(base)


@pytest.mark.parametrize("shape", [*LINEAR, *CONV])
@pytest.mark.parametrize("random", [True, False], ids=["random", "initial"])
def test_glora_equals_the_forward_pass_of_lycoris(shape, random):
    saved, weight, _, base = judged(GLoRAModule, shape, rank=3, random=random)
    assert_equal(ours(saved, shape, base=base).weight.dense(), weight)


@pytest.mark.parametrize("constraint", [0, 0.005, 100.0])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("module_class", [DiagOFTModule, ButterflyOFTModule])
@pytest.mark.parametrize("shape", [(24, 10), (12, 12), (24, 8, 3, 3), (12, 12, 1, 1)])
def test_oft_and_boft_equal_the_forward_pass_of_lycoris(module_class, shape, rescaled, constraint):
    options = {"constraint": constraint, "rescaled": rescaled}
    # LyCORIS inverts in float32 whatever the layer's dtype, so these two cannot run in float64.
    saved, weight, _, base = judged(module_class, shape, rank=6, dtype=torch.float32, **options)
    assert_equal(ours(saved, shape, base=base).weight.dense(), weight)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("shape", [*LINEAR, *CONV])
def test_ia3_equals_the_forward_pass_of_lycoris(shape, on_input):
    saved, weight, _, base = judged(IA3Module, shape, train_on_input=on_input)
    assert_equal(ours(saved, shape, base=base).weight.dense(), weight)


@pytest.mark.parametrize("shape", [*LINEAR, *CONV])
def test_full_differences_and_their_bias_equal_the_forward_pass_of_lycoris(shape):
    base = base_layer(shape).double()
    untouched = copy.deepcopy(base)
    module = FullModule("layer", base, 1.0).double()
    randomise(dict(module.named_parameters()))
    saved = {"diff": module.weight.detach().clone(), "diff_b": module.bias.detach().clone()}
    module.apply_to()
    weight, bias = seen_delta(base, untouched, shape)
    delta = ours(saved, shape)
    assert_equal(delta.weight.dense(), weight)
    assert_equal(delta.bias, bias)


@pytest.mark.parametrize("norm", [torch.nn.LayerNorm(8), torch.nn.GroupNorm(2, 8)])
def test_norms_equal_the_forward_pass_of_lycoris(norm):
    base = copy.deepcopy(norm).double()
    untouched = copy.deepcopy(base)
    module = NormModule("layer", base, 1.0).double()
    randomise(dict(module.named_parameters()))
    module.apply_to()
    delta = build({key: t.detach().float() for key, t in module.state_dict().items()}, where=WHERE)
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        judged_change = base(x) - untouched(x)
        untouched.weight.copy_(delta.weight.dense())
        untouched.bias.copy_(delta.bias)
        assert_equal(untouched(x), judged_change)


def test_a_trained_scalar_is_already_in_the_saved_factors():
    for module_class in (LoConModule, LohaModule, LokrModule):
        saved, weight, _, _ = judged(module_class, (12, 20), rank=2, use_scalar=True)
        assert "scalar" not in saved
        assert_equal(ours(saved, (12, 20)).weight.dense(), weight)


def test_every_kind_of_the_registry_has_a_judge_or_a_formula():
    judged_here = {
        "lora",
        "tucker",
        "loha",
        "loha_tucker",
        "lokr",
        "dora",
        "glora",
        "oft",
        "boft",
        "ia3",
        "full",
        "norm",
    }
    by_formula = {"oft_diag", "bias"}  # no module of the day writes these; see test_adapters_rules.py
    assert judged_here | by_formula == set(ADAPTERS)
