# ruff: noqa: E501  (tables of names are easier to read one row to a line)
"""Files of one base model under different names: one layer stays one layer, and its host finds what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_loramerge.cli import main
from lib_loramerge.errors import IncompatibleError, RecipeError, UnsupportedError
from lib_loramerge.merge import open_source
from tests.helpers.fixtures import metadata_of
from tests.helpers.format_files import merge


def factors(seed: int, out: int = 64, in_: int = 64, rank: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, rank, generator=generator), torch.randn(rank, in_, generator=generator)


def lora(
    names, *, seed: int = 1, kohya: bool = False, out: int = 64, in_: int = 64
) -> dict[str, torch.Tensor]:
    up, down = (".lora_up.weight", ".lora_down.weight") if kohya else (".lora_B.weight", ".lora_A.weight")
    tensors = {}
    for number, name in enumerate(names):
        tensors[name + up], tensors[name + down] = factors(100 * seed + number, out, in_)
        if kohya:
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


def change(tensors, name: str) -> torch.Tensor:
    for up, down in ((".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight")):
        if name + up in tensors:
            factor = tensors[name + down]
            alpha = tensors.get(f"{name}.alpha", torch.tensor(float(factor.shape[0])))
            return float(alpha) / factor.shape[0] * tensors[name + up].double() @ factor.double()
    raise KeyError(name)


# Spellings of two layers of one model, and the names that ComfyUI has for them.
SAME_LAYERS = {
    "HiDream": (
        ["diffusion_model.double_stream_blocks.{}.block.attn1.to_q", "transformer.double_stream_blocks.{}.block.attn1.to_q",
         "lycoris_double_stream_blocks_{}_block_attn1_to_q", "model.diffusion_model.double_stream_blocks.{}.block.attn1.to_q",
         "lora_unet_double_stream_blocks_{}_block_attn1_to_q", "base_model.model.double_stream_blocks.{}.block.attn1.to_q",
         "double_stream_blocks.{}.block.attn1.to_q"],
        "diffusion_model.double_stream_blocks.{}.block.attn1.to_q",
    ),
    "Krea 2": (
        ["diffusion_model.blocks.{}.attn.wq", "base_model.model.blocks.{}.attn.wq", "transformer.transformer_blocks.{}.attn.to_q",
         "lycoris_transformer_blocks_{}_attn_to_q", "diffusion_model.transformer_blocks.{}.attn.to_q", "lora_unet_blocks_{}_attn_wq"],
        "diffusion_model.blocks.{}.attn.wq",
    ),
    "AuraFlow": (
        ["diffusion_model.single_layers.{}.attn.w1o", "transformer.single_transformer_blocks.{}.attn.to_out.0"],
        "diffusion_model.single_layers.{}.attn.w1o",
    ),
    "PixArt": (
        ["diffusion_model.blocks.{}.cross_attn.q_linear", "base_model.model.transformer_blocks.{}.attn2.to_q",
         "unet.base_model.model.transformer_blocks.{}.attn2.to_q", "transformer.transformer_blocks.{}.attn2.to_q"],
        "diffusion_model.blocks.{}.cross_attn.q_linear",
    ),
    "Mochi": (
        ["diffusion_model.blocks.{}.attn.proj_x", "blocks.{}.attn.proj_x", "transformer.transformer_blocks.{}.attn1.to_out.0"],
        "diffusion_model.blocks.{}.attn.proj_x",
    ),
    "ACE-Step": (
        ["transformer_blocks.{}.cross_attn.to_add_out", "diffusion_model.transformer_blocks.{}.cross_attn.to_add_out"],
        "diffusion_model.transformer_blocks.{}.cross_attn.to_add_out",
    ),
    "ACE-Step 1.5": (
        ["base_model.model.layers.{}.self_attn.q_proj", "diffusion_model.decoder.layers.{}.self_attn.q_proj",
         "transformer.layers.{}.self_attn.to_q", "lycoris_layers_{}_self_attn_q_proj"],
        "diffusion_model.decoder.layers.{}.self_attn.q_proj",
    ),
    "HunyuanDiT": (
        ["base_model.model.blocks.{}.attn1.out_proj", "diffusion_model.blocks.{}.attn1.out_proj"],
        "diffusion_model.blocks.{}.attn1.out_proj",
    ),
    "Ernie-Image": (
        ["transformer.layers.{}.self_attention.to_out.0", "diffusion_model.layers.{}.self_attention.to_out.0"],
        "diffusion_model.layers.{}.self_attention.to_out.0",
    ),
}  # fmt: skip
# A layer that only this model has, where the two alone do not tell it.
COMPANY = {"PixArt": "diffusion_model.blocks.5.cross_attn.kv_linear", "Mochi": "diffusion_model.blocks.5.attn.qkv_x",
           "HunyuanDiT": "diffusion_model.blocks.5.attn1.Wqkv"}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "first", "second"),
    [(model, names[0], name) for model, (names, _) in SAME_LAYERS.items() for name in names[1:]],
)
def test_one_layer_under_two_names_is_summed_in_one(model, first, second, tmp_path):
    written = SAME_LAYERS[model][1]
    company = lora([COMPANY[model]], seed=9) if model in COMPANY else {}
    kohya = "." not in second
    a = lora([first.format(n) for n in (0, 3)], seed=1)
    b = lora([second.format(n) for n in (0, 3)], seed=2, kohya=kohya)
    save_file(a | company, tmp_path / "a.safetensors")
    save_file(b | company, tmp_path / "b.safetensors")
    merge(tmp_path, "a:1", "b:-0.5", rank="full", dtype="float32")
    result = load_file(tmp_path / "out.safetensors")
    names = {key.rpartition(".lora_")[0] for key in result if "lora_" in key}
    assert {written.format(n) for n in (0, 3)} <= names
    assert len(names) == 2 + len(company) // 2
    for n in (0, 3):
        exact = change(a, first.format(n)) - 0.5 * change(b, second.format(n))
        got = change(result, written.format(n))
        assert torch.linalg.norm(got - exact) < 1e-5 * torch.linalg.norm(exact)


def test_a_file_minus_itself_under_another_prefix_leaves_nothing(tmp_path):
    a = lora(["diffusion_model.blocks.1.attn.wk", "diffusion_model.blocks.2.mlp.up"])
    b = {key.replace("diffusion_model.", "base_model.model."): value for key, value in a.items()}
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    with pytest.raises(IncompatibleError, match="cancel each other"):
        merge(tmp_path, "a:1", "b:-1")


@pytest.mark.parametrize(
    ("beside", "name"),
    [
        ("diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.modulation"),
        ("lora_unet_blocks_0_self_attn_q", "lora_unet_blocks_0_modulation"),
        (
            "diffusion_model.double_blocks.0.img_mod.lin",
            "diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale",
        ),
        ("diffusion_model.blocks.0.attn.wq", "diffusion_model.blocks.0.prenorm.scale"),
    ],
)
def test_a_parameter_that_is_no_weight_keeps_its_dotted_name_and_shape(beside, name, tmp_path):
    shape = (1, 6, 64) if name.endswith("modulation") else (64,)
    save_file(lora([beside]) | {f"{name}.diff": torch.randn(shape)}, tmp_path / "a.safetensors")
    merge(tmp_path, "a:0.5", dtype="float32", rank="full")
    result = load_file(tmp_path / "out.safetensors")
    dotted = {"lora_unet_blocks_0_modulation": "diffusion_model.blocks.0.modulation"}.get(name, name)
    given = load_file(tmp_path / "a.safetensors")[f"{name}.diff"]
    assert torch.allclose(result[f"{dotted}.diff"], 0.5 * given)


def test_a_layer_that_no_table_has_keeps_its_name(tmp_path):
    save_file(
        lora(["diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.new_thing.q"]),
        tmp_path / "a.safetensors",
    )
    report = merge(tmp_path, "a")
    assert "diffusion_model.blocks.0.new_thing.q.lora_up.weight" in load_file(tmp_path / "out.safetensors")
    assert any("not in our list" in text for text in report.warnings)


def test_two_spellings_of_a_layer_that_no_table_has_are_refused(tmp_path):
    save_file(
        lora(["diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.new_thing.q"]),
        tmp_path / "a.safetensors",
    )
    save_file(
        lora(["lora_unet_blocks_0_self_attn_q", "lora_unet_blocks_0_new_thing_q"], kohya=True),
        tmp_path / "b.safetensors",
    )
    with pytest.raises(IncompatibleError, match="two spellings"):
        merge(tmp_path, "a", "b")


def test_what_no_host_reads_is_left_out_with_a_warning(tmp_path):
    tensors = lora(["diffusion_model.blocks.0.self_attn.q"]) | {
        "diffusion_model.blocks.0.modulation.diff_m": torch.ones(6)
    }
    save_file(tensors, tmp_path / "a.safetensors")
    report = merge(tmp_path, "a")
    assert not any("diff_m" in key for key in load_file(tmp_path / "out.safetensors"))
    assert any("diff_m" in text for text in report.warnings)


def twice(equal: bool) -> dict[str, torch.Tensor]:
    """Z-Image with its attention fused and split, the same numbers or others."""
    names = [f"lora_unet_layers_0_attention_to_{name}" for name in "qkv"]
    split = lora(names, kohya=True)
    other = split if equal else lora(names, seed=5, kohya=True)
    ups, downs = ([other[f"{name}.lora_{side}.weight"] for name in names] for side in ("up", "down"))
    return split | {
        "lora_unet_layers_0_attention_qkv.lora_up.weight": torch.block_diag(*ups),
        "lora_unet_layers_0_attention_qkv.lora_down.weight": torch.cat(downs),
        "lora_unet_layers_0_attention_qkv.alpha": torch.tensor(6.0),
    }


def test_a_layer_that_a_file_holds_twice_with_the_same_numbers_counts_once(tmp_path):
    save_file(twice(True), tmp_path / "a.safetensors")
    report = merge(tmp_path, "a", rank="full", dtype="float32")
    result, given = load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "a.safetensors")
    exact = change(given, "lora_unet_layers_0_attention_qkv")
    assert torch.linalg.norm(
        change(result, "lora_unet_layers_0_attention_qkv") - exact
    ) < 1e-5 * torch.linalg.norm(exact)
    assert any("counts once" in text for text in report.warnings)


def test_a_layer_that_a_file_holds_twice_with_other_numbers_is_an_error(tmp_path):
    save_file(twice(False), tmp_path / "a.safetensors")
    with pytest.raises(IncompatibleError, match="different numbers"):
        open_source(tmp_path / "a.safetensors")


CHROMA_OR_FLUX = ["lora_unet_double_blocks_0_img_attn_proj"]


def test_files_merge_when_one_model_fits_all_of_them(tmp_path):
    save_file(lora(CHROMA_OR_FLUX, kohya=True), tmp_path / "open.safetensors")
    save_file(
        lora([*CHROMA_OR_FLUX, "lora_unet_distilled_guidance_layer_layers_0_in_layer"], seed=2, kohya=True),
        tmp_path / "chroma.safetensors",
    )
    merge(tmp_path, "open", "chroma")
    assert metadata_of(tmp_path / "out.safetensors")["ss_base_model_version"] == "chroma"


def test_a_file_that_several_models_fit_claims_none_of_them(tmp_path):
    save_file(lora(CHROMA_OR_FLUX, kohya=True), tmp_path / "open.safetensors")
    report = merge(tmp_path, "open")
    metadata = metadata_of(tmp_path / "out.safetensors")
    assert not {"ss_base_model_version", "modelspec.architecture"} & metadata.keys()
    assert any("--base-model" in text for text in report.warnings)
    merge(tmp_path, "open", out="named", base_model="Chroma")
    assert metadata_of(tmp_path / "named.safetensors")["ss_base_model_version"] == "chroma"


def test_names_that_differ_between_the_models_that_fit_are_written_in_those_they_share(tmp_path):
    names = [f"transformer.transformer_blocks.{n}.attn.to_{p}" for n in (0, 3) for p in "qk"]
    save_file(lora(names, out=3072, in_=3072), tmp_path / "a.safetensors")
    merge(tmp_path, "a")
    assert {key.rpartition(".lora_")[0] for key in load_file(tmp_path / "out.safetensors")} == set(names)
    with pytest.raises(UnsupportedError, match="--base-model"):
        merge(tmp_path, "a", out="b", dialect="kohya")
    merge(tmp_path, "a", out="c", base_model="qwen_image")
    assert "lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight" in load_file(tmp_path / "c.safetensors")


def test_an_unknown_base_model_is_an_error_with_the_nearest_name(tmp_path):
    save_file(lora(CHROMA_OR_FLUX, kohya=True), tmp_path / "open.safetensors")
    with pytest.raises(RecipeError, match="chroma"):
        merge(tmp_path, "open", base_model="chrome")


def test_two_sizes_of_one_model_are_refused(tmp_path):
    save_file(
        lora(["lora_unet_single_blocks_0_linear2"], kohya=True, out=3072, in_=12288),
        tmp_path / "a.safetensors",
    )
    save_file(
        lora(["lora_unet_single_blocks_1_linear2"], kohya=True, out=4096, in_=16384),
        tmp_path / "b.safetensors",
    )
    with pytest.raises(IncompatibleError, match=r"Klein 4B.*Klein 9B"):
        merge(tmp_path, "a", "b")


@pytest.mark.parametrize("prefix", ["lora_te1_", "lora_te_"])
def test_a_clip_alone_keeps_the_prefix_that_its_hosts_look_for_and_claims_no_model(prefix, tmp_path):
    names = [f"{prefix}text_model_encoder_layers_0_mlp_fc1", f"{prefix}text_model_encoder_layers_3_mlp_fc1"]
    save_file(lora(names, kohya=True, out=3072, in_=768), tmp_path / "a.safetensors")
    report = merge(tmp_path, "a")
    assert {f"{name}.lora_up.weight" for name in names} <= set(load_file(tmp_path / "out.safetensors"))
    metadata = metadata_of(tmp_path / "out.safetensors")
    assert not {"ss_base_model_version", "modelspec.architecture"} & metadata.keys()
    assert any("Flux.1" in text and "Stable Diffusion XL" in text for text in report.warnings)


@pytest.mark.parametrize(
    ("encoder", "width", "leaf"),
    [
        ("qwen25_7b", 3584, "model.layers.0.self_attn.q_proj"),
        ("qwen3_8b", 4096, "model.layers.35.self_attn.q_proj"),
        ("mistral3_24b", 5120, "model.layers.39.self_attn.q_proj"),
        ("llama", 4096, "model.layers.0.mlp.gate_proj"),
        ("clip_g", 1280, "text_model.encoder.layers.0.mlp.fc1"),
        ("t5xxl", 4096, "encoder.block.0.layer.0.SelfAttention.q"),
        ("byt5_small", 1472, "encoder.block.0.layer.0.SelfAttention.q"),
        ("some_new_one", 2048, "model.layers.0.self_attn.q_proj"),
    ],
)
def test_a_text_encoder_that_comfyui_names_is_written_where_comfyui_looks_for_it(
    encoder, width, leaf, tmp_path
):
    name = f"text_encoders.{encoder}.transformer.{leaf}"
    save_file(lora([name], out=width, in_=width), tmp_path / "a.safetensors")
    merge(tmp_path, "a")
    result = load_file(tmp_path / "out.safetensors")
    written = {key.partition(".lora_")[0].removesuffix(".alpha") for key in result}
    if encoder in ("qwen3_8b", "mistral3_24b"):  # Flux.2's alone, whose hosts also look for kohya's names.
        name = "lora_te_" + leaf.removeprefix("model.").replace(".", "_")
    assert written == {name}


def test_a_language_model_that_several_base_models_have_keeps_the_name_they_share(tmp_path):
    name = "lora_te_layers_0_self_attn_q_proj"
    save_file(lora([name], kohya=True, out=4096, in_=2560), tmp_path / "a.safetensors")
    report = merge(tmp_path, "a")
    assert f"{name}.lora_up.weight" in load_file(tmp_path / "out.safetensors")
    assert "ss_base_model_version" not in metadata_of(tmp_path / "out.safetensors")
    assert any("Z-Image" in text and "Krea 2" in text for text in report.warnings)


def test_a_t5_whose_names_differ_between_the_models_is_refused_with_the_way_out(tmp_path):
    name = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    save_file(lora([name], kohya=True, out=4096, in_=4096), tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedError, match=r"Flux.1.*Chroma.*--base-model"):
        merge(tmp_path, "a")
    merge(tmp_path, "a", base_model="flux1")
    assert f"{name}.lora_up.weight" in load_file(tmp_path / "out.safetensors")


@pytest.mark.parametrize("prefix", ["diffusion_model.", "", "lora_unet_"])
def test_names_that_are_looked_for_in_one_of_the_models_alone_stay_as_they_are(prefix, tmp_path):
    name = f"{prefix}transformer_blocks.0.attn1.to_q"
    if prefix == "lora_unet_":
        name = name.replace(".", "_")
    save_file(lora([name], kohya=prefix == "lora_unet_", out=2048, in_=2048), tmp_path / "a.safetensors")
    report = merge(tmp_path, "a")
    # ComfyUI's name in LTX-Video; it has this layer of Anima and Cosmos-Predict2 under another.
    result = load_file(tmp_path / "out.safetensors")
    assert "diffusion_model.transformer_blocks.0.attn1.to_q.lora_B.weight" in result
    assert any("LTX-Video" in text and "Anima" in text for text in report.warnings)


def test_the_t5_of_chroma_is_its_first_text_encoder(tmp_path):
    name = "encoder_block_0_layer_0_SelfAttention_q"
    tensors = lora(["lora_unet_distilled_guidance_layer_in_proj", f"lora_te3_{name}"], kohya=True)
    save_file(tensors, tmp_path / "a.safetensors")
    merge(tmp_path, "a")
    assert f"lora_te1_{name}.lora_up.weight" in load_file(tmp_path / "out.safetensors")


def test_factors_without_alpha_have_one_rank_for_diffusers(tmp_path):
    small, large = factors(1, rank=2), factors(2, rank=8)
    names = [
        "transformer.transformer_blocks.0.img_mlp.net.2",
        "transformer.transformer_blocks.1.img_mlp.net.2",
    ]
    tensors = {}
    for name, (up, down) in zip(names, (small, large), strict=True):
        tensors |= {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}
    save_file(tensors, tmp_path / "a.safetensors")
    merge(tmp_path, "a", dialect="diffusers", dtype="float32")
    result = load_file(tmp_path / "out.safetensors")
    assert {value.shape[0] for key, value in result.items() if key.endswith("lora_A.weight")} == {8}
    for name in names:
        exact = change(tensors, name)
        assert torch.linalg.norm(change(result, name) - exact) < 1e-5 * torch.linalg.norm(exact)


@pytest.mark.parametrize(
    ("first", "second", "warned"),
    [
        ("style_high_noise", "light_low_noise", True),
        ("Wan2.2-HIGH-style", "Wan2.2-LOW-light", True),
        ("style_high_noise", "light_high_noise", False),
        ("flowers", "glow", False),
    ],
)
def test_high_and_low_noise_of_wan_are_never_merged_without_a_word(first, second, warned, tmp_path):
    for seed, name in enumerate((first, second)):
        save_file(
            lora(["lora_unet_blocks_0_self_attn_q"], seed=seed, kohya=True), tmp_path / f"{name}.safetensors"
        )
    report = merge(tmp_path, first, second)
    assert any("low-noise" in text for text in report.warnings) == warned


def wan_lora(path, seed):
    save_file(lora(["lora_unet_blocks_0_self_attn_q"], seed=seed, kohya=True), path)
    return load_file(path)


def test_a_pair_of_pairs_is_merged_in_one_command_and_never_across(tmp_path, capsys):
    names = ("style_high_noise", "style_low_noise", "light-HIGH", "light-LOW")
    files = {name: wan_lora(tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate(names)}
    given = [f"{name}:{0.5 + n}" for n, name in enumerate(names)]
    out = ["--lora-dir", str(tmp_path), "-o", "both", "--rank", "full", "--dtype", "float32", "--pairs"]
    assert main(["merge", *given, *out, "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert [Path(report["output"]).name for report in reports] == [
        "both_high_noise.safetensors", "both_low_noise.safetensors",
    ]  # fmt: skip
    layer = "lora_unet_blocks_0_self_attn_q"
    for kind, (first, second) in {"high": (0, 2), "low": (1, 3)}.items():
        result = load_file(tmp_path / f"both_{kind}_noise.safetensors")
        exact = sum((0.5 + n) * change(files[names[n]], layer) for n in (first, second))
        assert torch.linalg.norm(change(result, layer) - exact) < 1e-5 * torch.linalg.norm(exact)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("a_high_noise", "plain"), "plain.safetensors does not say whether"),
        (("a_high_noise", "b_high_noise"), "no input is for the low-noise one"),
    ],
)
def test_pairs_that_are_not_complete_are_refused_by_name(names, told, tmp_path, capsys):
    for seed, name in enumerate(names):
        wan_lora(tmp_path / f"{name}.safetensors", seed)
    assert main(["merge", *names, "--lora-dir", str(tmp_path), "-o", "both", "--pairs"]) == 1
    assert told in capsys.readouterr().err
    assert not list(tmp_path.glob("both*"))


def test_a_norm_that_the_dialect_has_no_name_for_is_listed_and_stops_nothing(tmp_path):
    tensors = lora(["diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.cross_attn.q"])
    tensors["diffusion_model.blocks.0.modulation.diff"] = torch.randn(64)
    save_file(tensors, tmp_path / "a.safetensors")
    report = merge(tmp_path, "a", dialect="diffusers", base_model="wan")
    assert {key.rpartition(".lora_")[0] for key in load_file(tmp_path / "out.safetensors")} == {
        "transformer.blocks.0.attn1.to_q", "transformer.blocks.0.attn2.to_q",
    }  # fmt: skip
    assert any("modulation" in text for text in report.skipped)


def test_weights_that_the_dialect_has_no_name_for_stop_a_conversion_unless_it_is_allowed(tmp_path):
    names = ["diffusion_model.blocks.0.self_attn.q", "diffusion_model.audio_injector.injector.0.q"]
    save_file(lora(names), tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedError, match="audio_injector"):
        merge(tmp_path, "a", dialect="diffusers")
    report = merge(tmp_path, "a", dialect="diffusers", skip_unsupported=True)
    assert any("audio_injector" in text for text in report.skipped)


@pytest.mark.parametrize(
    ("company", "came", "written"),
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", "lora_te1_text_projection", "lora_te1_text_projection"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", "lora_te_text_projection", "lora_te1_text_projection"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", "lora_unet_conv_norm_out", "lora_unet_out_0"),
        ("diffusion_model.double_blocks.0.img_attn_proj", "text_encoders.qwen25_7b.transformer.model.layers.0.self_attn.q_proj",
         "text_encoders.qwen25_7b.transformer.model.layers.0.self_attn.q_proj"),
    ],
)  # fmt: skip
def test_layers_that_hosts_know_by_one_name_alone_are_written_under_it(tmp_path, company, came, written):
    models = {"lora": ("sd1", 768), "diff": ("hunyuan_image", 64)}
    base_model, width = models[company[:4]]
    tensors = lora([company], in_=width, kohya=company.startswith("lora"))
    if "norm" in came:
        tensors |= {f"{came}.w_norm": torch.ones(320), f"{came}.b_norm": torch.ones(320)}
    else:
        tensors |= lora([came], kohya=came.startswith("lora"))
    save_file(tensors, tmp_path / "a.safetensors")
    merge(tmp_path, "a", base_model=base_model)
    assert any(key.startswith(f"{written}.") for key in load_file(tmp_path / "out.safetensors"))
