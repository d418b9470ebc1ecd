# ruff: noqa: E501  (tables of names are easier to read one row to a line)
"""LoRAs baked into checkpoints: the sums, their rounding, and that nothing else changes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib_loramerge.blocks import Presets
from lib_loramerge.checkpoints import baking, beside, look, rewriting, summing
from lib_loramerge.checkpoints.numbers import FLOAT8_LARGEST, all_finite, decode_codes, encode
from lib_loramerge.checkpoints.preparing import prepare_bake
from lib_loramerge.cli import bake as bake_command
from lib_loramerge.cli import main
from lib_loramerge.errors import Cancelled, OutputError
from lib_loramerge.files import read_header
from lib_loramerge.metadata import read_recipe
from lib_loramerge.recipe import LoraInput, MergeRecipe
from tests.helpers.checkpoint_files import checkpoint_tensors, lora_of, make_checkpoint, product

Q = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
LORA_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TE = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
BLOCK = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0"
FLUX = "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"

LAYOUTS = {
    "sd1-ldm": {
        LORA_Q: ((320, 320), Q, None),
        "lora_unet_down_blocks_0_resnets_0_conv1": (
            (320, 320, 3, 3), "model.diffusion_model.input_blocks.1.0.in_layers.2.weight", None,
        ),
        "lora_unet_down_blocks_0_attentions_0_proj_in": (
            (320, 320, 1, 1), "model.diffusion_model.input_blocks.1.1.proj_in.weight", None,
        ),
        TE: ((768, 768), "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight", None),
    },
    "sdxl-sgm": {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": ((640, 2048), f"{BLOCK}.attn2.to_k.weight", None),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (
            (3072, 768), "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight", None,
        ),
        "lora_te2_text_model_encoder_layers_0_self_attn_k_proj": (
            (1280, 1280),
            "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",
            slice(1280, 2560),
        ),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": (
            (5120, 1280), "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight", None,
        ),
    },
    "sdxl-diffusers_unet_only": {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (
            (640, 2048), "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight", None,
        ),
    },
    "sd3-comfyui": {
        "lora_unet_joint_blocks_0_x_block_attn_qkv": (
            (4608, 1536), "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", None,
        ),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (
            (768, 768), "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight", None,
        ),
    },
    "flux-flux": {
        "lora_unet_double_blocks_0_img_attn_qkv": ((9216, 3072), FLUX, None),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (
            (768, 768), "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight", None,
        ),
    },
}  # fmt: skip


def bake(*words: object) -> int:
    return main(["bake", *map(str, words)])


def baked(tmp_path, base, lora, *words, strength=0.7):
    """Report and tensors of a bake."""
    out = tmp_path / "out.safetensors"
    save_file(lora, tmp_path / "a.safetensors")
    assert bake(base, f"{tmp_path / 'a.safetensors'}:{strength}", "-o", out, "--overwrite", *words) == 0
    return load_file(out)


@pytest.fixture
def sd1(tmp_path):
    metadata = {"modelspec.architecture": "stable-diffusion-v1", "note": "日本"}
    return make_checkpoint(tmp_path / "base.safetensors", "sd1-ldm", metadata=metadata)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gets_the_exact_sum_and_nothing_else_changes(tmp_path, layout):
    before = make_checkpoint(tmp_path / "base.safetensors", layout)
    if "diffusers" not in layout:
        before["v_pred"] = torch.zeros(0)
        save_file(before, tmp_path / "base.safetensors")
    lora = lora_of({name: shape for name, (shape, _, _) in LAYOUTS[layout].items()})
    after = baked(tmp_path, tmp_path / "base.safetensors", lora)
    wanted = {key: tensor.double() for key, tensor in before.items()}
    for name, (_, key, rows) in LAYOUTS[layout].items():
        wanted[key][rows if rows else slice(None)] += 0.7 * product(lora, name)
    changed = {key for _, key, _ in LAYOUTS[layout].values()}
    assert list(after) == list(load_file(tmp_path / "base.safetensors"))
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        if key not in changed:
            assert torch.equal(after[key], tensor), key
            continue
        best = wanted[key].half()
        other = after[key] != best
        assert other.double().mean() <= 1e-5 * 2
        assert (
            (after[key].double() - best.double()).abs() <= 2.0**-10 * best.double().abs() + 2.0**-24
        ).all()


def test_float32_equals_peft_to_the_last_bit(tmp_path, sd1):
    peft = pytest.importorskip("peft")
    wide = checkpoint_tensors("sd1-ldm", dtype=torch.float32)
    save_file(wide, tmp_path / "base.safetensors")
    lora = lora_of({LORA_Q: (320, 320)})
    after = baked(tmp_path, tmp_path / "base.safetensors", lora, strength=1)
    model = torch.nn.Sequential(torch.nn.Linear(320, 320, bias=False)).double()
    model[0].weight.data = wide[Q].double()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=2, target_modules=["0"]))
    layer = adapted.base_model.model[0]
    layer.lora_A["default"].weight.data = lora[f"{LORA_Q}.lora_down.weight"].double()
    layer.lora_B["default"].weight.data = lora[f"{LORA_Q}.lora_up.weight"].double()
    assert torch.equal(after[Q], adapted.merge_and_unload()[0].weight.data.float())


def test_loha_equals_lycoris_to_the_last_bit(tmp_path):
    loha = pytest.importorskip("lycoris.functional.loha")
    wide = make_checkpoint(tmp_path / "base.safetensors", "sd1-ldm", dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(320, 3, generator=generator) * 0.1, torch.randn(3, 320, generator=generator) * 0.1,
             torch.randn(320, 3, generator=generator) * 0.1, torch.randn(3, 320, generator=generator) * 0.1]  # fmt: skip
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    lora = {f"{LORA_Q}.{name}": part for name, part in zip(names, parts, strict=True)}
    lora[f"{LORA_Q}.alpha"] = torch.tensor(3.0)
    after = baked(tmp_path, tmp_path / "base.safetensors", lora, strength=1)
    delta = loha.diff_weight(
        *[part.double() for part in (parts[1], parts[0], parts[3], parts[2])], None, None
    )
    assert torch.equal(after[Q], (wide[Q].double() + delta).float())


def test_biases_and_norms_are_added(tmp_path, sd1):
    lora = lora_of({TE: (768, 768)})
    lora[f"{TE}.diff_b"] = torch.full((768,), 0.5)
    norm = "lora_te_text_model_encoder_layers_0_layer_norm1"
    lora |= {f"{norm}.w_norm": torch.full((768,), 0.25), f"{norm}.b_norm": torch.full((768,), -0.25)}
    after = baked(tmp_path, tmp_path / "base.safetensors", lora, strength=1)
    stem = "cond_stage_model.transformer.text_model.encoder.layers.0."
    for key, more in (
        ("self_attn.q_proj.bias", 0.5),
        ("layer_norm1.weight", 0.25),
        ("layer_norm1.bias", -0.25),
    ):
        assert torch.equal(after[stem + key], (sd1[stem + key].float() + more).half())


def test_a_convolution_of_nine_channels_takes_a_lora_of_four(tmp_path, sd1):
    key = "model.diffusion_model.input_blocks.0.0.weight"
    sd1[key] = torch.randn(320, 9, 3, 3).half()
    save_file(sd1, tmp_path / "base.safetensors")
    lora = lora_of({"lora_unet_conv_in": (320, 4, 3, 3)})
    after = baked(tmp_path, tmp_path / "base.safetensors", lora, strength=1)
    assert torch.equal(after[key][:, 4:], sd1[key][:, 4:])
    wanted = sd1[key][:, :4].double() + product(lora, "lora_unet_conv_in")
    # Half a step of float16 is at most 2**-11 of a number.
    assert torch.allclose(after[key][:, :4].double(), wanted, rtol=2.0**-10.9, atol=1e-6)


def test_metadata_are_kept_and_show_a1111_of_the_merge(tmp_path, sd1):
    baked(tmp_path, tmp_path / "base.safetensors", lora_of({LORA_Q: (320, 320)}))
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        texts = file.metadata()
    digest = hashlib.sha256((tmp_path / "base.safetensors").read_bytes()).hexdigest()
    assert texts["note"] == "日本"
    assert texts["modelspec.architecture"] == "stable-diffusion-v1"
    assert json.loads(texts["sd_merge_models"])[digest]["name"] == "base.safetensors"
    assert json.loads(texts["sd_merge_recipe"])["primary_model_hash"] == digest
    assert str(tmp_path) not in "".join(texts.values())


def test_the_recipe_of_a_bake_is_kept_and_read_under_either_name(tmp_path, sd1):
    baked(tmp_path, tmp_path / "base.safetensors", lora_of({LORA_Q: (320, 320)}))
    texts = dict(read_header(tmp_path / "out.safetensors").metadata)
    bake = json.loads(texts["loramerge_recipe"])["bake"]
    digest = hashlib.sha256((tmp_path / "base.safetensors").read_bytes()).hexdigest()
    assert (bake["base"], bake["base_sha256"]) == ("base.safetensors", digest)
    assert (bake["rounding"], bake["dtype"]) == ("auto", "same")
    assert "loramerge_bake" not in texts
    recipe = read_recipe(texts)  # Merging it again makes the LoRA that was baked.
    assert [given.name for given in recipe.inputs] == ["a"]
    told = look(tmp_path / "out.safetensors").baked
    assert told[1:] == ("base: base.safetensors",)
    texts["loramerge_bake"] = texts.pop("loramerge_recipe")
    save_file(load_file(tmp_path / "out.safetensors"), tmp_path / "older.safetensors", texts)
    assert look(tmp_path / "older.safetensors").baked == told
    baked(tmp_path, tmp_path / "older.safetensors", lora_of({LORA_Q: (320, 320)}))
    again = read_header(tmp_path / "out.safetensors").metadata
    assert json.loads(again["loramerge_recipe"])["bake"]["base"] == "older.safetensors"
    assert "loramerge_bake" not in again


def test_the_report_shows_the_hash_and_what_survives(tmp_path, sd1, capsys):
    lora = lora_of({LORA_Q: (320, 320)}, size=0.004)
    after = baked(tmp_path, tmp_path / "base.safetensors", lora, "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["sha256"] == hashlib.sha256((tmp_path / "out.safetensors").read_bytes()).hexdigest()
    exact = 0.7 * product(lora, LORA_Q)
    moved = after[Q].double() - sd1[Q].double()
    assert report["survives"] == pytest.approx(float((moved * exact).sum() / exact.square().sum()), abs=1e-3)
    assert report["error"] == pytest.approx(float((moved - exact).norm() / exact.norm()), abs=1e-3)


def test_a_bake_can_be_baked_back(tmp_path, sd1):
    lora = lora_of({LORA_Q: (320, 320)})
    after = baked(tmp_path, tmp_path / "base.safetensors", lora, strength=1)
    os.replace(tmp_path / "out.safetensors", tmp_path / "baked.safetensors")
    back = baked(tmp_path, tmp_path / "baked.safetensors", lora, strength=-1)
    assert not torch.equal(after[Q], sd1[Q])
    assert torch.allclose(back[Q].float(), sd1[Q].float(), atol=1e-4)


def float8(tensors, dtype=torch.float8_e4m3fn):
    return {
        key: tensor.to(dtype) if tensor.dim() > 1 and "diffusion_model." in key else tensor
        for key, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_small_change_survives_in_float8(tmp_path, sd1, capsys, dtype):
    save_file(float8(sd1, dtype), tmp_path / "base.safetensors")
    lora = lora_of({LORA_Q: (320, 320)}, size=0.011)
    baked(tmp_path, tmp_path / "base.safetensors", lora, "--json", strength=1)
    by_chance = json.loads(capsys.readouterr().out)
    baked(tmp_path, tmp_path / "base.safetensors", lora, "--json", "--rounding", "nearest", strength=1)
    nearest = json.loads(capsys.readouterr().out)
    assert by_chance["survives"] == pytest.approx(1, abs=0.15)
    assert nearest["survives"] < 0.3
    assert "stochastic" in nearest["warnings"][-1]


def test_random_rounding_does_not_depend_on_threads_and_does_on_the_seed(tmp_path, sd1, monkeypatch):
    save_file(float8(sd1), tmp_path / "base.safetensors")
    lora = lora_of({LORA_Q: (320, 320)})
    files = {}
    for name, workers, seed in (("one", 1, 0), ("four", 4, 0), ("other", 2, 5)):
        monkeypatch.setattr(rewriting, "WORKERS", workers)
        monkeypatch.setattr(summing, "CHUNK", 10_000)
        baked(tmp_path, tmp_path / "base.safetensors", lora, "--seed", seed)
        files[name] = load_file(tmp_path / "out.safetensors")[Q].view(torch.uint8)
    assert torch.equal(files["one"], files["four"])
    assert not torch.equal(files["one"], files["other"])


@pytest.mark.parametrize("ends", [("scale_weight",), ("weight_scale", "comfy_quant")])
def test_scaled_float8_is_read_and_written_with_its_factor(tmp_path, sd1, ends):
    stem, scale = Q.removesuffix("weight"), float(sd1[Q].float().abs().max()) / 448
    sd1[Q] = (sd1[Q].float() / scale).to(torch.float8_e4m3fn)
    sd1[stem + ends[0]] = torch.tensor(scale)
    if len(ends) > 1:
        text = json.dumps({"format": "float8_e4m3fn"}).encode()
        sd1[stem + ends[1]] = torch.tensor(list(text), dtype=torch.uint8)
    save_file(sd1, tmp_path / "base.safetensors")
    lora = lora_of({LORA_Q: (320, 320)}, size=0.15)
    after = baked(tmp_path, tmp_path / "base.safetensors", lora, strength=1)
    exact = sd1[Q].double() * scale + product(lora, LORA_Q)
    factor = float(after[stem + ends[0]])
    got = after[Q].double() * factor
    assert factor >= scale
    assert (got - exact).norm() / exact.norm() < 0.05
    assert abs(float((got - exact).mean())) < 1e-3
    # Another precision needs no factor.
    wide = baked(tmp_path, tmp_path / "base.safetensors", lora, "--dtype", "float16", strength=1)
    assert wide[Q].dtype == torch.float16
    assert stem + ends[0] not in wide
    assert torch.allclose(wide[Q].double(), exact, atol=1e-3)


def test_what_names_float8_in_the_header_goes_with_it(tmp_path, sd1):
    quantised = float8(sd1)
    layer = Q.removesuffix(".weight")
    text = json.dumps({"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"}}})
    metadata = {"_quantization_metadata": text, "note": "stays"}
    save_file({**quantised, f"{Q}_scale": torch.tensor(0.5)}, tmp_path / "base.safetensors", metadata)
    lora = lora_of({LORA_Q: (320, 320)})
    for words, kept in (((), True), (("--dtype", "float16"), False)):
        after = baked(tmp_path, tmp_path / "base.safetensors", lora, *words)
        assert (f"{Q}_scale" in after) == kept
        said = read_header(tmp_path / "out.safetensors").metadata
        assert ("_quantization_metadata" in said) == kept
        assert said["note"] == "stays"


def test_bytes_untouched_are_those_of_tensors_that_are_the_same(tmp_path, sd1, capsys):
    lora = lora_of({LORA_Q: (320, 320)})
    for words in ((), ("--dtype", "float32"), ("--drop-ema",)):
        capsys.readouterr()
        after = baked(tmp_path, tmp_path / "base.safetensors", lora, *words, "--json")
        report = json.loads(capsys.readouterr().out)
        same = sum(
            tensor.nbytes
            for key, tensor in after.items()
            if tensor.dtype == sd1[key].dtype and torch.equal(tensor, sd1[key])
        )
        assert report["untouched_bytes"] == same


def test_another_precision_leaves_vae_and_norms(tmp_path, sd1):
    after = baked(
        tmp_path, tmp_path / "base.safetensors", lora_of({LORA_Q: (320, 320)}), "--dtype", "bfloat16"
    )
    assert after[Q].dtype == torch.bfloat16
    for key, tensor in after.items():
        if key.startswith(("first_stage", "model_ema")) or "norm" in key:
            assert tensor.dtype == sd1[key].dtype
    dropped = baked(tmp_path, tmp_path / "base.safetensors", lora_of({LORA_Q: (320, 320)}), "--drop-ema")
    assert not any(key.startswith("model_ema") for key in dropped)
    assert any(key.startswith("model_ema") for key in sd1)


def test_shards_and_folders_are_baked_into_a_new_folder(tmp_path, sd1):
    folder = tmp_path / "shards"
    folder.mkdir()
    names = sorted(sd1)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    index = {}
    for number, half in enumerate(halves, 1):
        name = f"m-0000{number}-of-00002.safetensors"
        save_file({key: sd1[key] for key in half}, folder / name)
        index |= dict.fromkeys(half, name)
    (folder / "m.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    save_file({"stray": torch.zeros(3)}, folder / "m-00003-of-00003.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "other.safetensors.index.json").write_text("{}")
    (folder / "more").mkdir()
    (folder / "more" / "model.ckpt").write_bytes(b"0" * 100)
    lora = lora_of({LORA_Q: (320, 320)})
    save_file(lora, tmp_path / "a.safetensors")
    assert bake(folder / "m.safetensors.index.json", tmp_path / "a.safetensors", "-o", tmp_path / "new") == 0
    after = load_file(tmp_path / "new" / index[Q])
    wanted = sd1[Q].double() + product(lora, LORA_Q)
    assert (after[Q] != wanted.half()).double().mean() < 1e-4
    # What else lies beside the index is no part of it.
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        *index.values(),
        "m.safetensors.index.json",
        "config.json",
    }
    os.remove(folder / index[Q])
    assert bake(folder / "m.safetensors.index.json", tmp_path / "a.safetensors", "-o", tmp_path / "more") == 1


def test_an_index_names_what_is_in_its_shards(tmp_path, sd1):
    folder, index = tmp_path / "shards", tmp_path / "shards" / "m.safetensors.index.json"
    folder.mkdir()
    scaled = {**float8(sd1), f"{Q}_scale": torch.tensor(0.5)}
    places = {key: f"m-0000{1 + (key == Q)}-of-00002.safetensors" for key in scaled}
    for name in set(places.values()):
        save_file({key: t for key, t in scaled.items() if places[key] == name}, folder / name)
    total = sum(tensor.nbytes for tensor in scaled.values())
    index.write_text(json.dumps({"metadata": {"total_size": total, "note": "x"}, "weight_map": places}))
    save_file(lora_of({LORA_Q: (320, 320)}), tmp_path / "a.safetensors")
    for number, words in enumerate(((), ("--dtype", "float16"), ("--drop-ema",))):
        out = tmp_path / f"out{number}"
        assert bake(index, tmp_path / "a.safetensors", "-o", out, *words) == 0
        said = json.loads((out / index.name).read_text())
        found = {
            key: (file.name, tensor.nbytes)
            for file in out.glob("*.safetensors")
            for key, tensor in load_file(file).items()
        }
        assert said["weight_map"] == {key: name for key, (name, _) in found.items()}
        assert said["metadata"] == {"total_size": sum(size for _, size in found.values()), "note": "x"}
        assert (len(found) == len(scaled)) == (words == ())


@pytest.fixture
def folder(tmp_path):
    """A folder in diffusers' layout whose only weights are the denoiser's, with a LoRA for it."""
    root = tmp_path / "folder"
    (root / "unet").mkdir(parents=True)
    (root / "model_index.json").write_text("{}")
    (root / "unet" / "config.json").write_text("{}")
    make_checkpoint(root / "unet" / "diffusion_pytorch_model.safetensors", "sdxl-diffusers_unet_only")
    (root / "vae").mkdir()
    (root / "vae" / "large.bin").write_bytes(bytes(5 << 20))
    layers = {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (640, 2048)}
    save_file(lora_of(layers), tmp_path / "a.safetensors")
    return root


def _files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_folder_of_one_file_is_baked_into_a_folder(tmp_path, folder):
    assert bake(folder, tmp_path / "a.safetensors", "-o", tmp_path / "new") == 0
    assert _files_of(tmp_path / "new") == _files_of(folder)
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "new" / name).read_bytes() != (folder / name).read_bytes()


def test_weights_of_a_folder_that_are_not_baked_are_named(tmp_path, folder, capsys):
    words, part = (folder, tmp_path / "a.safetensors"), folder / "unet"
    assert bake(*words, "-o", tmp_path / "first") == 0
    assert "other weights" not in capsys.readouterr().out
    variant = "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(part / "diffusion_pytorch_model.safetensors", part / variant)
    assert bake(*words, "-o", tmp_path / "second") == 0
    assert f"{variant}: other weights in the folder" in capsys.readouterr().out
    assert (tmp_path / "second" / "unet" / variant).read_bytes() == (part / variant).read_bytes()


def test_the_copy_of_a_folder_is_cancelled_within_a_file(tmp_path, folder):
    asked = 0

    def cancel():
        nonlocal asked
        asked += 1
        part = next(tmp_path.glob(".loramerge-*/vae/large.bin"), None)
        return part is not None and part.stat().st_size > 0

    recipe = MergeRecipe(inputs=(LoraInput("a"),))
    with (
        prepare_bake(recipe, folder, find=lambda _: tmp_path / "a.safetensors", presets=Presets()) as ready,
        pytest.raises(Cancelled),
    ):
        ready.run(tmp_path / "new", cancel=cancel)
    assert asked
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "folder"]


def test_a_text_encoder_s_own_file_goes_into_the_folder(tmp_path, folder, capsys):
    part = "text_model.encoder.layers.0.self_attn.{}_proj"
    clip = {part.format(end) + ".weight": torch.zeros(768, 768).half() for end in ("q", "k", "v", "out")}
    clip["text_model.final_layer_norm.weight"] = torch.ones(768).half()
    save_file(clip, tmp_path / "clip_l.safetensors")
    layers = {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (640, 2048)}
    layers |= {f"lora_te1_{part.format(end).replace('.', '_')}": (768, 768) for end in ("q", "k", "v", "out")}
    save_file(lora_of(layers), tmp_path / "a.safetensors")
    words = (folder, tmp_path / "a.safetensors", "--base-te", tmp_path / "clip_l.safetensors")
    assert bake(*words, "-o", tmp_path / "new") == 0
    after = load_file(tmp_path / "new" / "clip_l.safetensors")
    assert after[part.format("q") + ".weight"].abs().max() > 0
    (folder / "clip_l.safetensors").write_bytes(b"another")
    assert bake(*words, "-o", tmp_path / "more") == 1
    assert "would both be written to clip_l.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


def test_a_text_encoder_of_its_own_file(tmp_path, capsys):
    tensors = checkpoint_tensors("flux-flux")
    prefix = "text_encoders.clip_l.transformer."
    clip = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    clip["text_model.final_layer_norm.weight"] = torch.ones(768)
    save_file({k: t for k, t in tensors.items() if not k.startswith(prefix)}, tmp_path / "flux.safetensors")
    save_file(clip, tmp_path / "clip_l.safetensors")
    name = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    lora = lora_of({"lora_unet_double_blocks_0_img_attn_qkv": (9216, 3072), name: (768, 768)})
    save_file(lora, tmp_path / "a.safetensors")
    words = (tmp_path / "flux.safetensors", tmp_path / "a.safetensors", "-o", tmp_path / "out.safetensors")
    assert bake(*words) == 1
    assert "--base-te" in capsys.readouterr().err
    assert bake(*words, "--base-te", tmp_path / "clip_l.safetensors") == 0
    key = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    after = load_file(tmp_path / "out.clip_l.safetensors")
    assert torch.allclose(after[key].double(), clip[key].double() + product(lora, name), atol=1e-3)


@pytest.fixture
def parted(tmp_path):
    """A denoiser, its two text encoders under one name in folders, and a LoRA of all; words for bake."""
    make_checkpoint(
        tmp_path / "xl.safetensors",
        "sdxl-diffusers_unet_only",
        keep=r"down_blocks\.1\.attentions\.0\.transformer_blocks\.0\.attn2",
    )
    layers = {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (640, 2048)}
    for number, width in ((1, 768), (2, 1280)):
        (tmp_path / f"te{number}").mkdir()
        names = [
            f"text_model.encoder.layers.0.self_attn.{part}_proj.weight" for part in ("q", "k", "v", "out")
        ]
        tensors = {name: torch.zeros(width, width).half() for name in names}
        tensors["text_model.final_layer_norm.weight"] = torch.ones(width).half()
        save_file(tensors, tmp_path / f"te{number}" / "model.safetensors")
        layers |= {
            f"lora_te{number}_text_model_encoder_layers_0_self_attn_{part}_proj": (width, width)
            for part in ("q", "k", "v", "out")
        }
    save_file(lora_of(layers), tmp_path / "a.safetensors")
    return (tmp_path / "xl.safetensors", tmp_path / "a.safetensors")


def test_the_report_counts_tensors_of_one_name_in_two_text_encoders(tmp_path, parted, capsys):
    words = _named(tmp_path, "clip_l", "clip_g")
    assert bake(*parted, *words, "-o", tmp_path / "out.safetensors", "--json") == 0
    lora = load_file(tmp_path / "a.safetensors")
    added = sum(float(product(lora, key[:-6]).square().sum()) for key in lora if key.endswith(".alpha"))
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    before = float(
        load_file(tmp_path / "xl.safetensors")[key].double().square().sum()
    )  # The others are zero.
    assert json.loads(capsys.readouterr().out)["change"] == pytest.approx((added / before) ** 0.5, rel=1e-4)


def _named(tmp_path, *names):
    for number, name in enumerate(names, 1):
        os.rename(tmp_path / f"te{number}" / "model.safetensors", tmp_path / f"{name}.safetensors")
    return [word for name in names for word in ("--base-te", tmp_path / f"{name}.safetensors")]


def test_two_text_encoders_of_one_name_are_refused_before_any_work(tmp_path, parted, capsys):
    before = sorted(tmp_path.rglob("*"))
    encoders = [w for n in (1, 2) for w in ("--base-te", tmp_path / f"te{n}" / "model.safetensors")]
    for more in ((), ("--overwrite",), ("--dry-run",)):
        assert bake(*parted, *encoders, "-o", tmp_path / "out", *more) == 1
        assert "would both be written to out.model.safetensors" in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before


def test_a_text_encoder_is_no_place_to_write_its_result(tmp_path, parted, capsys):
    encoders = _named(tmp_path, "clip", "xl2.clip2")
    os.link(tmp_path / "xl2.clip2.safetensors", tmp_path / "clip2.safetensors")
    encoders[-1] = tmp_path / "clip2.safetensors"
    data = encoders[-1].read_bytes()
    assert bake(*parted, *encoders, "-o", tmp_path / "xl2", "--overwrite") == 1
    assert "xl2.clip2.safetensors is one of the inputs" in capsys.readouterr().err
    assert (tmp_path / "xl2.clip2.safetensors").read_bytes() == data
    assert not (tmp_path / "xl2.safetensors").exists()


def test_files_that_belong_together_are_written_all_or_none(tmp_path, parted, capsys, monkeypatch):
    encoders = _named(tmp_path, "clip", "clip2")
    before = sorted(tmp_path.rglob("*"))
    original = baking.rewrite

    def second_fails(source, target, *given, **more):
        if target.name == "out.clip2.safetensors":
            raise OutputError("The disk is full.")
        return original(source, target, *given, **more)

    monkeypatch.setattr(baking, "rewrite", second_fails)
    assert bake(*parted, *encoders, "-o", tmp_path / "out") == 1
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    assert bake(*parted, *encoders, "-o", tmp_path / "out") == 0
    assert len(set(tmp_path.rglob("*")) - set(before)) == 3


@pytest.mark.parametrize("how", ["fails", "cancelled"])
def test_files_that_belong_together_replace_the_old_ones_all_or_none(tmp_path, parted, monkeypatch, how):
    encoders = _named(tmp_path, "clip", "clip2")
    names = ["out.safetensors", "out.clip.safetensors", "out.clip2.safetensors"]
    for name in names:
        (tmp_path / name).write_bytes(b"old")
    original, writing = baking.rewrite, []

    def last(source, target, *given, **more):
        writing.append(target.name)
        if how == "fails" and target.name == names[-1]:
            raise OutputError("The disk is full.")
        return original(source, target, *given, **more)

    monkeypatch.setattr(baking, "rewrite", last)
    if how == "cancelled":
        monkeypatch.setattr(bake_command.interrupts, "asked", lambda: writing[-1:] == names[-1:])
    assert bake(*parted, *encoders, "-o", tmp_path / "out", "--overwrite") != 0
    assert writing == names
    assert [(tmp_path / name).read_bytes() for name in names] == [b"old"] * 3
    monkeypatch.undo()
    assert bake(*parted, *encoders, "-o", tmp_path / "out", "--overwrite") == 0
    assert all(len(load_file(tmp_path / name)) > 1 for name in names)


def test_a_text_encoder_of_its_own_is_not_given_again(tmp_path, sd1, capsys):
    prefix = "cond_stage_model.transformer."
    clip = {key.removeprefix(prefix): tensor for key, tensor in sd1.items() if key.startswith(prefix)}
    save_file(clip, tmp_path / "clip.safetensors")
    save_file(lora_of({TE: (768, 768)}), tmp_path / "a.safetensors")
    words = [tmp_path / "base.safetensors", tmp_path / "a.safetensors", "-o", tmp_path / "out"]
    assert bake(*words, "--base-te", tmp_path / "clip.safetensors") == 1
    assert "base.safetensors has a text encoder clip_l of its own" in capsys.readouterr().err
    assert bake(*words) == 0


def test_a_text_encoder_given_twice_is_refused(tmp_path, parted, capsys):
    encoders = [*_named(tmp_path, "clip", "clip2"), "--base-te", tmp_path / "again.safetensors"]
    os.link(tmp_path / "clip.safetensors", tmp_path / "again.safetensors")
    assert bake(*parted, *encoders, "-o", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "again.safetensors and clip.safetensors are the same text encoder" in error


def test_a_part_of_the_difference_is_no_place_to_write_to(tmp_path, sd1, capsys):
    """Shards are files that are read, whatever their index is called."""
    folder = tmp_path / "shards"
    folder.mkdir()
    save_file(sd1, folder / "m-1.safetensors")
    (folder / "m.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(sd1, "m-1.safetensors")})
    )
    make_checkpoint(tmp_path / "minus.safetensors", "sd1-ldm", seed=3)
    words = (
        "--add",
        folder / "m.safetensors.index.json",
        "--minus",
        tmp_path / "minus.safetensors",
        "--overwrite",
    )
    data = (folder / "m-1.safetensors").read_bytes()
    assert bake(tmp_path / "base.safetensors", *words, "-o", folder / "m-1") == 1
    assert "m-1.safetensors is one of the inputs" in capsys.readouterr().err
    assert (folder / "m-1.safetensors").read_bytes() == data


def test_settings_beside_that_cannot_be_copied_are_a_warning(tmp_path, sd1, capsys, monkeypatch):
    save_file(lora_of({LORA_Q: (320, 320)}), tmp_path / "a.safetensors")
    (tmp_path / "base.yaml").write_text("model: v")

    def fails(target, content):
        raise OutputError(f"The disk is full, so {target.name} was not written.")

    monkeypatch.setattr(beside, "write_whole", fails)
    assert bake(tmp_path / "base.safetensors", tmp_path / "a.safetensors", "-o", tmp_path / "out") == 0
    assert "base.yaml could not be copied to out.yaml" in capsys.readouterr().out


def test_settings_of_the_checkpoint_that_was_replaced_do_not_stay_unseen(tmp_path, sd1, capsys):
    save_file(lora_of({LORA_Q: (320, 320)}), tmp_path / "a.safetensors")
    words = (tmp_path / "base.safetensors", tmp_path / "a.safetensors", "-o", tmp_path / "out")
    (tmp_path / "out.yaml").write_text("model: another")
    assert bake(*words) == 0
    assert "out.yaml was there before" in capsys.readouterr().out
    assert (tmp_path / "out.yaml").read_text() == "model: another"
    (tmp_path / "base.yaml").write_text("model: v")
    assert bake(*words, "--overwrite") == 0
    assert "out.yaml" not in capsys.readouterr().out
    assert (tmp_path / "out.yaml").read_text() == "model: v"


def test_a_dry_run_checks_the_place(tmp_path, sd1, capsys):
    save_file(lora_of({LORA_Q: (320, 320)}), tmp_path / "a.safetensors")
    words = (tmp_path / "base.safetensors", tmp_path / "a.safetensors", "--dry-run", "-o")
    assert bake(*words, tmp_path / "base") == 1
    assert "exists already" in capsys.readouterr().err
    assert bake(*words, tmp_path / "base", "--overwrite") == 1
    assert "the base itself" in capsys.readouterr().err


def _truncated(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 100])


def _gguf(path):
    path.write_bytes(b"GGUF" + bytes(100))


def _with(path, **more):
    tensors = checkpoint_tensors("sd1-ldm")
    tensors |= more
    save_file(tensors, path)


def _header_format(path, name):
    text = json.dumps({"format_version": "1.0", "layers": {Q.removesuffix(".weight"): {"format": name}}})
    make_checkpoint(path, "sd1-ldm", metadata={"_quantization_metadata": text})


REFUSED = {
    "gguf": (lambda path, lora: _gguf(path), "GGUF model"),
    "missing": (lambda path, lora: path.unlink(), "does not exist"),
    "empty": (lambda path, lora: path.write_bytes(b""), "empty"),
    "cut off": (lambda path, lora: _truncated(path), "cut off"),
    "a LoRA": (lambda path, lora: save_file(lora, path), "takes the checkpoint first"),
    "no model": (lambda path, lora: save_file({"weight.weight": torch.zeros(3, 3)}, path), "not a base model"),
    "a VAE": (lambda path, lora: save_file({"decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)}, path), "not a base model"),
    "nf4": (lambda path, lora: _with(path, **{f"{Q}.quant_state.bitsandbytes__nf4": torch.zeros(3)}), "4 bits"),
    "absmax": (lambda path, lora: _with(path, **{f"{Q}.absmax": torch.zeros(3)}), "4 bits"),
    "svdquant": (lambda path, lora: _with(path, **{"x.qweight": torch.zeros(3)}), "SVDQuant"),
    "nvfp4": (lambda path, lora: _with(path, **{"x.weight_scale_2": torch.zeros(3)}), "nvfp4"),
    "rows": (lambda path, lora: _with(path, **{f"{Q}_scale": torch.zeros(320)}), "for each row"),
    "int8": (lambda path, lora: _with(path, **{Q: torch.zeros(320, 320, dtype=torch.int8)}), "whole numbers"),
    "mxfp8": (
        lambda path, lora: _with(path, **{"x.comfy_quant": torch.tensor(list(b'{"format":"mxfp8"}'), dtype=torch.uint8)}),
        "mxfp8",
    ),
    **{
        f"{kind} of {dtype}".removeprefix("torch."): (
            lambda path, lora, key=key, shape=shape, dtype=dtype: _with(path, **{key: torch.zeros(shape, dtype=dtype)}),
            "that is quantised",
        )
        for kind, key, shape in (("weight", Q, (320, 320)), ("bias", "model.diffusion_model.time_embed.0.bias", (1280,)))
        for dtype in (torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64)
    },
    "format in the header": (lambda path, lora: _header_format(path, "nvfp4"), "ComfyUI's format nvfp4"),
    "unet layers lacking": (
        lambda path, lora: make_checkpoint(path, "sd1-ldm", keep=r"input_blocks\.2\."), "Stable Diffusion 1, or leave",
    ),
    "SDXL": (lambda path, lora: make_checkpoint(path, "sdxl-sgm"), "Choose a Stable Diffusion 1 checkpoint"),
    "layers lacking": (
        lambda path, lora: make_checkpoint(path, "sd1-ldm", keep=r"input_blocks\.2\."), "--skip-unsupported",
    ),
    "NaN": (lambda path, lora: _with(path, **{Q: torch.full((320, 320), float("nan")).half()}), "NaN"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_baked_is_one_sentence_and_nothing_is_written(tmp_path, capsys, case):
    path = tmp_path / "base.safetensors"
    lora = lora_of({LORA_Q: (320, 320)})
    save_file(lora, tmp_path / "a.safetensors")
    make_checkpoint(path, "sd1-ldm")
    spoil, said = REFUSED[case]
    spoil(path, lora)
    assert bake(path, tmp_path / "a.safetensors", "-o", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert "safetensors" in error or Q in error
    assert sorted(file.name for file in tmp_path.iterdir()) in (
        ["a.safetensors", "base.safetensors"], ["a.safetensors"],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["base.ckpt", "base.pt", "base.bin"])
def test_pickles_are_refused(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"\x80\x02}.")
    save_file(lora_of({LORA_Q: (320, 320)}), tmp_path / "a.safetensors")
    assert bake(tmp_path / name, tmp_path / "a.safetensors", "-o", tmp_path / "out") == 1
    assert "convert it to .safetensors" in capsys.readouterr().err


def test_the_base_is_never_overwritten(tmp_path, sd1, capsys):
    save_file(lora_of({LORA_Q: (320, 320)}), tmp_path / "a.safetensors")
    data = (tmp_path / "base.safetensors").read_bytes()
    os.link(tmp_path / "base.safetensors", tmp_path / "same.safetensors")
    for name in ("base.safetensors", "same.safetensors"):
        words = (tmp_path / "base.safetensors", tmp_path / "a.safetensors", "-o", tmp_path / name)
        assert bake(*words, "--overwrite") == 1
        assert "the base itself" in capsys.readouterr().err
    assert (tmp_path / "base.safetensors").read_bytes() == data


def test_too_little_disk_is_reported_before_a_byte_is_written(tmp_path, sd1, capsys, monkeypatch):
    from lib_loramerge.files import place

    save_file(lora_of({LORA_Q: (320, 320)}), tmp_path / "a.safetensors")
    monkeypatch.setattr(place, "free_space", lambda folder: 1000)
    (tmp_path / "out.safetensors").write_bytes(b"old")
    words = (tmp_path / "base.safetensors", tmp_path / "a.safetensors", "-o", tmp_path / "out.safetensors")
    assert bake(*words, "--overwrite") == 1
    assert "stays until the new one is complete" in capsys.readouterr().err
    assert (tmp_path / "out.safetensors").read_bytes() == b"old"


def test_a_dry_run_writes_nothing(tmp_path, sd1, capsys):
    save_file(lora_of({LORA_Q: (320, 320)}), tmp_path / "a.safetensors")
    assert bake(tmp_path / "base.safetensors", tmp_path / "a.safetensors", "--dry-run") == 0
    assert "1 layer in 1 tensor (" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 2


def test_the_difference_of_two_checkpoints_is_added_to_a_third(tmp_path, capsys):
    third = make_checkpoint(tmp_path / "third.safetensors", "sdxl-sgm", seed=1)
    base = make_checkpoint(tmp_path / "minus.safetensors", "sdxl-sgm", seed=2)
    tuned = {
        key: (tensor.float() + 0.01 * torch.randn_like(tensor.float())).half() for key, tensor in base.items()
    }
    save_file(tuned, tmp_path / "tuned.safetensors")
    words = [tmp_path / "third.safetensors", "--add", tmp_path / "tuned.safetensors"]
    words += ["--minus", tmp_path / "minus.safetensors", "--strength", "0.5", "-o", tmp_path / "out"]
    assert bake(*words) == 0
    after = load_file(tmp_path / "out.safetensors")
    for key in third:
        wanted = third[key].double() + 0.5 * (tuned[key].double() - base[key].double())
        if key.startswith("first_stage") or key.endswith("logit_scale"):
            assert torch.equal(after[key], third[key]), key
        else:
            assert (after[key] != wanted.half()).double().mean() < 1e-3, key
    report = capsys.readouterr().out
    assert "Skipped" not in report
    assert "The VAEs differ" in report


def test_a_difference_goes_into_the_first_channels_of_an_inpainting_model(tmp_path, capsys):
    first, keep = "model.diffusion_model.input_blocks.0.0.weight", r"input_blocks\.[01]\.|layers\.0\."
    base = make_checkpoint(tmp_path / "minus.safetensors", "sd1-ldm", keep=keep)
    tuned = {key: tensor + 0.01 if tensor.is_floating_point() else tensor for key, tensor in base.items()}
    save_file(tuned, tmp_path / "tuned.safetensors")
    third = checkpoint_tensors("sd1-ldm", keep=keep, seed=1)
    third[first] = torch.randn(320, 9, 3, 3).half()
    save_file(third, tmp_path / "third.safetensors")
    words = ["--add", tmp_path / "tuned.safetensors", "--minus", tmp_path / "minus.safetensors"]
    assert bake(tmp_path / "third.safetensors", *words, "-o", tmp_path / "out") == 0
    assert "Skipped" not in capsys.readouterr().out
    after = load_file(tmp_path / "out.safetensors")
    wanted = third[first].double()
    wanted[:, :4] += tuned[first].double() - base[first].double()
    assert torch.equal(after[first], wanted.half())
    # The other way round there is no place for the further channels.
    words = ["--add", tmp_path / "third.safetensors", "--minus", tmp_path / "minus.safetensors"]
    assert bake(tmp_path / "tuned.safetensors", *words, "-o", tmp_path / "other") == 0
    assert "lora_unet_input_blocks_0_0: of another shape" in capsys.readouterr().out
    assert torch.equal(load_file(tmp_path / "other.safetensors")[first], tuned[first])


def test_layers_of_other_shapes_and_those_of_two_alone_are_named(tmp_path, capsys):
    key = "model.diffusion_model.time_embed.0.weight"
    base = make_checkpoint(tmp_path / "minus.safetensors", "sd1-ldm")
    tuned = {**base, key: torch.cat([base[key]] * 2)}
    save_file(tuned, tmp_path / "tuned.safetensors")
    save_file(
        {key: tensor for key, tensor in base.items() if "attn2.to_k" not in key},
        tmp_path / "third.safetensors",
    )
    words = ["--add", tmp_path / "tuned.safetensors", "--minus", tmp_path / "minus.safetensors"]
    assert bake(tmp_path / "third.safetensors", *words, "-o", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "lora_unet_time_embed_0: of another shape" in said
    assert "attn2_to_k: not in all three checkpoints" in said


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_numbers_are_rounded_to_a_neighbour_and_right_on_average(dtype):
    kinds = {
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
    }
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2000, generator=generator) * torch.logspace(-9, 1, 2000)
    nearest = values.to(kinds[dtype]).float()
    assert torch.equal(decode_codes(encode(values, dtype), dtype), nearest)
    rows = torch.stack([decode_codes(encode(values, dtype, "k", seed), dtype) for seed in range(400)])
    assert torch.equal(
        rows[0], decode_codes(encode(rows[0], dtype, "k", 1), dtype)
    )  # Numbers that it holds stay.
    step, least = {
        "F16": (2**-10, 2**-24),
        "BF16": (2**-7, 0),
        "F8_E4M3": (2**-3, 2**-9),
        "F8_E5M2": (2**-2, 2**-16),
    }[dtype]
    bias = (rows.double().mean(0) - values.double()).abs()
    assert bool((bias <= 0.15 * (values.double().abs() * step).clamp(min=least)).all())
    assert all(len(np.unique(column)) <= 2 for column in rows.T.numpy())
    large = encode(torch.tensor([1e6, -1e6]), "F8_E4M3", "k")
    assert decode_codes(large, "F8_E4M3").tolist() == [FLOAT8_LARGEST["F8_E4M3"], -FLOAT8_LARGEST["F8_E4M3"]]


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("number", ["nan", "-nan", "inf", "-inf", "largest", "-largest", "-0.0"])
def test_nan_and_infinity_are_seen_in_stored_numbers(dtype, number):
    kind = {"F16": torch.float16, "BF16": torch.bfloat16}.get(dtype)
    kind = kind or {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[dtype]
    value = float(number.replace("largest", str(torch.finfo(kind).max)))
    stored = torch.tensor([0.5, -0.25, 1.0, 0.0, math.copysign(value, -1 if "-" in number else 1)]).to(kind)
    data = memoryview(stored.view(torch.uint8).numpy())
    assert all_finite(data, dtype) == bool(stored.float().isfinite().all())


@pytest.mark.parametrize("dtype", ["F32", "F64", "F16", "BF16"])
def test_every_number_is_told_from_nan_and_infinity(dtype):
    bits = {"F16": 16, "BF16": 16, "F32": 32, "F64": 64}[dtype]
    tops = np.arange(65536, dtype=np.uint64) << (bits - 16)  # Sign, exponent and the first digits.
    codes = tops.astype(f"<u{bits // 8}")
    kind = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}[dtype]
    finite = torch.from_numpy(codes.view(f"<i{bits // 8}")).view(kind).isfinite()
    assert [
        all_finite(memoryview(codes[n : n + 1]).cast("B"), dtype) for n in range(65536)
    ] == finite.tolist()


def test_copied_tensors_that_hold_nan_or_infinity_are_named(tmp_path, sd1, capsys):
    vae = "first_stage_model.decoder.conv_in.weight"
    lora = lora_of({LORA_Q: (320, 320)})
    baked(tmp_path, tmp_path / "base.safetensors", lora, "--json", "--drop-ema")
    assert json.loads(capsys.readouterr().out)["warnings"] == []
    sd1[vae][-1, -1] = math.nan
    save_file(sd1, tmp_path / "base.safetensors")
    after = baked(tmp_path, tmp_path / "base.safetensors", lora, "--json", "--drop-ema")
    assert torch.equal(after[vae].view(torch.int16), sd1[vae].view(torch.int16))
    [warning] = json.loads(capsys.readouterr().out)["warnings"]
    assert warning == f"1 tensor holds NaN or infinity and was copied as it is: {vae}."
    sd1["first_stage_model.decoder.conv_in.bias"][0] = -math.inf
    save_file(sd1, tmp_path / "base.safetensors")
    baked(tmp_path, tmp_path / "base.safetensors", lora, "--json", "--drop-ema")
    [warning] = json.loads(capsys.readouterr().out)["warnings"]
    assert warning.startswith(
        "2 tensors hold NaN or infinity and were copied as they are, such as first_stage"
    )


def test_data_begin_where_in_a_page_they_did(tmp_path, sd1):
    baked(tmp_path, tmp_path / "base.safetensors", lora_of({LORA_Q: (320, 320)}))
    starts = []
    for name in ("base", "out"):
        with open(tmp_path / f"{name}.safetensors", "rb") as file:
            starts.append(8 + struct.unpack("<Q", file.read(8))[0])
    assert starts[0] % 4096 == starts[1] % 4096


@pytest.mark.parametrize("kind", ["lokr", "locon", "glora", "dora", "ia3"])
def test_other_adapters_equal_what_their_own_formula_gives(tmp_path, kind):
    wide = make_checkpoint(tmp_path / "base.safetensors", "sd1-ldm", dtype=torch.float32)
    generator = torch.Generator().manual_seed(4)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.1

    name, key, weight = LORA_Q, Q, wide[Q].double()
    if kind == "lokr":
        w1, w2 = draw(8, 8), draw(40, 40)
        lora, delta = (
            {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(1.0)},
            torch.kron(w1.double(), w2.double()),
        )
    elif kind == "locon":
        name, key = (
            "lora_unet_down_blocks_0_resnets_0_conv1",
            "model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
        )
        whole = lora_of({name: (320, 320, 3, 3)})
        weight, delta = wide[key].double(), product(whole, name)
        lora = {slot.removeprefix(f"{name}."): tensor for slot, tensor in whole.items()}
    elif kind == "glora":
        lora = {
            "a1.weight": draw(4, 320),
            "a2.weight": draw(320, 4),
            "b1.weight": draw(4, 320),
            "b2.weight": draw(320, 4),
        }
        a = lora["a2.weight"].double() @ lora["a1.weight"].double()
        delta = lora["b2.weight"].double() @ lora["b1.weight"].double() + weight @ a
        lora["alpha"] = torch.tensor(4.0)
    elif kind == "dora":
        lora = {"lora_up.weight": draw(320, 4), "lora_down.weight": draw(4, 320), "alpha": torch.tensor(4.0)}
        lora["dora_scale"] = 1 + draw(1, 320).abs()
        added = weight + lora["lora_up.weight"].double() @ lora["lora_down.weight"].double()
        delta = added / added.norm(dim=0, keepdim=True) * lora["dora_scale"].double() - weight
    else:
        name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
        key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
        weight, scale = wide[key].double(), draw(320)
        lora = {"weight": scale, "on_input": torch.tensor(False)}
        delta = weight * scale.double()[:, None]
    save_file(
        {f"{name}.{slot}": tensor.contiguous() for slot, tensor in lora.items()}, tmp_path / "a.safetensors"
    )
    words = (tmp_path / "base.safetensors", tmp_path / "a.safetensors", "-o", tmp_path / "out.safetensors")
    assert bake(*words) == 0
    after = load_file(tmp_path / "out.safetensors")[key].double()
    exact = weight + delta
    assert (after - exact).norm() / exact.norm() < 1e-6
    assert delta.norm() / weight.norm() > 0.01


def test_two_loras_of_fused_and_split_names_meet_in_one_tensor(tmp_path):
    before = make_checkpoint(tmp_path / "base.safetensors", "flux-flux", dtype=torch.bfloat16)
    fused = lora_of({"lora_unet_double_blocks_0_img_attn_qkv": (9216, 3072)})
    split = {
        f"transformer.transformer_blocks.0.attn.to_k.lora_{end}.weight": tensor
        for end, tensor in (("A", torch.randn(2, 3072) * 0.02), ("B", torch.randn(3072, 2) * 0.02))
    }
    save_file(fused, tmp_path / "a.safetensors")
    save_file(split, tmp_path / "b.safetensors")
    words = (
        tmp_path / "base.safetensors",
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        "--dtype",
        "float32",
    )
    assert bake(*words, "-o", tmp_path / "out") == 0
    exact = before[FLUX].double() + product(fused, "lora_unet_double_blocks_0_img_attn_qkv")
    down, up = (
        split[f"transformer.transformer_blocks.0.attn.to_k.lora_{end}.weight"].double() for end in "AB"
    )
    exact[3072:6144] += up @ down
    after = load_file(tmp_path / "out.safetensors")[FLUX]
    assert after.dtype == torch.float32
    assert (after.double() - exact).norm() / exact.norm() < 1e-7


def prepared(tmp_path):
    from lib_loramerge.blocks import bundled_preset_path, load_presets
    from lib_loramerge.checkpoints import prepare_bake
    from lib_loramerge.recipe import LoraInput, MergeRecipe

    save_file(lora_of({LORA_Q: (320, 320)}), tmp_path / "a.safetensors")
    return prepare_bake(
        MergeRecipe(inputs=(LoraInput("a"),)),
        tmp_path / "base.safetensors",
        find=lambda name: tmp_path / f"{name}.safetensors",
        presets=load_presets([bundled_preset_path()]),
    )


@pytest.mark.parametrize("calls", [1, 3, 8])
def test_a_cancelled_bake_leaves_nothing_and_the_old_file(tmp_path, sd1, calls):
    from lib_loramerge.errors import Cancelled

    asked = 0

    def cancel():
        nonlocal asked
        asked += 1
        return asked > calls

    (tmp_path / "out.safetensors").write_bytes(b"old")
    with prepared(tmp_path) as ready, pytest.raises(Cancelled):
        ready.run(tmp_path / "out.safetensors", overwrite=True, cancel=cancel)
    assert (tmp_path / "out.safetensors").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", ["base", "a"])
def test_inputs_that_change_meanwhile_are_an_error_and_nothing_is_written(tmp_path, sd1, name):
    from lib_loramerge.errors import FileError

    with prepared(tmp_path) as ready:
        with open(tmp_path / f"{name}.safetensors", "r+b") as file:
            file.truncate(os.path.getsize(tmp_path / f"{name}.safetensors") - 1000)
        with pytest.raises(FileError):
            ready.run(tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_killed_bake_leaves_nothing(tmp_path, sd1):
    import subprocess
    import sys
    import time

    for number in range(40):
        sd1[f"first_stage_model.padding{number}.weight"] = torch.zeros(1 << 20).half()
    save_file(sd1, tmp_path / "base.safetensors")
    save_file(lora_of({LORA_Q: (320, 320)}), tmp_path / "a.safetensors")
    words = ["bake", tmp_path / "base.safetensors", tmp_path / "a.safetensors", "-o", tmp_path / "out"]
    for wait in (1.5, 2.2):
        process = subprocess.Popen(
            [sys.executable, "-m", "lib_loramerge", *map(str, words)], stdout=subprocess.DEVNULL
        )
        time.sleep(wait)
        process.kill()
        process.wait()
        left = {path.name for path in tmp_path.iterdir()} - {"base.safetensors", "a.safetensors"}
        # Killed late, it was done: then the file is whole.
        assert left in (set(), {"out.safetensors"})
        if left:
            assert load_file(tmp_path / "out.safetensors").keys() == sd1.keys()
            (tmp_path / "out.safetensors").unlink()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--add", "base.safetensors"), "together"),
        (
            ("--add", "base.safetensors", "--minus", "base.safetensors", "--strength", "nan"),
            "must be a number",
        ),
        (("--add", "base.safetensors", "--minus", "base.safetensors"), "are the same file"),
        (
            ("--add", "base.safetensors", "--minus", "base.safetensors", "--strength", "0"),
            "The strength is 0",
        ),
        (
            ("--add", "base.safetensors", "--minus", "base.safetensors", "--strength", "1e30"),
            "from -1000 to 1000",
        ),
        ((), "at least one LoRA"),
        (("a.safetensors", "--strength", "0.5"), "a.safetensors:0.5"),
        (
            ("--add", "a.safetensors", "--minus", "base.safetensors", "--mode", "ties", "--density", "0.5"),
            "so leave --mode, --density out",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, sd1, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    assert bake("base.safetensors", *words, "-o", "out") == 1
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


def test_a_thread_that_computes_after_a_stop_does_not_write_to_a_closed_file(tmp_path):
    """The number of a closed file may be another file's by then."""
    with open(tmp_path / "file", "wb") as file, rewriting._Writer(file) as writer:
        writer.put(4, b"data")
        writer.put(0, b"head")
    writer.put(0, b"late")
    assert (tmp_path / "file").read_bytes() == b"headdata"
