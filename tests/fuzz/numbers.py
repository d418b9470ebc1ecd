# ruff: noqa: E501
"""Merges of small LoRAs with numbers that are hard to compute with, each judged by a dense sum in long double.

    python -m tests.fuzz.numbers --minutes 60 [--seed 1]   for an hour; a minute is enough before a commit
    python -m tests.fuzz.numbers --only 12345              one case again, with what it was made of

Factors of 1e-300 to 1e300, subnormal ones, inputs that cancel to the last digits, one file twice, extreme
alphas, every type of number, LoRA, LoHa, LoKr and full differences, every mode, rank rule and output type. A
merge has to end with a file or a sentence (LoraMergeError). For the exact modes the distance of the file from
the sum is computed anew from the tensors as written, and has to be what the report states, or no more than that
where the report says "at most".
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib_loramerge.errors import LoraMergeError
from lib_loramerge.methods import METHODS
from tests.helpers import format_files as ff

WIDE = np.longdouble
Dense = dict[str, np.ndarray]
_BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
LAYERS = {f"{_BLOCK}_attn1_to_q": (24, 16), f"{_BLOCK}_attn2_to_k": (20, 768), f"{_BLOCK}_ff_net_2": (48, 80)}
METADATA = {"ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora", "ss_v2": "False"}
SIZES = (1.0, 1.0, 1.0, 1e-4, 1e4, 1e8, 1e12, 1e-12, 1e18, 1e25, 1e-25, 1e-40)
EXTREME = (1e150, 1e-150, 1e300, 1e-300)
# How far a stated error may be off: by a part of itself, and by a part of the norm that is lost in float64.
RELATIVE, ABSOLUTE = 0.03, 3e-9


@dataclass
class Case:
    """A merge, and the float64 deltas of its inputs.

    Attributes:
        files: Name to tensors.
        weights: Input, ``name:strength``.
        fields: Of the recipe.
        exact: Layer to the weighted sum, in long double.
    """

    files: dict[str, dict[str, Tensor]]
    weights: list[tuple[str, float]]
    fields: dict[str, Any]
    exact: Dense
    told: str


def case(seed: int) -> Case:
    """The case of a number, the same each time."""
    random = np.random.default_rng(seed)
    files: dict[str, dict[str, Tensor]] = {}
    deltas: dict[str, Dense] = {}
    told = []
    for name in "abc"[: random.integers(1, 4)]:
        kind = str(random.choice(["lora", "lora", "lora", "loha", "lokr", "full"]))
        dtype = [torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16][
            random.integers(5)
        ]
        files[name], deltas[name] = _file(random, kind, dtype)
        told.append(f"{name}: {kind} {dtype}")
    names = list(files)
    relation = str(random.choice(["none", "none", "none", "twice", "scaled", "near", "gauge"]))
    if relation != "none":
        files["d"], deltas["d"] = _related(random, relation, files["a"], deltas["a"])
        names.append("d")
        told.append(f"d: {relation}")
    weights = [(name, float(random.choice([1.0, 1.0, 0.7, -0.5, 2.0, 1e-3, 1000.0]))) for name in names]
    if relation != "none":
        off = float(random.choice([0.0, 1e-3, 1e-6, 1e-9]))
        weights[-1] = ("d", -weights[0][1] * (1 + off))
        if random.random() < 0.3:
            weights = [weights[0], weights[-1]]
    mode = str(random.choice(["svd"] * 8 + ["concat"] * 3 + sorted(METHODS)))
    if METHODS[mode].maximum and len(weights) > 2:
        weights = weights[:2]
    fields: dict[str, Any] = {"mode": mode, "dtype": str(random.choice(["float32", "float16", "bfloat16"]))}
    if METHODS[mode].uses_rank:
        fields |= [{"rank": "full"}, {"rank": 4}, {"retain": 0.9}, {}, {"size": 0.02}][random.integers(5)]
    exact = {layer: _sum([(weight, deltas[name][layer]) for name, weight in weights]) for layer in LAYERS}
    return Case(files, weights, fields, exact, "; ".join(told))


def _sum(parts: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """The weighted sum; the same delta twice counts once, or it would drown the others' digits."""
    once: list[tuple[float, np.ndarray]] = []
    for weight, delta in parts:
        same = next((place for place, (_, other) in enumerate(once) if np.array_equal(other, delta)), None)
        if same is None:
            once.append((weight, delta))
        else:
            once[same] = (math.fsum([once[same][0], weight]), delta)
    return sum((WIDE(weight) * delta for weight, delta in once if weight), WIDE(0) * parts[0][1])


def _file(random: np.random.Generator, kind: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], Dense]:
    tensors: dict[str, Tensor] = {}
    for layer, (out, in_) in LAYERS.items():
        rank = int(random.integers(1, 9))
        slots = {
            "lora": {"lora_up.weight": (out, rank), "lora_down.weight": (rank, in_)},
            "loha": {
                "hada_w1_a": (out, 2),
                "hada_w1_b": (2, in_),
                "hada_w2_a": (out, 3),
                "hada_w2_b": (3, in_),
            },
            "lokr": {"lokr_w1": (4, 4), "lokr_w2": (out // 4, in_ // 4)},
            "full": {"diff": (out, in_)},
        }[kind]
        sizes = SIZES + EXTREME if dtype == torch.float64 else SIZES
        for slot, shape in slots.items():
            size = random.choice(sizes) if random.random() < 0.3 else 1.0
            numbers = torch.from_numpy(random.standard_normal(shape)) * (0.2 * float(size))
            limit = torch.finfo(dtype).max / 4
            tensors[f"{layer}.{slot}"] = numbers.clamp(-limit, limit).to(dtype)
        if kind != "full" and random.random() < 0.5:
            alpha = float(random.choice([1.0, 4.0, 1e-3, 0.5, 1e-30, 1e30, -2.0, 0.0]))
            tensors[f"{layer}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return tensors, dense(tensors)


def _related(
    random: np.random.Generator, relation: str, tensors: dict[str, Tensor], deltas: Dense
) -> tuple[dict[str, Tensor], Dense]:
    """A file that all but cancels with another."""
    made = {key: tensor.clone() for key, tensor in tensors.items()}
    factor = 1 + float(random.choice([1e-2, 1e-4, 1e-6, 1e-8, 2.0**-20]))
    for layer in LAYERS:
        ups = [
            key for key in made if key.startswith(layer) and key.endswith(("up.weight", "w1_a", "w1", "diff"))
        ]
        for key in ups[:1]:
            if relation == "scaled":
                made[key] = (made[key].double() * factor).to(made[key].dtype)
            if relation == "near":
                noise = torch.from_numpy(random.standard_normal(tuple(made[key].shape)))
                made[key] = (made[key].double() * (1 + (factor - 1) * noise)).to(made[key].dtype)
        up, down = f"{layer}.lora_up.weight", f"{layer}.lora_down.weight"
        if relation == "gauge" and up in made:
            rank = made[down].shape[0]
            gauge = torch.eye(rank, dtype=torch.float64) + 0.2 * torch.from_numpy(
                random.standard_normal((rank, rank))
            ) / math.sqrt(rank)
            made[up] = (made[up].double() @ gauge).to(made[up].dtype)
            made[down] = torch.linalg.solve(gauge, made[down].double()).to(made[down].dtype)
    return made, dense(made)


def dense(tensors: dict[str, Tensor]) -> Dense:
    """Layer to its delta by the plain formulas, in long double."""
    found: Dense = {}
    for layer in LAYERS:
        slots = {
            key[len(layer) + 1 :]: tensor.double().numpy().astype(WIDE)
            for key, tensor in tensors.items()
            if key.startswith(f"{layer}.")
        }
        if not slots:
            continue
        if "diff" in slots:
            found[layer] = slots["diff"]
            continue
        alpha = slots.get("alpha")
        if "lora_up.weight" in slots:
            product, rank = (
                slots["lora_up.weight"] @ slots["lora_down.weight"],
                slots["lora_down.weight"].shape[0],
            )
        elif "lokr_w1" in slots:
            product, rank, alpha = np.kron(slots["lokr_w1"], slots["lokr_w2"]), 1, None
        else:
            first, second = (slots[f"hada_w{n}_a"] @ slots[f"hada_w{n}_b"] for n in "12")
            product, rank = first * second, slots["hada_w1_b"].shape[0]
        found[layer] = product if alpha is None else product * (alpha.reshape(()) / rank)
    return found


def failure(number: int, folder: Path) -> str | None:
    """What is wrong with the merge of a case; None where nothing is."""
    made = case(number)
    for name, tensors in made.files.items():
        save_file(
            {key: t.contiguous() for key, t in tensors.items()}, str(folder / f"{name}.safetensors"), METADATA
        )
    inputs = [f"{name}:{weight!r}" for name, weight in made.weights]
    (folder / "out.safetensors").unlink(missing_ok=True)
    try:
        report = ff.merge(folder, *inputs, **{"rank": "same", **made.fields})
        json.dumps(report.to_json(), allow_nan=False)
        report.to_text()
    except LoraMergeError:
        return None
    except Exception:
        return traceback.format_exc(limit=-4)
    written = load_file(str(folder / "out.safetensors"))
    if not all(bool(tensor.isfinite().all()) for tensor in written.values()):
        return "numbers in the file are not finite"
    if made.fields["mode"] not in ("svd", "concat"):
        return None
    true, stated = distance(dense(written), made.exact), report.error
    if not stated >= true * (1 - RELATIVE) - ABSOLUTE:
        return f"states {stated:.4g} where {true:.4g} is true"
    if not (report.error_at_most or stated <= true * (1 + RELATIVE) + ABSOLUTE):
        return f"states {stated:.4g} where only {true:.4g} is true"
    return None


def distance(got: Dense, exact: Dense) -> float:
    """Relative Frobenius distance over the file."""
    wrong = size = WIDE(0)
    for layer, wanted in exact.items():
        difference = wanted - got[layer].reshape(wanted.shape) if layer in got else wanted
        wrong += np.square(difference).sum()
        size += np.square(wanted).sum()
    return float(np.sqrt(wrong / size)) if size > 0 else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="one case, told in full")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.only is not None:
            made = case(options.only)
            print(made.told, made.weights, made.fields)
            print(failure(options.only, folder) or "nothing is wrong")
            return 0
        end, number, bad = time.monotonic() + 60 * options.minutes, options.seed, 0
        while time.monotonic() < end:
            wrong = failure(number, folder)
            if wrong:
                bad += 1
                print(f"case {number}: {wrong}", flush=True)
            number += 1
    print(f"{number - options.seed} cases, {bad} of them wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
