"""DoRA on LoKr with a base checkpoint, for every transformer whose checkpoint layout is known."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_loramerge.errors import IncompatibleError
from lib_loramerge.models import ARCHITECTURES, checkpoint_keys, comfy_layer
from tests.helpers.format_files import merge

OUT, IN = 32, 16
MODELS = [record.id for record in ARCHITECTURES.values() if record.names is not None]


def dokr(name: str, seed: int = 3, out: int = OUT) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.lokr_w1": torch.randn(4, 4, generator=generator) * 0.2,
        f"{name}.lokr_w2": torch.randn(out // 4, IN // 4, generator=generator) * 0.2,
        f"{name}.alpha": torch.tensor(1.0),
        f"{name}.dora_scale": torch.rand(out, 1, generator=generator) + 0.5,
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


@pytest.mark.parametrize("joined", [True, False])
def test_dora_on_projections_that_diffusers_fuses_is_split_as_the_checkpoint_has_them(joined, tmp_path):
    name = "lycoris_text_fusion_layerwise_blocks_0_attn_to_qkv"
    tensors = dokr(name, out=48)
    weight = torch.randn(48, IN, generator=torch.Generator().manual_seed(1))
    save_file(tensors, tmp_path / "a.safetensors")
    third, stem = 16, "text_fusion.layerwise_blocks.0.attn"
    base = {f"{stem}.to_qkv.weight": weight}
    if not joined:
        base = {f"{stem}.to_{x}.weight": weight[n * third :][:third].clone() for n, x in enumerate("qkv")}
    save_file(base, tmp_path / "base.safetensors")
    merge(tmp_path, "a:1", base=tmp_path / "base.safetensors", base_model="krea2")
    true = exact(tensors, name, weight)
    result = load_file(tmp_path / "out.safetensors")
    for n, x in enumerate("qkv"):
        change = result[f"diffusion_model.txtfusion.layerwise_blocks.0.attn.w{x}.diff"].double()
        want = true[n * third :][:third]
        assert torch.linalg.norm(change - want) < 1e-6 * torch.linalg.norm(true)


# Models whose diffusers pipeline has q, k and v apart, and how many rows each has beside the others.
FUSED = {
    "flux1": ("transformer_blocks.0.attn", (1, 1, 1)), "sd3": ("transformer_blocks.0.attn", (1, 1, 1)),
    "krea2": ("transformer_blocks.0.attn", (4, 1, 1)), "qwen_image": ("transformer_blocks.0.attn", (1, 1, 1)),
    "lumina2": ("layers.0.attn", (3, 1, 1)), "zimage": ("layers.0.attention", (1, 1, 1)),
    "wan": ("blocks.0.attn1", (1, 1, 1)), "ideogram4": ("layers.0.attention", (1, 1, 1)),
    "hunyuan_video": ("transformer_blocks.0.attn", (1, 1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("model", FUSED)
def test_projections_that_diffusers_fused_meet_the_split_ones(model, tmp_path):
    stem, units = FUSED[model]
    rows = [4 * count for count in units]
    generator = torch.Generator().manual_seed(2)
    up, down = torch.randn(sum(rows), 3, generator=generator), torch.randn(3, IN, generator=generator)
    one, two = torch.randn(rows[1], 2, generator=generator), torch.randn(2, IN, generator=generator)
    name = f"transformer.{stem}"
    save_file(
        {f"{name}.to_qkv.lora_B.weight": up, f"{name}.to_qkv.lora_A.weight": down},
        tmp_path / "a.safetensors",
    )
    save_file(
        {f"{name}.to_k.lora_B.weight": one, f"{name}.to_k.lora_A.weight": two}, tmp_path / "b.safetensors"
    )
    merge(tmp_path, "a:1", "b:1", base_model=model, dialect="diffusers", rank="full", dtype="float32")
    result = load_file(tmp_path / "out.safetensors")
    whole = up.double() @ down.double()
    whole[rows[0] : rows[0] + rows[1]] += one.double() @ two.double()
    start = 0
    for leaf, count in zip(("to_q", "to_k", "to_v"), rows, strict=True):
        key = f"{name}.{leaf}"
        change = result[f"{key}.lora_B.weight"].double() @ result[f"{key}.lora_A.weight"].double()
        assert torch.linalg.norm(change - whole[start : start + count]) < 1e-6 * torch.linalg.norm(whole)
        start += count
    assert not any("qkv" in key for key in result)


def test_a_layer_that_is_in_no_table_is_looked_up_by_its_own_name(tmp_path):
    name = "lycoris_text_fusion_layerwise_blocks_0_attn_to_other"
    tensors = dokr(name)
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
    save_file(tensors, tmp_path / "a.safetensors")
    key = "text_fusion.layerwise_blocks.0.attn.to_other.weight"
    save_file({key: weight}, tmp_path / "base.safetensors")
    save_file({key.replace(".0.", ".1."): weight}, tmp_path / "other.safetensors")
    merge(tmp_path, "a:1", base=tmp_path / "base.safetensors")
    true = exact(tensors, name, weight)
    assert torch.linalg.norm(written(tmp_path / "out.safetensors") - true) < 1e-6 * torch.linalg.norm(true)
    with pytest.raises(IncompatibleError, match=r"other\.safetensors has no layer of the name .*_to_other"):
        merge(tmp_path, "a:1", out="second", base=tmp_path / "other.safetensors")
