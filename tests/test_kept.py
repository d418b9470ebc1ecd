"""What is kept of each LoRA, against dense float64 sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lib_loramerge.analysis import advise
from lib_loramerge.merge import run_merge
from lib_loramerge.methods import METHODS
from lib_loramerge.report import percent
from tests.helpers import format_files as ff
from tests.helpers.fixtures import SD1_LAYERS, dense_deltas, make_lora, sample_data, weighted_sum

LAYERS = {name: (min(out, 96), in_) for name, (out, in_) in list(SD1_LAYERS.items())[1:5]}
WEIGHTS = {"a": 1.0, "b": -0.4, "c": 0.05, "d": 2.0, "e": 0.3}
MODES = [name for name, method in METHODS.items() if not method.elementwise and name != "add"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    for seed, name in enumerate(WEIGHTS):
        make_lora(folder / f"{name}.safetensors", LAYERS, rank=3 + seed, alpha=2, seed=seed)
    return folder


def shares(folder, names, written):
    """Share of each input by the definition, as a whole and for text encoder and denoiser."""
    deltas = {name: dense_deltas(folder / f"{name}.safetensors") for name in names}
    total = weighted_sum([(folder / f"{name}.safetensors", WEIGHTS[name]) for name in names])
    got = dense_deltas(written)
    found = {}
    for name in names:
        sums = {}
        for layer, delta in deltas[name].items():
            part = "te" if layer.startswith("lora_te") else "unet"
            own = WEIGHTS[name] * delta
            rest = total[layer] - got[layer] if layer in got else total[layer]
            for key in ("", part):
                row = sums.setdefault(key, [0.0, 0.0])
                row[0] += float((rest * own).sum())
                row[1] += float(own.square().sum())
        found[name] = {key: 1 - lost / own for key, (lost, own) in sums.items()}
    return found


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("mode", [*MODES, "ties"])
def test_the_share_of_each_lora_is_that_of_dense_sums(folder, tmp_path, mode, count):
    names = list(WEIGHTS)[:count]
    if METHODS[mode].maximum == 2 and count > 2:
        names = names[:2]
    fields = {"rank": 2} if METHODS[mode].uses_rank else {}
    (folder / "out.safetensors").unlink(missing_ok=True)
    report = ff.merge(folder, *(f"{name}:{WEIGHTS[name]}" for name in names), mode=mode, **fields)
    wanted = shares(folder, names, folder / "out.safetensors")
    for entry in report.inputs:
        assert entry.kept == pytest.approx(wanted[entry.name].pop(""), abs=2e-6)
        assert entry.kept_in == pytest.approx(wanted[entry.name], abs=2e-6)
        assert report.to_json()["inputs"][names.index(entry.name)]["kept"] == entry.kept


@pytest.mark.parametrize("inputs", [["a"], ["a:1", "a:0.5"], ["a:1", "b:0.4"]])
@pytest.mark.parametrize("fields", [{"rank": 2}, {"retain": 0.8}, {"size": 0.05}, {"mode": "concat"}])
def test_one_lora_alone_or_twice_has_its_share_too(folder, inputs, fields):
    (folder / "out.safetensors").unlink(missing_ok=True)
    report = ff.merge(folder, *inputs, **fields)
    assert all(0 < entry.kept <= 1 + 1e-6 for entry in report.inputs)
    if fields == {"mode": "concat"}:
        assert all(entry.kept == pytest.approx(1, abs=1e-6) for entry in report.inputs)


def test_a_lora_that_the_rank_cut_off_is_named_and_what_would_keep_it(folder):
    for rank, warned in ((2, True), ("full", False)):
        (folder / "out.safetensors").unlink(missing_ok=True)
        report = ff.merge(folder, "a:1", "c:0.05", rank=rank)
        warnings = [text for text in report.warnings if text.startswith("c: only") and "--rank full" in text]
        assert bool(warnings) == warned
        assert "of it in the file" in report.to_text()
    assert [entry.kept for entry in report.inputs] == pytest.approx([1, 1], abs=1e-6)


@pytest.mark.skipif(sample_data() is None, reason="the sample data is not beside this checkout")
@pytest.mark.parametrize(("rank", "share"), [(1, 0.010), (2, 0.52), (4, 0.92)])
def test_the_weaker_of_two_real_loras(tmp_path, rank, share):
    from lib_loramerge.merge import run_merge

    plan = ff.plan(sample_data(), "analog_sd15_kohya:0.8", "disney_sd15_kohya:0.7", rank=rank)
    report = run_merge(plan, tmp_path / "out.safetensors")
    assert min(entry.kept for entry in report.inputs) == pytest.approx(share, abs=0.006)
    assert torch.isfinite(torch.tensor([entry.kept for entry in report.inputs])).all()


def test_the_default_keeps_everything_and_says_what_a_smaller_file_would(folder):
    for name in ("out", "small"):
        (folder / f"{name}.safetensors").unlink(missing_ok=True)
    plan = ff.plan(folder, "a:1", "b:-0.4", "c:0.05", dtype="float32")
    report = run_merge(plan, folder / "out.safetensors")
    assert report.error < 1e-6
    assert [entry.kept for entry in report.inputs] == pytest.approx([1] * 3, abs=1e-6)
    smaller = report.smaller
    assert smaller["rank"] == 5
    assert "none but the rounding" in report.to_text()
    small = ff.merge(folder, "a:1", "b:-0.4", "c:0.05", rank=5, out="small")
    weakest = min(small.inputs, key=lambda entry: entry.kept)
    assert (smaller["weakest"], smaller["kept"]) == (weakest.name, pytest.approx(weakest.kept, abs=1e-6))
    assert smaller["error"] == pytest.approx(small.error, rel=1e-5)
    assert small.size_bytes <= smaller["size_bytes"] == plan.to_json()["smaller"]["size_bytes"]
    assert small.size_bytes > 0.9 * smaller["size_bytes"]
    assert small.smaller is None


def test_a_file_that_came_out_small_already_is_compared_with_no_larger_one(folder):
    ff.merge(folder, "a:1", "b:1", rank="full", dtype="float32", out="sum")
    # Nothing but a and b is in these two, so the plan foresees twice the ranks that come out.
    report = ff.merge(folder, "sum:1", "a:0.5", dtype="float32", out="again")
    assert max(report.ranks) == max(ff.merge(folder, "sum:1", rank="full", out="alone").ranks)
    assert report.smaller is None


def test_modes_that_choose_elements_keep_the_rank_of_the_inputs(folder):
    plan = ff.plan(folder, "a:1", "b:-0.4", mode="ties", dtype="float32")
    assert plan.rank_histogram == {4: len(plan.layers)}
    assert plan.to_json()["smaller"] is None


def test_the_same_lora_twice_is_judged_as_one(folder):
    for name in ("out", "one"):
        (folder / f"{name}.safetensors").unlink(missing_ok=True)
    one = ff.merge(folder, "c:0.05", "a:1", rank=2, out="one")
    twice = ff.merge(folder, "c:0.2", "c:-0.15", "a:1", rank=2)
    assert one.inputs[0].kept < 0.5
    assert [entry.kept for entry in twice.inputs] == pytest.approx(
        [one.inputs[0].kept] * 2 + [one.inputs[1].kept], abs=1e-6
    )
    assert sum(text.startswith("c: only") for text in twice.warnings) == 1


def test_the_block_of_which_least_is_kept_is_named(folder):
    (folder / "out.safetensors").unlink(missing_ok=True)
    report = ff.merge(folder, "a:1", "c:0.05", rank=2)
    worst = report.inputs[1].worst_block
    plan = ff.plan(folder, "a:1", "c:0.05")
    spelt = {
        part.part.spelling: layer for layer, parts in plan.sources[1].source.layers.items() for part in parts
    }
    block = {layer.layer: layer.block for layer in plan.layers}
    got = dense_deltas(folder / "out.safetensors")
    total = weighted_sum([(folder / "a.safetensors", 1.0), (folder / "c.safetensors", 0.05)])
    blocks = {}
    for name, delta in dense_deltas(folder / "c.safetensors").items():
        row = blocks.setdefault(block[spelt[name]], [0.0, 0.0])
        row[0] += float(((total[name] - got[name]) * 0.05 * delta).sum())
        row[1] += float((0.05 * delta).square().sum())
    least = min(blocks, key=lambda block: 1 - blocks[block][0] / blocks[block][1])
    assert worst["block"] == least
    assert worst["kept"] == pytest.approx(1 - blocks[least][0] / blocks[least][1], abs=2e-6)
    assert f"of its block {least}" in next(text for text in report.warnings if text.startswith("c: only"))


@pytest.mark.parametrize("names", ["ab", "abcde", "ca"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if METHODS[mode].uses_rank])
def test_advice_says_what_each_rank_keeps_of_each_lora(folder, mode, names):
    """Against dense sums of the files that are made at these ranks."""
    names = list(names)[: METHODS[mode].maximum or 5]
    inputs = [f"{name}:{WEIGHTS[name]}" for name in names]
    # Modes that make another result for each rank are looked at for one.
    made_for = {"rank": 3} if mode in ("tsv", "ctm") else {}
    advice = advise(ff.plan(folder, *inputs, mode=mode, dtype="float32", **made_for))
    points = [point for point in advice.uniform if point.rank in ((3,) if made_for else (1, 3, 8, 24))]
    assert points
    for point in points:
        (folder / "out.safetensors").unlink(missing_ok=True)
        report = ff.merge(folder, *inputs, mode=mode, dtype="float32", rank=point.rank)
        wanted = {name: own[""] for name, own in shares(folder, names, Path(report.output)).items()}
        assert point.kept_of == pytest.approx(wanted, abs=3e-6)
        assert point.kept_of == pytest.approx({one.name: one.kept for one in report.inputs}, abs=3e-6)


def test_advice_says_what_a_size_keeps_of_each_lora(folder):
    inputs = [f"{name}:{WEIGHTS[name]}" for name in "acd"]
    advice = advise(ff.plan(folder, *inputs, dtype="float32"))
    for point in advice.allotted[10::5]:
        (folder / "out.safetensors").unlink(missing_ok=True)
        ff.merge(folder, *inputs, dtype="float32", size=point.size_bytes / 1e6)
        wanted = {name: own[""] for name, own in shares(folder, "acd", folder / "out.safetensors").items()}
        # The file's own header is a little shorter than the one that was foreseen.
        assert point.kept_of == pytest.approx(wanted, abs=0.02)
    assert advice.allotted[-1].kept_of == pytest.approx(dict.fromkeys("acd", 1), abs=1e-9)


def test_the_text_of_an_advice_names_the_shares_of_few_loras_and_the_least_of_many(folder):
    two = advise(ff.plan(folder, "a:1", "c:0.05"))
    shown = ", ".join(f"{name} {percent(share)}" for name, share in two.uniform[1].kept_of.items())
    assert shown.startswith("a ")
    assert f"  {shown}\n" in two.to_text()
    many = advise(ff.plan(folder, *(f"{name}:{WEIGHTS[name]}" for name in WEIGHTS)))
    line = next(line for line in many.to_text().splitlines() if line.split()[:1] == ["1"])
    least = min(many.uniform[0].kept_of, key=many.uniform[0].kept_of.get)
    assert line.endswith(f"least: {least} {percent(max(0.0, many.uniform[0].kept_of[least]))}")
    assert "kept of each" not in advise(ff.plan(folder, "a:1")).to_text()


@pytest.mark.parametrize("fields", [{}, {"rank": "full"}, {"rank": 64}])
def test_a_lora_below_the_rounding_of_another_is_not_said_to_be_cut_by_a_rank(folder, fields):
    (folder / "out.safetensors").unlink(missing_ok=True)
    report = ff.merge(folder, "a:1000", "b:0.00001", **fields)
    (text,) = [text for text in report.warnings if text.startswith("b: only")]
    assert "--rank" not in text
    assert "rounding of the other LoRAs to float32" in text
