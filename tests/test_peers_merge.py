"""Faults of other LoRA mergers in arithmetic and in what they write, each a test that it is not ours."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lib_loramerge.errors import LoraMergeError, UnsupportedError
from lib_loramerge.methods import METHODS
from tests.helpers.fixtures import (
    dense_deltas,
    lora_tensors,
    make_lora,
    metadata_of,
    relative_error,
    weighted_sum,
)
from tests.helpers.format_files import SD1_K, assert_close, merge, plan, rand, save, written

TE = "lora_te_text_model_encoder_layers_0_mlp_fc1"
Q = SD1_K.replace("attn2_to_k", "attn1_to_q")
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
PROJ = "lora_unet_down_blocks_0_attentions_0_proj_in"
LAYERS = {SD1_K: (24, 768), Q: (20, 20), TE: (32, 24)}
EXACT = [name for name, method in METHODS.items() if method.exact]
# The original merger's formula is the one mode that is told to be only approximate.
SOUND = [name for name in METHODS if name != "add"]


@pytest.fixture
def folder(tmp_path) -> Path:
    make_lora(tmp_path / "a.safetensors", LAYERS, rank=4, alpha=2, seed=1)
    make_lora(tmp_path / "b.safetensors", LAYERS, rank=6, alpha=6, seed=2)
    return tmp_path


def wanted(folder: Path, **weights: float) -> dict[str, Tensor]:
    return weighted_sum([(folder / f"{name}.safetensors", weight) for name, weight in weights.items()])


def rotated(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same deltas from other factors."""
    out = dict(tensors)
    for key, up in tensors.items():
        if not key.endswith("lora_up.weight"):
            continue
        down_key = key.replace("lora_up", "lora_down")
        rank = up.shape[1]
        change = torch.linalg.qr(rand(rank, rank, seed=rank).double()).Q + 0.5 * torch.eye(rank)
        out[key] = (up.double() @ change).float()
        out[down_key] = (torch.linalg.inv(change) @ tensors[down_key].double()).float()
    return out


# --- nothing is clamped, cut by one too many, or padded -----------------------------------------


@pytest.mark.parametrize("mode", EXACT)
def test_no_quantile_of_the_factors_is_clamped(tmp_path, mode):
    """Clamping at the 0.99 quantile costs 10 percent, and more where few numbers are large."""
    tensors = {}
    for layer, (out, in_) in LAYERS.items():
        u, v = torch.linalg.qr(rand(out, 16, seed=1)).Q, torch.linalg.qr(rand(in_, 16, seed=2)).Q
        tensors[f"{layer}.lora_up.weight"] = u * torch.logspace(1, -2, 16)
        tensors[f"{layer}.lora_down.weight"] = v.T
    save(tmp_path / "a.safetensors", tensors)
    merge(tmp_path, "a", mode=mode)
    assert relative_error(dense_deltas(tmp_path / "out.safetensors"), wanted(tmp_path, a=1)) < 1e-6
    merge(tmp_path, "a:1000", mode=mode, out="large")
    large = {layer: delta / 1000 for layer, delta in dense_deltas(tmp_path / "large.safetensors").items()}
    assert relative_error(large, wanted(tmp_path, a=1)) < 1e-6


@pytest.mark.parametrize("shape", [(64, 3072), (3072, 64), (64, 64)])
def test_a_rank_above_the_size_of_a_layer_neither_crashes_nor_strengthens_it(tmp_path, shape):
    layers = {SD1_K: (24, 768), Q: shape}
    make_lora(tmp_path / "a.safetensors", layers, rank=100, alpha=50)
    merge(tmp_path, "a", rank=512)
    tensors = load_file(tmp_path / "out.safetensors")
    up, down, alpha = (tensors[f"{Q}.{end}"] for end in ("lora_up.weight", "lora_down.weight", "alpha"))
    assert up.shape == (shape[0], 64)
    assert down.shape == (64, shape[1])
    assert float(alpha) == 64
    assert relative_error(dense_deltas(tmp_path / "out.safetensors"), wanted(tmp_path, a=1)) < 1e-6


@pytest.mark.parametrize("fields", [{"rank": "full"}, {"retain": 1.0}, {"rank": 20}, {"size": 50.0}])
def test_a_matrix_of_rank_1_or_16_is_written_with_that_rank_by_every_rule(tmp_path, fields):
    tensors = lora_tensors(LAYERS, rank=16)
    up = tensors[f"{Q}.lora_up.weight"]
    tensors[f"{Q}.lora_up.weight"] = up[:, :1] * torch.arange(1.0, 17.0)  # rank 1 in truth
    save(tmp_path / "a.safetensors", tensors)
    merge(tmp_path, "a", **fields)
    written_tensors = load_file(tmp_path / "out.safetensors")
    assert written_tensors[f"{SD1_K}.lora_down.weight"].shape[0] == 16
    assert written_tensors[f"{Q}.lora_down.weight"].shape[0] == 1


def test_convolutions_whose_rank_is_not_the_target_rank_and_1x1_ones_that_are_no_3x3_ones(tmp_path):
    layers = {SD1_K: (24, 768), CONV: (12, 8, 3, 3), PROJ: (12, 12, 1, 1)}
    make_lora(tmp_path / "a.safetensors", layers, rank=6, alpha=3)
    merge(tmp_path, "a", rank=5, conv_rank=2)
    ranks = {
        k.split(".")[0]: t.shape[0]
        for k, t in load_file(tmp_path / "out.safetensors").items()
        if "lora_down" in k
    }
    assert ranks == {SD1_K: 5, CONV: 2, PROJ: 5}
    got = dense_deltas(tmp_path / "out.safetensors")
    for layer, delta in wanted(tmp_path, a=1).items():
        best = torch.linalg.svdvals(delta)[ranks[layer] :].square().sum().sqrt()
        assert float(torch.linalg.vector_norm(got[layer] - delta)) == pytest.approx(float(best), rel=1e-4)


def test_a_layer_that_is_linear_in_one_file_and_a_1x1_convolution_in_the_other_is_summed(tmp_path):
    """Broadcasting (out, in) with (out, in, 1, 1) makes a tensor of out x in x out x in."""
    make_lora(tmp_path / "a.safetensors", {SD1_K: (24, 768), PROJ: (24, 24)}, rank=3, seed=1)
    make_lora(tmp_path / "b.safetensors", {SD1_K: (24, 768), PROJ: (24, 24, 1, 1)}, rank=2, seed=2)
    merge(tmp_path, "a:0.7", "b:-0.3")
    assert relative_error(dense_deltas(tmp_path / "out.safetensors"), wanted(tmp_path, a=0.7, b=-0.3)) < 1e-6


# --- strengths ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.5, -0.5, 2.0])
@pytest.mark.parametrize("mode", ["add", *EXACT])
def test_one_lora_at_a_strength_is_that_strength_and_not_its_square_or_root(folder, mode, weight):
    merge(folder, f"a:{weight}", mode=mode)
    assert relative_error(dense_deltas(folder / "out.safetensors"), wanted(folder, a=weight)) < 1e-6


@pytest.mark.parametrize("mode", EXACT)
def test_equal_ranks_beside_each_other_are_not_halved_and_the_file_says_its_true_rank(tmp_path, mode):
    make_lora(tmp_path / "a.safetensors", LAYERS, rank=8, alpha=8, seed=1)
    make_lora(tmp_path / "b.safetensors", LAYERS, rank=8, alpha=8, seed=2)
    merge(tmp_path, "a", "b:-1", mode=mode)
    assert relative_error(dense_deltas(tmp_path / "out.safetensors"), wanted(tmp_path, a=1, b=-1)) < 1e-6
    assert metadata_of(tmp_path / "out.safetensors")["ss_network_dim"] == "16"


@pytest.mark.parametrize("mode", EXACT)
def test_the_alpha_of_each_rank_counts_in_either_order(tmp_path, mode):
    """A rank of 64 beside one of 8 with equal alphas: the second must not come out at an eighth."""
    make_lora(tmp_path / "a.safetensors", LAYERS, rank=16, alpha=16, seed=1)
    make_lora(tmp_path / "b.safetensors", LAYERS, rank=2, alpha=16, seed=2)
    for names in (("a", "b"), ("b", "a")):
        merge(tmp_path, *names, mode=mode, out="".join(names))
        got = dense_deltas(tmp_path / f"{''.join(names)}.safetensors")
        assert relative_error(got, wanted(tmp_path, a=1, b=1)) < 1e-6


@pytest.mark.parametrize("mode", EXACT)
def test_a_file_without_alpha_is_not_saved_weaker_and_alpha_over_rank_counts_once(tmp_path, mode):
    make_lora(tmp_path / "a.safetensors", LAYERS, rank=8, alpha=None, seed=1)
    make_lora(tmp_path / "b.safetensors", LAYERS, rank=4, alpha=8, seed=2)
    merge(tmp_path, "a", "b", mode=mode)
    assert relative_error(dense_deltas(tmp_path / "out.safetensors"), wanted(tmp_path, a=1, b=1)) < 1e-6


@pytest.mark.parametrize("mode", EXACT)
def test_a_layer_of_one_lora_alone_takes_the_strength_of_its_text_encoder(tmp_path, mode):
    make_lora(tmp_path / "a.safetensors", LAYERS, rank=4, seed=1)
    make_lora(tmp_path / "b.safetensors", {SD1_K: LAYERS[SD1_K]}, rank=4, seed=2)
    merge(tmp_path, "a:0.3:0.9", "b:0.5", mode=mode)
    got = dense_deltas(tmp_path / "out.safetensors")
    assert_close(got[TE], 0.3 * dense_deltas(tmp_path / "a.safetensors")[TE])


@pytest.mark.parametrize("mode", SOUND)
def test_a_negative_strength_is_that_of_the_negated_lora(folder, mode):
    """Electing signs before the strengths are applied ignores the minus."""
    tensors = load_file(folder / "b.safetensors")
    save(folder / "c.safetensors", {k: -t if "lora_up" in k else t for k, t in tensors.items()})
    merge(folder, "a", "b:-0.7", mode=mode, out="minus", rank="full")
    merge(folder, "a", "c:0.7", mode=mode, out="negated", rank="full")
    minus, negated = (dense_deltas(folder / f"{name}.safetensors") for name in ("minus", "negated"))
    assert relative_error(minus, negated) < 1e-5


def test_five_loras_of_five_ranks_are_one_sum(tmp_path):
    weights = dict(zip("abcde", (0.2, -0.4, 0.6, 0.8, -1.0)))
    for number, name in enumerate(weights):
        make_lora(tmp_path / f"{name}.safetensors", LAYERS, rank=number + 1, alpha=number + 2, seed=number)
    merge(tmp_path, *(f"{name}:{weight}" for name, weight in weights.items()))
    assert relative_error(dense_deltas(tmp_path / "out.safetensors"), wanted(tmp_path, **weights)) < 1e-6


# --- methods look at deltas, not at factors -----------------------------------------------------


@pytest.mark.parametrize("mode", SOUND)
def test_the_same_lora_from_other_factors_gives_the_same_result(folder, mode):
    """Methods that work on up and down apart change their result by 100 percent here."""
    save(folder / "c.safetensors", rotated(load_file(folder / "a.safetensors")))
    merge(folder, "a:0.8", "b:0.5", mode=mode, out="plain", rank="full")
    merge(folder, "c:0.8", "b:0.5", mode=mode, out="turned", rank="full")
    plain, turned = (dense_deltas(folder / f"{name}.safetensors") for name in ("plain", "turned"))
    assert relative_error(turned, plain) < 1e-5


def test_the_approximate_mode_shows_how_far_it_is_from_the_sum(tmp_path):
    make_lora(tmp_path / "a.safetensors", LAYERS, rank=4, alpha=4, seed=1)
    make_lora(tmp_path / "b.safetensors", LAYERS, rank=4, alpha=4, seed=2)
    report = merge(tmp_path, "a", "b", mode="add")
    error = relative_error(dense_deltas(tmp_path / "out.safetensors"), wanted(tmp_path, a=1, b=1))
    assert error > 0.9  # cross terms as large as the result
    assert report.error == pytest.approx(error, rel=1e-5)


# --- kinds and formats --------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.5, -0.5])
@pytest.mark.parametrize("mode", EXACT)
def test_loha_at_a_strength_is_neither_lost_nor_squared(tmp_path, mode, weight):
    slots = {"w1_a": (24, 2), "w1_b": (2, 768), "w2_a": (24, 2), "w2_b": (2, 768)}
    tensors = {f"{SD1_K}.hada_{slot}": rand(*shape, seed=n) for n, (slot, shape) in enumerate(slots.items())}
    save(tmp_path / "a.safetensors", tensors)
    merge(tmp_path, f"a:{weight}", mode=mode)
    w = [tensors[f"{SD1_K}.hada_{slot}"].double() for slot in slots]
    assert_close(written(tmp_path / "out.safetensors")[0][SD1_K], weight * (w[0] @ w[1]) * (w[2] @ w[3]))


def test_dora_is_refused_by_name_without_its_base_and_never_merged_as_a_plain_lora(tmp_path):
    save(tmp_path / "a.safetensors", {**lora_tensors(LAYERS), f"{Q}.dora_scale": torch.ones(20, 1)})
    with pytest.raises(UnsupportedError, match=rf"a\.safetensors.*{Q}.*dora.*--base"):
        plan(tmp_path, "a")


@pytest.mark.parametrize("slot", ["dora_scale", "lora_mid.weight"])
def test_a_companion_without_its_factors_is_an_error_and_no_key_error(tmp_path, slot):
    save(tmp_path / "a.safetensors", {**lora_tensors({SD1_K: (24, 768)}), f"{Q}.{slot}": torch.ones(20, 1)})
    with pytest.raises(LoraMergeError, match=Q):
        plan(tmp_path, "a")


def test_no_tucker_core_is_left_behind_when_ranks_change(tmp_path):
    tensors = lora_tensors({SD1_K: (24, 768)})
    tensors |= {
        f"{CONV}.lora_up.weight": rand(12, 6, 1, 1),
        f"{CONV}.lora_mid.weight": rand(6, 6, 3, 3),
        f"{CONV}.lora_down.weight": rand(6, 8, 1, 1),
    }
    save(tmp_path / "a.safetensors", tensors)
    merge(tmp_path, "a", rank=3)
    keys = {key.split(".", 1)[1] for key in load_file(tmp_path / "out.safetensors")}
    assert keys == {"lora_up.weight", "lora_down.weight", "alpha"}


def test_split_projections_are_each_written_with_their_own_factors(tmp_path):
    """Saving k and v with q's down makes them wrong by more than 100 percent."""
    layer = "lora_unet_double_blocks_0_img_attn_qkv"
    make_lora(tmp_path / "a.safetensors", {layer: (48, 16)}, rank=3, alpha=3)
    merge(tmp_path, "a", dialect="diffusers")
    weights, _ = written(tmp_path / "out.safetensors")
    delta = dense_deltas(tmp_path / "a.safetensors")[layer]
    for number, name in enumerate(("to_q", "to_k", "to_v")):
        assert_close(
            weights[f"transformer.transformer_blocks.0.attn.{name}"], delta[16 * number : 16 * (number + 1)]
        )


def test_text_encoders_are_written_under_names_that_hosts_look_for(tmp_path):
    layers = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (32, 768),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": (32, 1280),
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (24, 2048),
    }
    make_lora(tmp_path / "a.safetensors", layers)
    merge(tmp_path, "a")
    assert {key.split(".")[0] for key in load_file(tmp_path / "out.safetensors")} == set(layers)


# --- what the file says -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_hash_is_that_of_the_bytes_written_in_every_precision(folder, dtype):
    merge(folder, "a", "b", dtype=dtype)
    content = (folder / "out.safetensors").read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata_of(folder / "out.safetensors")["sshs_model_hash"] == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_precision_asked_for_is_that_of_every_layer_also_of_those_in_one_lora(tmp_path, dtype):
    make_lora(tmp_path / "a.safetensors", LAYERS, rank=2, seed=1)
    make_lora(tmp_path / "b.safetensors", {Q: LAYERS[Q], SD1_K: LAYERS[SD1_K]}, rank=2, seed=2)
    merge(tmp_path, "a", "b", dtype=dtype)
    kinds = {
        t.dtype for key, t in load_file(tmp_path / "out.safetensors").items() if not key.endswith("alpha")
    }
    assert kinds == {getattr(torch, dtype)}


def test_an_sdxl_result_says_sdxl_and_not_its_parents_mistakes(tmp_path):
    layers = {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (24, 2048)}
    parent = {
        "ss_base_model_version": "sd_v1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "ss_output_name": "parent",
        "sshs_model_hash": "0" * 64,
    }
    make_lora(tmp_path / "a.safetensors", layers, metadata=parent)
    before = (tmp_path / "a.safetensors").read_bytes()
    merge(tmp_path, "a")
    said = metadata_of(tmp_path / "out.safetensors")
    assert said["ss_base_model_version"].startswith("sdxl_")
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert said["ss_output_name"] == "out"
    assert said["sshs_model_hash"] != "0" * 64
    assert (tmp_path / "a.safetensors").read_bytes() == before
