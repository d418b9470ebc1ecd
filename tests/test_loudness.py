"""How much stronger a sum is than its strongest LoRA, and --normalize, judged by dense float64 sums."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from lib_loramerge import cli
from lib_loramerge.analysis import advise, compare
from lib_loramerge.errors import RecipeError
from lib_loramerge.metadata import read_recipe
from tests.helpers import format_files as ff
from tests.helpers.fixtures import SD1_LAYERS, dense_deltas, make_loras, weighted_sum

LAYERS = {name: (min(out, 64), in_) for name, (out, in_) in list(SD1_LAYERS.items())[:6]}
WEIGHTS = {"a": 1.0, "b": 0.7, "c": -0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_loras(tmp_path_factory.mktemp("loud"), "abc", LAYERS, rank=4, alpha=4)


def inputs(weights):
    return [f"{name}:{weight}" for name, weight in weights.items()]


def norms(folder, sources):
    """Part to the norm of a weighted sum of files."""
    total = weighted_sum([(folder / f"{name}.safetensors", weight) for name, weight in sources])
    squares = {"te": 0.0, "unet": 0.0}
    for layer, delta in total.items():
        squares["te" if layer.startswith("lora_te") else "unet"] += float(delta.square().sum())
    return {part: square**0.5 for part, square in squares.items()}


def test_the_sum_is_said_to_be_as_much_stronger_as_it_is(folder):
    report = compare(ff.plan(folder, *inputs(WEIGHTS)))
    together, each = norms(folder, WEIGHTS.items()), [norms(folder, [one]) for one in WEIGHTS.items()]
    wanted = {part: together[part] / max(one[part] for one in each) for part in together}
    assert report.louder_in == pytest.approx(wanted, rel=1e-6)
    assert all(ratio > 1.05 for ratio in wanted.values())
    for block, ratio in report.louder.items():
        assert ratio == pytest.approx(report.sum_norms[block] / max(own[block] for own in report.norms))
    for row, (name, weight) in zip(report.quieter, WEIGHTS.items(), strict=True):
        assert row["name"] == name
        assert row["unet"] == pytest.approx(weight / wanted["unet"], rel=1e-3)
        assert row["te"] == pytest.approx(weight / wanted["te"], rel=1e-3)
    text = report.to_text()
    assert f"{wanted['unet']:.2f} times (denoiser)" in text
    assert "--normalize strongest" in text


@pytest.mark.parametrize("weights", [WEIGHTS, {"a": 1.0, "b": 1.0}, {"a": 2.0, "b": -0.1}])
def test_a_normalized_file_is_no_stronger_than_its_strongest_lora(folder, weights):
    (folder / "out.safetensors").unlink(missing_ok=True)
    report = ff.merge(folder, *inputs(weights), normalize="strongest", dtype="float32")
    got = {"te": 0.0, "unet": 0.0}
    for layer, delta in dense_deltas(folder / "out.safetensors").items():
        got["te" if layer.startswith("lora_te") else "unet"] += float(delta.square().sum())
    each = [norms(folder, [one]) for one in weights.items()]
    for part, square in got.items():
        assert square**0.5 == pytest.approx(max(one[part] for one in each), rel=1e-3)
    # One factor for all: what they are to each other stays.
    ratios = [entry.unet / weight for entry, weight in zip(report.inputs, weights.values(), strict=True)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-3)
    assert any(
        text.startswith("All strengths for the denoiser were multiplied by") for text in report.warnings
    )


def test_the_file_keeps_the_strengths_it_was_made_with_and_makes_itself_again(folder):
    for name in ("out", "again"):
        (folder / f"{name}.safetensors").unlink(missing_ok=True)
    ff.merge(folder, *inputs(WEIGHTS), normalize="strongest")
    with safe_open(folder / "out.safetensors", "pt") as file:
        recipe = read_recipe(file.metadata())
    assert recipe.normalize is None
    lower = [f"{one.name}:{one.te}:{one.unet}" for one in recipe.inputs]
    ff.merge(folder, *lower, out="again")
    one, two = (Path(folder / f"{name}.safetensors").read_bytes() for name in ("out", "again"))
    assert one[-4096:] == two[-4096:]


def test_loras_that_cancel_or_are_given_twice_are_not_changed(folder):
    for given in (["a:1", "a:-0.5"], ["a:1", "a:0.5"], ["b:0.3"]):
        report = compare(ff.plan(folder, *given)) if len(given) > 1 else None
        assert report is None or (not report.quieter and max(report.louder_in.values()) == pytest.approx(1))
        (folder / "out.safetensors").unlink(missing_ok=True)
        made = ff.merge(folder, *given, normalize="strongest")
        assert [entry.unet for entry in made.inputs] == [float(text.split(":")[1]) for text in given]


def test_compare_and_advise_take_it_too_and_other_modes_refuse_it(folder, capsys):
    plan = ff.plan(folder, *inputs(WEIGHTS), normalize="strongest")
    report, before = compare(plan), compare(ff.plan(folder, *inputs(WEIGHTS)))
    assert report.louder_in == pytest.approx({"te": 1, "unet": 1}, rel=1e-3)
    assert not report.quieter  # It was lowered already.
    for block, ratio in report.louder.items():
        assert ratio == pytest.approx(
            before.louder[block] / before.louder_in["te" if block == "BASE" else "unet"], rel=1e-3
        )
    assert any("All strengths will be lowered" in text for text in plan.warnings)
    plain = advise(replace(plan, recipe=replace(plan.recipe, normalize=None)))
    assert sum(advise(plan).norm_by_block.values()) < 0.97 * sum(plain.norm_by_block.values())
    with pytest.raises(RecipeError, match="mode ties makes something else"):
        ff.plan(folder, "a", "b", mode="ties", normalize="strongest")
    assert ff.plan(folder, "a", "b", normalize="none").recipe.normalize is None
    files = [str(folder / f"{name}.safetensors") for name in "ab"]
    assert cli.main(["compare", *files, "--normalize", "strongest", "--json"]) == 0
    assert max(json.loads(capsys.readouterr().out)["louder_in"].values()) == pytest.approx(1, rel=1e-3)
    # On the command line one option serves the parameter of ties, too.
    assert cli.main(["merge", *files, "--mode", "ties", "--normalize", "false", "--dry-run", "--json"]) == 0
    capsys.readouterr()
    assert cli.main(["merge", *files, "--normalize", "maybe", "--dry-run"]) != 0
    assert "normalize" in capsys.readouterr().err
