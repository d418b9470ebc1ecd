# ruff: noqa: E501  (tables of names are easier to read one row to a line)
"""A LoRA of the difference of two checkpoints, and what is refused."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_loramerge.checkpoints import ExtractSettings, foresee, look
from lib_loramerge.checkpoints import extract as run_extract
from lib_loramerge.cli import main
from lib_loramerge.delta import truncate
from lib_loramerge.delta.krylov import leading
from lib_loramerge.errors import IncompatibleError
from lib_loramerge.files import read_header
from lib_loramerge.merge import open_source
from tests.helpers.checkpoint_files import checkpoint_tensors, lora_of, make_checkpoint, product

Q = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
LORA_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TE_Q = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"


def extract(tmp_path, capsys, *words, rc=0):
    """The report of an extraction, or its error."""
    words = [tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", "-o", tmp_path / "lora", *words]
    assert main(["extract", *map(str, words), "--json", "--overwrite"]) == rc
    captured = capsys.readouterr()
    return json.loads(captured.out) if rc == 0 else captured.err


def pair(tmp_path, changes, *, layout="sd1-ldm", dtype=torch.float16):
    """A base, and a copy with something added."""
    base = make_checkpoint(tmp_path / "base.safetensors", layout, dtype=torch.float32)
    tuned = {key: (base[key] + changes[key] if key in changes else base[key]) for key in base}
    cast = {}
    for name, tensors in (("base", base), ("tuned", tuned)):
        cast[name] = {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}
        save_file(cast[name], tmp_path / f"{name}.safetensors")
    return cast["base"], cast["tuned"]


def planted(shape, rank, rho, seed=0):
    """A matrix of a rank whose size is a share of that of weights of std 0.03."""
    generator = torch.Generator().manual_seed(seed)
    width = int(np.prod(shape[1:]))
    matrix = torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, width, generator=generator)
    return (matrix * (rho * 0.03 * (shape[0] * width) ** 0.5 / matrix.norm())).reshape(shape)


def test_the_reported_error_is_that_of_the_file(tmp_path, capsys):
    generator = torch.Generator().manual_seed(5)
    conv = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    spread = {
        Q: torch.randn(320, 320, generator=generator) * 0.002,
        conv: torch.randn(320, 320, 3, 3, generator=generator) * 0.002,
    }
    base, tuned = pair(tmp_path, spread)
    report = extract(tmp_path, capsys, "--rank", "16", "--vectors", "none")
    lora = load_file(tmp_path / "lora.safetensors")
    lost = exact = best = 0.0
    for key, name in ((Q, LORA_Q), (conv, "lora_unet_down_blocks_0_resnets_0_conv1")):
        difference = (tuned[key].double() - base[key].double()).flatten(1)
        lost += float((difference - product(lora, name).flatten(1)).square().sum())
        exact += float(difference.square().sum())
        best += float((np.linalg.svd(difference.numpy(), compute_uv=False)[16:] ** 2).sum())
    assert report["error"] == pytest.approx((lost / exact) ** 0.5, abs=1e-4)
    assert (lost / best) ** 0.5 - 1 <= 2e-3
    assert report["ranks"] == {"16": 2}


TE_NORM = "text_model.encoder.layers.0.layer_norm1"
TE_LAYOUTS = {
    "sd1-ldm": ("cond_stage_model.transformer.", "lora_te_text_model_encoder_layers_0_"),
    "sdxl-sgm": ("conditioner.embedders.0.transformer.", "lora_te1_text_model_encoder_layers_0_"),
}


@pytest.mark.parametrize("layout", TE_LAYOUTS)
def test_all_vectors_are_written_where_they_are_asked_for_and_the_hosts_that_refuse_them_named(
    tmp_path, capsys, layout
):
    prefix, name = TE_LAYOUTS[layout]
    weight, bias = f"{prefix}{TE_NORM}.weight", f"{prefix}{TE_NORM}.bias"
    q_bias = f"{prefix}text_model.encoder.layers.0.self_attn.q_proj.bias"
    q = q_bias.removesuffix("bias") + "weight"
    tensors = make_checkpoint(tmp_path / "base.safetensors", layout, dtype=torch.float32)
    shapes = {key: tuple(tensors[key].shape) for key in (weight, bias, q_bias)}
    changes = {key: torch.full(shape, 0.25) for key, shape in shapes.items()}
    base, tuned = pair(tmp_path, {**changes, q: planted(tuple(tensors[q].shape), 2, 0.1)}, layout=layout)
    names = {f"{name}layer_norm1.w_norm": weight, f"{name}layer_norm1.b_norm": bias}
    names[f"{name}self_attn_q_proj.diff_b"] = q_bias
    report = extract(tmp_path, capsys, "--rank", "2")
    assert not set(names) & set(load_file(tmp_path / "lora.safetensors"))
    assert not any("Forge" in warning for warning in report["warnings"])
    report = extract(tmp_path, capsys, "--rank", "2", "--vectors", "all")
    lora = load_file(tmp_path / "lora.safetensors")
    for key, of in names.items():
        difference = tuned[of].double() - base[of].double()
        assert torch.equal(lora[key], difference.half()), key
    [warning] = [text for text in report["warnings"] if "Forge" in text]
    assert warning.startswith("3 tensors ")
    assert main(["inspect", str(tmp_path / "lora.safetensors")]) == 0


def test_parameters_of_no_layer_are_named_where_they_differ(tmp_path, capsys):
    tensors = checkpoint_tensors(
        "flux-flux", dtype=torch.float32, keep=r"double_blocks\.0\..*(norm|attn\.proj)|_in\."
    )
    scales = [key for key in tensors if key.endswith(".scale")]
    assert scales
    save_file(tensors, tmp_path / "base.safetensors")
    matrix = next(key for key in tensors if key.endswith("img_in.weight"))
    changed = {key: tensor * 1.5 if key in scales else tensor for key, tensor in tensors.items()}
    save_file(changed, tmp_path / "tuned.safetensors")
    assert f"{len(scales)} parameters differ that no LoRA holds" in extract(tmp_path, capsys, rc=1)
    changed[matrix] = tensors[matrix] + planted(tuple(tensors[matrix].shape), 2, 0.1)
    save_file(changed, tmp_path / "tuned.safetensors")
    report = extract(tmp_path, capsys, "--rank", "2")
    [text] = [text for text in report["skipped"] if "parameters" in text]
    assert text.startswith(f"{len(scales)} parameters that no LoRA holds")
    assert scales[0] in text
    save_file({**changed, **{key: tensors[key] for key in scales}}, tmp_path / "tuned.safetensors")
    assert not any("parameters" in text for text in extract(tmp_path, capsys, "--rank", "2")["skipped"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_auto_finds_the_rank_that_was_trained(tmp_path, capsys, dtype):
    pair(tmp_path, {Q: planted((320, 320), 4, 0.02)}, dtype=dtype)
    report = extract(tmp_path, capsys, "--rank", "auto")
    assert report["ranks"] == {"4": 1}


@pytest.mark.parametrize("power", [1.0, 0.25])
@pytest.mark.parametrize("shape", [(640, 640), (320, 2880), (1280, 320)])
def test_leading_values_are_near_the_best(power, shape):
    generator = torch.Generator().manual_seed(0)
    side = min(shape)
    left = torch.linalg.qr(torch.randn(shape[0], side, generator=generator).double()).Q
    right = torch.linalg.qr(torch.randn(shape[1], side, generator=generator).double()).Q
    values = torch.arange(1, side + 1).double() ** -power
    matrix = ((left * values) @ right.mT).float()
    found = leading(matrix, 16, "layer")
    best = float(values[16:].square().sum() ** 0.5)
    error = float(found.tail(16) ** 0.5)
    assert error / best - 1 <= (1e-3 if power == 1 else 2e-3)
    assert torch.allclose(found.values[:8], values[:8], rtol=1e-2)


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize("rank", [1, 5])
def test_a_difference_of_lower_rank_than_wanted_is_found_whole(rank, noise):
    """As of a baked LoRA: one strong direction, a few weak ones, and beyond them the rounding of the file."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(1280, rank, generator=generator) * torch.logspace(0, -2.5, rank)
    matrix = left @ torch.randn(rank, 640, generator=generator)
    matrix += noise * matrix.norm() / (1280 * 640) ** 0.5 * torch.randn(1280, 640, generator=generator)
    best = float(torch.linalg.svdvals(matrix.double())[8:].norm())
    for name in range(6):  # The name seeds the random start.
        found = truncate(leading(matrix, 8, f"layer {name}"), 8)
        assert float((matrix.double() - found.up @ found.down).norm()) <= 1.001 * best + 1e-5 * matrix.norm()


def test_a_baked_lora_comes_back(tmp_path, capsys):
    make_checkpoint(tmp_path / "base.safetensors", "sd1-ldm")
    lora = lora_of(
        {LORA_Q: (320, 320), "lora_te_text_model_encoder_layers_0_mlp_fc1": (3072, 768)}, rank=16, alpha=16
    )
    save_file(lora, tmp_path / "a.safetensors")
    words = ["bake", tmp_path / "base.safetensors", tmp_path / "a.safetensors", "-o", tmp_path / "tuned"]
    assert main([*map(str, words)]) == 0
    capsys.readouterr()
    extract(tmp_path, capsys, "--rank", "16")
    back = load_file(tmp_path / "lora.safetensors")
    for name in (LORA_Q, "lora_te_text_model_encoder_layers_0_mlp_fc1"):
        exact = product(lora, name)
        assert (product(back, name) - exact).norm() / exact.norm() < 0.005
    assert open_source(tmp_path / "lora.safetensors").architecture.id == "sd1"


def test_a_fused_attention_is_split_and_complete(tmp_path, capsys):
    key = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    change = torch.zeros(3840, 1280)
    change[1280:2560] = planted((1280, 1280), 2, 0.05)
    base, tuned = pair(tmp_path, {key: change}, layout="sdxl-sgm")
    extract(tmp_path, capsys, "--rank", "4")
    back = load_file(tmp_path / "lora.safetensors")
    stem = "lora_te2_text_model_encoder_layers_0_self_attn_"
    exact = (tuned[key].double() - base[key].double())[1280:2560]
    assert (product(back, f"{stem}k_proj") - exact).norm() / exact.norm() < 0.05
    for other in ("q_proj", "v_proj", "out_proj"):
        assert not product(back, stem + other).any()
    assert {name.split(".")[0] for name in back} == {
        stem + name for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    }


def test_small_changes_of_a_text_encoder_are_found(tmp_path, capsys):
    change = torch.empty(768, 768).uniform_(-0.0007, 0.0007, generator=torch.Generator().manual_seed(1))
    pair(tmp_path, {TE_Q: change})
    report = extract(tmp_path, capsys, "--rank", "8")
    assert report["layers"] == 1
    assert set(report["by_part"]) == {"te", "unet"}


def test_norms_and_biases_of_the_denoiser_are_written(tmp_path, capsys):
    norm = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.norm1.weight"
    bias = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.bias"
    matrix = bias.replace("bias", "weight")
    changes = {Q: planted((320, 320), 2, 0.1), matrix: planted((320, 320), 2, 0.1)}
    base, tuned = pair(tmp_path, {**changes, norm: torch.full((320,), 0.01), bias: torch.full((320,), 0.02)})
    extract(tmp_path, capsys, "--rank", "4")
    back = load_file(tmp_path / "lora.safetensors")
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
    assert torch.equal(
        back[f"{stem}attn1_to_out_0.diff_b"], (tuned[bias].float() - base[bias].float()).half()
    )
    assert torch.equal(back[f"{stem}norm1.w_norm"], (tuned[norm].float() - base[norm].float()).half())
    assert not back[f"{stem}norm1.b_norm"].any()  # A1111 needs both.


def test_metadata_name_the_base(tmp_path, capsys):
    pair(tmp_path, {Q: planted((320, 320), 2, 0.1)})
    extract(tmp_path, capsys)
    texts = read_header(tmp_path / "lora.safetensors").metadata
    assert texts["ss_sd_model_name"] == "base.safetensors"
    assert texts["ss_network_module"] == "networks.lora"
    assert json.loads(texts["loramerge_extract"])["tuned"]["name"] == "tuned.safetensors"
    facts = json.loads(texts["loramerge_extract"])
    assert {"base", "conv_rank", "max_rank", "parts", "rank", "retain", "size", "vectors", "version"} <= set(
        facts
    )
    assert len(texts["sshs_model_hash"]) == 64
    assert str(tmp_path) not in "".join(texts.values())


def test_layers_beyond_a_rank_count_as_error(tmp_path, capsys):
    pair(tmp_path, {Q: planted((320, 320), 2, 0.1), TE_Q: planted((768, 768), 2, 0.1)})
    report = extract(tmp_path, capsys, "--rank", "4", "--conv-rank", "0", "--parts", "unet")
    assert set(report["by_part"]) == {"unet"}
    assert report["layers"] == 1


@pytest.mark.parametrize("other", ["bf16", "e4m3", "mixed"])
def test_two_copies_of_one_model_are_refused(tmp_path, capsys, other):
    base = make_checkpoint(tmp_path / "base.safetensors", "sd1-ldm")
    kinds = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
    matrices = {key: t for key, t in base.items() if t.dim() > 1 and t.is_floating_point()}
    if other == "mixed":
        cast = {key: (0.3 * t.float() + 0.7 * t.float()).half() for key, t in matrices.items()}
    else:
        cast = {key: t.to(kinds[other]) for key, t in matrices.items()}
    save_file({**base, **cast}, tmp_path / "tuned.safetensors")
    error = extract(tmp_path, capsys, rc=1)
    assert ("hold the same model" in error) == (other != "e4m3")
    assert ("smaller than the steps of float8 e4m3" in error) == (other == "e4m3")
    assert error.count("\n") == 1
    assert not (tmp_path / "lora.safetensors").exists()


def test_a_change_below_the_steps_of_float8_is_said_to_be_that(tmp_path, capsys):
    base, _ = pair(tmp_path, {})
    base[Q] = base[Q].to(torch.float8_e5m2)
    save_file(base, tmp_path / "base.safetensors")
    save_file(lora_of({LORA_Q: (320, 320)}, size=0.005), tmp_path / "weak.safetensors")
    words = [
        "bake",
        tmp_path / "base.safetensors",
        tmp_path / "weak.safetensors",
        "-o",
        tmp_path / "tuned",
        "--overwrite",
    ]
    assert main([*map(str, words)]) == 0
    assert not torch.equal(load_file(tmp_path / "tuned.safetensors")[Q].float(), base[Q].float())
    capsys.readouterr()
    error = extract(tmp_path, capsys, rc=1)
    assert "differ only by rounding (float8 e5m2)" in error
    assert "smaller than the steps of float8 e5m2" in error


def test_unrelated_models_are_warned_of(tmp_path, capsys):
    make_checkpoint(tmp_path / "base.safetensors", "sd1-ldm", seed=1)
    make_checkpoint(tmp_path / "tuned.safetensors", "sd1-ldm", seed=2)
    report = extract(tmp_path, capsys, "--rank", "4", "--vectors", "none")
    assert any("may not be base and fine-tune" in text for text in report["warnings"])
    assert abs(report["cosine"]) < 0.05


def test_what_does_not_belong_together_is_one_sentence(tmp_path, capsys):
    pair(tmp_path, {Q: planted((320, 320), 2, 0.1)})
    tuned = load_file(tmp_path / "tuned.safetensors")
    cases = {
        "are the same file": None,
        "is Stable Diffusion XL": checkpoint_tensors("sdxl-sgm"),
        "that tuned.safetensors lacks": {k: t for k, t in tuned.items() if "input_blocks.2" not in k},
        "reads 9 channels": {**tuned, "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 9, 3, 3).half()},
        "is a LoRA": lora_of({LORA_Q: (320, 320)}),
    }  # fmt: skip
    base = load_file(tmp_path / "base.safetensors")
    base["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(320, 4, 3, 3).half()
    save_file(base, tmp_path / "base.safetensors")
    for said, tensors in cases.items():
        path = tmp_path / "tuned.safetensors"
        path.unlink()
        if tensors is None:
            path.hardlink_to(tmp_path / "base.safetensors")
        else:
            save_file(tensors, path)
        error = extract(tmp_path, capsys, rc=1)
        assert said in error
        assert error.count("\n") == 1
        assert not (tmp_path / "lora.safetensors").exists()


def test_a_lora_is_taken_out_of_a_merge(tmp_path, capsys):
    names = ("a", "b")
    loras = {name: lora_of({LORA_Q: (320, 320)}, seed=seed) for seed, name in enumerate(names, 1)}
    for name in names:
        save_file(loras[name], tmp_path / f"{name}.safetensors")
    words = [
        tmp_path / "a.safetensors",
        f"{tmp_path / 'b.safetensors'}:0.5",
        "-o",
        tmp_path / "ab",
        "--rank",
        "full",
        "--dtype",
        "float32",
    ]
    assert main(["merge", *map(str, words)]) == 0
    words = [
        tmp_path / "ab.safetensors",
        f"{tmp_path / 'b.safetensors'}:0.5",
        "-o",
        tmp_path / "back",
        "--rank",
        "4",
        "--dtype",
        "float32",
    ]
    assert main(["subtract", *map(str, words)]) == 0
    exact = product(loras["a"], LORA_Q)
    back = product(load_file(tmp_path / "back.safetensors"), LORA_Q)
    assert (back - exact).norm() / exact.norm() < 1e-5


def test_the_lora_of_a_transformer_is_read_as_one(tmp_path, capsys):
    key = "model.diffusion_model.double_blocks.0.img_attn.proj.weight"
    pair(tmp_path, {key: planted((3072, 3072), 4, 0.05)}, layout="flux-flux")
    extract(tmp_path, capsys, "--rank", "4")
    source = open_source(tmp_path / "lora.safetensors")
    assert source.architecture.id == "flux1"
    assert list(source.layers) == ["lora_unet_double_blocks_0_img_attn_proj"]
    assert "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight" in load_file(
        tmp_path / "lora.safetensors"
    )


def test_inspect_and_compare_take_checkpoints(tmp_path, capsys):
    pair(tmp_path, {Q: planted((320, 320), 2, 0.1)})
    save_file(lora_of({LORA_Q: (320, 320)}), tmp_path / "a.safetensors")
    words = ["bake", tmp_path / "base.safetensors", tmp_path / "a.safetensors", "-o", tmp_path / "baked"]
    assert main([*map(str, words)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "baked.safetensors"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["base_model"] == "Stable Diffusion 1"
    assert facts["baked"][0].startswith("a.safetensors")
    assert (facts["vae"], facts["ema"], set(facts["dtypes"])) == (True, True, {"F16"})
    assert main(["compare", str(tmp_path / "tuned.safetensors"), str(tmp_path / "base.safetensors")]) == 0
    text = capsys.readouterr().out
    assert "Written      nothing" in text
    assert "1 written" in text


def test_progress_is_in_bytes_of_both_checkpoints(tmp_path):
    base, _ = pair(tmp_path, {Q: planted((320, 320), 2, 0.1)})
    told = []
    settings = ExtractSettings(rank=4, parts=("te",))
    paths = (tmp_path / "tuned.safetensors", tmp_path / "base.safetensors")
    with pytest.raises(IncompatibleError, match="hold the same model"):
        run_extract(*paths, None, settings, progress=told.append)
    layers = [t for k, t in base.items() if k.startswith("cond_stage_model.") and t.is_floating_point()]
    layers = [t for t in layers if t.dim() == 1 or t.shape[0] != 49408]
    assert {entry.phase for entry in told} == {"extract"}
    assert told[-1].done == told[-1].total
    assert [entry.done for entry in told] == sorted({entry.done for entry in told})
    assert 0.9 < told[-1].total / (2 * 2 * sum(t.numel() for t in layers)) <= 1


def test_the_rank_of_convolutions_is_that_of_the_others_at_most_32_unless_it_is_given(tmp_path, capsys):
    conv = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    pair(tmp_path, {Q: planted((320, 320), 64, 0.1), conv: planted((320, 320, 3, 3), 64, 0.1)})
    for words, expected in (
        (("--rank", "48"), {"48": 1, "32": 1}),
        (("--rank", "8"), {"8": 2}),
        (("--rank", "8", "--conv-rank", "40"), {"40": 1, "8": 1}),
        (("--rank", "8", "--conv-rank", "0"), {"8": 1}),
    ):
        assert extract(tmp_path, capsys, *words)["ranks"] == expected


def test_an_extraction_is_the_same_from_any_number_of_threads(tmp_path, capsys, monkeypatch):
    from lib_loramerge.checkpoints import extracting

    conv = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    pair(tmp_path, {Q: planted((320, 320), 40, 0.1), conv: planted((320, 320, 3, 3), 40, 0.1)})
    data = []
    for workers in (1, 4):
        monkeypatch.setattr(extracting, "WORKERS", workers)
        extract(tmp_path, capsys, "--rank", "8")
        data.append((tmp_path / "lora.safetensors").read_bytes())
    assert data[0] == data[1]


NORM = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.norm1.weight"


def spread(shape, power, size, seed):
    """A matrix whose singular values fall as 1/j^power."""
    generator = torch.Generator().manual_seed(seed)
    width = int(np.prod(shape[1:]))
    side = min(shape[0], width)
    left = torch.linalg.qr(torch.randn(shape[0], side, generator=generator).double()).Q
    right = torch.linalg.qr(torch.randn(width, side, generator=generator).double()).Q
    matrix = (left * torch.arange(1, side + 1).double() ** -power) @ right.mT
    return (matrix * size / matrix.norm()).float().reshape(shape)


def test_a_file_of_limited_size_has_the_best_ranks_and_is_at_most_so_large(tmp_path, capsys):
    conv = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    changes = {
        Q: spread((320, 320), 1, 3.0, 1),
        conv: spread((320, 320, 3, 3), 1, 1.0, 2),
        TE_Q: spread((768, 768), 0.5, 1.0, 3),
        NORM: torch.full((320,), 0.01),
    }
    base, tuned = pair(tmp_path, changes, dtype=torch.float32)
    asked = ["--max-rank", "100", "--conv-rank", "100"]
    sizes = {}
    for size in (0.12, 0.3, 0.5):
        report = extract(tmp_path, capsys, "--size", str(size), *asked)
        sizes[size] = (tmp_path / "lora.safetensors").stat().st_size
        # As near as one rank of the largest layer and the room kept for the header allow.
        assert 0 <= size * 1e6 - sizes[size] <= 2 * (320 + 2880) + 1500
        lora = load_file(tmp_path / "lora.safetensors")
        assert sum(key.endswith("w_norm") for key in lora) == 1
        names = {Q: LORA_Q, conv: "lora_unet_down_blocks_0_resnets_0_conv1"}
        names[TE_Q] = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
        lost, exact, worth = 0.0, 0.0, []
        for key, name in names.items():
            difference = (tuned[key].double() - base[key].double()).flatten(1)
            written = product(lora, name).flatten(1) if f"{name}.alpha" in lora else 0 * difference
            rank = lora[f"{name}.alpha"].item() if f"{name}.alpha" in lora else 0
            lost += float((difference - written).square().sum())
            exact += float(difference.square().sum())
            values = np.linalg.svd(difference.numpy(), compute_uv=False) ** 2 / (2 * sum(difference.shape))
            worth.append((values[int(rank) - 1] if rank else np.inf, values[int(rank)]))
        assert report["error"] == pytest.approx((lost / exact) ** 0.5, abs=1e-4)
        # No rank that is left out is worth more a byte than one that is written, but for the entries' bytes.
        assert max(left for _, left in worth) <= 1.05 * min(kept for kept, _ in worth)
    assert extract(tmp_path, capsys, "--size", "0.5", *asked)["capped"] == 0


def test_a_file_of_generous_size_holds_what_the_largest_rank_does(tmp_path, capsys):
    pair(tmp_path, {Q: spread((320, 320), 1, 3.0, 1), TE_Q: spread((768, 768), 0.5, 1.0, 3)})
    by_rank = extract(tmp_path, capsys, "--rank", "16")
    by_size = extract(tmp_path, capsys, "--size", "500", "--max-rank", "16")
    assert by_size["ranks"] == by_rank["ranks"] == {"16": 2}
    assert by_size["error"] == pytest.approx(by_rank["error"], rel=1e-6)
    assert by_size["capped"] == 2


def test_a_size_that_holds_nothing_is_refused_with_the_least_one(tmp_path, capsys):
    pair(tmp_path, {Q: planted((320, 320), 2, 0.1)})
    error = extract(tmp_path, capsys, "--size", "0.001", rc=1)
    least = error.split("at least ")[1].split(" MB")[0]
    assert not (tmp_path / "lora.safetensors").exists()
    assert extract(tmp_path, capsys, "--size", least)["ranks"] == {"2": 1}
    for words in (("--size", "5", "--rank", "4"), ("--size", "5", "--retain", "0.5"), ("--size", "nan")):
        assert extract(tmp_path, capsys, *words, rc=1).count("\n") == 1


def test_limited_size_counts_the_zeros_of_an_attention(tmp_path, capsys):
    key = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    change = torch.zeros(3840, 1280)
    change[1280:2560] = spread((1280, 1280), 0.5, 2.0, 1)
    pair(tmp_path, {key: change}, layout="sdxl-sgm", dtype=torch.float32)
    report = extract(tmp_path, capsys, "--size", "0.2")
    size = (tmp_path / "lora.safetensors").stat().st_size
    assert 200_000 - 2 * 2560 - 1500 <= size <= 200_000
    names = {key.split(".")[0][-8:] for key in load_file(tmp_path / "lora.safetensors")}
    assert names == {"n_q_proj", "n_k_proj", "n_v_proj", "out_proj"}
    assert max(map(int, report["ranks"])) > 20


def test_limited_size_counts_the_zeros_of_an_attention_in_the_rank_of_the_others(tmp_path, capsys):
    key = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    change = torch.zeros(3840, 1280)
    change[1280:2560] = spread((1280, 1280), 0.5, 2.0, 1)
    pair(tmp_path, {key: change}, layout="sdxl-sgm", dtype=torch.float32)
    extract(tmp_path, capsys, "--size", "0.3", "--dialect", "diffusers")
    size = (tmp_path / "lora.safetensors").stat().st_size
    assert 300_000 - 4 * 2 * 2560 - 2500 <= size <= 300_000
    foreseen = dry_run(tmp_path, capsys, "--dialect", "diffusers", "--rank", "16")
    size = extract(tmp_path, capsys, "--dialect", "diffusers", "--rank", "16")["size_bytes"]
    (point,) = (point for point in foreseen["advice"]["uniform"] if point["rank"] == 16)
    assert foreseen["size_bytes"] == point["size_bytes"]
    assert size <= point["size_bytes"] <= size + 2500


def test_all_layers_have_one_rank_in_the_spelling_of_diffusers(tmp_path, capsys):
    """Without alpha, diffusers before 0.40 applies layers of other ranks at another strength."""
    conv = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    base, tuned = pair(tmp_path, {Q: planted((320, 320), 12, 0.1), conv: planted((320, 320, 3, 3), 12, 0.1)})
    for rule in (("--rank", "12", "--conv-rank", "5"), ("--size", "0.09")):
        extract(tmp_path, capsys, *rule, "--dialect", "diffusers")
        lora = load_file(tmp_path / "lora.safetensors")
        downs = {key: t for key, t in lora.items() if key.endswith("lora_A.weight")}
        assert len({t.shape[0] for t in downs.values()}) == 1
        (key,) = (key for key in downs if "to_q" in key)
        found = lora[key.replace("lora_A", "lora_B")].double() @ lora[key].double()
        exact = tuned[Q].double() - base[Q].double()
        assert (found - exact).norm() < 0.9 * exact.norm()


@pytest.mark.parametrize("role", ["base", "tuned"])
def test_a_part_that_one_checkpoint_lacks_is_left_out_and_named(tmp_path, capsys, role):
    pair(tmp_path, {Q: planted((320, 320), 2, 0.1), TE_Q: planted((768, 768), 2, 0.1)})
    path = tmp_path / f"{role}.safetensors"
    save_file({k: t for k, t in load_file(path).items() if not k.startswith("cond_stage")}, path)
    report = extract(tmp_path, capsys, "--rank", "4")
    assert set(report["by_part"]) == {"unet"}
    assert any(text.startswith(f"{role}.safetensors has no te,") for text in report["warnings"])
    error = extract(tmp_path, capsys, "--parts", "te", rc=1)
    assert f"{role}.safetensors has no te," in error
    assert error.count("\n") == 1


def test_an_attention_is_completed_where_the_base_lacks_a_part_of_it(tmp_path, capsys):
    key = "conditioner.embedders.1.model.transformer.resblocks.0.attn."
    change = torch.zeros(3840, 1280)
    change[:1280] = planted((1280, 1280), 2, 0.1)
    pair(tmp_path, {f"{key}in_proj_weight": change}, layout="sdxl-sgm")
    path = tmp_path / "base.safetensors"
    save_file({k: t for k, t in load_file(path).items() if k != f"{key}out_proj.weight"}, path)
    extract(tmp_path, capsys, "--rank", "4", "--skip-unsupported")
    back = load_file(tmp_path / "lora.safetensors")
    assert not product(back, "lora_te2_text_model_encoder_layers_0_self_attn_out_proj").any()


def test_too_little_disk_is_reported_before_anything_is_read(tmp_path, capsys, monkeypatch):
    from lib_loramerge.files import place

    pair(tmp_path, {Q: planted((320, 320), 2, 0.1)})
    monkeypatch.setattr(place, "free_space", lambda folder: 20_000)
    for rule in (("--rank", "64"), ("--size", "1")):
        error = extract(tmp_path, capsys, *rule, rc=1)
        assert "are needed, 20" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("calls", [1, 9, 40])
def test_a_stopped_extraction_of_limited_size_leaves_nothing(tmp_path, calls):
    from lib_loramerge.errors import Cancelled

    pair(tmp_path, {Q: planted((320, 320), 8, 0.1), TE_Q: planted((768, 768), 8, 0.1)})
    asked = iter(range(10**9))
    settings = ExtractSettings(size=0.05)
    paths = (tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", tmp_path / "lora.safetensors")
    with pytest.raises(Cancelled):
        run_extract(*paths, settings, cancel=lambda: next(asked) >= calls)
    assert {path.name for path in tmp_path.iterdir()} == {"tuned.safetensors", "base.safetensors"}


def test_a_difference_too_wide_for_its_rank_is_reported_as_that(tmp_path, capsys):
    """The two are clearly related: their cosine is 1."""
    pair(tmp_path, {Q: torch.randn(320, 320, generator=torch.Generator().manual_seed(1)) * 0.001})
    warnings = extract(tmp_path, capsys, "--rank", "2")["warnings"]
    assert any("spread over more directions" in text for text in warnings)
    assert not any("may not be base" in text for text in warnings)


@pytest.mark.parametrize("role", ["base", "tuned"])
def test_nan_is_named_with_file_and_layer(tmp_path, capsys, role):
    pair(tmp_path, {Q: planted((320, 320), 2, 0.1)})
    tensors = load_file(tmp_path / f"{role}.safetensors")
    tensors[Q][3, 4] = float("nan")
    save_file(tensors, tmp_path / f"{role}.safetensors")
    error = extract(tmp_path, capsys, rc=1)
    assert f"{role}.safetensors holds NaN or infinity in lora_unet_input_blocks_1_1_" in error


def test_what_is_no_checkpoint_is_named_by_inspect_and_compare_too(tmp_path, capsys):
    make_checkpoint(tmp_path / "base.safetensors", "sd1-ldm")
    save_file(lora_of({LORA_Q: (320, 320)}), tmp_path / "a.safetensors")
    (tmp_path / "q.gguf").write_bytes(b"GGUF" + bytes(100))
    (tmp_path / "p.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    base = str(tmp_path / "base.safetensors")
    cases = (
        (["inspect", "q.gguf"], "q.gguf is a GGUF model"),
        (["compare", "q.gguf", base], "q.gguf is a GGUF model"),
        (["compare", "a.safetensors", base], "a.safetensors is a LoRA"),
        (["compare", base, "a.safetensors"], "a.safetensors is a LoRA"),
        (["extract", "p.safetensors", base, "-o", "x"], "convert it to .safetensors first"),
        (["bake", base, "-o", "x"], "loramerge bake base.safetensors a.safetensors:0.8"),
        (["bake", base, base, "-o", "x"], "extract makes a LoRA of it and its base model"),
        (["bake", base, "--add", base, "--minus", base, "-o", "x"], "are the same file"),
    )
    for words, said in cases:
        words = [str(tmp_path / word) if "." in word or word == "x" else word for word in words]
        assert main(words) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.strip().count("\n") == 0
    assert not (tmp_path / "x.safetensors").exists()


XL = "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight"
LOOPS = {
    "sd1-ldm": {LORA_Q: (Q, (320, 320)), "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (TE_Q, (768, 768))},
    "sdxl-sgm": {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
            "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight",
            (640, 640),
        ),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": (XL, (5120, 1280)),
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LOOPS)
def test_two_loras_are_baked_extracted_taken_apart_and_baked_back(tmp_path, capsys, layout):
    layers = LOOPS[layout]
    base = make_checkpoint(tmp_path / "base.safetensors", layout)
    loras = [lora_of({name: shape for name, (_, shape) in layers.items()}, seed=seed) for seed in (1, 2)]
    for name, lora in zip("ab", loras, strict=True):
        save_file(lora, tmp_path / f"{name}.safetensors")

    def run(*words):
        words = [tmp_path / word if "safetensors" in word else word for word in words]
        assert main([*map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    paths = ["base.safetensors", "a.safetensors:0.8", "b.safetensors:0.5", "-o", "both.safetensors"]
    assert run("bake", *paths)["survives"] == pytest.approx(1, abs=0.01)
    report = run("extract", "both.safetensors", "base.safetensors", "-o", "ab.safetensors", "--rank", "auto")
    assert report["error"] < 0.03
    assert report["layers"] == len(layers)
    paths = ["ab.safetensors", "b.safetensors:0.5", "-o", "only.safetensors", "--rank", "4"]
    assert run("subtract", *paths)["error"] < 0.03
    only, both = load_file(tmp_path / "only.safetensors"), load_file(tmp_path / "ab.safetensors")
    for name in layers:
        names = {name, name.replace("down_blocks_0_attentions_0", "input_blocks_1_1")}
        (found,) = {key.split(".")[0] for key in only if key.split(".")[0] in names}
        first, second = (product(lora, name) for lora in loras)
        assert (product(both, found) - 0.8 * first - 0.5 * second).norm() < 0.03 * first.norm()
        assert (product(only, found) - 0.8 * first).norm() < 0.04 * first.norm()
    run("bake", "both.safetensors", "ab.safetensors:-1", "-o", "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    for key, tensor in base.items():
        if key not in [key for key, _ in layers.values()]:
            assert torch.equal(back[key], tensor)
        else:  # To two roundings, each half a unit of float16.
            assert (back[key].double() - tensor.double()).norm() < 1e-3 * tensor.double().norm()


@pytest.mark.parametrize("rule", [(), ("--rank", "8")])
def test_a_limit_of_ranks_that_are_given_is_refused(tmp_path, capsys, rule):
    pair(tmp_path, {Q: planted((320, 320), 4, 0.1)})
    words = ["extract", str(tmp_path / "tuned.safetensors"), str(tmp_path / "base.safetensors")]
    assert main([*words, "--dry-run", *rule, "--max-rank", "4"]) == 1
    assert "max_rank limits the rank auto" in capsys.readouterr().err


def test_the_largest_rank_holds_for_convolutions_too(tmp_path, capsys):
    conv = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    pair(tmp_path, {conv: planted((320, 320, 3, 3), 40, 0.2)})
    ranks = extract(tmp_path, capsys, "--rank", "auto", "--conv-rank", "64", "--max-rank", "6")["ranks"]
    assert {int(rank) for rank in ranks} == {6}


def test_parts_that_there_are_not_are_refused_with_those_there_are(tmp_path, capsys):
    pair(tmp_path, {Q: planted((320, 320), 4, 0.1)})
    words = ["extract", str(tmp_path / "tuned.safetensors"), str(tmp_path / "base.safetensors"), "--dry-run"]
    assert main([*words, "--parts", "te2"]) == 1
    assert "Parts of both: te, unet." in capsys.readouterr().err


def test_a_picture_is_drawn_of_two_checkpoints_ranks_alone(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pair(tmp_path, {Q: planted((320, 320), 4, 0.1)})
    files = [str(tmp_path / "tuned.safetensors"), str(tmp_path / "base.safetensors")]
    picture = tmp_path / "x.png"
    refused = {("inspect", files[0]): "is a checkpoint", ("inspect", *files): "is a checkpoint"}
    refused |= {("extract", *files, "-o", str(tmp_path / "y")): "--dry-run"}
    for words, why in refused.items():
        assert main([*words, "--plot", str(picture)]) == 1
        assert why in capsys.readouterr().err
        assert not picture.exists()
    for words in (["compare", *files], ["extract", *files, "--dry-run"]):
        assert main([*words, "--plot", str(picture)]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()


def _plain(tmp_path, tensors, metadata):
    save_file(tensors, tmp_path / "tuned.safetensors", metadata)


def _yaml(tmp_path, tensors):
    _plain(tmp_path, tensors, None)
    text = "model:\n  params:\n    parameterization: 'v'  # as it was trained\n"
    (tmp_path / "tuned.yaml").write_text(text)


PREDICTING = {
    "v_pred": lambda path, tensors: _plain(path, {**tensors, "v_pred": torch.zeros(0)}, None),
    "edm": lambda path, tensors: _plain(path, {**tensors, "edm_vpred.sigma_max": torch.tensor(80.0)}, None),
    "metadata": lambda path, tensors: _plain(path, tensors, {"modelspec.prediction_type": "v"}),
    "yaml": _yaml,
    "none": lambda path, tensors: _plain(path, tensors, {"modelspec.prediction_type": "epsilon"}),
}


@pytest.mark.parametrize("how", PREDICTING)
def test_what_a_model_predicts_is_read_wherever_it_stands(tmp_path, capsys, how):
    _, tuned = pair(tmp_path, {Q: planted((320, 320), 4, 0.1)})
    PREDICTING[how](tmp_path, tuned)
    report = extract(tmp_path, capsys, "--rank", "4")
    warned = any("change of objective" in text for text in report["warnings"])
    said = read_header(tmp_path / "lora.safetensors").metadata["modelspec.prediction_type"]
    assert main(["inspect", str(tmp_path / "tuned.safetensors")]) == 0
    shown = "Predicts" in capsys.readouterr().out
    assert (warned, said, shown) == ((False, "epsilon", False) if how == "none" else (True, "v", True))


@pytest.mark.parametrize(("spread", "predicts"), [(0.05, ""), (0.2, "v")])
def test_stable_diffusion_2_tells_by_the_spread_of_one_bias(tmp_path, spread, predicts):
    keep = r"input_blocks\.1\.1|output_blocks\.11\.1\.transformer_blocks\.0\.norm1"
    tensors = checkpoint_tensors("sd1-ldm", keep=keep)
    for key in [key for key in tensors if "attn2.to_k" in key or "attn2.to_v" in key]:
        tensors[key] = torch.zeros(320, 1024).half()
    norm = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    tensors[norm] = torch.linspace(-1, 1, 320) * spread * 3**0.5
    save_file(tensors, tmp_path / "base.safetensors")
    facts = look(tmp_path / "base.safetensors")
    assert facts.base_model.startswith("Stable Diffusion 2")
    assert facts.prediction == predicts


def test_a_folder_tells_by_its_scheduler(tmp_path):
    for part in ("unet", "scheduler"):
        (tmp_path / "model" / part).mkdir(parents=True)
    make_checkpoint(tmp_path / "model" / "unet" / "model.safetensors", "sdxl-diffusers_unet_only")
    for said, predicts in (("v_prediction", "v"), ("epsilon", "")):
        path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({"prediction_type": said}))
        assert look(tmp_path / "model").prediction == predicts


def test_a_bias_that_changed_alone_is_written_beside_zeros(tmp_path, capsys):
    bias = "model.diffusion_model.time_embed.0.bias"
    conv = "model.diffusion_model.input_blocks.1.0.in_layers.2.bias"
    changes = {Q: planted((320, 320), 4, 0.1), bias: torch.full((1280,), 0.1), conv: torch.full((320,), 0.1)}
    base, tuned = pair(tmp_path, changes)
    report = extract(tmp_path, capsys, "--rank", "4")
    assert report["skipped"] == []
    lora = load_file(tmp_path / "lora.safetensors")
    for name, key in (("time_embedding_linear_1", bias), ("down_blocks_0_resnets_0_conv1", conv)):
        assert not lora[f"lora_unet_{name}.lora_up.weight"].any()
        wanted = tuned[key].double() - base[key].double()
        assert torch.allclose(lora[f"lora_unet_{name}.diff_b"].double(), wanted, atol=1e-4)
    words = [tmp_path / "base.safetensors", tmp_path / "lora.safetensors", "-o", tmp_path / "back"]
    assert main(["bake", *map(str, words)]) == 0
    back = load_file(tmp_path / "back.safetensors")
    for key in (bias, conv):
        assert torch.allclose(back[key].double(), tuned[key].double(), atol=1e-4)
    capsys.readouterr()
    # Without convolutions, and where the size is limited, such a bias is left out and counted.
    for words, count in ((("--rank", "4", "--conv-rank", "0"), 1), (("--size", "1"), 2)):
        (text,) = extract(tmp_path, capsys, *words)["skipped"]
        assert text.startswith(f"{count} ")


def test_a_bias_beside_a_whole_difference_is_written(tmp_path, capsys):
    first = "model.diffusion_model.input_blocks.0.0"
    names = {f"{first}.weight": torch.full((320, 4, 3, 3), 0.01), f"{first}.bias": torch.full((320,), 0.1)}
    keep = r"input_blocks\.[01]\.|layers\.0\."
    base = checkpoint_tensors("sd1-ldm", keep=keep)
    tuned = {key: tensor + names[key].half() if key in names else tensor for key, tensor in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    extract(tmp_path, capsys, "--rank", "64", "--conv-rank", "64")
    lora = load_file(tmp_path / "lora.safetensors")
    assert {key for key in lora if "conv_in" in key} == {"lora_unet_conv_in.diff", "lora_unet_conv_in.diff_b"}


def test_embeddings_and_vaes_that_differ_are_named(tmp_path, capsys):
    token = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    keep = r"input_blocks\.1\.|layers\.0\.|token_embedding|first_stage_model.decoder.conv_in"
    base = checkpoint_tensors("sd1-ldm", keep=keep)
    vae = "first_stage_model.decoder.conv_in.bias"
    tuned = {**base, token: base[token] + 0.01, vae: base[vae] + 1}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    error = extract(tmp_path, capsys, rc=1)
    assert "their matrices are equal" in error
    assert "embeddings differ, which no LoRA holds: lora_te_text_model_embeddings_token_embedding" in error
    assert "VAEs differ" in error
    save_file({**tuned, Q: tuned[Q] + 0.01}, tmp_path / "tuned.safetensors")
    assert any("token_embedding" in text for text in extract(tmp_path, capsys)["skipped"])
    assert extract(tmp_path, capsys, "--parts", "unet")["skipped"] == []


def test_the_rounding_that_two_files_differ_by_is_that_of_what_differs(tmp_path, capsys):
    base, _ = pair(tmp_path, {})
    names = [key for key in base if key.startswith("model.diffusion_model") and base[key].ndim == 2]
    tuned = {key: t.float().to(torch.float8_e5m2) if key in names else t for key, t in base.items()}
    save_file(tuned, tmp_path / "tuned.safetensors")
    assert "only by rounding (float16 against float8 e5m2)" in extract(tmp_path, capsys, rc=1)


@pytest.mark.parametrize("layout", ["sd1-ldm", "sdxl-sgm", "flux-flux"])
def test_the_size_that_is_foreseen_is_not_exceeded(tmp_path, layout):
    base = checkpoint_tensors(layout)
    generator = torch.Generator().manual_seed(4)
    tuned = {
        key: (t.float() + 0.005 * torch.randn(t.shape, generator=generator)).half()
        if t.is_floating_point()
        else t
        for key, t in base.items()
    }
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    files = (tmp_path / "tuned.safetensors", tmp_path / "base.safetensors")
    for number, how in enumerate(
        ({"rank": 1}, {"rank": 8}, {"rank": 8, "conv_rank": 2, "dialect": "diffusers"})
    ):
        settings = ExtractSettings(**how)
        output = tmp_path / f"lora{number}.safetensors"
        run_extract(*files, output, settings)
        assert 0.8 < output.stat().st_size / foresee(*files, settings).size_bytes <= 1 or number == 0
        assert output.stat().st_size <= foresee(*files, settings).size_bytes


class _Full:
    """A file on a full disk: what waits in its buffer cannot be written when it is closed, either."""

    def seek(self, *place):
        return 0

    def write(self, data):
        return len(data)

    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    close = flush


def test_a_disk_that_becomes_full_is_one_sentence(tmp_path, capsys, monkeypatch):
    pair(tmp_path, {Q: planted((320, 320), 4, 0.1)})
    before = sorted(tmp_path.iterdir())
    for opened in (lambda dir: _Full(), lambda dir: _Full().flush()):
        monkeypatch.setattr("lib_loramerge.checkpoints.tensors.tempfile.TemporaryFile", opened)
        error = extract(tmp_path, capsys, rc=1)
        assert "no room for the LoRA while it is made (No space left" in error
        assert error.count("\n") == 1
        assert sorted(tmp_path.iterdir()) == before


CONV = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
LORA_CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


def several(tmp_path, dtype):
    """Differences of all kinds of spectra: planted, falling, hardly falling, and of a convolution."""
    generator = torch.Generator().manual_seed(8)
    changes = {
        Q: planted((320, 320), 12, 0.05),
        Q.replace("attn1.to_q", "attn2.to_k"): torch.randn(320, 768, generator=generator) * 0.002,
        Q.replace("attn1.to_q", "ff.net.2"): spread((320, 1280), 1.0, 1.0, 3),
        CONV: spread((320, 320, 3, 3), 0.25, 2.0, 4),
        TE_Q: spread((768, 768), 0.5, 1.0, 5),
        NORM: torch.full((320,), 0.25),
        Q.replace("to_q.weight", "to_out.0.bias"): torch.full((320,), 0.25),
    }
    return pair(tmp_path, changes, dtype=dtype)


def dry_run(tmp_path, capsys, *words):
    files = [str(tmp_path / name) for name in ("tuned.safetensors", "base.safetensors")]
    assert main(["extract", *files, "--dry-run", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def singular_values(base, tuned):
    """Of all matrices that differ, by float64 LAPACK; and whether it is a convolution."""
    for key, matrix in tuned.items():
        difference = (matrix.double() - base[key].double()).numpy()
        if difference.ndim > 1 and difference.any() and not key.startswith(("first_stage", "model_ema")):
            flat = difference.reshape(difference.shape[0], -1)
            yield np.linalg.svd(flat, compute_uv=False), difference.ndim == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_dry_run_tells_the_error_of_every_rank(tmp_path, capsys, dtype):
    spectra = list(singular_values(*several(tmp_path, dtype)))
    report = dry_run(tmp_path, capsys)
    advice = report["advice"]
    points = {point["rank"]: point["error"] for point in advice["uniform"]}
    assert list(points) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
    total = sum(float((values**2).sum()) for values, _ in spectra)
    for rank, error in points.items():
        lost = sum(float((v[min(rank, 32 if conv else rank) :] ** 2).sum()) for v, conv in spectra)
        assert error == pytest.approx((lost / total) ** 0.5, abs=2e-4), rank
    assert report["error"] == pytest.approx(points[64], abs=1e-3)
    assert (advice["chosen_rank"], advice["largest"]) == (64, 128)
    shares = [sum(float(v[i] ** 2) for v, conv in spectra if not conv) for i in range(128)]
    np.testing.assert_allclose(advice["spectrum"], np.sqrt(np.array(shares) / total), atol=1e-4)
    blocks = advice["kept_by_block"]
    assert set(blocks) == {"BASE", "IN01"}
    te = next(values for values, _ in spectra if len(values) == 768)
    kept = [float((te[:rank] ** 2).sum() / (te**2).sum()) ** 0.5 for rank in points]
    np.testing.assert_allclose(blocks["BASE"], kept, atol=1e-3)


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_each_line_of_a_dry_run_is_the_file_that_its_rule_writes(tmp_path, capsys, dialect):
    several(tmp_path, torch.float16)
    advice = dry_run(tmp_path, capsys, "--dialect", dialect)["advice"]
    points = {point["rank"]: point for point in advice["uniform"]}
    wanted = [(("--rank", str(rank)), points[rank]) for rank in (12, 96)]
    wanted.append((("--rank", "auto"), advice["auto"]))
    budget = advice["allotted"][12]["size_bytes"]
    wanted.append((("--size", str(budget / 1e6)), advice["allotted"][12]))
    for rule, point in wanted:
        report = extract(tmp_path, capsys, *rule, "--dialect", dialect)
        size = (tmp_path / "lora.safetensors").stat().st_size
        assert size <= point["size_bytes"], rule
        assert point["size_bytes"] - size < 0.02 * size + 2500, rule
        assert report["error"] == pytest.approx(point["error"], abs=1e-3), rule
        foreseen = dry_run(tmp_path, capsys, *rule, "--dialect", dialect)
        assert size <= foreseen["size_bytes"] <= 1.02 * size + 2500, rule
        assert foreseen["ranks"] == report["ranks"], rule
        assert foreseen["error"] == pytest.approx(report["error"], abs=1e-4), rule
    auto = advice["auto"]
    report = extract(tmp_path, capsys, "--rank", "auto", "--dialect", dialect)
    ranks = sorted(int(rank) for rank, count in report["ranks"].items() for _ in range(count))
    assert (auto["least"], auto["most"], auto["layers"]) == (ranks[0], ranks[-1], len(ranks))
    assert (auto["median"], auto["capped"]) == (ranks[(len(ranks) - 1) // 2], report["capped"])


def test_a_dry_run_tells_the_least_rank_and_file_for_an_error(tmp_path, capsys):
    spectra = list(
        singular_values(
            *pair(
                tmp_path,
                {Q: planted((320, 320), 12, 0.1), TE_Q: spread((768, 768), 1.0, 1.0, 5)},
                dtype=torch.float32,
            )
        )
    )
    advice = dry_run(tmp_path, capsys)["advice"]
    total = sum(float((values**2).sum()) for values, _ in spectra)
    least = {}
    for target in (0.01, 0.05, 0.1):
        lost = (sum(float((v[rank:] ** 2).sum()) for v, _ in spectra) for rank in range(129))
        rank = next((rank for rank, own in enumerate(lost) if own <= target**2 * total), None)
        least |= {} if rank is None else {f"{target:g}": rank}
    assert advice["smallest_rank"] == least
    assert least
    for target, size in advice["smallest_size"].items():
        report = extract(tmp_path, capsys, "--size", str(size / 1e6))
        assert report["error"] <= float(target) + 1e-4
        assert extract(tmp_path, capsys, "--size", str(size / 1e6 - 0.006))["error"] > float(target)


def test_a_dry_run_goes_up_to_the_rank_that_is_asked_for_or_to_the_largest(tmp_path, capsys):
    several(tmp_path, torch.float32)
    for words, largest in (
        (("--rank", "140"), 140),
        (("--rank", "auto", "--max-rank", "10"), 10),
        (("--size", "0.3", "--max-rank", "20"), 20),
        (("--retain", "0.9"), 128),
    ):
        advice = dry_run(tmp_path, capsys, *words)["advice"]
        assert advice["largest"] == advice["uniform"][-1]["rank"] == largest
        assert advice["auto"]["most"] == min(largest, 128)
        assert advice["auto"]["capped"] > 0
    text = dry_run(tmp_path, capsys, "--conv-rank", "0")["advice"]
    assert text["uniform"][-1]["error"] > 0.5


def test_a_dry_run_prints_the_table_and_writes_nothing(tmp_path, capsys):
    several(tmp_path, torch.bfloat16)
    files = [str(tmp_path / name) for name in ("tuned.safetensors", "base.safetensors")]
    before = sorted(tmp_path.iterdir())
    texts = []
    for words in (["extract", *files, "--dry-run"], ["compare", *files]):
        assert main(words) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    lines = texts[0].splitlines()
    assert sum(line.split()[:1] == ["64"] for line in lines) == 1
    assert any(line.startswith("Rank above the rounding (--rank auto)") for line in lines)
    assert any("% of it is rounding" in line for line in lines)
    assert any("te, of whose change" in line for line in lines)
    assert sorted(tmp_path.iterdir()) == before


def test_the_share_of_rounding_is_told_by_part(tmp_path, capsys):
    """Rounding of two bfloat16 files, from the numbers before they were rounded."""
    change = {Q: planted((320, 320), 4, 0.02), TE_Q: planted((768, 768), 4, 0.05)}
    base, tuned = pair(tmp_path, change, dtype=torch.bfloat16)
    report = dry_run(tmp_path, capsys)
    for part, key in (("unet", Q), ("te", TE_Q)):
        difference = tuned[key].double() - base[key].double()
        noise = difference - change[key].double()
        share = float(noise.square().sum() / difference.square().sum())
        assert report["noise_by_part"][part] == pytest.approx(share, rel=0.05), part
    assert report["advice"]["rounding"] == pytest.approx(report["noise"] ** 0.5)


def test_a_dry_run_checks_the_place(tmp_path, capsys, monkeypatch):
    from lib_loramerge.files import place

    pair(tmp_path, {Q: planted((320, 320), 2, 0.1)})
    files = [str(tmp_path / name) for name in ("tuned.safetensors", "base.safetensors")]
    taken = ["extract", *files, "--dry-run", "-o", files[1]]
    for words, why in ((taken, "exists"), ([*taken, "--overwrite"], "is one of the inputs")):
        assert main(words) == 1
        assert why in capsys.readouterr().err
    words = ["extract", *files, "--dry-run", "-o", str(tmp_path / "new")]
    assert main(words) == 0
    capsys.readouterr()
    monkeypatch.setattr(place, "free_space", lambda folder: 20_000)
    assert main(words) == 1
    assert "are needed, 20" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"tuned.safetensors", "base.safetensors"}


def test_a_dry_run_can_be_stopped(tmp_path):
    from lib_loramerge.errors import Cancelled

    pair(tmp_path, {Q: planted((320, 320), 2, 0.1)})
    asked = iter(range(10**9))
    paths = (tmp_path / "tuned.safetensors", tmp_path / "base.safetensors")
    with pytest.raises(Cancelled):
        run_extract(*paths, None, ExtractSettings(), cancel=lambda: next(asked) >= 5)


@pytest.mark.parametrize("kind", ["random", "planted", "hardly falling"])
def test_the_errors_at_all_ranks_are_known_from_the_largest_values(kind):
    """Also of matrices so large that not all of their values are computed."""
    shape = (900, 1300)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.001
    matrix = planted(shape, 20, 0.2) + matrix if kind == "planted" else matrix
    matrix = spread(shape, 0.25, 1.0, 6) if kind == "hardly falling" else matrix
    energy = float(matrix.double().square().sum())
    found = leading(matrix, 128, "layer", energy=energy).values
    assert len(found) == 128
    exact = np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
    for rank in range(129):
        error = max(0.0, 1 - float(found[:rank].square().sum()) / energy) ** 0.5
        assert error == pytest.approx((exact[rank:].sum() / energy) ** 0.5, abs=1e-4), rank


def test_a_norm_that_changed_alone_is_a_lora_of_its_own(tmp_path, capsys):
    base, tuned = pair(tmp_path, {NORM: torch.full((320,), 0.25)})
    foreseen = dry_run(tmp_path, capsys)
    assert (foreseen["advice"]["uniform"], foreseen["advice"]["auto"]) == ([], None)
    report = extract(tmp_path, capsys)
    assert report["error"] == 0
    assert report["size_bytes"] <= foreseen["size_bytes"] <= report["size_bytes"] + 1000
    lora = load_file(tmp_path / "lora.safetensors")
    [weight] = [tensor for key, tensor in lora.items() if key.endswith(".w_norm")]
    assert torch.equal(weight, (tuned[NORM].double() - base[NORM].double()).half())
    assert "Nothing of the difference" in extract(tmp_path, capsys, "--vectors", "none", rc=1)
    files = [str(tmp_path / name) for name in ("tuned.safetensors", "base.safetensors")]
    assert main(["compare", *files]) == 0
    assert "rank" not in capsys.readouterr().out.split("Worst layers")[1]
    assert main(["compare", *files, "--plot", str(tmp_path / "x.png")]) == 1
    assert "no layer has a rank" in capsys.readouterr().err


def test_no_higher_rank_is_advised_for_rounding(tmp_path, capsys):
    noise = torch.randn(320, 320, generator=torch.Generator().manual_seed(3)) * 2e-5
    pair(tmp_path, {NORM: torch.full((320,), 0.25), Q: noise}, dtype=torch.bfloat16)
    report = dry_run(tmp_path, capsys, "--rank", "auto")
    assert report["error"] == 1
    assert report["noise"] > 0.9
    assert not any("higher rank" in text for text in report["warnings"])
