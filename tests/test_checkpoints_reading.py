"""Checkpoints without a published list of keys, under their hosts' names; and what a bfloat16 keeps."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_loramerge.checkpoints import Checkpoint
from lib_loramerge.cli import main
from tests.helpers.checkpoint_files import lora_of, make_checkpoint, product

UNET = "model.diffusion_model."
OPENCLIP = "conditioner.embedders.0.model.transformer.resblocks.0"
TE_K = "lora_te_text_model_encoder_layers_0_self_attn_k_proj"


def attention(name: str, width: int, context: int, depth: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.{end}.weight": (width, width) for end in ("proj_in", "proj_out")
    }
    for block in (f"{name}.transformer_blocks.{number}" for number in range(depth)):
        for attn, read in (("attn1", width), ("attn2", context)):
            sizes = {"to_q": width, "to_k": read, "to_v": read, "to_out.0": width}
            shapes |= {f"{block}.{attn}.{part}.weight": (width, size) for part, size in sizes.items()}
        shapes[f"{block}.ff.net.0.proj.weight"] = (8 * width, width)
        shapes[f"{block}.ff.net.2.weight"] = (width, 4 * width)
    return shapes


def encoder(width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{OPENCLIP}.attn.in_proj_weight": (3 * width, width),
        f"{OPENCLIP}.mlp.c_fc.weight": (4 * width, width),
    }


SHAPES = {
    # SD-Turbo: Stable Diffusion 2 with the text encoder where SDXL has its first.
    "sd2": (
        {
            f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3),
            **attention(f"{UNET}input_blocks.1.1", 320, 1024, 1),
        },
        1024,
    ),
    # SDXL's refiner: 384 channels, and the large text encoder alone.
    "sdxl_refiner": (
        {
            f"{UNET}input_blocks.0.0.weight": (384, 4, 3, 3),
            f"{UNET}label_emb.0.0.weight": (1536, 2560),
            **attention(f"{UNET}input_blocks.4.1", 768, 1280, 4),
        },
        1280,
    ),
}  # fmt: skip


@pytest.mark.parametrize("identity", SHAPES)
def test_sd_turbo_and_the_refiner_are_read_whole_and_baked_into(tmp_path, identity):
    unet, width = SHAPES[identity]
    shapes = {**unet, **encoder(width)}
    before = {key: torch.randn(shape) * 0.03 for key, shape in shapes.items()}
    save_file(before, tmp_path / "base.safetensors")
    with Checkpoint(tmp_path / "base.safetensors") as checkpoint:
        assert checkpoint.architecture.id == identity
        assert {place.key for places in checkpoint.layers.values() for place in places} == set(shapes)
    query = next(key for key in shapes if key.endswith("attn2.to_k.weight"))
    name = "lora_unet_" + query.removeprefix(UNET).removesuffix(".weight").replace(".", "_")
    lora = lora_of({name: shapes[query], TE_K: (width, width)})
    save_file(lora, tmp_path / "a.safetensors")
    words = [tmp_path / "base.safetensors", tmp_path / "a.safetensors", "-o", tmp_path / "out.safetensors"]
    assert main(["bake", *map(str, words)]) == 0
    after = load_file(tmp_path / "out.safetensors")
    fused = f"{OPENCLIP}.attn.in_proj_weight"
    exact = {key: tensor.double() for key, tensor in before.items()}
    exact[query] = exact[query] + product(lora, name)
    exact[fused] = exact[fused].clone()
    exact[fused][width : 2 * width] += product(lora, TE_K)
    for key in shapes:
        assert torch.equal(after[key], exact[key].float()), key


def test_bfloat16_warns_of_a_change_that_it_loses_and_of_none_that_it_keeps(tmp_path, capsys):
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    key = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    base = make_checkpoint(tmp_path / "base.safetensors", "sd1-ldm", dtype=torch.bfloat16)
    lora = lora_of({layer: (320, 320)})
    save_file(lora, tmp_path / "a.safetensors")
    ratio = float(base[key].double().norm() / product(lora, layer).norm())

    def report(share: float, *words: str) -> dict:
        lora_word = f"{tmp_path / 'a.safetensors'}:{share * ratio:.9g}"
        out = str(tmp_path / "out.safetensors")
        given = ["bake", str(tmp_path / "base.safetensors"), lora_word, "-o", out, "--overwrite", "--json"]
        assert main([*given, *words]) == 0
        return json.loads(capsys.readouterr().out)

    lossy = report(0.001)
    assert lossy["survives"] < 0.7
    (warning,) = [text for text in lossy["warnings"] if "survives rounding" in text]
    assert "--rounding stochastic" in warning
    assert "--dtype float16" in warning
    for kept in (report(0.001, "--rounding", "stochastic"), report(0.03)):
        assert kept["survives"] == pytest.approx(1, abs=0.05)
        assert not [text for text in kept["warnings"] if "survives rounding" in text]
