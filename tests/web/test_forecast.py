"""What is told before a merge: loss and time from headers; fonts for names in every writing."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from lib_loramerge import blocks
from lib_loramerge.merge import MergePlan, plan_merge, run_merge
from lib_loramerge.recipe import LoraInput, MergeRecipe
from lib_loramerge.report import lossy
from lib_loramerge.webui import fonts, forecast
from lib_loramerge.webui.render import error_value
from tests.helpers.fixtures import make_lora

LAYER = "lora_unet_middle_block_1_transformer_blocks_{}_attn1_to_q"


def planned(folder: Path, side: int = 64, count: int = 1, loras: int = 2, **settings: object) -> MergePlan:
    names = [f"{side}x{count}-{index}" for index in range(loras)]
    for seed, name in enumerate(names):
        layers = {LAYER.format(index): (side, side) for index in range(count)}
        make_lora(folder / f"{name}.safetensors", layers, rank=4, seed=seed)
    recipe = MergeRecipe(inputs=tuple(LoraInput(name, te=1.0, unet=1.0) for name in names), **settings)
    presets = blocks.load_presets([blocks.bundled_preset_path()])
    return plan_merge(recipe, find=lambda name: folder / f"{name}.safetensors", presets=presets)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "At rank 4 the file would have"),
        ({"rank": "same"}, "Rank 4 of up to 8: the sum may need more"),
        ({"rank": 5}, "Rank 5 of up to 8: the sum may need more"),
        ({"rank": 8}, None),
        ({"rank": "full"}, None),
        ({"mode": "concat"}, None),
        ({"mode": "ties"}, "Rank 4 of up to 64: the result may need more"),
        ({"retain": 0.98}, "an error of up to 19.9 %"),
        ({"retain": 1.0}, None),
        ({"size": 0.002}, "does not fit into the file size"),
        ({"size": 1.0}, None),
    ],
)
def test_what_a_rule_may_lose_is_told_before(tmp_path: Path, settings: dict, words: str | None) -> None:
    plan = planned(tmp_path, **settings)
    found = forecast.notes(plan, forecast.less_of(plan))
    assert [words in text for text in found] == ([True] if words else [])


def test_one_lora_alone_loses_nothing_at_its_own_rank(tmp_path: Path) -> None:
    assert forecast.notes(planned(tmp_path, loras=1)) == []


@pytest.mark.parametrize("retain", [0.5, 0.9, 0.99])
def test_the_error_that_a_share_allows_is_never_passed(tmp_path: Path, retain: float) -> None:
    plan = planned(tmp_path, retain=retain, dtype="float32")
    report = run_merge(plan, tmp_path / "out.safetensors")
    assert report.error <= (1 - retain**2) ** 0.5


def test_time_is_told_where_layers_are_formed_whole_and_grows_with_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "_crowd", lambda: 1.0)
    assert forecast.seconds(planned(tmp_path)) == 0
    assert forecast.seconds(planned(tmp_path, mode="knots")) == 0
    small = forecast.seconds(planned(tmp_path, mode="ties"))
    assert 0 < small < 1
    assert forecast.seconds(planned(tmp_path, side=128, mode="ties")) > 3 * small
    assert forecast.seconds(planned(tmp_path, count=4, mode="ties")) == pytest.approx(4 * small)
    assert forecast.seconds(planned(tmp_path, mode="ties", rank="full")) > small


def test_the_estimate_learns_from_the_merges_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "PACE", forecast._Pace())
    plan = planned(tmp_path, mode="ties")
    monkeypatch.setattr(forecast, "_work", lambda plan, rank=None: 10.0)
    forecast.learn(plan, 50.0)
    assert forecast.seconds(plan) == pytest.approx(50.0)
    forecast.learn(plan, 0.0)
    assert forecast.seconds(plan) == pytest.approx(50.0)


def test_a_long_merge_says_what_makes_it_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "_work", lambda plan, rank=None: 3000.0 if rank is None else 120.0)
    monkeypatch.setattr(forecast, "PACE", forecast._Pace())
    monkeypatch.setattr(forecast, "_processor", lambda: 1.0)
    monkeypatch.setattr(forecast, "_crowd", lambda: 1.0)
    [text] = forecast.notes(planned(tmp_path, mode="ties", rank="full"))
    assert "about 50 min" in text
    assert "about 2 min" in text


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rounding_alone_is_no_loss_and_a_cut_is(tmp_path: Path, dtype: str) -> None:
    exact = run_merge(planned(tmp_path, rank="full", dtype=dtype), tmp_path / "exact.safetensors")
    assert exact.error > 0
    assert not lossy(exact.error, dtype)
    assert "none but rounding" in error_value(exact.error, dtype)
    cut = run_merge(planned(tmp_path, rank=4, dtype=dtype), tmp_path / "cut.safetensors")
    assert lossy(cut.error, dtype)
    assert "%" in error_value(cut.error, dtype)


NAMES = ("水彩画", "水墨画风格", "수채화")


def test_names_without_strange_letters_are_drawn_with_the_usual_font() -> None:
    assert len(fonts.families(["style", "café"])) == 1
    assert fonts.lacking(["style", "café \n"]) == ""


def test_letters_that_no_font_has_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_installed", list)
    assert fonts.lacking(["ab水", "彩a"]) == "彩水"
    assert len(fonts.families(NAMES)) == 1


def test_letters_come_from_the_first_font_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = fonts._usual()
    known = {usual[0]: {*map(ord, "ab")}, "One": {ord("水")}, "None": set(), "Two": {ord("수")}}
    monkeypatch.setattr(fonts, "_letters", lambda family: frozenset(known[family]))
    monkeypatch.setattr(fonts, "_installed", lambda: ["None", "One", "Two"])
    assert fonts.families(["a水"]) == [*usual, "One"]
    assert fonts.families(["a水수"]) == [*usual, "One", "Two"]
    assert fonts.lacking(["a水수火"]) == "火"


def test_a_figure_is_drawn_with_fonts_for_its_names(recwarn: pytest.WarningsRecorder) -> None:
    from matplotlib.figure import Figure

    from lib_loramerge.webui import plots

    readable = [name for name in NAMES if not fonts.lacking([name])]
    figure = Figure()
    axis = figure.subplots()
    axis.plot([0, 1], label=readable[0] if readable else "style")
    axis.legend()
    assert plots.png(figure).startswith(b"\x89PNG")
    assert [str(warning.message) for warning in recwarn if "missing from" in str(warning.message)] == []
