"""What compare, advise and inspect say, against dense float64 and against the merge itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_loramerge import cli
from lib_loramerge.analysis import advise, compare, expected_seconds, inspect
from lib_loramerge.analysis.compare import Relation, _row
from lib_loramerge.blocks import bundled_preset_path, load_presets
from lib_loramerge.files import LoraFolder
from lib_loramerge.merge import MergePlan, plan_merge, run_merge
from lib_loramerge.merge.layer import open_merger
from lib_loramerge.merge.layout import output_names
from lib_loramerge.recipe import MergeRecipe, parse_inputs
from lib_loramerge.webui import plots
from tests.helpers.fixtures import (
    SD1_LAYERS,
    dense_deltas,
    lora_tensors,
    make_lora,
    relative_error,
    weighted_sum,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_lora(tmp_path / "a.safetensors", SD1_LAYERS, rank=4, alpha=2, seed=1)
    # b is a third of a, and something of its own: they agree in part.
    own = lora_tensors(SD1_LAYERS, rank=4, alpha=2, seed=2)
    same = load_file(tmp_path / "a.safetensors")
    for layer in SD1_LAYERS:
        up, down = f"{layer}.lora_up.weight", f"{layer}.lora_down.weight"
        own[up] = torch.cat([own[up], same[up] / 3], dim=1)
        own[down] = torch.cat([own[down], same[down]])
        own[f"{layer}.alpha"] = torch.tensor(4.0)
    save_file(own, tmp_path / "b.safetensors")
    return tmp_path


def plan(folder: Path, *inputs: str, **fields) -> MergePlan:
    recipe = MergeRecipe(inputs=parse_inputs(list(inputs)), **fields)
    return plan_merge(recipe, find=LoraFolder([folder]).find, presets=load_presets([bundled_preset_path()]))


def cosine(a, b) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


@pytest.mark.parametrize(("first", "second"), [(0.8, 0.5), (1.0, -0.7)])
def test_cosines_are_those_of_the_dense_deltas(folder, first, second):
    report = compare(plan(folder, f"a:{first}", f"b:{second}")).pairs[0]
    a, b = dense_deltas(folder / "a.safetensors"), dense_deltas(folder / "b.safetensors")
    a, b = {k: first * v for k, v in a.items()}, {k: second * v for k, v in b.items()}
    whole = (
        sum(float((a[k] * b[k]).sum()) for k in a)
        / (
            sum(float(v.square().sum()) for v in a.values())
            * sum(float(v.square().sum()) for v in b.values())
        )
        ** 0.5
    )
    assert report.whole.cosine == pytest.approx(whole, abs=1e-9)
    text = cosine(
        a["lora_te_text_model_encoder_layers_3_mlp_fc1"], b["lora_te_text_model_encoder_layers_3_mlp_fc1"]
    )
    assert report.layers["lora_te_text_model_encoder_layers_3_mlp_fc1"].cosine == pytest.approx(
        text, abs=1e-9
    )
    assert report.whole.norms[0] == pytest.approx(
        sum(float(v.square().sum()) for v in a.values()) ** 0.5, rel=1e-9
    )


def test_overlap_of_spaces_is_the_mean_squared_cosine_of_their_angles(folder):
    report = compare(plan(folder, "a", "b")).pairs[0]
    tensors = [load_file(folder / f"{name}.safetensors") for name in "ab"]
    layer = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    bases = [torch.linalg.qr(t[f"{layer}.lora_down.weight"].double().T).Q for t in tensors]
    wanted = float((torch.linalg.svdvals(bases[0].T @ bases[1]) ** 2).mean())
    assert report.layers[layer].inputs == pytest.approx(wanted, abs=1e-9)


def test_a_sign_conflict_is_the_weighted_share_of_elements_of_opposite_sign(folder):
    report = compare(plan(folder, "a", "b")).pairs[0]
    a, b = dense_deltas(folder / "a.safetensors"), dense_deltas(folder / "b.safetensors")
    layer = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    product = a[layer] * b[layer]
    wanted = float(-product[product < 0].sum() / product.abs().sum())
    assert report.layers[layer].sign_conflict == pytest.approx(wanted, abs=0.03)


def test_verdicts_distinguish_unrelated_from_same_and_opposed(folder):
    make_lora(folder / "c.safetensors", SD1_LAYERS, rank=4, alpha=2, seed=9)
    assert "orthogonal" in compare(plan(folder, "a", "c")).pairs[0].verdict
    assert "same" in compare(plan(folder, "a", "a:0.9")).pairs[0].verdict
    assert "against" in compare(plan(folder, "a", "a:-1")).pairs[0].verdict


def fighter(folder: Path, strength: float) -> None:
    """Saves d: a stranger to a, but ``strength`` times a in the middle block."""
    make_lora(folder / "c.safetensors", SD1_LAYERS, rank=4, alpha=2, seed=9)
    a, tensors = load_file(folder / "a.safetensors"), load_file(folder / "c.safetensors")
    tensors |= {key: value for key, value in a.items() if "_mid_block_" in key}
    for key in (key for key in tensors if "_mid_block_" in key and key.endswith("lora_up.weight")):
        tensors[key] = strength * tensors[key]
    save_file(tensors, folder / "d.safetensors")


def test_loras_that_fight_in_one_block_are_not_called_orthogonal_and_get_weights_for_it(folder):
    fighter(folder, -1.0)
    before = compare(plan(folder, "a", "d")).pairs[0]
    assert abs(before.whole.cosine) < 0.1
    assert "keeps all of both" not in before.verdict
    assert "pull against each other in M00" in before.verdict
    weights = before.verdict.partition("lbw=")[2].partition(")")[0]
    after = compare(plan(folder, "a", f"d:lbw={weights}")).pairs[0]
    for block, relation in before.blocks.items():
        wanted = relation.norms[1] * (0.5 if block == "M00" else 1)
        assert after.blocks[block].norms[1] == pytest.approx(wanted, rel=1e-9)


def test_blocks_in_which_loras_agree_or_one_drowns_the_other_are_named(folder):
    fighter(folder, 4.0)
    verdict = compare(plan(folder, "a", "d")).pairs[0].verdict
    assert "agree in M00" in verdict
    assert "d is more than three times as strong as the other in M00." in verdict


def test_of_many_pairs_those_are_drawn_that_fight(folder):
    fighter(folder, -1.0)
    inputs = ["c", "a:0.3:1", "b", "c:0.5", "d"]
    report = compare(plan(folder, *inputs))
    titles = [axis.get_title() for axis in plots.compare_figure(report).axes if axis.get_title()]
    assert titles[0] == "a  and  d"
    assert len(titles) == 4
    few = compare(plan(folder, *inputs[2:]))
    assert [axis.get_title() for axis in plots.compare_figure(few).axes if axis.get_title()] == [
        "b  and  c:  no conflict in any block", "b  and  d", "c  and  d:  no conflict in any block",
    ]  # fmt: skip


def norms_of(deltas: dict[str, torch.Tensor], made: MergePlan) -> dict[str, float]:
    """Norm of each block, from whole matrices."""
    blocks = {
        name: layer.block or "other" for layer in made.layers for name, _ in output_names(made, layer.layer)
    }
    sums: dict[str, float] = {}
    for name, delta in deltas.items():
        sums[blocks[name]] = sums.get(blocks[name], 0.0) + float(delta.square().sum())
    return {block: square**0.5 for block, square in sums.items()}


@pytest.mark.parametrize("mode", ["svd", "ties", "slerp", "add"])
def test_the_norms_of_the_result_are_those_of_the_merged_file(folder, mode):
    inputs = ("a:0.8", "c:0.5") if mode == "add" else ("a:0.8", "b:0.5")
    make_lora(folder / "c.safetensors", SD1_LAYERS, rank=4, alpha=2, seed=9)
    rank = "same" if mode == "add" else "full"
    made = plan(folder, *inputs, mode=mode, rank=rank, dtype="float32")
    run_merge(made, folder / "made.safetensors")
    merged = dense_deltas(folder / "made.safetensors")
    found = advise(made).norm_by_block
    assert found == pytest.approx(norms_of(merged, made), rel=1e-5)
    sums = compare(made).sum_norms
    assert (found == pytest.approx(sums, rel=1e-5)) == (mode == "svd")


def test_the_picture_shows_the_result_of_a_mode_that_is_no_sum(folder):
    def labels(figure: object) -> list[str]:
        return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]

    made = plan(folder, "a:0.8", "b:0.5", mode="ties")
    report, advice = compare(made), advise(made)
    assert labels(plots.compare_figure(report)) == ["a", "b", "their sum"]
    figure = plots.compare_figure(report, result=(advice.mode, advice.norm_by_block))
    assert labels(figure) == ["a", "b", "their sum", "mode ties"]
    heights = [bar.get_height() for bar in figure.axes[0].containers[3]]
    assert sorted(heights) == pytest.approx(sorted(advice.norm_by_block.values()))


def test_advice_and_merge_agree_on_error_and_size(folder):
    advice = advise(plan(folder, "a:0.8", "b:-0.5"))
    wanted = weighted_sum([(folder / "a.safetensors", 0.8), (folder / "b.safetensors", -0.5)])
    for point in advice.uniform:
        made = plan(folder, "a:0.8", "b:-0.5", rank=point.rank)
        report = run_merge(made, folder / f"rank{point.rank}.safetensors")
        assert report.error == pytest.approx(point.error, rel=1e-5, abs=1e-6)
        assert point.size_bytes - 1500 <= report.size_bytes <= point.size_bytes
        error = relative_error(dense_deltas(Path(report.output)), wanted)
        assert error == pytest.approx(point.error, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("mode", "ranks"), [("knots", (1, 4, 8)), ("iso", (3, 8)), ("ties", (2, 24, 512))])
def test_advice_and_merge_agree_for_methods_that_are_no_sum(folder, mode, ranks):
    """Errors are against the method's own result, which the merge makes again at each rank."""
    inputs = ("a:0.8", "b:-0.5")
    advice = {point.rank: point for point in advise(plan(folder, *inputs, mode=mode)).uniform}
    for rank in ranks:
        report = run_merge(plan(folder, *inputs, mode=mode, rank=rank), folder / f"{mode}{rank}.safetensors")
        assert report.error == pytest.approx(advice[rank].error, rel=2e-5, abs=1e-6)
        assert report.kept == pytest.approx(advice[rank].kept, rel=1e-5)
        assert advice[rank].size_bytes - 1500 <= report.size_bytes <= advice[rank].size_bytes


@pytest.mark.parametrize(
    ("rule", "chosen"), [({"rank": 5}, 5), ({}, 8), ({"rank": 500}, 8), ({"retain": 0.9}, None)]
)
def test_the_chosen_rank_is_a_point_of_the_curve_and_marked_on_it(folder, rule, chosen):
    advice = advise(plan(folder, "a:0.8", "b:-0.5", **rule))
    assert advice.chosen_rank == chosen
    figure = plots.advise_figure(advice)
    diamonds = [line for axis in figure.axes for line in axis.lines if line.get_marker() == "D"]
    point = next((point for point in advice.uniform if point.rank == chosen), None)
    assert len(diamonds) == (2 if point else 0)
    for line, place in zip(diamonds, (chosen, point and point.size_bytes / 1e6)):
        assert (list(line.get_xdata()), list(line.get_ydata())) == ([place], [point.error])


def test_a_chosen_size_is_marked_on_the_curve_of_allotted_ranks(folder):
    advice = advise(plan(folder, "a:0.8", "b:-0.5", size=0.05))
    report = run_merge(plan(folder, "a:0.8", "b:-0.5", size=0.05), folder / "sized.safetensors")
    # Layers for which there was no room are lost, too.
    wanted = weighted_sum([(folder / "a.safetensors", 0.8), (folder / "b.safetensors", -0.5)])
    assert report.layers_left_out == 3
    assert report.error == pytest.approx(relative_error(dense_deltas(Path(report.output)), wanted), rel=1e-5)
    assert report.kept == pytest.approx((1 - report.error**2) ** 0.5, rel=1e-5)
    figure = plots.advise_figure(advice)
    (diamond,) = [line for axis in figure.axes for line in axis.lines if line.get_marker() == "D"]
    assert list(diamond.get_xdata()) == [0.05]
    assert float(diamond.get_ydata()[0]) == pytest.approx(report.error, rel=0.02)


def test_the_spectrum_is_each_components_share_of_the_norm(folder):
    advice = advise(plan(folder, "a:0.8", "b:-0.5"))
    wanted = weighted_sum([(folder / "a.safetensors", 0.8), (folder / "b.safetensors", -0.5)])
    squares = sum(torch.linalg.svdvals(delta)[:8].square() for delta in wanted.values())
    assert advice.spectrum == pytest.approx((squares / squares.sum()).sqrt().tolist(), rel=1e-6)


def test_norms_of_inputs_and_their_sum_are_those_of_the_dense_deltas(folder):
    report = compare(plan(folder, "a:0.8", "b:-0.5"))
    sources = [(folder / "a.safetensors", 0.8), (folder / "b.safetensors", -0.5)]
    deltas = [weighted_sum([source]) for source in sources]
    for norms, found in zip([*report.norms, report.sum_norms], [*deltas, weighted_sum(sources)]):
        middle = next(delta for name, delta in found.items() if "_mid_block_" in name)
        assert norms["M00"] == pytest.approx(float(middle.norm()), rel=1e-9)
        whole = sum(float(delta.square().sum()) for delta in found.values())
        assert sum(norm**2 for norm in norms.values()) == pytest.approx(whole, rel=1e-9)


def test_a_file_of_limited_size_has_the_error_that_was_foreseen_for_whole_layers(folder):
    point = advise(plan(folder, "a:0.8", "b:-0.5", mode="ties")).allotted[8]
    sized = plan(folder, "a:0.8", "b:-0.5", mode="ties", size=point.size_bytes / 1e6)
    report = run_merge(sized, folder / "sized.safetensors")
    assert report.size_bytes <= point.size_bytes
    assert report.error == pytest.approx(point.error, rel=5e-3)


def test_advice_on_whole_layers_keeps_no_layer_in_memory(folder):
    """With vectors each spectrum holds its layer: 23 GB for the layers of SDXL."""
    with open_merger(plan(folder, "a", "b", mode="ties")) as merger:
        assert [merger.spectrum(layer).source for layer in merger.plan.layers] == [None] * len(SD1_LAYERS)


def test_the_time_that_whole_layers_take_is_reported_before_they_are_looked_at(folder):
    assert expected_seconds(plan(folder, "a", "b")) == 0
    slow = plan(folder, "a", "b", mode="ties")
    assert expected_seconds(slow, cores=1) == pytest.approx(2 * expected_seconds(slow, cores=2))
    assert expected_seconds(plan(folder, "a", "b", "a:0.3", mode="ties"), 1) > expected_seconds(slow, 1) > 0
    steps = []
    advise(slow, progress=steps.append)
    assert (steps[0].done, steps[0].eta) == (0, expected_seconds(slow))
    assert [step.done for step in steps] == list(range(len(SD1_LAYERS) + 1))
    assert steps[-1].eta == 0
    assert all(step.eta >= 0 for step in steps)


def test_a_long_look_is_announced_on_the_command_line(folder, capsys, monkeypatch):
    monkeypatch.setattr("lib_loramerge.cli.look.LONG_SECONDS", 0.0)
    files = [str(folder / "a.safetensors"), str(folder / "b.safetensors")]
    assert cli.main(["advise", *files, "--mode", "ties", "--json"]) == 0
    told = capsys.readouterr()
    assert "Mode ties" in told.err
    assert "min on this machine" in told.err
    assert json.loads(told.out)["mode"] == "ties"


def test_the_smallest_rank_for_an_error_is_the_smallest(folder):
    advice = advise(plan(folder, "a:0.8", "b:-0.5"))
    wanted = weighted_sum([(folder / "a.safetensors", 0.8), (folder / "b.safetensors", -0.5)])
    values = [torch.linalg.svdvals(delta) ** 2 for delta in wanted.values()]
    total = sum(float(v.sum()) for v in values)

    def error(rank: int) -> float:
        return (sum(float(v[rank:].sum()) for v in values) / total) ** 0.5

    for target, rank in advice.smallest_rank.items():
        assert error(rank) <= float(target) + 1e-9
        assert error(rank - 1) > float(target)
    assert advice.numerical_rank == 8


def test_the_smallest_file_for_an_error_is_really_made_by_a_size_rule(folder):
    advice = advise(plan(folder, "a:0.8", "b:-0.5"))
    size = advice.smallest_size["0.1"]
    report = run_merge(plan(folder, "a:0.8", "b:-0.5", size=size / 1e6), folder / "sized.safetensors")
    assert report.size_bytes <= size
    assert report.error <= 0.1 * 1.02
    by_rank = next(p for p in advice.uniform if p.rank >= advice.smallest_rank["0.1"])
    assert size <= by_rank.size_bytes


def test_inspect_measures_norm_and_rank_by_another_route(folder):
    report = inspect(folder / "b.safetensors")
    deltas = dense_deltas(folder / "b.safetensors")
    assert report.norm == pytest.approx(
        sum(float(d.square().sum()) for d in deltas.values()) ** 0.5, rel=1e-9
    )
    kept = sum(float((torch.linalg.svdvals(d)[:4] ** 2).sum()) for d in deltas.values())
    assert report.kept_at_rank[4] == pytest.approx(kept**0.5 / report.norm, rel=1e-9)
    assert report.numerical_rank["largest"] == 8
    text = [k for k in deltas if k.startswith("lora_te")]
    assert report.norm_by_block["BASE"] == pytest.approx(
        sum(float(deltas[k].square().sum()) for k in text) ** 0.5, rel=1e-9
    )
    json.dumps(report.to_json(), allow_nan=False)


def test_the_effective_rank_of_each_block_is_the_mean_of_its_layers(folder):
    report = inspect(folder / "b.safetensors")
    found = {}
    for name, delta in dense_deltas(folder / "b.safetensors").items():
        values = torch.linalg.svdvals(delta)[:8]
        shares = values / values.sum()
        found.setdefault("te" if "_te_" in name else name, []).append(
            float((-(shares * shares.log()).sum()).exp())
        )
    te = found.pop("te")
    assert report.effective_rank_by_block["BASE"] == pytest.approx(sum(te) / len(te), rel=1e-6)
    middle = next(values for name, values in found.items() if "_mid_block_" in name)
    assert report.effective_rank_by_block["M00"] == pytest.approx(middle[0], rel=1e-6)
    assert set(report.effective_rank_by_block) == set(report.norm_by_block)
    assert f"effective rank {report.effective_rank_by_block['M00']:.1f}" in report.to_text()


def test_hosts_are_reported_what_stops_them(tmp_path):
    plain = make_lora(tmp_path / "plain.safetensors", SD1_LAYERS)
    report = inspect(plain)
    assert set(report.hosts.values()) == {"reads all"}
    assert report.host_versions["A1111"] == "1.10.1, e61adddd"
    assert "A1111 (1.10.1, e61adddd): reads all" in report.to_text()


MID = "mid_block.attentions.0.transformer_blocks.0."
MID_KOHYA = "lora_unet_" + MID.replace(".", "_")
SD1_K = {f"{MID_KOHYA}attn2_to_k.{end}": (64, 2) if "up" in end else (2, 768) for end in (
    "lora_up.weight", "lora_down.weight",
)}  # fmt: skip
SDXL_K = {
    key.replace("mid_block", "down_blocks_1"): (2, 2048) if shape[0] == 2 else shape
    for key, shape in SD1_K.items()
}
COMFY = ("Forge", "reForge", "Forge Neo", "ComfyUI")
ALL = "reads all"
NO_NAMES = "no: it does not look for names such as"


def pair(name: str, up: str = "lora_B.weight", down: str = "lora_A.weight", in_: int = 64) -> dict:
    return {f"{name}.{up}": (64, 2), f"{name}.{down}": (2, in_)}


def kohya_pair(name: str, in_: int = 64) -> dict:
    return pair(name, "lora_up.weight", "lora_down.weight", in_)


@pytest.mark.parametrize(
    ("tensors", "verdicts"),
    [
        pytest.param(
            # ComfyUI's lists have the attention of a U-Net under the names of attention processors alone.
            pair(f"unet.{MID}attn2.to_k", in_=768),
            {
                "A1111": "no: it takes names only",
                **dict.fromkeys((*COMFY, "SD.Next"), NO_NAMES),
                "diffusers": ALL,
            },
            id="diffusers with PEFT",
        ),
        pytest.param(
            pair(f"unet.{MID}attn2.processor.to_k_lora", "up.weight", "down.weight", in_=768),
            {"A1111": "no: it takes names only", **dict.fromkeys(COMFY, ALL), "SD.Next": NO_NAMES},
            id="attention processors",
        ),
        pytest.param(
            pair(f"base_model.model.{MID}attn2.to_k", "lora_B.default.weight", "lora_A.default.weight", 768),
            {"A1111": "no: it takes names only", **dict.fromkeys((*COMFY, "SD.Next"), NO_NAMES)},
            id="PEFT with the name of an adapter",
        ),
        pytest.param(
            {
                "transformer." + key: shape
                for key, shape in pair("single_transformer_blocks.0.proj_mlp").items()
            },
            {
                "A1111": "no: it has no Flux.1",
                **dict.fromkeys((*COMFY, "diffusers"), ALL),
                "SD.Next": NO_NAMES,
            },
            id="ai-toolkit",
        ),
        pytest.param(
            pair("double_blocks.0.processor.qkv_lora1", "up.weight", "down.weight"),
            dict.fromkeys((*COMFY, "SD.Next"), NO_NAMES),
            id="XLabs",
        ),
        pytest.param(
            kohya_pair("lora_unet_double_blocks_0_img_mlp_0"),
            {**dict.fromkeys(COMFY, ALL), "SD.Next": "no: it takes this spelling only with an alpha"},
            id="Flux without alpha",
        ),
        pytest.param(
            kohya_pair("lora_unet_joint_blocks_0_x_block_attn_proj", 1536),
            {"Forge": ALL, "reForge": ALL, "SD.Next": "no: it takes SD3 only in the diffusers spelling"},
            id="SD3 of kohya",
        ),
        pytest.param(
            {**SD1_K, f"{MID_KOHYA}attn1_to_q.alpha": ()},
            {"A1111": "no: it refuses a file in which an alpha stands alone", "Forge": ALL},
            id="lone alpha",
        ),
        pytest.param(
            {**SD1_K, f"{MID_KOHYA}attn1_to_out_0.diff_b": (64,)},
            {"A1111": "no: it refuses a file in which a bias stands alone", "Forge": ALL},
            id="lone bias",
        ),
        pytest.param(
            {**SD1_K, "lora_unet_mid_block_attentions_0_norm.w_norm": (64,)},
            {"A1111": "no: it refuses a file with w_norm but no b_norm", "Forge": ALL},
            id="lone norm",
        ),
        pytest.param(
            {
                **SD1_K,
                **{
                    f"{MID_KOHYA}attn1_to_q.{slot}.weight": shape
                    for slot, shape in (
                        ("a1", (64, 2)),
                        ("a2", (2, 64)),
                        ("b1", (64, 2)),
                        ("b2", (2, 64)),
                    )
                },
            },
            {
                "A1111": "no: it computes only GLoRA of the old order",
                "Forge": ALL,
                "SD.Next": "no: it comp",
            },
            id="new GLoRA",
        ),
        pytest.param(
            {**SDXL_K, **kohya_pair("lora_unet_add_embedding_linear_1")},
            {"A1111": "reads 1 of 2 layers, not lora_unet_add_emb", "Forge": ALL},
            id="SDXL in diffusers names",
        ),
        pytest.param(
            {
                **SDXL_K,
                **kohya_pair("lora_te2_text_model_encoder_layers_0_self_attn_q_proj"),
            },
            {"A1111": "reads 1 of 2 layers, not lora_te2_", "Forge": ALL},
            id="q alone of OpenCLIP",
        ),
        pytest.param(
            {
                **SD1_K,
                **kohya_pair(f"{MID_KOHYA}attn1_to_q"),
                **{
                    f"{MID_KOHYA}attn2_to_k.bias_{end}": shape
                    for end, shape in (
                        ("indices", (2, 1)),
                        ("values", (1,)),
                        ("size", (2,)),
                    )
                },
            },
            {
                **dict.fromkeys(("A1111", *COMFY), "reads all layers, but leaves out 3 tensors"),
                "SD.Next": ALL,
            },
            id="sparse residual",
        ),
        pytest.param(
            {**SD1_K, **{f"bundle_emb.e{n}.string_to_param.*": (1, 768) for n in range(13)}},
            {
                "A1111": ALL,
                "Forge": "no: it refuses a file with more than 12 tensors",
                "Forge Neo": "no: ",
                "diffusers": "no: it refuses a file with emb",
            },
            id="many embeddings",
        ),
        pytest.param(
            pair("transformer.weird.3.q"),
            dict.fromkeys(("A1111", *COMFY, "SD.Next"), "not known: which base model"),
            id="unknown model",
        ),
    ],
)
def test_what_each_host_makes_of_a_file_follows_from_its_names(tmp_path, tensors, verdicts):
    save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, tmp_path / "a.safetensors")
    hosts = inspect(tmp_path / "a.safetensors", tensors=False).hosts
    for host, verdict in verdicts.items():
        assert hosts[host] == verdict if verdict == ALL else hosts[host].startswith(verdict), host


def test_the_name_that_is_shown_as_written_is_one_that_a_merge_writes(folder, tmp_path):
    files = {
        "norm": {"lora_unet_mid_block_attentions_0_norm.w_norm": torch.ones(64),
                 "lora_unet_mid_block_attentions_0_norm.b_norm": torch.ones(64)},
        "diff": {f"{MID_KOHYA}attn2_to_k.diff": torch.ones(64, 768)},
    }  # fmt: skip
    files["both"] = {**files["norm"], **{key: torch.ones(shape) for key, shape in SD1_K.items()}}
    for name, tensors in files.items():
        if name == "norm":
            tensors["lora_te_text_model_encoder_layers_0_layer_norm1.w_norm"] = torch.ones(768)
            tensors["lora_te_text_model_encoder_layers_0_layer_norm1.b_norm"] = torch.ones(768)
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata={"ss_base_model_version": "sd_v1"})
        assert cli.main(["convert", str(tmp_path / f"{name}.safetensors"), "-o", str(tmp_path / "o")]) == 0
        assert inspect(tmp_path / f"{name}.safetensors").written_as in load_file(tmp_path / "o.safetensors")
        (tmp_path / "o.safetensors").unlink()


@pytest.mark.parametrize("command", ["inspect", "compare", "advise"])
def test_pictures_are_drawn(folder, tmp_path, capsys, command):
    target = tmp_path / f"{command}.png"
    files = [str(folder / "a.safetensors"), str(folder / "b.safetensors")]
    assert cli.main([command, *files, "--plot", str(target)]) == 0
    assert target.read_bytes().startswith(b"\x89PNG")
    assert len(target.read_bytes()) > 5000
    capsys.readouterr()


def test_columns_of_a_comparison_stay_apart_however_small_a_share_is() -> None:
    tiny = 1.64e-7  # "1.64e-05 %"
    relation = Relation(
        cosine=0.5, inputs=1.0, outputs=tiny, sign_conflict=tiny, norms=(1.234e-12, 1.234e-12)
    )
    assert re.sub(r" +", " ", _row("all", relation)).split(" %") == [
        " all 0.500 100", " 1.64e-05", " 1.64e-05", " 1.23e-12 : 1.23e-12",
    ]  # fmt: skip
