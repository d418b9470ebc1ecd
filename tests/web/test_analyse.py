"""Analyse: the reports and pictures behind the button and behind REST, and the button in a browser."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from lib_loramerge import analysis
from lib_loramerge.analysis.compare import AGREEMENTS
from lib_loramerge.errors import RecipeError
from lib_loramerge.recipe import LoraInput, MergeRecipe
from lib_loramerge.report import percent
from lib_loramerge.webui import analyse, plots, render_analysis
from lib_loramerge.webui.analyse import Looks, Question
from lib_loramerge.webui.background import RUNNING
from lib_loramerge.webui.host import ConflictError, StandaloneHost
from lib_loramerge.webui.render import size_text
from lib_loramerge.webui.standalone import shared_file
from tests.helpers.browser import PATIENCE, SERVED, Tab
from tests.helpers.fixtures import SD1_LAYERS, make_lora
from tests.helpers.hosting import FakeHost

API = "/loramerge/v1"
PNG = b"\x89PNG\r\n\x1a\n"
BOTH = (LoraInput("style", te=0.8, unet=0.8), LoraInput("face", te=0.5, unet=0.5))


def fill(folder: Path) -> None:
    make_lora(folder / "style.safetensors", SD1_LAYERS, rank=4, alpha=2.0, seed=1)
    make_lora(folder / "face.safetensors", SD1_LAYERS, rank=8, seed=2)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[StandaloneHost]:
    fill(tmp_path)
    made = StandaloneHost([tmp_path])
    yield made
    made.close()


@pytest.fixture
def looks() -> Iterator[Looks]:
    made = Looks(lambda *_: None)
    yield made
    made.close()


def plan_of(host: StandaloneHost, *inputs: LoraInput, program: str | None = None):
    return host.plan(MergeRecipe(inputs, device="cpu", host=program))


def finished(looks: Looks, question: Question):
    look = looks.ask(question)
    assert looks.wait(look, 60)
    return look


def test_a_look_finds_what_the_library_finds_and_draws_it(host, looks):
    plan = plan_of(host, *BOTH)
    look = finished(looks, Question(plan, analyse.KINDS, "dark"))
    assert look.state == "done", look.error
    assert look.findings.advise == analysis.advise(plan)
    assert look.findings.compare == analysis.compare(plan)
    assert [Path(report.file).stem for report in look.findings.inspect] == ["style", "face"]
    assert set(look.findings.pictures) == set(analyse.KINDS)
    assert all(content.startswith(PNG) for content in look.findings.pictures.values())


@pytest.mark.parametrize(("mode", "shown"), [("svd", None), ("ties", "ties"), ("slerp", "slerp")])
def test_the_picture_shows_the_result_of_a_mode_that_is_no_sum(host, looks, monkeypatch, mode, shown):
    results = []
    usual = plots.compare_figure

    def seen(report, theme, result):
        results.append(result)
        return usual(report, theme, result)

    monkeypatch.setattr(plots, "compare_figure", seen)
    plan = host.plan(MergeRecipe(BOTH, mode=mode, device="cpu"))
    look = finished(looks, Question(plan, analyse.KINDS, "light"))
    assert look.state == "done", look.error
    wanted = None if shown is None else (shown, analysis.advise(plan).norm_by_block)
    assert results == [wanted]
    assert len(set(look.findings.pictures.values())) == len(analyse.KINDS)


def test_the_page_tells_the_verdict_the_ranks_and_names_no_folder(host, looks, tmp_path):
    plan = plan_of(host, *BOTH)
    found = finished(looks, Question(plan, analyse.KINDS, "light"))
    page = render_analysis.look_page(found)
    plain = re.sub(r"<[^>]+>", " ", page)
    assert found.findings.compare.pairs[0].verdict in " ".join(plain.replace("  ", " ").split())
    rows = re.findall(r"<tr><td>([^<]+)</td><td><b>(\d+)</b></td><td>([^<]+)</td>", page)
    advice = analysis.advise(plan)
    assert rows == [
        (percent(float(target)), str(rank), size_text(advice.smallest_size[target]))
        for target, rank in advice.smallest_rank.items()
    ]
    assert page.count("<img") == 3
    assert page.count('alt="') == 3
    assert str(tmp_path) not in page


def test_names_of_files_are_escaped_on_the_page(tmp_path, looks):
    nasty = "a&b 'x' <i>"
    make_lora(tmp_path / f"{nasty}.safetensors", SD1_LAYERS, rank=2, seed=5)
    make_lora(tmp_path / "plain.safetensors", SD1_LAYERS, rank=2, seed=6)
    host = StandaloneHost([tmp_path])
    plan = plan_of(host, LoraInput(nasty), LoraInput("plain"))
    page = render_analysis.look_page(finished(looks, Question(plan, analyse.KINDS)))
    host.close()
    assert "&lt;i&gt;" in page
    assert "x' <i>" not in page
    assert "& " not in page.replace("&amp;", "")


def test_one_lora_alone_is_inspected_and_advised_but_not_compared(host, looks):
    plan = plan_of(host, BOTH[0])
    assert analyse.kinds_for(plan) == ("inspect", "advise")
    assert finished(looks, Question(plan, analyse.kinds_for(plan))).state == "done"
    with pytest.raises(RecipeError, match="two"):
        looks.ask(Question(plan, ("compare",)))


def test_the_same_question_again_computes_nothing_and_another_strength_does(host, looks, monkeypatch):
    counts = {"advise": 0}
    usual = analysis.advise

    def counted(*args, **kwargs):
        counts["advise"] += 1
        return usual(*args, **kwargs)

    monkeypatch.setattr(analysis, "advise", counted)
    for _ in range(2):
        finished(looks, Question(plan_of(host, *BOTH), ("advise",)))
    assert counts["advise"] == 1
    finished(looks, Question(plan_of(host, BOTH[0], LoraInput("face", te=0.25, unet=0.25)), ("advise",)))
    assert counts["advise"] == 2


def test_a_file_that_was_replaced_is_looked_at_again(host, looks, tmp_path):
    before = finished(looks, Question(plan_of(host, BOTH[1]), ("advise",))).findings.advise
    make_lora(tmp_path / "face.safetensors", SD1_LAYERS, rank=2, seed=9)
    after = finished(looks, Question(plan_of(host, BOTH[1]), ("advise",))).findings.advise
    assert (before.numerical_rank, after.numerical_rank) == (8, 2)


@pytest.fixture
def slow(monkeypatch):
    """advise takes until it is let go or cancelled; tells how many run at once."""
    state = {"now": 0, "most": 0}
    gate, lock = threading.Event(), threading.Lock()
    usual = analysis.advise

    def waiting(plan, *, progress=None, cancel=None):
        with lock:
            state["now"] += 1
            state["most"] = max(state["most"], state["now"])
        try:
            while not gate.wait(0.01):
                if cancel():
                    break
            return usual(plan, progress=progress, cancel=cancel)
        finally:
            with lock:
                state["now"] -= 1

    monkeypatch.setattr(analysis, "advise", waiting)
    yield gate, state
    gate.set()


def test_looks_are_worked_on_one_after_the_other_and_only_so_many_wait(host, looks, slow):
    gate, state = slow
    given = [LoraInput("style", unet=0.1 * (number + 1)) for number in range(analyse.MAX_WAITING + 2)]
    *questions, one_more = (Question(plan_of(host, entry), ("advise",)) for entry in given)
    asked = [looks.ask(question) for question in questions]
    with pytest.raises(ConflictError, match="waiting"):
        looks.ask(one_more)
    gate.set()
    assert all(looks.wait(look, 60) for look in asked)
    assert {look.state for look in asked} == {"done"}
    assert state["most"] == 1


def test_cancelling_ends_a_running_look_and_drops_a_waiting_one(host, looks, slow):
    running, waiting = (looks.ask(Question(plan_of(host, given), ("advise",))) for given in BOTH)
    looks.cancel(waiting.id)
    looks.cancel(running.id)
    assert looks.wait(running, 60)
    assert (running.state, waiting.state) == ("cancelled", "cancelled")


def test_a_look_that_takes_too_long_is_ended_with_a_sentence(host, looks, slow):
    look = finished(looks, Question(plan_of(host, *BOTH), ("advise",), limit=0.2))
    assert look.state == "failed"
    assert "longer than" in render_analysis.look_state(look, "")


def test_the_time_left_is_told_and_whole_layers_get_more_time(host, looks):
    plan = plan_of(host, *BOTH)
    assert analyse.limit_for(plan) == analyse.LIMIT_SECONDS
    whole = host.plan(MergeRecipe(BOTH, mode="ties", device="cpu"))
    assert analyse.limit_for(whole) > analyse.LIMIT_SECONDS
    look = analyse.Look(Question(whole, ("advise",)))
    look.state, look.started, look.stage, look.eta = RUNNING, time.time(), "advise", 240.0
    assert "time left 4 min" in re.sub(r"<[^>]*>", "", render_analysis.look_state(look, "0"))
    look.eta = 0.5
    assert "time left" not in render_analysis.look_state(look, "0")


def test_a_bug_of_ours_becomes_a_sentence_on_the_page_and_a_traceback_in_the_console(host, monkeypatch):
    told = []
    looks = Looks(lambda *words: told.append(words))
    monkeypatch.setattr(analysis, "advise", lambda *_, **__: 1 / 0)
    look = finished(looks, Question(plan_of(host, *BOTH), ("advise",)))
    assert "ZeroDivisionError" in render_analysis.look_state(look, "")
    assert isinstance(told[0][1], ZeroDivisionError)


def test_stages_pictures_and_verdicts_are_translated():
    known = json.loads((shared_file("localizations") / "ja_JP.json").read_text(encoding="utf-8"))
    words = {*render_analysis.STAGES.values(), *render_analysis.PICTURES.values(), *AGREEMENTS}
    assert words - set(known) == set()


# REST


@pytest.fixture(scope="module")
def webui(tmp_path_factory) -> Iterator[FakeHost]:
    data = tmp_path_factory.mktemp("webui")
    fill(data / "models" / "Lora")
    with FakeHost(data, "--api", *SERVED) as running:
        yield running


RECIPE = {
    "inputs": [{"name": "style", "te": 0.8, "unet": 0.8}, {"name": "face", "te": 0.5, "unet": 0.5}],
    "device": "cpu",
}


def library_plan(webui: FakeHost, program: str | None = None):
    host = StandaloneHost([webui.lora_dir])
    try:
        return plan_of(host, *BOTH, program=program)
    finally:
        host.close()


def test_rest_gives_the_librarys_reports_as_json(webui):
    plan = library_plan(webui)
    advice = webui.post(f"{API}/advise", {"recipe": RECIPE})
    assert advice == json.loads(json.dumps(analysis.advise(plan).to_json()))
    pairs = webui.post(f"{API}/compare", {"recipe": RECIPE})["pairs"]
    assert pairs[0]["verdict"] == analysis.compare(plan).pairs[0].verdict
    assert pairs[0]["whole"]["cosine"] == pytest.approx(analysis.compare(plan).pairs[0].whole.cosine)


@pytest.mark.parametrize("kind", analyse.KINDS)
def test_rest_draws_a_png(webui, kind):
    from PIL import Image

    body = json.dumps({"recipe": RECIPE, "kind": kind, "theme": "dark"}).encode()
    request = urllib.request.Request(
        f"{webui.url}{API}/plot", data=body, headers={"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=120) as answer:
        assert answer.headers["Content-Type"] == "image/png"
        content = answer.read()
    with Image.open(io.BytesIO(content)) as image:
        assert image.width > 800
        assert sum(image.convert("RGB").getpixel((2, 2))) < 200, "the dark page's colour"


@pytest.mark.parametrize(
    ("route", "body", "status", "words"),
    [
        ("compare", {"recipe": {"inputs": ["style"]}}, 422, "two"),
        ("advise", {"recipe": {"inputs": ["stile"]}}, 404, "style"),
        ("advise", {"recipe": {"inputs": ["../style"]}}, 400, "not a name"),
        ("plot", {"recipe": RECIPE, "kind": "pie"}, 422, "inspect, compare, advise"),
        ("plot", {"recipe": RECIPE, "theme": "pink"}, 422, "light, dark"),
        ("compare", {"recipe": RECIPE, "more": 1}, 422, "more"),
    ],
)
def test_rest_refuses_with_a_sentence(webui, route, body, status, words):
    got, content = webui.request("POST", f"{API}/{route}", body)
    assert got == status
    assert words in content["error"]


def test_rest_describes_the_picture_in_its_schema(webui):
    paths = webui.get("/openapi.json")["paths"]
    assert list(paths[f"{API}/plot"]["post"]["responses"]["200"]["content"]) == ["image/png"]
    assert "503" in paths[f"{API}/advise"]["post"]["responses"]


# In a browser


def test_analyse_shows_verdict_ranks_and_pictures_while_the_page_stays_usable(chromium, webui):
    with Tab(chromium, webui.url) as tab:
        tab.row(0, "style", 0.8)
        tab.row(1, "face", 0.5)
        tab.wait_for_facts("File size")
        tab.press("analyse")
        # The rest answers meanwhile: another field, and the server's own words for it.
        tab.fill("name", "style")
        tab.expect_text("name_message", "exists already")
        tab.expect_text("analyse_state", "Analysed.")
        plan = library_plan(webui, program="a1111")  # The page writes for the WebUI that it is in.
        advice, compared = analysis.advise(plan), analysis.compare(plan)
        tab.expect_text("analyse_result", compared.pairs[0].verdict)
        rows = tab.page.locator("#loramerge_analyse_result [data-table=ranks]").first.locator("tr").all()
        cells = [row.locator("td").all_inner_texts() for row in rows[1:]]
        assert cells == [
            [
                str(point.rank),
                size_text(point.size_bytes),
                percent(point.error) if point.error > 1e-6 else "none",
                *(percent(share) for share in point.kept_of.values()),
                "chosen" if point.rank == advice.chosen_rank else "Use",
            ]
            for point in advice.uniform
        ]
        # The facts say now what the smaller file loses.
        least = next(point for point in advice.uniform if point.rank == 8)
        tab.wait_for_facts(percent(least.error))
        # One click each: a rank, a size, and strengths at which the sum is no stronger than its strongest.
        before = tab.page.locator("#loramerge_facts [data-stamp]").first.get_attribute("data-stamp")
        tab.page.locator("#loramerge_analyse_result [data-table=ranks] .lm-use").nth(1).click()
        tab.expect_value("rank_rule", "A number")
        tab.expect_value("rank", "2")
        expect(tab.page.locator("#loramerge_facts [data-stamp]").first).not_to_have_attribute(
            "data-stamp", before, timeout=PATIENCE
        )
        tab.page.locator("#loramerge_analyse_result [data-table=targets] .lm-use").nth(1).click()
        tab.expect_value("rank_rule", "Fit a size")
        assert float(tab.value("size")) * 1e6 == pytest.approx(advice.smallest_size["0.01"], abs=1000)
        assert compared.quieter
        tab.page.locator("#loramerge_analyse_result .lm-pair .lm-use").click()
        tab.expect_value("normalize", "That of the strongest LoRA")
        tab.wait_for_facts("All strengths will be lowered")
        images = tab.page.locator("#loramerge_analyse_result >> nth=0").locator("img")
        expect(images).to_have_count(3, timeout=PATIENCE)
        for image in images.all():
            assert image.evaluate("image => image.decode().then(() => image.naturalWidth > 800)")
            assert image.get_attribute("alt")
        with tab.page.expect_download() as download:
            tab.page.locator(".lm-save-picture").first.click()
        assert download.value.suggested_filename == "loramerge-compare.png"
        shown = images.first.get_attribute("src").partition(",")[2]
        assert Path(download.value.path()).read_bytes() == base64.b64decode(shown)
        assert tab.errors == []


def test_analyse_tells_an_error_beside_the_button(chromium, webui):
    with Tab(chromium, webui.url) as tab:
        tab.press("analyse")
        expect(tab.page.locator("#loramerge_analyse_state [role=alert]").first).to_be_visible(
            timeout=PATIENCE
        )
        assert tab.errors == []
