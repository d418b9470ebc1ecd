# ruff: noqa: E501  (tables of names are easier to read one row to a line)
"""Thirty things that LoRA files do, from file to file; a comment says where another test goes deeper."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lib_loramerge.adapters.scaling import ALPHA_UNUSED
from lib_loramerge.analysis import inspect
from lib_loramerge.errors import (
    IncompatibleError,
    LoraMergeError,
    UnknownKeyError,
    UnsupportedError,
)
from lib_loramerge.merge import open_source
from tests.helpers.fixtures import metadata_of
from tests.helpers.format_files import SD1_K, assert_close, merge, plan, rand, save, written

Q = SD1_K.replace("attn2_to_k", "attn1_to_q")
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
PROJ = "lora_unet_down_blocks_0_attentions_0_proj_in"
SD1 = {"ss_base_model_version": "sd_v1"}


def lora(layer: str, out: int = 16, in_: int = 768, rank: int = 2, *, seed: int = 1) -> dict[str, Tensor]:
    """up and down of one linear layer."""
    return {
        f"{layer}.lora_up.weight": rand(out, rank, seed=seed),
        f"{layer}.lora_down.weight": rand(rank, in_, seed=seed + 50),
    }


def product(tensors: dict[str, Tensor], layer: str) -> Tensor:
    up, down = (tensors[f"{layer}.lora_{side}.weight"].double().flatten(1) for side in ("up", "down"))
    return up @ down


def merged(
    folder: Path, tensors: dict[str, Tensor], *, weight: float = 0.5, metadata=None, out="out", **fields
):
    """The file alone, merged at a strength; (weights, biases, report)."""
    save(folder / "a.safetensors", tensors, metadata)
    report = merge(folder, f"a:{weight}", out=out, **fields)
    return *written(folder / f"{out}.safetensors"), report


def base_model(folder: Path, weights: dict[str, Tensor]) -> Path:
    return save(
        folder / "base.safetensors", {f"model.diffusion_model.{k}.weight": w for k, w in weights.items()}
    )


LDM_K = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
LDM_CONV = "input_blocks.1.0.in_layers.2"


def test_01_without_alpha_the_scale_is_1(tmp_path):
    tensors = lora(SD1_K, rank=4)
    weights, _, _ = merged(tmp_path, tensors)
    assert_close(weights[SD1_K], 0.5 * product(tensors, SD1_K))


def test_02_an_alpha_of_0_is_a_delta_of_0_and_is_reported(tmp_path):
    tensors = {**lora(SD1_K), **lora(Q, in_=16), f"{Q}.alpha": torch.tensor(0.0)}
    weights, _, report = merged(tmp_path, tensors)
    assert weights.keys() == {SD1_K}
    found = [text for text in report.warnings if "alpha is 0" in text]
    assert len(found) == 1
    assert "alpha is 0 in 1 layer (" in found[0]
    assert "attn1_to_q" in found[0]


def test_02_many_layers_with_an_alpha_of_0_are_counted_in_one_sentence_and_inspect_names_them_too(tmp_path):
    tensors = lora(SD1_K)
    for block in (1, 2, 4, 5, 7):
        layer = f"lora_unet_input_blocks_{block}_1_transformer_blocks_0_attn2_to_v"
        tensors |= {**lora(layer), f"{layer}.alpha": torch.tensor(0.0)}
    path = save(tmp_path / "many.safetensors", tensors)
    _, _, report = merged(tmp_path, tensors)
    for notes in (report.warnings, inspect(path).notes):
        [found] = [text for text in notes if "alpha is 0" in text]
        assert "in 5 layers (lora_unet_input_blocks_1_1_" in found
        assert "and 2 more)" in found


def test_02_notes_on_a_file_and_on_its_layers_are_sentences_of_ours_within_one_with_its_name(tmp_path):
    lokr = {
        f"{SD1_K}.lokr_w1": rand(4, 4),
        f"{SD1_K}.lokr_w2": rand(4, 192),
        f"{SD1_K}.alpha": torch.tensor(1.0),
    }
    zero = {**lora(Q, in_=16), f"{Q}.alpha": torch.tensor(0.0)}
    _, _, report = merged(tmp_path, {**lokr, **zero})
    [ignored, nothing] = sorted(text for text in report.warnings if "alpha is" in text)[::-1]
    assert [text.parts[0] for text in (ignored, nothing)] == ["a.safetensors"] * 2
    assert ignored.parts[1].key == ALPHA_UNUSED
    assert nothing.parts[1].key.startswith("alpha is 0 in {layers}")


@pytest.mark.parametrize("alpha", [
    torch.tensor([3.0]), torch.tensor(3), torch.tensor(3.0, dtype=torch.float16),
    torch.tensor([3.0], dtype=torch.bfloat16), torch.tensor(3.0).to(torch.float8_e4m3fn),
], ids=["[1]", "int64", "float16", "[1] bfloat16", "float8"])  # fmt: skip
def test_03_alpha_may_be_of_any_shape_of_one_number_and_any_dtype(tmp_path, alpha):
    tensors = {**lora(SD1_K), f"{SD1_K}.alpha": alpha}
    weights, _, _ = merged(tmp_path, tensors)
    assert_close(weights[SD1_K], 0.5 * 1.5 * product(tensors, SD1_K))


def test_04_a_lone_alpha_is_dropped_and_reported_and_a_lone_factor_is_an_error_that_names_its_layer(tmp_path):
    weights, _, report = merged(tmp_path, {**lora(SD1_K), f"{Q}.alpha": torch.tensor(1.0)})
    assert weights.keys() == {SD1_K}
    assert any(f"{Q}.alpha" in text and "dropped" in text for text in report.warnings)
    for side in ("up", "down"):
        tensors = {**lora(SD1_K), **lora(Q, in_=16)}
        del tensors[f"{Q}.lora_{side}.weight"]
        save(tmp_path / f"half_{side}.safetensors", tensors)
        with pytest.raises(IncompatibleError, match=rf"half_{side}\.safetensors.*{Q}.*{side}"):
            plan(tmp_path, f"half_{side}")


def test_05_every_layer_has_its_own_rank_and_alpha(tmp_path):
    tensors, wanted = {}, {}
    for rank, (layer, in_) in enumerate({SD1_K: 768, Q: 16, Q.replace("to_q", "to_v"): 16}.items(), start=1):
        tensors |= {
            **lora(layer, in_=in_, rank=rank, seed=rank),
            f"{layer}.alpha": torch.tensor(rank * 0.7 + 1),
        }
        wanted[layer] = 0.5 * (rank * 0.7 + 1) / rank * product(tensors, layer)
    weights, _, report = merged(tmp_path, tensors)
    for layer, delta in wanted.items():
        assert_close(weights[layer], delta)
    assert report.ranks == {3: 1, 2: 1, 1: 1}
    assert metadata_of(tmp_path / "out.safetensors")["ss_network_dim"] == "Dynamic"


def test_06_convolutions_of_another_rank_and_factors_with_too_few_or_too_many_axes(tmp_path):
    tensors = {
        **lora(SD1_K),
        f"{CONV}.lora_up.weight": rand(8, 3, 1, 1),
        f"{CONV}.lora_down.weight": rand(3, 4, 3, 3),
        **lora(PROJ, 8, 8),  # a 1 x 1 convolution stored as a matrix
        f"{Q}.lora_up.weight": rand(16, 2, 1, 1, seed=3),  # a linear layer stored as a convolution
        f"{Q}.lora_down.weight": rand(2, 16, 1, 1, seed=4),
    }
    weights, _, _ = merged(tmp_path, tensors)
    for layer in (SD1_K, CONV, PROJ, Q):
        assert_close(weights[layer], 0.5 * product(tensors, layer))
    shapes = {key: tuple(t.shape) for key, t in load_file(tmp_path / "out.safetensors").items()}
    assert shapes[f"{CONV}.lora_down.weight"] == (3, 4, 3, 3)
    assert shapes[f"{PROJ}.lora_down.weight"] == (2, 8, 1, 1)  # Stable Diffusion 1 has a convolution here
    assert shapes[f"{Q}.lora_down.weight"] == (2, 16)


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1)])
def test_07_tucker_cores_are_folded_away(tmp_path, kernel):
    layer = CONV if kernel == (3, 3) else PROJ
    up, mid, down = rand(8, 3, 1, 1), rand(3, 3, *kernel, seed=2), rand(3, 4, 1, 1, seed=3)
    tensors = {f"{layer}.lora_{n}.weight": t for n, t in (("up", up), ("mid", mid), ("down", down))}
    weights, _, _ = merged(tmp_path, {**lora(SD1_K), **tensors, f"{layer}.alpha": torch.tensor(1.5)})
    wanted = torch.einsum("on,nmkl,mi->oikl", up[..., 0, 0].double(), mid.double(), down[..., 0, 0].double())
    assert_close(weights[layer], 0.5 * 0.5 * wanted.flatten(1))
    assert not any("lora_mid" in key for key in load_file(tmp_path / "out.safetensors"))


def test_08_loha_of_unequal_ranks_tucker_and_more_ranks_than_the_layer(tmp_path):
    def named(layer: str, **slots: Tensor) -> dict[str, Tensor]:
        return {f"{layer}.hada_{slot}": tensor for slot, tensor in slots.items()}

    # Alpha is divided by the rank of w1, as the WebUIs do.
    a = [rand(16, 2, seed=1), rand(2, 768, seed=2), rand(16, 3, seed=3), rand(3, 768, seed=4)]
    b = [rand(6, 5, seed=5), rand(5, 7, seed=6), rand(6, 5, seed=7), rand(5, 7, seed=8)]
    t = [rand(2, 2, 3, 3, seed=9), rand(2, 8, seed=10), rand(2, 4, seed=11)]
    tensors = {
        **named(SD1_K, w1_a=a[0], w1_b=a[1], w2_a=a[2], w2_b=a[3]),
        f"{SD1_K}.alpha": torch.tensor(3.0),
        **named(Q, w1_a=b[0], w1_b=b[1], w2_a=b[2], w2_b=b[3]),
        **named(CONV, t1=t[0], w1_a=t[1], w1_b=t[2], t2=t[0], w2_a=t[1], w2_b=t[2]),
    }
    weights, _, _ = merged(tmp_path, tensors)
    a, b, t = ([tensor.double() for tensor in group] for group in (a, b, t))
    assert_close(weights[SD1_K], 0.5 * 1.5 * (a[0] @ a[1]) * (a[2] @ a[3]))
    assert_close(weights[Q], 0.5 * (b[0] @ b[1]) * (b[2] @ b[3]))
    whole = torch.einsum("ijkl,jr,ip->prkl", t[0], t[2], t[1])
    assert_close(weights[CONV], 0.5 * (whole * whole).flatten(1))
    ranks = {
        k.split(".")[0]: v.shape[0]
        for k, v in load_file(tmp_path / "out.safetensors").items()
        if "lora_down" in k
    }
    assert ranks[SD1_K] == 6
    assert ranks[Q] == 6  # 25 components in a 6 x 7 layer


def test_08_the_large_ranks_that_exact_products_have_are_reported_unless_a_rank_is_asked_for(tmp_path):
    slots = {"w1_a": (256, 16), "w1_b": (16, 768), "w2_a": (256, 16), "w2_b": (16, 768)}
    save(
        tmp_path / "a.safetensors",
        {f"{SD1_K}.hada_{slot}": rand(*shape, seed=n) for n, (slot, shape) in enumerate(slots.items())},
    )
    told = [
        any("up to 256" in text for text in plan(tmp_path, "a", rank=r).warnings)
        for r in ("same", "full", 32)
    ]
    assert told == [True, True, False]


def test_09_lokr_in_all_its_forms(tmp_path):
    k = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_"
    w = {name: rand(*shape, seed=i).double() for i, (name, shape) in enumerate({
        "small": (2, 4), "large": (8, 192), "s_a": (2, 1), "s_b": (1, 4), "l_a": (8, 3), "l_b": (3, 192),
        "conv": (4, 2, 3, 3), "c_a": (4, 2), "c_b": (2, 18), "t2": (2, 2, 3, 3), "t_a": (2, 4), "t_b": (2, 2),
        "c_small": (2, 2), "tall": (8, 1), "thin": (2, 16),
    }.items())}  # fmt: skip
    forms = {
        SD1_K: ({"w1": "small", "w2_a": "l_a", "w2_b": "l_b"}, torch.kron(w["small"], w["l_a"] @ w["l_b"]) / 3),
        f"{k}q": ({"w1_a": "s_a", "w1_b": "s_b", "w2_a": "l_a", "w2_b": "l_b"},
                  torch.kron(w["s_a"] @ w["s_b"], w["l_a"] @ w["l_b"]) / 3),
        f"{k}k": ({"w1": "small", "w2": "large"}, torch.kron(w["small"], w["large"])),  # alpha counts for nothing
        f"{k}v": ({"w1": "tall", "w2": "thin"}, torch.kron(w["tall"], w["thin"])),
        CONV: ({"w1": "c_small", "w2": "conv"}, torch.kron(w["c_small"].reshape(2, 2, 1, 1), w["conv"]).reshape(8, -1)),
        CONV.replace("conv1", "conv2"): (
            {"w1": "c_small", "w2_a": "c_a", "w2_b": "c_b"},
            torch.kron(w["c_small"], w["c_a"] @ w["c_b"]) / 2,
        ),
        CONV.replace("resnets_0", "resnets_1"): (
            {"w1": "c_small", "t2": "t2", "w2_a": "t_a", "w2_b": "t_b"},
            torch.kron(w["c_small"].reshape(2, 2, 1, 1),
                       torch.einsum("ijkl,ip,jr->prkl", w["t2"], w["t_a"], w["t_b"]).contiguous()).reshape(8, -1) / 2,
        ),
    }  # fmt: skip
    tensors = {
        f"{layer}.lokr_{slot}": w[name].float()
        for layer, (slots, _) in forms.items()
        for slot, name in slots.items()
    }
    tensors |= {f"{layer}.alpha": torch.tensor(1.0) for layer in forms}
    weights, _, _ = merged(tmp_path, tensors)
    for layer, (_, wanted) in forms.items():
        if layer == CONV.replace("conv1", "conv2"):
            wanted = wanted.reshape(8, 2, 2, 9).reshape(8, 36)
        assert_close(weights[layer], 0.5 * wanted)


@pytest.mark.parametrize(("shape", "axis"), [
    ((16, 1), 1), ((1, 768), 0), ((16,), 1),
])  # fmt: skip
def test_10_dora_of_linear_layers_by_the_shape_of_its_magnitude(tmp_path, shape, axis):
    tensors, w = lora(SD1_K), rand(16, 768, seed=9, scale=1)
    magnitude = rand(*shape, seed=8).abs() + 1
    v = w.double() + product(tensors, SD1_K)
    wanted = v / v.norm(dim=axis, keepdim=True) * magnitude.double().reshape([-1, 1] if axis else [1, -1]) - w
    base = base_model(tmp_path, {LDM_K: w})
    weights, _, _ = merged(tmp_path, {**tensors, f"{SD1_K}.dora_scale": magnitude}, base=base)
    assert_close(weights[SD1_K], 0.5 * wanted)
    with pytest.raises(UnsupportedError, match="--base"):
        merge(tmp_path, "a", out="second")


@pytest.mark.parametrize(("ending", "axes"), [
    ("dora_scale", (0, 2, 3)), ("lora_magnitude_vector", (1, 2, 3)), ("lora_magnitude_vector.default.weight", (1, 2, 3)),
    ("magnitude", (1, 2, 3)),
])  # fmt: skip
def test_10_dora_of_square_convolutions_per_input_in_lycoris_and_per_output_in_peft(tmp_path, ending, axes):
    up, down, w = rand(4, 2, 1, 1), rand(2, 4, 3, 3), rand(4, 4, 3, 3, seed=9, scale=1)
    magnitude = rand(1, 4, 1, 1, seed=8).abs() + 1
    v = w.double() + (up.flatten(1).double() @ down.flatten(1).double()).reshape(w.shape)
    length = magnitude.double() if axes[0] == 0 else magnitude.double().reshape(4, 1, 1, 1)
    wanted = v / v.square().sum(axes, keepdim=True).sqrt() * length - w
    path = "unet.down_blocks.0.resnets.0.conv1" if ending != "dora_scale" else CONV
    tensors = {
        **lora(SD1_K), f"{path}.lora_B.weight": up, f"{path}.lora_A.weight": down, f"{path}.{ending}": magnitude,
    }  # fmt: skip
    weights, _, _ = merged(tmp_path, tensors, base=base_model(tmp_path, {LDM_CONV: w}))
    assert_close(weights[CONV], 0.5 * wanted.flatten(1))


@pytest.mark.parametrize("generation", ["old", "new"])
def test_11_glora_of_both_generations(tmp_path, generation):
    """LyCORIS as the judge of the new one: test_adapters_lycoris; square layers: test_adapters_rules."""
    w, r = rand(16, 768, seed=9, scale=1), 3
    first, second = rand(768, r, seed=1), rand(r, 768, seed=2)  # W first second
    left, right = rand(16, r, seed=3), rand(r, 768, seed=4)
    wanted = w.double() @ first.double() @ second.double() + left.double() @ right.double()
    slots = {"a1": first, "a2": second, "b1": left, "b2": right}
    if generation == "old":
        slots = {"a2": first, "a1": second, "b2": left, "b1": right}
    tensors = {f"{SD1_K}.{slot}.weight": tensor for slot, tensor in slots.items()}
    base = base_model(tmp_path, {LDM_K: w})
    weights, _, _ = merged(tmp_path, tensors, base=base)
    assert_close(weights[SD1_K], 0.5 * wanted)
    weights, _, _ = merged(tmp_path, {**tensors, f"{SD1_K}.alpha": torch.tensor(1.5)}, base=base, out="x")
    assert_close(weights[SD1_K], 0.5 * 0.5 * wanted)


@pytest.mark.parametrize("prefix", ["lora_unet", "oft_unet"])
@pytest.mark.parametrize("alpha", [None, 0.0, 1e-3])
def test_12_oft_with_and_without_a_constraint(tmp_path, alpha, prefix):
    w, blocks = rand(16, 768, seed=9, scale=1), rand(4, 4, 4, seed=1, scale=0.4)
    q = (blocks - blocks.mT).double()
    if alpha:
        length = q.square().sum().sqrt()
        q = (
            q * min(float(length), alpha * 16) / length
        )  # LyCORIS's and kohya's constraint: alpha times outputs
    eye = torch.eye(4).double()
    turned = torch.einsum(
        "knm,kni->kmi", (eye + q) @ torch.linalg.inv(eye - q), w.double().reshape(4, 4, 768)
    )
    layer = SD1_K.replace("lora_unet", prefix)
    tensors = {f"{layer}.oft_blocks": blocks}
    if alpha is not None:
        tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    weights, _, _ = merged(tmp_path, tensors, base=base_model(tmp_path, {LDM_K: w}), metadata=SD1)
    assert_close(weights[SD1_K], 0.5 * (turned.reshape(16, 768) - w.double()))


def test_12_the_rotations_of_early_lycoris_and_boft(tmp_path):
    """BOFT by LyCORIS's module: test_formats_kinds."""
    w, blocks = rand(16, 768, seed=9, scale=1), rand(4, 4, 4, seed=1)
    turns = torch.linalg.qr(blocks.double()).Q.float()
    weights, _, _ = merged(
        tmp_path, {f"{SD1_K}.oft_diag": turns}, base=base_model(tmp_path, {LDM_K: w}), metadata=SD1
    )
    turned = torch.einsum("knm,kni->kmi", turns.double(), w.double().reshape(4, 4, 768))
    assert_close(weights[SD1_K], 0.5 * (turned.reshape(16, 768) - w.double()))


@pytest.mark.parametrize("on_input", [0, 1])
def test_13_ia3_of_linear_layers_and_convolutions(tmp_path, on_input):
    w, c = rand(16, 768, seed=9, scale=1), rand(8, 4, 3, 3, seed=10, scale=1)
    factors = {
        SD1_K: rand(768 if on_input else 16, seed=1),
        CONV: rand(1, 4 if on_input else 8, 1, 1, seed=2),
    }
    tensors = {f"{layer}.weight": factor for layer, factor in factors.items()}
    tensors |= {f"{layer}.on_input": torch.tensor(on_input) for layer in factors}
    base = base_model(tmp_path, {LDM_K: w, LDM_CONV: c})
    weights, _, _ = merged(tmp_path, tensors, base=base, metadata=SD1)
    linear = w.double() * factors[SD1_K].double().reshape([1, -1] if on_input else [-1, 1])
    conv = c.double() * factors[CONV].double().reshape([1, -1, 1, 1] if on_input else [-1, 1, 1, 1])
    assert_close(weights[SD1_K], 0.5 * linear)
    assert_close(weights[CONV], 0.5 * conv.flatten(1))


def test_14_full_differences_biases_and_norms_beside_lora_in_one_file(tmp_path):
    norm = SD1_K.replace("attn2_to_k", "norm1")
    tensors = {
        **lora(SD1_K),
        f"{SD1_K}.diff_b": rand(16, seed=5),
        f"{Q}.diff": rand(16, 16, seed=6),
        f"{Q}.diff_b": rand(16, seed=7),
        f"{norm}.w_norm": rand(16, seed=8),
        f"{norm}.b_norm": rand(16, seed=9),
    }
    weights, biases, report = merged(tmp_path, tensors)
    assert_close(weights[SD1_K], 0.5 * product(tensors, SD1_K))
    assert_close(weights[Q], 0.5 * tensors[f"{Q}.diff"])
    assert_close(weights[norm], 0.5 * tensors[f"{norm}.w_norm"])
    for layer, slot in ((SD1_K, "diff_b"), (Q, "diff_b"), (norm, "b_norm")):
        assert_close(biases[layer], 0.5 * tensors[f"{layer}.{slot}"])
    assert any("bias" in text and "ignore it: A1111." in text for text in report.warnings)


def test_14_a_bias_alone_is_kept_in_a_way_that_a1111_loads(tmp_path):
    """A1111 refuses a whole file over a lone diff_b, so the layer gets empty factors where its width is known."""
    tensors = {**lora(SD1_K), f"{Q}.diff_b": rand(16, seed=5)}
    save(tmp_path / "b.safetensors", lora(Q, in_=16))
    save(tmp_path / "a.safetensors", tensors)
    merge(tmp_path, "a", "b:0.5", out="with")
    weights, biases = written(tmp_path / "with.safetensors")
    assert_close(weights[Q], 0.5 * product(lora(Q, in_=16), Q))
    assert_close(biases[Q], tensors[f"{Q}.diff_b"])
    report = merge(tmp_path, "a:0.5", out="alone")
    weights, biases = written(tmp_path / "alone.safetensors", lone_bias=True)
    assert_close(biases[Q], 0.5 * tensors[f"{Q}.diff_b"])
    assert Q not in weights
    assert any("bias" in text and "refuse the whole file: A1111." in text for text in report.warnings)


def test_14_biases_are_spelled_as_peft_does_in_the_diffusers_dialect(tmp_path):
    tensors = {**lora(SD1_K), f"{SD1_K}.diff_b": rand(16, seed=5)}
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    weights, biases, _ = merged(tmp_path, tensors, dialect="diffusers", out="there")
    assert load_file(tmp_path / "there.safetensors").keys() == {
        f"{path}.lora_A.weight", f"{path}.lora_B.weight", f"{path}.lora_B.bias",
    }  # fmt: skip
    merge(tmp_path, "there", out="back")
    for got in (biases[path], written(tmp_path / "back.safetensors")[1][SD1_K]):
        assert_close(got, 0.5 * tensors[f"{SD1_K}.diff_b"])
    assert_close(weights[path], 0.5 * product(tensors, SD1_K))


def test_14_a_bias_alone_is_complete_with_the_width_that_the_base_model_tells(tmp_path):
    tensors = {**lora(SD1_K), f"{Q}.diff_b": rand(16, seed=5)}
    base = base_model(tmp_path, {LDM_K.replace("attn2.to_k", "attn1.to_q"): rand(16, 16)})
    weights, biases, _ = merged(tmp_path, tensors, base=base)
    assert not weights[Q].any()
    assert_close(biases[Q], 0.5 * tensors[f"{Q}.diff_b"])


def test_14_a_lone_w_norm_gets_the_b_norm_that_a1111_needs(tmp_path):
    norm = SD1_K.replace("attn2_to_k", "norm1")
    merged(tmp_path, {**lora(SD1_K), f"{norm}.w_norm": rand(16)})
    assert load_file(tmp_path / "out.safetensors")[f"{norm}.b_norm"].eq(0).all()


@pytest.mark.parametrize("twin", [
    (SD1_K, "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k", 768),
    ("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1", 768),
])  # fmt: skip
def test_15_one_layer_under_two_names_is_refused_with_both(tmp_path, twin):
    first, second, in_ = twin
    save(tmp_path / "a.safetensors", {**lora(SD1_K), **lora(first, in_=in_), **lora(second, in_=in_, seed=7)})
    with pytest.raises(IncompatibleError) as caught:
        plan(tmp_path, "a")
    assert first in str(caught.value)
    assert second in str(caught.value)
    assert "a.safetensors" in str(caught.value)


def test_16_sdxl_in_diffusers_names_is_written_in_those_that_a1111_finds(tmp_path):
    names = {
        "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": "input_blocks_4_1_transformer_blocks_0_attn2_to_k",
        "add_embedding_linear_1": "label_emb_0_0",
        "add_embedding_linear_2": "label_emb_0_2",
        "time_embedding_linear_1": "time_embed_0",
    }
    tensors = {}
    for name in names:
        tensors |= lora(f"lora_unet_{name}", in_=2048 if "to_k" in name else 12)
    up = "lora_unet_up_blocks_0_upsamplers_0_conv"
    tensors |= {f"{up}.lora_up.weight": rand(4, 2, 1, 1), f"{up}.lora_down.weight": rand(2, 4, 3, 3)}
    weights, _, _ = merged(tmp_path, tensors)
    assert weights.keys() == {f"lora_unet_{ldm}" for ldm in names.values()} | {
        "lora_unet_output_blocks_2_2_conv"
    }
    for name, ldm in names.items():
        assert_close(weights[f"lora_unet_{ldm}"], 0.5 * product(tensors, f"lora_unet_{name}"))


def test_17_sd1_with_lora_te1_and_sd2_is_not_sd1(tmp_path):
    te = "text_model_encoder_layers_0_mlp_fc1"
    weights, _, _ = merged(tmp_path, {**lora(SD1_K), **lora(f"lora_te1_{te}")})
    assert weights.keys() == {SD1_K, f"lora_te_{te}"}
    save(tmp_path / "v2.safetensors", {
        **lora(SD1_K, in_=1024), **lora("lora_te_text_model_encoder_layers_22_mlp_fc1", in_=1024),
    })  # fmt: skip
    assert open_source(tmp_path / "v2.safetensors").architecture.id == "sd2"
    with pytest.raises(IncompatibleError, match=r"Stable Diffusion 1.*Stable Diffusion 2"):
        plan(tmp_path, "a", "v2")
    report = merge(tmp_path, "v2", out="two")
    assert report.base_model == "Stable Diffusion 2"
    assert metadata_of(tmp_path / "two.safetensors")["ss_v2"] == "True"


def test_18_the_refiner_is_a_base_model_of_its_own(tmp_path):
    tensors = {
        **lora("lora_unet_input_blocks_4_1_transformer_blocks_3_attn2_to_k", in_=1280),
        **lora("lora_te_text_model_encoder_layers_31_mlp_fc1", in_=1280),
    }
    weights, _, report = merged(tmp_path, tensors)
    assert "refiner" in report.base_model
    assert len(weights) == 2
    assert metadata_of(tmp_path / "out.safetensors")["ss_base_model_version"].startswith("sdxl_refiner")


def test_19_a_control_adapter_of_bfl_names_what_cannot_be_merged(tmp_path):
    """Flux in all its dialects: test_formats_dialects."""
    tensors = {
        "double_blocks.0.img_attn.qkv.lora_B.weight": rand(48, 2),
        "double_blocks.0.img_attn.qkv.lora_A.weight": rand(2, 16),
        "double_blocks.0.img_attn.qkv.lora_B.bias": rand(48),
        "double_blocks.0.img_attn.norm.key_norm.scale": rand(128),
        "single_blocks.0.norm.key_norm.scale": rand(128),
        "img_in.lora_B.weight": rand(16, 2),
        "img_in.lora_A.weight": rand(2, 128),
        "img_in.lora_B.bias": rand(16),
    }
    save(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UnsupportedError, match=r"a\.safetensors.*key_norm.*replaces.*2 more layers"):
        plan(tmp_path, "a")
    weights, biases, report = merged(tmp_path, tensors, skip_unsupported=True)
    assert weights.keys() == {"lora_unet_double_blocks_0_img_attn_qkv"}
    assert_close(
        biases["lora_unet_double_blocks_0_img_attn_qkv"],
        0.5 * tensors["double_blocks.0.img_attn.qkv.lora_B.bias"],
    )
    assert len(report.skipped) == 3
    assert any("img_in" in text and "wider" in text for text in report.skipped)


def test_19_the_wider_img_in_of_a_control_adapter_does_not_merge_with_an_ordinary_one(tmp_path):
    layers = {"a": 128, "b": 64}
    for name, in_ in layers.items():
        save(tmp_path / f"{name}.safetensors", {
            **lora("lora_unet_double_blocks_0_img_mod_lin", 24, 16), **lora("lora_unet_img_in", 16, in_),
        })  # fmt: skip
    with pytest.raises(IncompatibleError, match=r"img_in.*16 x 128.*16 x 64"):
        plan(tmp_path, "a", "b")


def test_20_models_that_share_names_are_distinguished(tmp_path):
    qkv = "lora_unet_double_blocks_0_img_attn_qkv"
    cases = {
        "flux1": (lora(qkv, 9216, 3072), {}),
        "chroma": (lora(qkv, 9216, 3072), {"ss_base_model_version": "chroma"}),
        "flux2": ({**lora(qkv, 18432, 6144), **lora("lora_unet_single_blocks_47_linear2", 6144, 24576)}, {}),
        "lumina2": (lora("lora_unet_layers_0_attention_qkv", 3840, 2304), {}),
        "zimage": (lora("lora_unet_layers_0_attention_qkv", 11520, 3840), {}),
    }
    for name, (tensors, metadata) in cases.items():
        save(tmp_path / f"{name}.safetensors", tensors, metadata)
        assert open_source(tmp_path / f"{name}.safetensors").architecture.id == name
    with pytest.raises(IncompatibleError, match=r"Flux\.2.*Chroma"):
        plan(tmp_path, "flux2", "chroma")
    # The first one's layers are Chroma's too.
    assert plan(tmp_path, "flux1", "chroma").architecture.id == "chroma"


def test_21_split_qkv_files_of_kohya_scale_by_all_three_ranks(tmp_path):
    """Beside a file of another dialect: test_formats_dialects."""
    layer = "lora_unet_double_blocks_0_img_attn_qkv"
    up, down = torch.block_diag(*(rand(16, 2, seed=n) for n in range(3))), rand(6, 16)
    tensors = {
        f"{layer}.lora_up.weight": up,
        f"{layer}.lora_down.weight": down,
        f"{layer}.alpha": torch.tensor(2.0),
    }
    weights, _, _ = merged(tmp_path, tensors)
    assert_close(weights[layer], 0.5 / 3 * product(tensors, layer))


@pytest.mark.parametrize("ending", [
    "lora_{}.default.weight", "lora_{}.my-adapter_2.weight", "lora_{}", "lora_{}.weight",
])  # fmt: skip
def test_22_adapter_names_and_missing_weights_in_keys(tmp_path, ending):
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    plain = lora(SD1_K)
    up, down = plain.values()
    weights, _, _ = merged(
        tmp_path, {f"{path}.{ending.format('B')}": up, f"{path}.{ending.format('A')}": down}
    )
    assert_close(weights[SD1_K], 0.5 * product(plain, SD1_K))


@pytest.mark.parametrize(("start", "model"), [
    ("diffusion_model_", "sd1"), ("model_diffusion_model_", "sd1"), ("LORA_UNET_", "sd1"),
    ("lora_unet__orig_mod_", "sd1"), ("lora_unet__", "wan"),
])  # fmt: skip
def test_23_odd_beginnings(tmp_path, start, model):
    path = SD1_K.removeprefix("lora_unet_") if model == "sd1" else "blocks_0_self_attn_q"
    in_ = 768 if model == "sd1" else 1536
    tensors = lora(f"{start}{path.upper() if start.isupper() else path}", in_=in_)
    if model == "wan":
        tensors |= lora(f"{start}blocks_0_ffn_0", in_=1536)
    weights, _, _ = merged(tmp_path, tensors)
    assert f"lora_unet_{path}" in weights
    assert open_source(tmp_path / "a.safetensors").architecture.id == model


def test_24_embeddings_are_united_and_the_first_of_one_name_wins(tmp_path):
    star = "bundle_emb.style.string_to_param.*"
    save(tmp_path / "a.safetensors", {**lora(SD1_K), star: rand(2, 768, seed=1)})
    more = {f"bundle_emb.word{n}.string_to_param.*": rand(1, 768, seed=n) for n in range(12)}
    save(tmp_path / "b.safetensors", {**lora(SD1_K), star: rand(3, 768, seed=2), **more})
    report = merge(tmp_path, "a:0.3", "b:0.6")
    got = load_file(tmp_path / "out.safetensors")
    assert torch.equal(got[star], rand(2, 768, seed=1))
    assert all(torch.equal(got[key], tensor) for key, tensor in more.items())
    assert any("style" in text and "first" in text for text in report.warnings)
    assert any("13" in text and "Forge" in text for text in report.warnings)


def test_25_scale_scalar_and_residuals_follow_the_webuis_and_are_reported(tmp_path):
    tensors = lora(SD1_K)
    plain = product(tensors, SD1_K)
    base = {**tensors, f"{SD1_K}.alpha": torch.tensor(1.0)}
    dense = rand(16, 768, seed=3)
    indices = torch.tensor([[0, 3, 3], [5, 1, 700]], dtype=torch.int16)
    values = torch.tensor([1.0, -2.0, 0.5])
    sparse = torch.zeros(16, 768).double()
    sparse[indices[0].long(), indices[1].long()] = values.double()
    cases = {
        "scale": ({"scale": torch.tensor(3.0)}, 3 * plain),
        "scalar": ({"scalar": torch.tensor(7.0)}, 0.5 * plain),
        "residual": ({"bias": dense}, 0.5 * (plain + dense.double())),
        "sparse": (
            {
                "bias_indices": indices,
                "bias_values": values,
                "bias_size": torch.tensor([16, 768], dtype=torch.int16),
            },
            0.5 * (plain + sparse),
        ),
    }
    for name, (extra, wanted) in cases.items():
        save(
            tmp_path / f"{name}.safetensors", {**base, **{f"{SD1_K}.{slot}": t for slot, t in extra.items()}}
        )
        report = merge(tmp_path, f"{name}:0.5", out=f"{name}_out")
        assert_close(written(tmp_path / f"{name}_out.safetensors")[0][SD1_K], 0.5 * wanted)
        assert report.warnings, name


def test_25_a_tensor_nobody_knows_stops_the_merge_or_is_listed(tmp_path):
    tensors = {**lora(SD1_K), "lora_unet_down_blocks_0.strange_thing": rand(3)}
    save(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UnknownKeyError, match=r"a\.safetensors.*strange_thing.*--skip-unsupported"):
        plan(tmp_path, "a")
    _, _, report = merged(tmp_path, tensors, skip_unsupported=True)
    assert any("strange_thing" in text for text in report.skipped)
    shape = {**lora(SD1_K), f"{SD1_K}.reshape_weight": torch.tensor([16, 1536])}
    save(tmp_path / "b.safetensors", shape)
    with pytest.raises(UnsupportedError, match="reshape_weight"):
        plan(tmp_path, "b")


def test_26_mixed_dtypes_tiny_numbers_and_empty_layers(tmp_path):
    v = Q.replace("to_q", "to_v")
    tensors = {**lora(SD1_K), **lora(Q, in_=16), **lora(v, in_=16)}
    tensors[f"{SD1_K}.lora_up.weight"] = tensors[f"{SD1_K}.lora_up.weight"].to(torch.float8_e4m3fn)
    tensors[f"{SD1_K}.lora_down.weight"] = tensors[f"{SD1_K}.lora_down.weight"].bfloat16()
    tensors[f"{Q}.lora_up.weight"] = (tensors[f"{Q}.lora_up.weight"] * 1e-6).half()  # subnormal in float16
    tensors[f"{v}.lora_up.weight"] = torch.zeros(16, 2)
    weights, _, report = merged(tmp_path, tensors)
    assert weights.keys() == {SD1_K, Q}
    for layer in weights:
        pair = {key: tensor.float() for key, tensor in tensors.items()}
        assert_close(weights[layer], 0.5 * product(pair, layer))
    assert report.layers_left_out == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["up", "down"])
def test_26_broken_numbers_are_named(tmp_path, bad, side):
    tensors = lora(SD1_K)
    tensors[f"{SD1_K}.lora_{side}.weight"][1, 1] = bad
    with pytest.raises(LoraMergeError, match=rf"a\.safetensors.*lora_{side}"):
        merged(tmp_path, tensors)
    assert not (tmp_path / "out.safetensors").exists()


def _header(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


WHOLE = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
DAMAGED = {
    "empty": (b"", "empty"),
    "metadata alone": (_header({"__metadata__": {"a": "b"}}), "no tensors|metadata"),
    "huge header": ((200_000_000).to_bytes(8, "little") + b"{" * 64, "header|damaged"),
    "truncated": (_header(WHOLE) + b"\0\0", "truncated|incomplete|shorter|download"),
    "trailing bytes": (_header(WHOLE) + b"\0" * 9, "more|trailing|longer|after"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git-lfs"),
    "web page": (b"<!DOCTYPE html><html><body>Log in</body></html>", "web page"),
    "picture": (b"\x89PNG\r\n\x1a\n" + b"\0" * 64, "PNG"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_27_a_file_that_is_damaged_or_something_else_is_called_what_it_is(tmp_path, case):
    content, told = DAMAGED[case]
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(LoraMergeError, match=rf"(?i)a\.safetensors.*({told})"):
        plan(tmp_path, "a")


class _Malicious:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_28_pickles_are_read_without_running_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = lora(SD1_K)
    torch.save({"state_dict": tensors}, tmp_path / "a.pt")
    merge(tmp_path, "a:0.5")
    assert_close(written(tmp_path / "out.safetensors")[0][SD1_K], 0.5 * product(tensors, SD1_K))
    for name in ("bad.pt", "worse.ckpt"):
        (tmp_path / name).write_bytes(pickle.dumps({"state_dict": {"x": _Malicious()}}))
        with pytest.raises(LoraMergeError, match=name):
            plan(tmp_path, name.split(".")[0])
    assert not (tmp_path / "ran").exists()


def test_28_numbered_files_are_named_by_their_order(tmp_path):
    """All 192 layers: test_dialects_cloneofsimo."""
    path = "text_model.encoder.layers.{}.self_attn.{}_proj"
    order = [path.format(n, leaf) for n in range(12) for leaf in ("k", "v", "q", "out")]
    tensors = {}
    for number in range(48):
        tensors[f"text_encoder:{number}:up"] = rand(768, 1, seed=number)
        tensors[f"text_encoder:{number}:down"] = rand(1, 768, seed=number + 100)
    weights, _, _ = merged(tmp_path, tensors)
    for number in (0, 1, 2, 3, 47):
        wanted = (
            tensors[f"text_encoder:{number}:up"].double() @ tensors[f"text_encoder:{number}:down"].double()
        )
        assert_close(weights["lora_te_" + order[number].replace(".", "_")], 0.5 * wanted)


OTHERS = {
    "checkpoint": {"model.diffusion_model.input_blocks.0.0.weight": rand(4, 4, 3, 3), "first_stage_model.x.weight": rand(4)},
    "VAE": {"encoder.conv_in.weight": rand(4, 3, 3, 3), "decoder.conv_in.weight": rand(4, 4, 3, 3)},
    "embedding": {"emb_params": rand(2, 768)},
    "LLLite": {"lllite_unet_down_blocks_0_x.conditioning1.0.weight": rand(4, 4)},
    "IP-Adapter": {"ip_adapter.1.to_k_ip.weight": rand(4, 4), "image_proj.proj.weight": rand(4, 4)},
    "T-LoRA": {f"{SD1_K}.q_layer.weight": rand(4, 4), f"{SD1_K}.p_layer.weight": rand(4, 4), f"{SD1_K}.lambda_layer": rand(1, 4)},
    "VeRA": {"base_model.model.x.vera_lambda_b": rand(4), "base_model.model.x.vera_lambda_d": rand(4)},
    "OFT": {"base_model.model.x.oft_R.weight": rand(4, 6)},
    "ControlNet": {"control_model.input_blocks.0.0.weight": rand(4, 4, 3, 3)},
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_29_what_is_no_lora_is_refused_by_its_name(tmp_path, kind):
    save(tmp_path / "a.safetensors", OTHERS[kind])
    with pytest.raises(LoraMergeError, match=rf"(?i)a\.safetensors.*{kind}"):
        plan(tmp_path, "a")


def test_30_a_lora_of_an_inpainting_model_does_not_merge_with_an_ordinary_one(tmp_path):
    for name, in_ in (("inpaint", 9), ("plain", 4)):
        save(tmp_path / f"{name}.safetensors", {
            **lora(SD1_K), "lora_unet_conv_in.lora_up.weight": rand(8, 2, 1, 1),
            "lora_unet_conv_in.lora_down.weight": rand(2, in_, 3, 3),
        })  # fmt: skip
    with pytest.raises(IncompatibleError, match=r"input_blocks_0_0.*8 x 9.*8 x 4.*inpainting"):
        plan(tmp_path, "inpaint", "plain")
    merge(tmp_path, "inpaint", out="alone")
    assert load_file(tmp_path / "alone.safetensors")["lora_unet_conv_in.lora_down.weight"].shape == (
        2,
        9,
        3,
        3,
    )


def test_30_names_of_any_language_equal_stems_and_a_result_over_its_own_source(tmp_path):
    tensors = lora(SD1_K)
    long = "長い名前" * 15
    for name in (long, "Ünïcödé ✨", "sub/twin", "other/twin"):
        save(tmp_path / f"{name}.safetensors", tensors)
    merge(tmp_path, f"{long}:0.5", "Ünïcödé ✨:0.25", "sub/twin:0.25", out="結果")
    assert_close(written(tmp_path / "結果.safetensors")[0][SD1_K], product(tensors, SD1_K))
    with pytest.raises(LoraMergeError, match=r"twin.*(sub/twin|other/twin)"):
        plan(tmp_path, "twin")
    # Not even where overwriting is allowed: the result would take the place of what it was made from.
    from lib_loramerge.merge import run_merge

    target = tmp_path / "sub" / "twin.safetensors"
    before = target.read_bytes()
    with pytest.raises(LoraMergeError, match=r"twin\.safetensors is one of the LoRAs being merged"):
        run_merge(plan(tmp_path, "sub/twin:0.5"), target, overwrite=True)
    assert target.read_bytes() == before
