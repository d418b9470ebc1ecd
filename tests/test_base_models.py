"""DoRA on LoKr with a base checkpoint, for every transformer whose checkpoint layout is known."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_loramerge.errors import IncompatibleError
from lib_loramerge.models import ARCHITECTURES, checkpoint_keys, comfy_layer
from tests.format_files import merge

OUT, IN = 32, 16
MODELS = [record.id for record in ARCHITECTURES.values() if record.names is not None]


def dokr(name: str, seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.lokr_w1": torch.randn(4, 4, generator=generator) * 0.2,
        f"{name}.lokr_w2": torch.randn(OUT // 4, IN // 4, generator=generator) * 0.2,
        f"{name}.alpha": torch.tensor(1.0),
        f"{name}.dora_scale": torch.rand(OUT, 1, generator=generator) + 0.5,
    }


def exact(tensors: dict[str, torch.Tensor], name: str, weight: torch.Tensor) -> torch.Tensor:
    """What LyCORIS' forward pass changes, in float64: rows of the sum brought to the stored lengths."""
    whole = weight.double() + torch.kron(
        tensors[f"{name}.lokr_w1"].double(), tensors[f"{name}.lokr_w2"].double()
    )
    return whole * tensors[f"{name}.dora_scale"].double() / whole.norm(dim=1, keepdim=True) - weight.double()


def written(path) -> torch.Tensor:
    result = load_file(path)
    dense = [value.double() for key, value in result.items() if key.endswith(".diff")]
    if dense:
        return dense[0]
    (up,) = (
        value.double() for key, value in result.items() if key.endswith(("lora_up.weight", "lora_B.weight"))
    )
    (down,) = (
        value.double() for key, value in result.items() if key.endswith(("lora_down.weight", "lora_A.weight"))
    )
    alpha = [float(value) for key, value in result.items() if key.endswith(".alpha")]
    return up @ down * ((alpha[0] / down.shape[0]) if alpha else 1.0)


def whole_layer(model: str) -> str:
    """A matrix of the model, by its canonical name."""
    names = ARCHITECTURES[model].names
    paths = [
        path for path in names.layers
        if path not in names.parameters and "norm" not in path and "{}" in path and "embed" not in path
    ]  # fmt: skip
    path = min(
        paths, key=lambda path: (("attn" not in path and "attention" not in path), "qkv" in path, path)
    )
    flat = path.replace("{}", "0").replace(".", "_")
    return f"lora_unet_{flat}"


@pytest.mark.parametrize("model", MODELS)
def test_dora_on_lokr_is_made_exact_from_the_base_of_every_model(model, tmp_path):
    layer = whole_layer(model)
    name = comfy_layer(model, layer) or layer
    tensors = dokr(name)
    places = checkpoint_keys(model, layer)
    assert places, layer
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({places[0][0].key: weight}, tmp_path / "base.safetensors")
    merge(tmp_path, "a:1", base=tmp_path / "base.safetensors", base_model=model)
    true = exact(tensors, name, weight)
    assert torch.linalg.norm(written(tmp_path / "out.safetensors") - true) < 1e-6 * torch.linalg.norm(true)


def test_a_layer_that_is_in_no_table_is_looked_up_by_its_own_name(tmp_path):
    name = "lycoris_text_fusion_layerwise_blocks_0_attn_to_qkv"
    tensors = dokr(name)
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
    save_file(tensors, tmp_path / "a.safetensors")
    key = "text_fusion.layerwise_blocks.0.attn.to_qkv.weight"
    save_file({key: weight}, tmp_path / "base.safetensors")
    save_file({key.replace(".0.", ".1."): weight}, tmp_path / "other.safetensors")
    merge(tmp_path, "a:1", base=tmp_path / "base.safetensors")
    true = exact(tensors, name, weight)
    assert torch.linalg.norm(written(tmp_path / "out.safetensors") - true) < 1e-6 * torch.linalg.norm(true)
    with pytest.raises(IncompatibleError, match=r"other\.safetensors has no layer of the name .*_to_qkv"):
        merge(tmp_path, "a:1", out="second", base=tmp_path / "other.safetensors")
