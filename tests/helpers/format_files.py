"""LoRA files of every kind for tests, merging by name, and reading what was written without our code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib_loramerge.blocks import bundled_preset_path, load_presets
from lib_loramerge.files import LoraFolder
from lib_loramerge.merge import MergePlan, plan_merge, run_merge
from lib_loramerge.recipe import MergeRecipe, parse_inputs
from lib_loramerge.report import MergeReport

SD1_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def plan(folder: Path, *inputs: str, base: Path | None = None, **fields) -> MergePlan:
    """Plan a merge of files in ``folder`` as a user's recipe does."""
    recipe = MergeRecipe(inputs=parse_inputs(list(inputs)), **fields)
    presets = load_presets([bundled_preset_path()])
    return plan_merge(recipe, find=LoraFolder([folder]).find, presets=presets, base=base)


def merge(folder: Path, *inputs: str, out: str = "out", base: Path | None = None, **fields) -> MergeReport:
    """Merge files in ``folder``; rank full and float32 unless told otherwise."""
    fields = {"rank": "full", "dtype": "float32", **fields}
    if fields.keys() & {"retain", "size", "keep"} or fields.get("mode") in ("concat", "add"):
        fields["rank"] = "same"
    return run_merge(plan(folder, *inputs, base=base, **fields), folder / f"{out}.safetensors")


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write tensors as they are, each with its own memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    save_file(own, str(path), dict(metadata) if metadata else None)
    return path


def rand(*shape: int, seed: int = 0, scale: float = 0.1) -> Tensor:
    """Random float32 numbers that depend on the shape and the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * scale


_SIDES = {
    "lora_up.weight": "up", "lora_down.weight": "down", "lora_B.weight": "up", "lora_A.weight": "down",
    "lora_B": "up", "lora_A": "down", "alpha": "alpha", "diff": "diff", "diff_b": "diff_b",
    "w_norm": "w_norm", "b_norm": "b_norm", "lora_B.bias": "diff_b",
}  # fmt: skip


def written(path: Path, *, lone_bias: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, biases): float64 change of each layer of a file we wrote, by the plain formulas.

    Weights are (out, in * kh * kw), or vectors for norms. Any other tensor in the file is an error, and so
    is a layer for which A1111 would refuse the whole file.

    Args:
        lone_bias: Layers may have a bias alone, which A1111 refuses.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(str(path)).items():
        side = next((end for end in _SIDES if key.endswith(f".{end}")), None)
        assert side is not None, f"not a tensor that any WebUI knows: {key}"
        groups.setdefault(key[: -len(side) - 1], {})[_SIDES[side]] = tensor.double()
    weights: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    for layer, slots in groups.items():
        complete = {"up", "down"} <= slots.keys() or {"w_norm", "b_norm"} <= slots.keys() or "diff" in slots
        assert complete or (lone_bias and slots.keys() == {"diff_b"}), f"{layer} has only {sorted(slots)}"
        assert not {"up", "diff"} <= slots.keys(), f"{layer} has two algebras"
        if "up" in slots:
            up, down = slots["up"].flatten(1), slots["down"].flatten(1)
            scale = float(slots["alpha"].reshape(-1)[0]) / down.shape[0] if "alpha" in slots else 1.0
            weights[layer] = scale * up @ down
        elif "diff" in slots:
            weights[layer] = slots["diff"].flatten(1) if slots["diff"].dim() > 1 else slots["diff"]
        elif "w_norm" in slots:
            weights[layer] = slots["w_norm"]
        for slot in ("diff_b", "b_norm"):
            if slot in slots:
                biases[layer] = slots[slot]
    return weights, biases


def assert_close(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Relative Frobenius distance below ``tolerance``."""
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    error = float(torch.linalg.vector_norm(got.double() - wanted.double()))
    size = float(torch.linalg.vector_norm(wanted.double()))
    assert error <= tolerance * size, f"relative error {error / size if size else error:.3g}"
