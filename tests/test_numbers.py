# ruff: noqa: E501
"""Numbers that are hard to compute with: sums that cancel, and factors far from 1. Judged in long double."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lib_loramerge.delta import LowRank, cut_layer, decompose, round_cut, stack
from lib_loramerge.errors import LoraMergeError
from tests.fuzz import numbers
from tests.helpers import format_files as ff
from tests.helpers import golden

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (48, 80, 8),
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k": (40, 24, 16),
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (32, 768, 4),
}


def lora(seed: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> dict[str, torch.Tensor]:
    random = np.random.default_rng(seed)
    tensors = {}
    for layer, (out, in_, rank) in LAYERS.items():
        up, down = random.standard_normal((out, rank)), random.standard_normal((rank, in_))
        tensors[f"{layer}.lora_up.weight"] = (torch.from_numpy(up) * scale).to(dtype)
        tensors[f"{layer}.lora_down.weight"] = torch.from_numpy(down).to(dtype)
    return tensors


def dense(tensors) -> dict[str, np.ndarray]:
    """Layer as the inputs spell it to its delta in long double."""
    found = {}
    for layer in LAYERS:
        if f"{layer}.lora_up.weight" not in tensors:
            continue
        up, down = (
            tensors[f"{layer}.lora_{side}.weight"].double().numpy().astype(np.longdouble)
            for side in ("up", "down")
        )
        alpha = tensors.get(f"{layer}.alpha")
        found[layer] = up @ down * (1 if alpha is None else np.longdouble(float(alpha)) / down.shape[0])
    return found


def true_error(folder: Path, exact: dict[str, np.ndarray]) -> float:
    return numbers.distance(dense(load_file(str(folder / "out.safetensors"))), exact)


def changed(tensors, factor: float, noise: dict | None = None):
    """Every up factor multiplied, or a multiple of another file's added to it."""
    made = dict(tensors)
    for key in tensors:
        if key.endswith("up.weight"):
            made[key] = tensors[key] * factor if noise is None else tensors[key] + factor * noise[key]
    return made


@pytest.mark.parametrize("rank", ["full", 4])
@pytest.mark.parametrize("case", ["a multiple", "a small change", "large strengths"])
def test_the_stated_error_is_true_where_little_is_left_of_the_inputs(tmp_path, case, rank):
    a, b = lora(1), lora(2)
    exact = dense(a)
    if case == "a multiple":
        second, weights = changed(a, 1 + 1e-6), (1.0, -1.0)
    elif case == "a small change":
        second, weights = changed(a, 1e-6, b), (1.0, -1.0)
    else:
        second, weights = a, (1000.0, -999.999)
    ff.save(tmp_path / "a.safetensors", a)
    ff.save(tmp_path / "second.safetensors", second)
    ff.save(tmp_path / "b.safetensors", b)
    other = dense(second)
    inputs = [f"a:{weights[0]}", f"second:{weights[1]}"]
    exact = {
        layer: np.longdouble(weights[0]) * exact[layer] + np.longdouble(weights[1]) * other[layer]
        for layer in exact
    }
    if case == "large strengths":
        exact = {layer: exact[layer] + np.longdouble(0.001) * delta for layer, delta in dense(b).items()}
        inputs.append("b:0.001")
    report = ff.merge(tmp_path, *inputs, rank=rank)
    true = true_error(tmp_path, exact)
    assert report.error == pytest.approx(true, rel=0.02, abs=3e-9)
    assert not report.error_at_most
    if rank == "full":
        assert true < 1e-6


def test_a_lora_taken_from_itself_leaves_the_difference_of_the_strengths(tmp_path):
    a = lora(1, torch.float16)
    ff.save(tmp_path / "a.safetensors", a)
    ff.save(tmp_path / "copy.safetensors", a)
    report = ff.merge(tmp_path, "a:1", "copy:-0.999999999")
    exact = {
        layer: (np.longdouble(1) - np.longdouble(0.999999999)) * delta for layer, delta in dense(a).items()
    }
    assert true_error(tmp_path, exact) < 1e-6
    assert report.error < 1e-6
    assert max(report.ranks) <= 16  # the ranks of one, not of both


@pytest.mark.parametrize("kind", ["factors", "a whole difference"])
def test_where_float64_does_not_resolve_what_is_left_the_error_is_an_upper_bound(tmp_path, kind):
    """The same delta of 2^100 by other factors: only rounding is left of the two, which drowns a third."""
    a, b = lora(1, torch.bfloat16), lora(2, torch.float32)
    layer, (_, _, rank) = next(iter(LAYERS.items()))
    up, down = f"{layer}.lora_up.weight", f"{layer}.lora_down.weight"
    a = {up: a[up].double() * 2.0**100, down: a[down].double()}
    gauge = torch.eye(rank, dtype=torch.float64) + torch.eye(rank, dtype=torch.float64).roll(1, 1).triu()
    other = {
        up: a[up] @ gauge,
        down: torch.linalg.inv(gauge) @ a[down],
    }  # small whole numbers: no digit is lost
    exact = dense(b)
    if kind == "a whole difference":
        whole = dense(b)[layer].astype(np.float32)
        exact[layer] += whole - dense(b)[layer]
        b = {key: tensor for key, tensor in b.items() if not key.startswith(layer)}
        b[f"{layer}.diff"] = torch.from_numpy(whole)
    for name, tensors in (("a", a), ("other", other), ("b", b)):
        ff.save(tmp_path / f"{name}.safetensors", tensors)
    report = ff.merge(tmp_path, "a", "other:-1", "b", rank="full")
    assert report.error_at_most
    assert report.to_json()["error_at_most"]
    assert report.error >= true_error(tmp_path, exact)
    assert "at most" in report.to_text()
    assert any(f"In 1 of {len(LAYERS)} layers" in text for text in report.warnings)


def test_what_cannot_be_distinguished_from_noise_counts_as_error():
    """Two inputs that differ in the last digits of float32 alone: nothing is written, and that is not called exact."""
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(48, 8, generator=generator), torch.randn(8, 80, generator=generator)
    delta = stack(
        [LowRank(up, down, 8.0), LowRank(up * (1 + 2e-8), down.double() * (1 + 2e-8), 8.0)], [1.0, -1.0]
    )
    spectrum = decompose(delta)
    size = float(torch.linalg.matrix_norm(delta.dense()))
    assert spectrum.rank == 0
    assert spectrum.tail(0) ** 0.5 == pytest.approx(size, rel=1e-6)
    assert cut_layer(delta, torch.float32) is None


@pytest.mark.parametrize("alpha", [1e-30, 1e-20, 1e25, 1e30])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_extreme_alpha_hides_no_error(tmp_path, alpha, dtype):
    a = lora(1, torch.bfloat16) | {f"{layer}.alpha": torch.tensor(alpha) for layer in LAYERS}
    ff.save(tmp_path / "a.safetensors", a)
    for mode, rank in (("svd", 2), ("svd", "full"), ("concat", "same")):
        (tmp_path / "out.safetensors").unlink(missing_ok=True)
        report = ff.merge(tmp_path, "a:0.7", mode=mode, rank=rank, dtype=dtype)
        exact = {layer: np.longdouble(0.7) * delta for layer, delta in dense(a).items()}
        assert report.error == pytest.approx(true_error(tmp_path, exact), rel=0.02, abs=3e-9), (mode, rank)


@pytest.mark.parametrize("shape", [(20, 768), (768, 20)])
def test_factors_brought_into_range_have_their_true_rounding_error(shape):
    """Float16 holds factors this small only after powers of two went into alpha, unequal ones on either side."""
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(shape[0], 6, generator=generator), torch.randn(6, shape[1], generator=generator)
    delta = LowRank(up * 1e-9, down * 1e-6, 6.0)
    stored = round_cut(decompose(delta), 6, torch.float16)
    distance = float(torch.linalg.matrix_norm(stored.delta().dense() - delta.dense()))
    assert stored.error_sq**0.5 == pytest.approx(distance, rel=0.01)


FAR = {"lora": (1e12, 1e25), "loha": (1e8, 1e12), "lokr": (1e8, 1e25), "full": (1e25,)}


@pytest.mark.parametrize(
    ("kind", "factor"), [(kind, factor) for kind, factors in FAR.items() for factor in factors]
)
@pytest.mark.parametrize("mode", ["ties", "svd", "knots", "sce", "np", "karcher"])
def test_large_numbers_are_merged_as_small_ones_are(tmp_path, kind, factor, mode):
    """All inputs times one power of two give the result times that power."""
    factor = 2.0 ** round(math.log2(factor))
    tensors = golden._kind_file(kind, seed=1, alpha=None)
    first = {"full": "diff", "loha": "hada_w1_a", "lokr": "lokr_w1", "lora": "lora_up.weight"}[kind]
    plain = golden._kind_file("lora", seed=2, alpha=None)
    results = []
    for place, times in enumerate((1.0, factor)):
        large = {key: tensor * (times if key.endswith(first) else 1.0) for key, tensor in tensors.items()}
        other = {key: tensor * (times if key.endswith("up.weight") else 1.0) for key, tensor in plain.items()}
        ff.save(tmp_path / f"kind{place}.safetensors", {k: t for k, t in large.items() if "diff_b" not in k})
        ff.save(tmp_path / f"other{place}.safetensors", other)
        ff.merge(tmp_path, f"kind{place}", f"other{place}:0.5", mode=mode, rank=5, out=f"out{place}")
        results.append(ff.written(tmp_path / f"out{place}.safetensors")[0])
    for layer, delta in results[0].items():
        ff.assert_close(results[1][layer] / factor, delta, 1e-5)


@pytest.mark.parametrize("power", [300, -300])
def test_factors_of_float64_far_from_1_are_their_product(tmp_path, power):
    a = lora(1)
    far = {k: t * (10.0**power if k.endswith("up.weight") else 10.0**-power) for k, t in a.items()}
    ff.save(tmp_path / "a.safetensors", far)
    for fields in ({"rank": "full"}, {"mode": "ties", "density": 1.0}, {"mode": "concat"}):
        params = {"params": {"density": fields.pop("density")}} if "density" in fields else {}
        (tmp_path / "out.safetensors").unlink(missing_ok=True)
        report = ff.merge(tmp_path, "a", dtype="float32", **fields, **params)
        assert report.error < 1e-3
        assert true_error(tmp_path, dense(a)) == pytest.approx(report.error, rel=0.02, abs=1e-7)


@pytest.mark.parametrize("size", [1e250, 1e-250])
def test_a_delta_that_no_file_can_hold_is_refused_in_words(tmp_path, size):
    ff.save(tmp_path / "a.safetensors", lora(1, scale=size))
    for mode in ("svd", "concat", "ties", "core"):
        with pytest.raises(LoraMergeError, match=r"too (large|small)"):
            ff.merge(tmp_path, "a", mode=mode)


def test_subnormal_factors_are_written_or_counted_as_lost(tmp_path):
    a = lora(1, torch.float32, 1e-41)
    ff.save(tmp_path / "a.safetensors", a)
    for mode in ("svd", "concat"):
        (tmp_path / "out.safetensors").unlink(missing_ok=True)
        report = ff.merge(tmp_path, "a", mode=mode, dtype="float16")
        true = true_error(tmp_path, dense(a))
        assert report.error == pytest.approx(true, rel=0.02)
        assert true < 0.01  # alpha takes the power of two


# Cases that a merge once got wrong: each gives a wrong error, a traceback, or numbers that are not finite.
FOUND = (
    0,
    57,
    129,
    131,
    149,
    154,
    156,
    182,
    186,
    187,
    205,
    221,
    225,
    245,
    248,
    274,
    295,
    306,
    384,
    1155,
    1237,
    1388,
    6334,
    6384,
    9801,
    10246,
    12285,
    13545,
    14195,
    14228,
    16641,
    20802,
    21029,
    21765,
    22116,
    23271,
    24306,
    700780,
)


@pytest.mark.parametrize("number", FOUND)
def test_a_case_that_was_found_by_trying_at_random(tmp_path, number):
    assert numbers.failure(number, tmp_path) is None


def test_the_random_cases_are_judged(tmp_path, monkeypatch):
    """A merge that states another error is seen."""
    honest = ff.merge

    def boasting(*args, **fields):
        report = honest(*args, **fields)
        return type(report)(**{**report.__dict__, "error": report.error / 2})

    monkeypatch.setattr(numbers.ff, "merge", boasting)
    assert "states" in str(numbers.failure(57, tmp_path))


_IN_ANOTHER_PROCESS = """
import json, sys, tempfile
from pathlib import Path
from tests.helpers import golden
with tempfile.TemporaryDirectory() as name:
    golden.make_inputs(Path(name))
    wanted = dict(golden.recipes())
    print(json.dumps({recipe: golden.result(wanted[recipe], Path(name)).layers for recipe in sys.argv[1:]}))
"""


def test_other_kernels_give_the_same_result_within_the_bound_that_the_readme_states():
    """Relative to its norm: 1e-6 in float32, 1e-2 in bfloat16."""
    import json

    bounds = {"svd, rank 3": 1e-6, "ties, rank 3": 1e-6, "mode core": 1e-6, "brain kept": 1e-2}
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", _IN_ANOTHER_PROCESS, *bounds],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    found = json.loads(done.stdout)
    for name, bound in bounds.items():
        wanted = golden.record()["recipes"][name]["layers"]
        assert found[name].keys() == wanted.keys()
        for layer, values in wanted.items():
            assert found[name][layer] == pytest.approx(values, rel=0, abs=bound * values[0]), (name, layer)
