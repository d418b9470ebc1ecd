# ruff: noqa: E501  (tables of names are easier to read one row to a line)
"""Merges whose every bit is written down, so that nothing that is moved about in the code changes a result.

    python -m tests.helpers.golden --renew         writes tests/data/golden.json anew, after a change that is meant
    python -m tests.helpers.golden --show NAME...  prints the tensors and the report of recipes, to compare two versions

Inputs are made of whole numbers divided by powers of two, so they are the same everywhere. Results are not:
torch, its kernels and the processor decide the last bits. The file therefore holds, for each recipe,

- what must be the same everywhere: names, shapes and types of the tensors, and all words of the report,
- numbers that must agree everywhere within a bound: the norm and two projections of each written layer, and
  the numbers of the report,
- SHA-256 of the tensors' bytes and of the report, compared where arithmetic is bit for bit that of the
  machine on which they were taken (:func:`environment`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from lib_loramerge.merge import run_merge
from tests.helpers import format_files as ff
from tests.helpers.dialect_cases import CASES
from tests.helpers.fixtures import sample_data

RECORD = Path(__file__).resolve().parents[1] / "data" / "golden.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# --- Inputs -------------------------------------------------------------------------------

_BLOCK = "down_blocks_0_attentions_0_transformer_blocks_0"
_CHECKPOINT = "model.diffusion_model.input_blocks.1"
# Layer of an SD1 LoRA: its place in a checkpoint, its shape.
LAYERS: dict[str, tuple[str, tuple[int, ...]]] = {
    f"lora_unet_{_BLOCK}_attn1_to_q": (f"{_CHECKPOINT}.1.transformer_blocks.0.attn1.to_q", (24, 36)),
    f"lora_unet_{_BLOCK}_attn1_to_k": (f"{_CHECKPOINT}.1.transformer_blocks.0.attn1.to_k", (24, 36)),
    f"lora_unet_{_BLOCK}_attn2_to_k": (f"{_CHECKPOINT}.1.transformer_blocks.0.attn2.to_k", (24, 768)),
    "lora_unet_down_blocks_0_resnets_0_conv1": (f"{_CHECKPOINT}.0.in_layers.2", (24, 8, 3, 3)),
    "lora_unet_down_blocks_0_attentions_0_proj_in": (f"{_CHECKPOINT}.1.proj_in", (24, 24, 1, 1)),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1",
        (40, 16),
    ),
}
METADATA = {"ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora", "ss_v2": "False"}
Shape = tuple[int, ...]


def numbers(*shape: int, seed: int = 0, scale: float = 0.125) -> Tensor:
    """Float32 numbers that float16 and bfloat16 hold too, the same on every machine."""
    drawn = np.asarray(np.random.RandomState(seed).randint(-127, 128, size=shape), dtype=np.float32)
    return torch.from_numpy(drawn) * (scale / 64)


def _conv(kernel: Shape) -> Shape:
    return (1,) * len(kernel)


# What a kind stores of a layer (out, in, kernel, rank): slot to shape.
KINDS: dict[str, Callable[[int, int, Shape, int], dict[str, Shape]]] = {
    "lora": lambda o, i, k, r: {"lora_up.weight": (o, r, *_conv(k)), "lora_down.weight": (r, i, *k)},
    "tucker": lambda o, i, k, r: {
        "lora_up.weight": (o, r, 1, 1), "lora_mid.weight": (r, r, *(k or (1, 1))), "lora_down.weight": (r, i, 1, 1),
    },
    "loha": lambda o, i, k, r: {
        "hada_w1_a": (o, r), "hada_w1_b": (r, i * math.prod(k)), "hada_w2_a": (o, r), "hada_w2_b": (r, i * math.prod(k)),
    },
    "loha_tucker": lambda o, i, k, r: {
        "hada_t1": (r, r, *(k or (1, 1))), "hada_w1_a": (r, o), "hada_w1_b": (r, i),
        "hada_t2": (r, r, *(k or (1, 1))), "hada_w2_a": (r, o), "hada_w2_b": (r, i),
    },
    "lokr": lambda o, i, k, r: {"lokr_w1": (4, 4), "lokr_w2_a": (o // 4, r), "lokr_w2_b": (r, i // 4 * math.prod(k))},
    "lokr_whole": lambda o, i, k, r: {"lokr_w1": (4, 4), "lokr_w2": (o // 4, i // 4, *k)},
    "lokr_both": lambda o, i, k, r: {
        "lokr_w1_a": (4, 2), "lokr_w1_b": (2, 4), "lokr_w2_a": (o // 4, r), "lokr_w2_b": (r, i // 4 * math.prod(k)),
    },
    "lokr_tucker": lambda o, i, k, r: {
        "lokr_w1": (4, 4), "lokr_t2": (r, r, *(k or (1, 1))), "lokr_w2_a": (r, o // 4), "lokr_w2_b": (r, i // 4),
    },
    "full": lambda o, i, k, r: {"diff": (o, i, *k), "diff_b": (o,)},
    "norm": lambda o, i, k, r: {"w_norm": (o,), "b_norm": (o,)},
    "bias": lambda o, i, k, r: {"lora_up.weight": (o, r, *_conv(k)), "lora_down.weight": (r, i, *k), "diff_b": (o,)},
    "residual": lambda o, i, k, r: {"lora_up.weight": (o, r, *_conv(k)), "lora_down.weight": (r, i, *k), "bias": (o, i, *k)},
    "dora": lambda o, i, k, r: {
        "lora_up.weight": (o, r, *_conv(k)), "lora_down.weight": (r, i, *k), "dora_scale": (o, 1, *_conv(k)),
    },
    "glora": lambda o, i, k, r: {"a1.weight": (i, r), "a2.weight": (r, i), "b1.weight": (o, r), "b2.weight": (r, i, *k)},
    "ia3": lambda o, i, k, r: {"weight": (i,), "on_input": ()},
    "oft": lambda o, i, k, r: {"oft_blocks": (o // 4, 4, 4)},
    "boft": lambda o, i, k, r: {"oft_blocks": (2, o // 4, 4, 4)},
}  # fmt: skip
NEED_BASE = ("dora", "glora", "ia3", "oft", "boft")
_NO_ALPHA = ("full", "norm", "ia3", "oft", "boft")


def _kind_file(kind: str, *, rank: int = 3, seed: int = 0, alpha: float | None = 2.0) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for place, (layer, (_, shape)) in enumerate(LAYERS.items()):
        out, in_, *kernel = shape
        if kind == "glora" and kernel:
            continue
        for slot, size in KINDS[kind](out, in_, tuple(kernel), rank).items():
            tensors[f"{layer}.{slot}"] = numbers(*size, seed=zlib.crc32(f"{seed} {place} {slot}".encode()))
        if f"{layer}.on_input" in tensors:
            tensors[f"{layer}.on_input"] = torch.tensor(1.0)
        if f"{layer}.dora_scale" in tensors:
            tensors[f"{layer}.dora_scale"] = tensors[f"{layer}.dora_scale"].abs() + 1
        if alpha is not None and kind not in _NO_ALPHA:
            tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    return tensors


def make_inputs(folder: Path) -> None:
    """Write all input files that the recipes name."""
    for kind in KINDS:
        ff.save(folder / f"{kind}.safetensors", _kind_file(kind, seed=7), METADATA)
    for seed, (name, rank, dtype) in enumerate(
        (("a", 4, "float32"), ("b", 6, "float32"), ("c", 2, "float32"), ("half", 4, "float16"), ("brain", 4, "bfloat16"))
    ):  # fmt: skip
        tensors = _kind_file("lora", rank=rank, seed=20 + seed, alpha=rank / 2)
        ff.save(
            folder / f"{name}.safetensors", {k: t.to(DTYPES[dtype]) for k, t in tensors.items()}, METADATA
        )
    plain = _kind_file("lora", rank=4, seed=20, alpha=None)
    ff.save(folder / "without_alpha.safetensors", plain, METADATA)
    few = [key for key in plain if "attn2" in key or "_te_" in key]
    ff.save(folder / "few.safetensors", {key: plain[key] for key in few}, METADATA)
    large = {key: tensor * 2.0**20 for key, tensor in plain.items() if "attn" in key}
    ff.save(folder / "large.safetensors", large, METADATA)
    base = {f"{key}.weight": numbers(*shape, seed=3, scale=0.5) for key, shape in LAYERS.values()}
    ff.save(folder / "base.safetensors", base)
    for number, name in enumerate(DIALECTS):
        ff.save(folder / f"dialect{number}.safetensors", _of_shapes(CASES[name][0], seed=number))


def _of_shapes(shapes: Mapping[str, Shape], seed: int) -> dict[str, Tensor]:
    return {
        key: numbers(*shape, seed=seed + place)
        for place, (key, shape) in enumerate(sorted(shapes.items()))
        if "upsamplers" not in key
    }  # a 3 x 3 convolution, of which the list holds no kernel


# Spellings of tests.helpers.dialect_cases; those added there later do not make this record incomplete.
DIALECTS = (
    "kohya SD1", "SD1 with lora_te1_", "SD2", "refiner", "diffusers SDXL", "attention processors", "PEFT under a component",
    "NTC slider", "OneTrainer's raw format", "Flux fused", "Flux split", "Flux of SimpleTuner", "Flux of XLabs",
    "Flux.2 of diffusers", "SD3 of diffusers", "Lumina 2", "Z-Image", "Qwen-Image", "Wan", "Wan of diffusers", "Anima",
    "HunyuanVideo", "Stable Cascade", "a model that nobody knows",
)  # fmt: skip


# --- Recipes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """One merge: inputs as on the command line, and fields of ``MergeRecipe``."""

    inputs: tuple[str, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    base: bool = False
    real: bool = False


PAIR = ("a:0.8", "b:-0.5")
# Modes with the fields that make them differ from their defaults.
MODES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        mode: (mode, {})
        for mode in (
            "svd", "concat", "ties", "dare_linear", "dare_ties", "della", "breadcrumbs", "magnitude_prune", "sce",
            "average", "slerp", "karcher", "knots", "core", "ctm", "tsv", "iso", "np", "ssr",
        )
    },
    "ties, summed": ("ties", {"normalize": False, "density": 0.2}),
    "sce, half": ("sce", {"select_topk": 0.5}),
    "knots, dare_ties": ("knots", {"rule": "dare_ties"}),
    "core, magnitude_prune": ("core", {"rule": "magnitude_prune"}),
    "ctm, ties and balance": ("ctm", {"rule": "ties", "balance": 0.5}),
    "iso, fro": ("iso", {"beta": 0.7, "norm": "fro"}),
}  # fmt: skip
RANKS: dict[str, dict[str, Any]] = {
    "rank 3": {"rank": 3},
    "full": {"rank": "full"},
    "conv rank": {"rank": 5, "conv_rank": 2},
    "retain": {"retain": 0.9},
    "size": {"size": 0.012},
}


def recipes() -> Iterator[tuple[str, Recipe]]:
    """Every recipe with its name."""
    for name, (mode, params) in MODES.items():
        yield f"mode {name}", Recipe(PAIR, {"mode": mode, "params": params, "seed": 5})
    for mode in ("svd", "ties", "knots", "tsv"):
        for rule, fields in RANKS.items():
            if mode != "tsv" or "size" not in fields:
                yield f"{mode}, {rule}", Recipe(PAIR, {"mode": mode, **fields})
    for mode in ("svd", "ties", "core", "np", "karcher"):
        yield f"three, {mode}", Recipe(("a", "b:0.5", "c:2"), {"mode": mode})
    yield "four, ties", Recipe(("a", "b:0.5", "c:2", "half"), {"mode": "ties"})
    yield "add", Recipe(("a:0.8", "half:0.5"), {"mode": "add"})
    for kind in KINDS:
        base = kind in NEED_BASE
        yield f"kind {kind}", Recipe((f"{kind}:0.9",), {"rank": "full"}, base)
        if kind != "norm":
            yield f"kind {kind} and a LoRA", Recipe((f"{kind}:0.9", "a:0.5"), {"rank": 6}, base)
    for kind in ("loha", "lokr_whole", "full"):
        yield f"kind {kind}, ties", Recipe((f"{kind}:0.9", "a:0.5"), {"mode": "ties", "rank": 6})
    for number, name in enumerate(DIALECTS):
        yield f"dialect {name}", Recipe((f"dialect{number}:0.7",), {"rank": 2, "dtype": "float16"})
    for name in ("diffusers SDXL", "Flux split", "Qwen-Image"):
        number = DIALECTS.index(name)
        yield f"{name}, written for diffusers", Recipe((f"dialect{number}:0.7",), {"dialect": "diffusers"})
    for dtype in DTYPES:
        yield f"stored as {dtype}", Recipe(PAIR, {"dtype": dtype})
    for name in ("half", "brain"):
        yield f"{name} kept", Recipe((name, f"{name}:0.5"), {"rank": "full"})
    yield "one alone", Recipe(("without_alpha",))
    yield "one twice", Recipe(("a", "a:0.5"), {"rank": "full"})
    yield "nearly cancelling", Recipe(("a", "a:-0.999", "b:0.001"), {"rank": "full"})
    yield "some layers only", Recipe(("few", "b"))
    yield "large", Recipe(("large", "a"), {"rank": "full"})
    yield "block weights", Recipe(("a:0.8:lbw=0,1,0.5,1,1,1,1,1,1,1,1,1,1,1,1,1,1", "b"))
    yield "own text encoder", Recipe(("a:0.2:1", "b:0:1"))
    yield "first ranks", Recipe(("a:1:dyn=2", "b"))
    for mode in ("svd", "core"):
        yield (
            f"real, {mode}",
            Recipe(("analog_sd15_kohya:0.8", "disney_sd15_kohya:0.7"), {"mode": mode, "rank": 4}, real=True),
        )


# --- Results ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a merge gave, as far as it is written down; see the module's first lines.

    Attributes:
        words, layout, tensors, report: SHA-256.
        layers: Layer to norm and two projections of its written delta.
        numbers: Of the report, in their order.
    """

    words: str
    layout: str
    tensors: str
    report: str
    layers: Mapping[str, list[float]]
    numbers: list[float]

    def to_json(self, exact: bool) -> dict[str, Any]:
        rounded = {name: [float(f"{value:.10g}") for value in values] for name, values in self.layers.items()}
        found = {"words": self.words, "layout": self.layout, "layers": rounded}
        found["numbers"] = [float(f"{value:.10g}") for value in self.numbers]
        return found | ({"tensors": self.tensors, "report": self.report} if exact else {})


def result(recipe: Recipe, folder: Path, workers: int | None = None) -> Result:
    """Carry a recipe out on the inputs in ``folder``."""
    tensors, report = carried_out(recipe, folder, workers)
    named = sorted(tensors.items())
    layout = json.dumps([[key, list(t.shape), str(t.dtype)] for key, t in named])
    data = hashlib.sha256()
    for _, tensor in named:
        data.update(
            tensor.contiguous().view(torch.uint8).numpy().tobytes()
            if tensor.dim()
            else str(float(tensor)).encode()
        )
    found: list[float] = []
    words = json.dumps(_without_numbers(report, found), sort_keys=True)
    return Result(
        words=_sha(words),
        layout=_sha(layout),
        tensors=data.hexdigest()[:32],
        report=_sha(json.dumps(report, sort_keys=True)),
        layers=_projections(tensors),
        numbers=found,
    )


def carried_out(
    recipe: Recipe, folder: Path, workers: int | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the written file, and the report without clocks, paths and sizes of files."""
    source = folder
    if recipe.real:
        data = sample_data()
        assert data is not None
        source = data
    base = folder / "base.safetensors" if recipe.base else None
    output = folder / "out.safetensors"
    plan = ff.plan(source, *recipe.inputs, base=base, **{"rank": "same", **recipe.fields})
    report = run_merge(plan, output, overwrite=True, workers=workers).to_json()
    for name in ("output", "size_bytes", "seconds", "peak_memory_bytes", "sshs_model_hash"):
        report.pop(name)
    for entry in report["inputs"]:
        entry.pop("path")
    return {key: tensor.clone() for key, tensor in load_file(str(output)).items()}, report


def _without_numbers(value: Any, found: list[float]) -> Any:
    """A report with floats taken out into ``found``; the worst layers' names go, for near ties change places."""
    if isinstance(value, float):
        found.append(value)
        return "number"
    if isinstance(value, dict):
        return {
            key: _without_numbers(value[key], found)
            for key in sorted(value, key=str)
            if key != "worst_layers"
        }
    return [_without_numbers(entry, found) for entry in value] if isinstance(value, list) else value


def _projections(tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Layer to norm and two projections; the directions are rows of signs that depend on the sizes alone."""
    found: dict[str, list[float]] = {}
    for key, tensor in sorted(tensors.items()):
        for up_end, down_end in (("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight")):
            if key.endswith(up_end):
                layer = key.removesuffix(f".{up_end}")
                up, down = tensor.double().flatten(1), tensors[f"{layer}.{down_end}"].double().flatten(1)
                alpha = tensors.get(f"{layer}.alpha")
                up = up * (float(alpha) / down.shape[0] if alpha is not None else 1.0)
                found[layer] = _measured(up, down)
        if key.endswith((".diff", ".diff_b", ".w_norm", ".b_norm", ".lora_B.bias")):
            whole = tensor.double().reshape(tensor.shape[0], -1)
            found[key] = _measured(whole, torch.eye(whole.shape[1], dtype=torch.float64))
    return found


def _measured(up: Tensor, down: Tensor) -> list[float]:
    square = float(((up.mT @ up) * (down @ down.mT)).sum())
    signs = [_signs(up.shape[0]), _signs(down.shape[1])]
    return [
        math.sqrt(max(0.0, square)),
        *(float((signs[0][row] @ up) @ (down @ signs[1][row])) for row in range(2)),
    ]


@cache
def _signs(size: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(size).randint(0, 2, size=(2, size)) * 2.0 - 1)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# --- The record ---------------------------------------------------------------------------


def environment() -> str:
    """torch, the instructions it uses, and the bits of a few of its results: what exact results hang on."""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, kernels {_kernels()}"


def _kernels() -> str:
    """A hash of products and factorisations in the sizes that the recipes have."""
    found = hashlib.sha256()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for dtype in (torch.float32, torch.float64):
            for rows, columns in ((3, 24), (10, 40), (10, 768), (24, 72), (24, 768), (4, 3072), (4, 27648)):
                matrix = numbers(rows, columns, seed=columns).to(dtype) / 3
                batch = torch.stack([matrix, matrix / 7])
                square = matrix @ matrix.mT + torch.eye(rows, dtype=dtype)
                low = torch.linalg.cholesky(square)
                results = (
                    square, batch @ batch.mT, matrix.mT[:64] @ matrix, low, *torch.linalg.eigh(square),
                    torch.linalg.solve_triangular(low.mT, matrix, upper=True), torch.linalg.qr(matrix.mT).R,
                    torch.linalg.vector_norm(matrix, dim=1), matrix.square().sum(0), torch.linalg.svdvals(matrix),
                )  # fmt: skip
                for tensor in results:
                    found.update(tensor.contiguous().numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    return found.hexdigest()[:12]


def record() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def renew() -> None:
    """Write the record anew; recipes on files that are not here keep what it says of them."""
    old = record()["recipes"] if RECORD.is_file() else {}
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        for recipe_name, recipe in recipes():
            if recipe.real and sample_data() is None:
                entry = old.get(recipe_name)
            else:
                entry = result(recipe, folder).to_json(exact=True)
            if entry is None:
                continue
            if entry != old.get(recipe_name):
                print(f"{'changed' if recipe_name in old else 'new'}: {recipe_name}")
            lines.append(f"{json.dumps(recipe_name)}: {json.dumps(entry, separators=(',', ':'))}")
    body = ",\n".join(lines)
    RECORD.write_text(
        f'{{"environment": {json.dumps(environment())},\n"recipes": {{\n{body}\n}}}}\n', encoding="utf-8"
    )


def show(names: list[str]) -> None:
    wanted = dict(recipes())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        for recipe_name in names:
            tensors, report = carried_out(wanted[recipe_name], folder, None)
            print(f"{recipe_name}\n{json.dumps(report, indent=1, sort_keys=True)}")
            for key, tensor in sorted(tensors.items()):
                print(f"{key} {tuple(tensor.shape)} {tensor.dtype} {tensor.double().flatten()[:4].tolist()}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--renew", action="store_true", help="write the record anew")
    parser.add_argument("--show", nargs="+", metavar="NAME", help="print what recipes give")
    options = parser.parse_args()
    if options.renew:
        renew()
    elif options.show:
        show(options.show)
    else:
        parser.print_help()


if __name__ == "__main__":
    main()
