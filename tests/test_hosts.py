"""Files written for one host: it loads every layer of them, and what it would not is left out and listed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib_loramerge import cli
from lib_loramerge.hosts import HOSTS
from lib_loramerge.metadata import read_recipe
from lib_loramerge.recipe import SETTINGS
from tests.helpers.accepted import accepted


def pair(name: str, out: int, in_: int) -> dict[str, torch.Tensor]:
    return {
        f"{name}.lora_up.weight": torch.randn(out, 2, generator=_RANDOM),
        f"{name}.lora_down.weight": torch.randn(2, in_, generator=_RANDOM),
        f"{name}.alpha": torch.tensor(1.0),
    }


_RANDOM = torch.Generator().manual_seed(5)
_ATTENTION = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_"
FILES = {
    "sd1": {
        **pair(f"{_ATTENTION}attn2_to_k", 640, 768),
        **pair("lora_te_text_model_encoder_layers_0_mlp_fc1", 3072, 768),
        f"{_ATTENTION}attn1_to_out_0.diff_b": torch.randn(640, generator=_RANDOM),
        "lora_unet_mid_block_attentions_0_norm.w_norm": torch.randn(1280, generator=_RANDOM),
        "lora_unet_mid_block_attentions_0_norm.b_norm": torch.randn(1280, generator=_RANDOM),
        **{f"bundle_emb.e{n}.clip_l": torch.ones(1, 768) for n in range(13)},
    },
    "sd3": {
        **pair("lora_unet_joint_blocks_0_x_block_attn_qkv", 4608, 1536),
        **pair("lora_unet_joint_blocks_0_context_block_mlp_fc1", 6144, 1536),
    },
    "flux1": {
        **pair("lora_unet_double_blocks_0_img_attn_qkv", 9216, 3072),
        **pair("lora_unet_single_blocks_0_linear1", 21504, 3072),
        **pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 3072, 768),
    },
    "wan": {
        **pair("lora_unet_blocks_0_self_attn_q", 5120, 5120),
        **pair("lora_unet_blocks_0_cross_attn_k", 5120, 5120),
        **pair("lora_unet_blocks_0_ffn_0", 13824, 5120),
    },
}
# Layers (or parts that the dialect splits them into) that each host finds in what is written for it.
WRITTEN = {
    ("sd1", "a1111"): 3, ("sd1", "forge"): 4, ("sd1", "reforge"): 4, ("sd1", "neo"): 4,
    ("sd1", "sdnext"): 4, ("sd1", "comfyui"): 4, ("sd1", "diffusers"): 2,
    ("sd3", "a1111"): 3, ("sd3", "forge"): 2, ("sd3", "reforge"): 2, ("sd3", "sdnext"): 4,
    ("sd3", "comfyui"): 2, ("sd3", "diffusers"): 4,
    ("flux1", "forge"): 3, ("flux1", "reforge"): 3, ("flux1", "neo"): 3, ("flux1", "sdnext"): 2,
    ("flux1", "comfyui"): 3, ("flux1", "diffusers"): 8,
    ("wan", "neo"): 3, ("wan", "sdnext"): 3, ("wan", "comfyui"): 3, ("wan", "diffusers"): 3,
}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    for name, tensors in FILES.items():
        save_file(
            tensors,
            tmp_path / f"{name}.safetensors",
            {"ss_base_model_version": "sd_v1"} if name == "sd1" else {},
        )
    return tmp_path


def layers_in(path) -> set[str]:
    factors = (".lora_up.weight", ".lora_down.weight", ".lora_A.weight", ".lora_B.weight")
    endings = (*factors, ".alpha", ".diff_b", ".w_norm", ".b_norm")
    return {key[: -len(ending)] for key in load_file(path) for ending in endings if key.endswith(ending)}


@pytest.mark.parametrize(("model", "host"), WRITTEN)
def test_a_file_for_a_host_holds_what_the_host_loads(files, capsys, model, host):
    target = files / "out.safetensors"
    assert (
        cli.main(["convert", str(files / f"{model}.safetensors"), "-o", str(target), "--for", host, "--json"])
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    layers = layers_in(target)
    assert len(layers) == WRITTEN[model, host]
    if host != "diffusers" and model in accepted(host).models:
        assert layers <= set(accepted(host).names(model))
    assert bool(report["skipped"]) == ((model, host) in LEFT_OUT), report["skipped"]


# Where something is left out, and a sentence says so.
LEFT_OUT = {("sd1", "a1111"), ("sd1", "forge"), ("sd1", "diffusers"), ("sd3", "a1111"), ("flux1", "sdnext")}


def test_a_host_without_the_base_model_is_refused_with_those_that_have_it(files, capsys):
    for model, host, others in (
        ("wan", "forge", "Forge Neo, SD.Next, ComfyUI, diffusers"),
        ("flux1", "a1111", "Forge, reForge, Forge Neo, SD.Next, ComfyUI, diffusers"),
    ):
        target = files / "out.safetensors"
        assert (
            cli.main(["convert", str(files / f"{model}.safetensors"), "-o", str(target), "--for", host]) == 1
        )
        message = capsys.readouterr().err
        assert f"{HOSTS[host].label} has no " in message
        assert f"These load it: {others}." in message
        assert not target.exists()


def test_for_a_base_model_that_is_not_known_no_host_is_promised(tmp_path, capsys):
    save_file(pair("lora_unet_odd_3_q", 64, 64), tmp_path / "odd.safetensors")
    target = tmp_path / "out.safetensors"
    assert cli.main(["convert", str(tmp_path / "odd.safetensors"), "-o", str(target), "--for", "forge"]) == 0
    assert "The base model is not known, so neither is what Forge reads" in capsys.readouterr().out


def test_sd_next_gets_dotted_names_with_its_own_endings_and_alpha(files):
    target = files / "out.safetensors"
    cli.main(["convert", str(files / "sd3.safetensors"), "-o", str(target), "--for", "sdnext"])
    keys = set(load_file(target))
    assert "transformer.transformer_blocks.0.attn.to_q.lora_up.weight" in keys
    assert "transformer.transformer_blocks.0.attn.to_q.alpha" in keys
    cli.main(["convert", str(files / "sd3.safetensors"), "-o", str(target), "--for", "a1111", "--overwrite"])
    assert not any(key.endswith(".alpha") for key in load_file(target))


def test_the_sum_is_the_same_for_every_host(files):
    wanted = FILES["wan"]
    name = "lora_unet_blocks_0_self_attn_q"
    exact = 0.5 * wanted[f"{name}.lora_up.weight"].double() @ wanted[f"{name}.lora_down.weight"].double()
    for host, up, down, scale in (
        ("comfyui", f"{name}.lora_up.weight", f"{name}.lora_down.weight", 0.5),
        (
            "diffusers",
            "transformer.blocks.0.attn1.to_q.lora_B.weight",
            "transformer.blocks.0.attn1.to_q.lora_A.weight",
            1.0,
        ),
    ):
        target = files / f"{host}.safetensors"
        assert cli.main(["convert", str(files / "wan.safetensors"), "-o", str(target), "--for", host]) == 0
        tensors = load_file(target)
        got = scale * tensors[up].double() @ tensors[down].double()
        assert float((got - exact).norm() / exact.norm()) < 1e-6


def test_the_host_is_in_the_stored_recipe_and_outside_it_a_line_shows_of_diffusers(files, capsys):
    target = files / "out.safetensors"
    cli.main(["convert", str(files / "wan.safetensors"), "-o", str(target), "--for", "diffusers"])
    with safe_open(target, "pt") as opened:
        recipe = read_recipe(opened.metadata())
    assert recipe is not None
    assert recipe.host == "diffusers"
    capsys.readouterr()
    cli.main(["convert", str(files / "wan.safetensors"), "-o", str(target), "--overwrite"])
    assert "do not look for the names of this file: SD.Next, diffusers. --for" in capsys.readouterr().out
    cli.main(["convert", str(files / "flux1.safetensors"), "-o", str(target), "--overwrite"])
    assert "do not look for the names" not in capsys.readouterr().out


def test_the_programs_that_look_for_none_of_the_names_are_those_whose_records_say_so(files, capsys):
    target = files / "out.safetensors"
    for dialect, others in (("auto", "A1111, SD.Next, diffusers"), ("diffusers", "Forge, SD.Next")):
        given = ["convert", str(files / "sd3.safetensors"), "-o", str(target), "--dialect", dialect]
        cli.main([*given, "--overwrite"])
        assert f"do not look for the names of this file: {others}. --for" in capsys.readouterr().out


def test_the_words_of_the_option_are_the_hosts():
    assert SETTINGS["host"].words == tuple(HOSTS)
    assert SETTINGS["host"].flag == "--for"


def test_a_file_that_several_base_models_fit_is_refused_for_a_host_with_the_way_out(tmp_path, capsys):
    name = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": torch.rand(2, 4096), f"{name}.lora_B.weight": torch.rand(4096, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    given = [
        "convert",
        str(tmp_path / "a.safetensors"),
        "-o",
        str(tmp_path / "b.safetensors"),
        "--for",
        "comfyui",
    ]
    assert cli.main(given) == 1
    assert "--base-model NAME" in capsys.readouterr().err
    assert cli.main([*given, "--base-model", "flux2"]) == 0
