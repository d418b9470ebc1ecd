"""The merged file at strength 1 is the weighted sum of its inputs, judged in float64 without our code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_loramerge.blocks import bundled_preset_path, load_presets
from lib_loramerge.errors import IncompatibleError, LoraMergeError, RecipeError
from lib_loramerge.files import LoraFolder
from lib_loramerge.merge import plan_merge, run_merge
from lib_loramerge.recipe import MergeRecipe, parse_inputs
from tests.helpers.fixtures import (
    SD1_LAYERS,
    SDXL_LAYERS,
    dense_deltas,
    lora_tensors,
    make_lora,
    metadata_of,
    relative_error,
    sample_data,
    weighted_sum,
)

CONV_LAYERS = {
    "lora_unet_down_blocks_0_resnets_0_conv1": (32, 16, 3, 3),
    "lora_unet_down_blocks_0_attentions_0_proj_in": (32, 32, 1, 1),
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (320, 768),
}


def merge(folder: Path, *inputs: str, out: str = "out", workers: int | None = None, **fields):
    """Merge ``inputs`` (names in ``folder``) as a user's recipe does; the report."""
    recipe = MergeRecipe(inputs=parse_inputs(list(inputs)), **fields)
    plan = plan_merge(recipe, find=LoraFolder([folder]).find, presets=load_presets([bundled_preset_path()]))
    return run_merge(plan, folder / f"{out}.safetensors", workers=workers)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_lora(tmp_path / "a.safetensors", SD1_LAYERS, rank=4, alpha=2, seed=1)
    make_lora(tmp_path / "b.safetensors", SD1_LAYERS, rank=6, alpha=6, seed=2)
    return tmp_path


@pytest.mark.parametrize("mode", ["concat", "svd"])
@pytest.mark.parametrize("weights", [(0.8, 0.5), (1.0, -1.0), (-0.3, 1.7), (2.5, 0.0)])
def test_the_file_is_the_weighted_sum(folder, mode, weights):
    merge(
        folder, f"a:{weights[0]}", f"b:{weights[1]}", mode=mode, rank="same" if mode == "concat" else "full"
    )
    wanted = weighted_sum([(folder / "a.safetensors", weights[0]), (folder / "b.safetensors", weights[1])])
    assert relative_error(dense_deltas(folder / "out.safetensors"), wanted) < 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 4e-4), ("bfloat16", 3.5e-3), ("float32", 1e-6)])
def test_rounding_costs_what_the_dtype_costs_and_the_report_says_it(folder, dtype, bound):
    report = merge(folder, "a:0.8", "b:0.5", rank="full", dtype=dtype)
    wanted = weighted_sum([(folder / "a.safetensors", 0.8), (folder / "b.safetensors", 0.5)])
    error = relative_error(dense_deltas(folder / "out.safetensors"), wanted)
    assert error < bound
    assert report.error == pytest.approx(error, rel=0.02, abs=1e-7)


def test_truncation_is_the_best_there_is_and_the_report_says_its_error(folder):
    report = merge(folder, "a:0.8", "b:0.5", rank=3)
    wanted = weighted_sum([(folder / "a.safetensors", 0.8), (folder / "b.safetensors", 0.5)])
    best = norm = 0.0
    for delta in wanted.values():
        values = torch.linalg.svdvals(delta)
        best += float((values[3:] ** 2).sum())
        norm += float((values**2).sum())
    error = relative_error(dense_deltas(folder / "out.safetensors"), wanted)
    assert error == pytest.approx((best / norm) ** 0.5, rel=1e-6)
    assert report.error == pytest.approx(error, rel=1e-6)
    assert report.kept == pytest.approx((1 - best / norm) ** 0.5, rel=1e-6)


def test_layers_in_only_one_file_and_any_mix_of_ranks_alphas_and_dtypes(tmp_path):
    names = list(SD1_LAYERS)
    first = {name: SD1_LAYERS[name] for name in names[:4]}
    second = {name: SD1_LAYERS[name] for name in names[2:]}
    ranks = {name: 1 + index for index, name in enumerate(first)}
    make_lora(tmp_path / "a.safetensors", first, rank=ranks, alpha=None, seed=1, dtype=torch.float16)
    make_lora(tmp_path / "b.safetensors", second, rank=5, alpha=0.5, seed=2, dtype=torch.bfloat16)
    report = merge(tmp_path, "a:0.7", "b:-1.2", rank="full")
    assert report.dtype == "float32"
    assert any("float16 and bfloat16" in text for text in report.warnings)
    wanted = weighted_sum([(tmp_path / "a.safetensors", 0.7), (tmp_path / "b.safetensors", -1.2)])
    assert relative_error(dense_deltas(tmp_path / "out.safetensors"), wanted) < 1e-6


@pytest.mark.parametrize("mode", ["concat", "svd"])
def test_convolutions_keep_their_kernels(tmp_path, mode):
    make_lora(tmp_path / "a.safetensors", CONV_LAYERS, rank=3, alpha=1, seed=1)
    make_lora(tmp_path / "b.safetensors", CONV_LAYERS, rank=2, alpha=2, seed=2)
    merge(tmp_path, "a:0.5", "b:1.5", mode=mode, rank="full" if mode == "svd" else "same")
    tensors = load_file(tmp_path / "out.safetensors")
    assert tensors["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"].shape == (5, 16, 3, 3)
    assert tensors["lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight"].shape == (32, 5, 1, 1)
    assert tensors["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"].shape == (5, 32, 1, 1)
    wanted = weighted_sum([(tmp_path / "a.safetensors", 0.5), (tmp_path / "b.safetensors", 1.5)])
    assert relative_error(dense_deltas(tmp_path / "out.safetensors"), wanted) < 1e-6


def test_conv_rank_counts_for_convolutions_alone(tmp_path):
    make_lora(tmp_path / "a.safetensors", CONV_LAYERS, rank=4, alpha=4)
    merge(tmp_path, "a", conv_rank=2)
    tensors = load_file(tmp_path / "out.safetensors")
    ranks = {key.split(".")[0]: t.shape[0] for key, t in tensors.items() if "lora_down" in key}
    assert ranks == dict(zip(CONV_LAYERS, (2, 4, 4)))


def test_text_encoder_and_denoiser_have_strengths_of_their_own(folder):
    merge(folder, "a:0.3:0.9", rank="full")
    got, source = dense_deltas(folder / "out.safetensors"), dense_deltas(folder / "a.safetensors")
    for layer, delta in source.items():
        strength = 0.3 if layer.startswith("lora_te_") else 0.9
        torch.testing.assert_close(got[layer], strength * delta, rtol=1e-5, atol=1e-9)


def test_each_text_encoder_can_have_its_own_strength(tmp_path):
    make_lora(tmp_path / "a.safetensors", SDXL_LAYERS, rank=2, alpha=2)
    merge(tmp_path, "a:0.5:te1=0.1:te2=-0.2", rank="full")
    got, source = dense_deltas(tmp_path / "out.safetensors"), dense_deltas(tmp_path / "a.safetensors")
    strengths = {"lora_te1": 0.1, "lora_te2": -0.2, "lora_unet": 0.5}
    for layer, delta in source.items():
        wanted = next(s for prefix, s in strengths.items() if layer.startswith(prefix)) * delta
        torch.testing.assert_close(got[layer], wanted, rtol=1e-5, atol=1e-9)


def test_block_weights_scale_the_layers_of_their_blocks(folder):
    # 17 entries: BASE IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03 ... OUT11
    weights = "0.5,1,0,0,0,0,0,0.25,0,0,2,0,0,0,0,0,0"
    merge(folder, f"a:0.8:lbw={weights}", rank="full")
    got, source = dense_deltas(folder / "out.safetensors"), dense_deltas(folder / "a.safetensors")
    expected = {
        "lora_unet_down_blocks_0_attentions_0": 1.0,  # IN01
        "lora_unet_mid_block": 0.25,  # M00
        "lora_unet_up_blocks_1_attentions_2": 2.0,  # OUT05
        "lora_te_": 0.5,  # BASE
    }
    for layer, delta in source.items():
        block = next(value for prefix, value in expected.items() if layer.startswith(prefix))
        torch.testing.assert_close(got[layer], 0.8 * block * delta, rtol=1e-5, atol=1e-9)


def test_a_layer_of_weight_zero_is_left_out_and_counted(folder):
    report = merge(folder, "a:0:1", rank="full")
    kept = dense_deltas(folder / "out.safetensors")
    assert kept
    assert not any(layer.startswith("lora_te") for layer in kept)
    assert report.layers == len(kept)
    assert report.layers_left_out == len(SD1_LAYERS) - len(kept)


def test_attention_of_the_large_text_encoder_is_written_whole(tmp_path):
    """A1111 applies q, k, v and out of SDXL's second encoder only together."""
    layers = dict(SDXL_LAYERS)
    for part in ("k", "out"):
        del layers[f"lora_te2_text_model_encoder_layers_0_self_attn_{part}_proj"]
    make_lora(tmp_path / "a.safetensors", layers, rank=2, alpha=2)
    merge(tmp_path, "a", rank="full")
    got = dense_deltas(tmp_path / "out.safetensors")
    assert set(got) == set(SDXL_LAYERS)
    for part in ("k", "out"):
        added = got[f"lora_te2_text_model_encoder_layers_0_self_attn_{part}_proj"]
        assert added.shape == (1280, 1280)
        assert not added.any()


@pytest.mark.parametrize("mode", ["concat", "svd"])
def test_cancelled_layers_are_absent_not_noise(folder, mode):
    tensors = load_file(folder / "a.safetensors")
    changed = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2"
    tensors[f"{changed}.lora_up.weight"] = tensors[f"{changed}.lora_up.weight"] * 3
    save_file(tensors, folder / "c.safetensors")
    report = merge(folder, "c", "a:-1", mode=mode)
    assert set(dense_deltas(folder / "out.safetensors")) == {changed}
    assert report.layers == 1


def test_what_cancels_everywhere_is_refused(folder):
    with pytest.raises(LoraMergeError, match="cancel"):
        merge(folder, "a", "a:-1")
    assert not (folder / "out.safetensors").exists()


def test_other_factors_of_the_same_deltas_give_the_same_file(folder):
    tensors = load_file(folder / "a.safetensors")
    generator = torch.Generator().manual_seed(5)
    for layer in SD1_LAYERS:
        up, down = tensors[f"{layer}.lora_up.weight"].double(), tensors[f"{layer}.lora_down.weight"].double()
        change = torch.randn(4, 4, generator=generator, dtype=torch.float64) + 3 * torch.eye(4)
        tensors[f"{layer}.lora_up.weight"] = (up @ change).float()
        tensors[f"{layer}.lora_down.weight"] = (torch.linalg.inv(change) @ down).float()
    save_file(tensors, folder / "c.safetensors")
    merge(folder, "a:0.8", "b:0.5", rank=5, out="from_a")
    merge(folder, "c:0.8", "b:0.5", rank=5, out="from_c")
    difference = relative_error(
        dense_deltas(folder / "from_c.safetensors"), dense_deltas(folder / "from_a.safetensors")
    )
    assert difference < 1e-5


@pytest.mark.parametrize("mode", ["concat", "svd"])
def test_the_order_of_the_inputs_does_not_matter(folder, mode):
    merge(folder, "a:0.8", "b:-0.5", mode=mode, out="ab")
    merge(folder, "b:-0.5", "a:0.8", mode=mode, out="ba")
    assert (
        relative_error(dense_deltas(folder / "ab.safetensors"), dense_deltas(folder / "ba.safetensors"))
        < 1e-6
    )


def test_the_same_recipe_gives_the_same_bytes_from_any_number_of_threads(folder):
    contents = []
    for workers in (1, 2, 4):
        report = merge(folder, "a:0.8", "b:0.5", rank=3, workers=workers, dtype="float16")
        contents.append(Path(report.output).read_bytes())
        Path(report.output).unlink()
    assert contents[0] == contents[1] == contents[2]


def test_merging_leaves_torch_as_it_was(folder):
    torch.manual_seed(7)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    merge(folder, "a", "b")
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_dyn_uses_the_first_ranks_at_an_unchanged_scale(folder):
    merge(folder, "a:1:1:2", rank="full")
    tensors, got = load_file(folder / "a.safetensors"), dense_deltas(folder / "out.safetensors")
    for layer in SD1_LAYERS:
        up, down = tensors[f"{layer}.lora_up.weight"].double(), tensors[f"{layer}.lora_down.weight"].double()
        torch.testing.assert_close(got[layer], 2 / 4 * up[:, :2] @ down[:2], rtol=1e-5, atol=1e-9)


def test_retain_keeps_the_share_it_promises_with_the_smallest_ranks(folder):
    merge(folder, "a:0.8", "b:0.5", retain=0.9)
    wanted = weighted_sum([(folder / "a.safetensors", 0.8), (folder / "b.safetensors", 0.5)])
    tensors = load_file(folder / "out.safetensors")
    for layer, delta in wanted.items():
        squares = torch.linalg.svdvals(delta) ** 2
        rank = tensors[f"{layer}.lora_down.weight"].shape[0]
        assert float(squares[:rank].sum()) >= 0.81 * float(squares.sum()) * (1 - 1e-9)
        assert float(squares[: rank - 1].sum()) < 0.81 * float(squares.sum())


class TestSize:
    @pytest.fixture
    def large(self, tmp_path):
        generator = torch.Generator().manual_seed(3)
        for name, seed in (("a", 1), ("b", 2)):
            tensors = lora_tensors(SD1_LAYERS, rank=24, alpha=24, seed=seed)
            for layer in SD1_LAYERS:
                # Layers differ in strength and decay, as trained ones do.
                strength = float(torch.rand(1, generator=generator)) * 3
                decay = torch.arange(1, 25) ** -float(torch.rand(1, generator=generator) * 2)
                tensors[f"{layer}.lora_up.weight"] *= strength * decay
            save_file(tensors, tmp_path / f"{name}.safetensors")
        return tmp_path

    @pytest.mark.parametrize("megabytes", [0.08, 0.12, 0.2])
    def test_the_file_is_no_larger_and_uses_the_room(self, large, megabytes):
        report = merge(large, "a:0.8", "b:0.5", size=megabytes, dtype="float16")
        size = (large / "out.safetensors").stat().st_size
        assert size == report.size_bytes
        assert size <= megabytes * 1e6
        assert size >= 0.93 * megabytes * 1e6

    def test_it_beats_one_rank_for_all_at_the_same_bytes(self, large):
        uniform = merge(large, "a:0.8", "b:0.5", rank=6, dtype="float16", out="uniform")
        fitted = merge(large, "a:0.8", "b:0.5", size=uniform.size_bytes / 1e6, dtype="float16", out="fitted")
        wanted = weighted_sum([(large / "a.safetensors", 0.8), (large / "b.safetensors", 0.5)])
        errors = [
            relative_error(dense_deltas(large / f"{n}.safetensors"), wanted) for n in ("fitted", "uniform")
        ]
        assert fitted.size_bytes <= uniform.size_bytes
        assert errors[0] < 0.9 * errors[1]

    def test_too_small_a_size_is_refused_with_the_least_that_works(self, large):
        with pytest.raises(LoraMergeError, match="too small"):
            merge(large, "a", "b", size=0.001)
        assert not (large / "out.safetensors").exists()

    @pytest.mark.parametrize("mode", ["svd", "average"])
    def test_what_is_lost_with_layers_that_have_no_room_is_reported(self, large, mode):
        tensors = load_file(large / "a.safetensors")
        tensors[f"{next(iter(SD1_LAYERS))}.lora_up.weight"] *= 100  # It takes all the room.
        save_file(tensors, large / "a.safetensors")
        report = merge(large, "a:0.9", "b:0.1", size=0.03, dtype="float16", mode=mode)
        assert 0 < report.layers_left_out < len(SD1_LAYERS)
        wanted = weighted_sum([(large / "a.safetensors", 0.9), (large / "b.safetensors", 0.1)])
        error = relative_error(dense_deltas(large / "out.safetensors"), wanted)
        assert report.error == pytest.approx(error, rel=1e-3)
        assert report.from_sum is None or report.from_sum == pytest.approx(error, rel=1e-3)

    @pytest.mark.parametrize("mode", ["concat", "add"])
    def test_a_mode_that_keeps_all_ranks_refuses_it_and_shows_of_an_idle_rank(self, large, mode):
        with pytest.raises(RecipeError, match="keeps all ranks"):
            merge(large, "a", "b", mode=mode, size=0.1)
        report = merge(large, "a", "b", mode=mode, rank=2)
        assert [note for note in report.warnings if "does not count" in note]

    @pytest.mark.parametrize("cancelled", [False, True])
    def test_layers_of_zeros_that_complete_a_group_are_in_the_size(self, tmp_path, cancelled):
        """A host takes q, k, v and out of the second text encoder only together; the file has q and v."""
        missing = ("k_proj", "out_proj")
        layers = {name: shape for name, shape in SDXL_LAYERS.items() if not name.endswith(missing)}
        for name, seed in (("a", 1), ("b", 2)):
            tensors = lora_tensors(layers, rank=12, alpha=12, seed=seed)
            if cancelled:
                same = lora_tensors(layers, rank=12)
                tensors |= {key: tensor for key, tensor in same.items() if "_v_" in key}
            save_file(tensors, tmp_path / f"{name}.safetensors")
        recipe = MergeRecipe(parse_inputs(["a", "b:-1"]))
        plan = plan_merge(recipe, find=LoraFolder([tmp_path]).find, presets=load_presets([]))
        whole = merge(tmp_path, "a", "b:-1", out="whole")
        assert whole.layers == len(layers) + 2 == plan.to_json()["layers"]
        assert whole.size_bytes <= plan.predicted_bytes
        for megabytes in (0.06, 0.1, 0.3):
            report = merge(tmp_path, "a", "b:-1", size=megabytes, dtype="float16", out=f"s{megabytes}")
            assert 0.93 * megabytes * 1e6 <= report.size_bytes <= megabytes * 1e6
        four = [key for key in load_file(tmp_path / "s0.06.safetensors") if "te2" in key and "lora_up" in key]
        assert len(four) == 4

    def test_more_room_than_needed_keeps_everything(self, large):
        merge(large, "a:0.8", "b:0.5", size=100)
        wanted = weighted_sum([(large / "a.safetensors", 0.8), (large / "b.safetensors", 0.5)])
        assert relative_error(dense_deltas(large / "out.safetensors"), wanted) < 1e-6


def test_add_is_the_original_formula_and_its_error_is_reported(tmp_path):
    make_lora(tmp_path / "a.safetensors", SD1_LAYERS, rank=4, alpha=2, seed=1)
    make_lora(tmp_path / "b.safetensors", SD1_LAYERS, rank=4, alpha=8, seed=2)
    report = merge(tmp_path, "a:0.8", "b:-0.5", mode="add")
    a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    got = dense_deltas(tmp_path / "out.safetensors")
    for layer in SD1_LAYERS:
        ups = [t[f"{layer}.lora_up.weight"].double() for t in (a, b)]
        downs = [t[f"{layer}.lora_down.weight"].double() for t in (a, b)]
        up = 0.8 * ups[0] - 0.5 * 2 * ups[1]
        down = 0.8 * downs[0] - 0.5 * 2 * downs[1]
        torch.testing.assert_close(got[layer], 2 / 4 * up @ down, rtol=1e-5, atol=1e-9)
    wanted = weighted_sum([(tmp_path / "a.safetensors", 0.8), (tmp_path / "b.safetensors", -0.5)])
    assert report.error == pytest.approx(relative_error(got, wanted), rel=1e-6)
    assert report.error > 0.1


@pytest.mark.parametrize("mode", ["average", "ties"])  # Factors, and layers written whole.
def test_methods_that_mean_something_else_say_how_far_from_the_sum_they_are(folder, mode):
    report = merge(folder, "a:0.8", "b:-0.5", mode=mode, rank="full")
    wanted = weighted_sum([(folder / "a.safetensors", 0.8), (folder / "b.safetensors", -0.5)])
    distance = relative_error(dense_deltas(folder / "out.safetensors"), wanted)
    assert report.from_sum == pytest.approx(distance, rel=1e-6)
    assert report.error < 1e-6
    assert merge(folder, "a:0.8", "b:-0.5", out="sum").from_sum is None


def test_a_report_without_a_sum_to_compare_with_is_still_json(tmp_path):
    make_lora(tmp_path / "a.safetensors", SD1_LAYERS, rank=2, alpha=2, seed=1)
    tensors = load_file(tmp_path / "a.safetensors")
    turned = {key: -value if "lora_up" in key else value for key, value in tensors.items()}
    save_file(turned, tmp_path / "b.safetensors")
    report = merge(tmp_path, "a", "b:0.9999999", mode="add")
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["mode"] == "add"


def test_add_refuses_unequal_ranks_with_the_layer_and_the_way_out(folder):
    with pytest.raises(IncompatibleError, match=r"ranks 4, 6.*svd") as caught:
        merge(folder, "a", "b", mode="add")
    assert any(layer in str(caught.value) for layer in SD1_LAYERS)


def test_different_base_models_are_refused_with_the_reason(tmp_path):
    make_lora(tmp_path / "old.safetensors", SD1_LAYERS)
    make_lora(tmp_path / "new.safetensors", SDXL_LAYERS)
    with pytest.raises(IncompatibleError, match=r"768.*2048|2048.*768"):
        merge(tmp_path, "old", "new")


def test_layers_of_different_shape_are_refused_by_name(tmp_path):
    wider = dict(SD1_LAYERS)
    wider["lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2"] = (128, 640)
    make_lora(tmp_path / "a.safetensors", SD1_LAYERS)
    make_lora(tmp_path / "b.safetensors", wider)
    with pytest.raises(IncompatibleError, match=r"middle_block_1.*ff_net_2.*a\.safetensors.*b\.safetensors"):
        merge(tmp_path, "a", "b")


def test_broken_numbers_are_named_and_nothing_is_written(folder):
    tensors = load_file(folder / "a.safetensors")
    key = next(key for key in tensors if "lora_up" in key)
    tensors[key][0, 0] = float("nan")
    save_file(tensors, folder / "c.safetensors")
    with pytest.raises(LoraMergeError, match=r"c\.safetensors.*lora_up.*NaN"):
        merge(folder, "c", "b")
    assert not (folder / "out.safetensors").exists()


@pytest.mark.parametrize("field", [{"mode": "nonsense"}, {"params": {"density": 0.5}}])
def test_unknown_modes_and_parameters_are_refused(folder, field):
    with pytest.raises(RecipeError, match=r"nonsense|density"):
        merge(folder, "a", "b", **field)


def test_two_real_loras_are_merged_exactly():
    """The two trained LoRAs beside the checkout, where they are there."""
    data = sample_data()
    if data is None:
        return
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for stem in ("analog_sd15_kohya", "disney_sd15_kohya"):
            (folder / f"{stem}.safetensors").write_bytes((data / f"{stem}.safetensors").read_bytes())
        report = merge(folder, "analog_sd15_kohya:0.8", "disney_sd15_kohya:0.5", rank="full", dtype="float16")
        wanted = weighted_sum(
            [(data / "analog_sd15_kohya.safetensors", 0.8), (data / "disney_sd15_kohya.safetensors", 0.5)],
            every=8,
        )
        got = dense_deltas(folder / "out.safetensors", every=8)
        assert got.keys() == wanted.keys()
        assert relative_error(got, wanted) < 4e-4
        assert report.error < 4e-4
        assert metadata_of(folder / "out.safetensors")["ss_base_model_version"] == "sd_v1"


def test_one_lora_of_zeros_is_said_to_change_nothing(folder):
    tensors = load_file(folder / "a.safetensors")
    nothing = {key: tensor * 0 if "lora_up" in key else tensor for key, tensor in tensors.items()}
    save_file(nothing, folder / "nothing.safetensors", {"ss_base_model_version": "sd_v1"})
    with pytest.raises(IncompatibleError, match=r"nothing\.safetensors changes nothing: its layers are zero"):
        merge(folder, "nothing:1")
    with pytest.raises(IncompatibleError, match="The LoRAs cancel each other"):
        merge(folder, "a:1", "a:-1")
