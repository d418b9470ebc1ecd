"""Merges on their way, in a browser: bar, cancel, reload, waiting line, two windows, trying, sending."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from lib_loramerge.files import model_hash
from tests.helpers.browser import PATIENCE, SERVED, Tab
from tests.helpers.fixtures import SD1_LAYERS, make_lora
from tests.helpers.hosting import FakeHost

MANY_LAYERS = {
    f"lora_unet_output_blocks_{block}_1_transformer_blocks_0_attn{a}_to_{part}": (64, 64)
    for block in range(3, 12)
    for a in (1, 2)
    for part in ("q", "v", "out_0")
}
# Every layer takes seconds to merge by elements; small on disk all the same.
LARGE_LAYERS = {
    f"lora_unet_middle_block_1_transformer_blocks_{block}_attn1_to_{part}": (1280, 1280)
    for block in range(10)
    for part in ("q", "k", "v", "out_0")
}
MANY = 4  # rows of one LoRA


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHost]:
    folder = tmp_path_factory.mktemp("webui")
    loras = folder / "models" / "Lora"
    make_lora(loras / "style.safetensors", SD1_LAYERS, rank=4, seed=1)
    make_lora(loras / "many.safetensors", MANY_LAYERS, rank=4, seed=2)
    make_lora(loras / "large.safetensors", LARGE_LAYERS, rank=16, seed=3)
    with FakeHost(folder, *SERVED, "--api") as running:
        yield running


@pytest.fixture
def tab(chromium: object, host: FakeHost) -> Iterator[Tab]:
    with Tab(chromium, host.url) as opened:
        yield opened


def fill(tab: Tab, name: str, lora: str = "many") -> None:
    """A merge of several layers, under a name."""
    tags = "".join(f"<lora:{lora}:{0.1 + index / 100}>" for index in range(MANY))
    tab.open("fill")
    tab.fill("fill_source", tags)
    tab.press("fill_text")
    tab.page.locator(f"#loramerge_row{MANY - 1}_line").wait_for(state="visible")
    tab.choose("mode", "TIES")
    tab.wait_for_facts(f"LoRAs {MANY}")
    tab.fill("name", name)


def test_the_page_stands_still_while_it_asks_the_server(tab: Tab) -> None:
    """The page asks again and again; an empty place must not grow and shrink meanwhile."""
    tab.row(1, "style")
    tab.wait_for_facts("LoRAs 1")
    heights = tab.page.evaluate(
        "() => new Promise((done) => { const seen = new Set(), end = performance.now() + 3000;"
        " const look = () => { seen.add(document.querySelector('#loramerge_jobs').offsetHeight);"
        " performance.now() < end ? requestAnimationFrame(look) : done([...seen]); }; look(); })"
    )
    assert heights == [0]


def left_behind(folder: Path, name: str) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if name in path.name)


# What is promised is one second, on a machine that does nothing else; the whole merge takes much longer.
CANCEL_SECONDS = 15.0


def test_cancel_in_the_middle_of_large_layers_acts_at_once_and_leaves_nothing(
    tab: Tab, host: FakeHost
) -> None:
    fill(tab, "stopped", "large")
    tab.press("merge")
    tab.wait_until_running(-1)
    assert tab.page.locator("#loramerge_row0_lora input").is_enabled()
    # From the press to the word on the page, by the page's own clock.
    milliseconds = tab.page.evaluate(
        "() => new Promise(done => { const start = performance.now();"
        " const told = () => /Cancelled|Done/.test(document.querySelector('#loramerge_result').textContent);"
        " const look = () => told() ? done(performance.now() - start) : setTimeout(look, 5);"
        " document.querySelector('#loramerge_jobs .lm-drop').click(); look(); })"
    )
    print(f"cancelled after {milliseconds:.0f} ms")
    assert "Cancelled" in tab.text("result")
    assert milliseconds < 1000 * CANCEL_SECONDS
    assert left_behind(host.lora_dir, "stopped") == []
    assert tab.value("name") == "stopped"
    assert tab.value(f"row{MANY - 1}_strength").startswith("0.1")


def test_a_reload_in_the_middle_shows_the_merge_again_and_keeps_the_form(tab: Tab, host: FakeHost) -> None:
    with host.held():
        _reload_in_the_middle(tab)


def _reload_in_the_middle(tab: Tab) -> None:
    fill(tab, "reloaded")
    tab.open("result_more")
    tab.fill("notes", "a note")
    tab.press("merge")
    tab.wait_until_running(1)
    assert "layers" in tab.text("jobs")
    tab.load()
    tab.wait_until_running(1)
    tab.expect_text("jobs", "reloaded")
    tab.page.locator(f"#loramerge_row{MANY - 1}_line").wait_for(state="visible")
    tab.expect_value("name", "reloaded")
    tab.expect_value("mode", "TIES")
    tab.page.locator("#loramerge_jobs .lm-drop").click()
    tab.expect_text("result", "Cancelled")
    tab.open("result_more")
    tab.fill("notes", "")
    tab.fill("name", "other")
    tab.page.locator("#loramerge_result .lm-refill").click()
    tab.expect_value("name", "reloaded")
    tab.expect_value("notes", "a note")


def test_a_second_window_sees_the_merge_waits_in_line_and_can_be_dropped(
    tab: Tab, chromium: object, host: FakeHost
) -> None:
    fill(tab, "first")
    with host.held(), Tab(chromium, host.url) as other:
        tab.press("merge")
        tab.wait_until_running()
        other.expect_text("jobs", "first")
        other.row(0, "style", 0.5)
        other.wait_for_facts("LoRAs 1")
        other.fill("name", "second")
        other.press("merge")
        other.expect_text("jobs", "Waiting for its turn")
        # Each window keeps its own form.
        tab.expect_value("name", "first")
        waiting = other.page.locator("#loramerge_jobs .lm-job").filter(has_text="second")
        waiting.locator(".lm-drop").click()
        other.expect_text("result", "Cancelled")
        other.press("merge")
        tab.page.locator("#loramerge_jobs .lm-job").filter(has_text="first").locator(".lm-drop").click()
        tab.expect_text("result", "Cancelled")
        host.post("/fake/let-go")
        other.expect_text("result", "Done")
    assert left_behind(host.lora_dir, "first") == []
    assert "second.safetensors" in left_behind(host.lora_dir, "second")


def test_a_press_on_cancel_counts_though_the_list_is_drawn_anew_before_it_ends(
    tab: Tab, host: FakeHost
) -> None:
    fill(tab, "pressed")
    with host.held():
        tab.press("merge")
        tab.wait_until_running()
        button = tab.page.locator("#loramerge_jobs .lm-drop").first
        button.hover()
        before = button.element_handle()
        tab.page.mouse.down()
        tab.page.wait_for_function("button => !button.isConnected", arg=before)
        tab.page.mouse.up()
        tab.expect_text("result", "Cancelled")
        host.post("/fake/let-go")
    assert left_behind(host.lora_dir, "pressed") == []


def test_a_merge_can_be_tried_sent_to_the_prompt_and_then_saved(tab: Tab, host: FakeHost) -> None:
    tab.row(0, "style", 0.5)
    tab.wait_for_facts("LoRAs 1")
    before = sorted(host.lora_dir.glob("*.safetensors"))
    tab.press("try")
    tab.expect_text("result", "Not saved")
    assert sorted(host.lora_dir.glob("*.safetensors")) == before
    prompt = send(tab)
    assert re.fullmatch("<lora:loramerge-try-[0-9a-f]+:1>", prompt)
    assert host.picture(prompt)
    tried = host.get("/loramerge/v1/jobs")["jobs"][-1]
    with host.held(0):  # Nothing is merged again.
        tab.merge("kept")
    tab.expect_text("result", "Done")
    kept = host.get("/loramerge/v1/jobs")["jobs"][-1]
    assert kept["report"]["sshs_model_hash"] == tried["report"]["sshs_model_hash"]
    assert model_hash(host.lora_dir / "kept.safetensors") == tried["report"]["sshs_model_hash"]
    # It takes the trial's place, strength and all.
    set_prompt(tab, "a cat, " + prompt.replace(":1>", ":0.8>") + ", ink")
    assert send(tab) == "a cat, <lora:kept:0.8>, ink"
    recipe = json.loads(json.dumps(tab.draft()))
    assert recipe["row0.strength"] == 0.5


def set_prompt(tab: Tab, text: str) -> None:
    tab.page.evaluate(
        "text => { const area = document.querySelector('#txt2img_prompt textarea'); area.value = text;"
        " area.dispatchEvent(new Event('input', {bubbles: true})); }",
        text,
    )


def send(tab: Tab) -> str:
    """The prompt after pressing Send; back on our tab."""
    tab.page.locator("#loramerge_result .lm-send").click()
    tab.page.locator("#tabs button").filter(has_text="LoRA Merge").first.click()
    return tab.page.locator("#txt2img_prompt textarea").input_value()


def test_sending_again_puts_no_lora_into_the_prompt_twice(tab: Tab, host: FakeHost) -> None:
    set_prompt(tab, "a cat")
    tab.row(0, "style", 0.5)
    tab.wait_for_facts("LoRAs 1")
    tab.merge("once")
    assert send(tab) == "a cat <lora:once:1>"
    assert send(tab) == "a cat <lora:once:1>"
    [(name, multiplier, _)] = host.picture("a cat <lora:once:1>")
    assert (name, multiplier) == ("once", 1)
    set_prompt(tab, "<lora:once:0.3:lbw=MIDD>, <lora:once more:1> <lora:once:2>")
    assert send(tab).split() == ["<lora:once:1>,", "<lora:once", "more:1>"]


def test_the_next_trial_of_the_same_loras_takes_the_place_of_the_last(tab: Tab, host: FakeHost) -> None:
    set_prompt(tab, "")
    names = []
    for strength in (0.5, 0.7):
        tab.row(0, "style", strength)
        tab.wait_for_facts("LoRAs 1")
        before = tab.shown_job()
        tab.press("try")
        expect(tab.page.locator("#loramerge_result .lm-result")).not_to_have_attribute("data-job", before)
        tab.expect_text("result", "Not saved")
        prompt = send(tab)
        names.append(re.fullmatch("<lora:(loramerge-try-[0-9a-f]+):1>", prompt))
    assert all(names)
    assert len({name[1] for name in names}) == 2
    # One of other LoRAs goes beside it.
    tab.row(0, "many", 1)
    tab.merge("beside")
    assert send(tab) == f"{prompt} <lora:beside:1>"


def test_the_prompt_is_in_the_window_after_sending_to_it(tab: Tab, host: FakeHost) -> None:
    tab.row(0, "style", 0.5)
    tab.merge("sent")
    tab.page.set_viewport_size({"width": 1400, "height": 400})
    tab.page.locator("#loramerge_result .lm-send").click()
    expect(tab.page.locator("#txt2img_prompt textarea")).to_be_in_viewport(timeout=PATIENCE)
    assert tab.page.locator("#txt2img_prompt textarea").input_value().endswith("<lora:sent:1>")
    tab.page.set_viewport_size({"width": 1400, "height": 1000})
    tab.page.locator("#tabs button").filter(has_text="LoRA Merge").first.click()


def test_an_error_in_the_middle_is_told_and_the_form_stays(tab: Tab, host: FakeHost) -> None:
    path = make_lora(host.lora_dir / "vanishing.safetensors", SD1_LAYERS, rank=2, seed=5)
    tab.press("refresh")
    tab.row(0, "vanishing", 0.5)
    tab.wait_for_facts("LoRAs 1")
    path.unlink()
    tab.press("merge")
    tab.expect_text("message", "vanishing")
    assert tab.value("row0_lora").startswith("vanishing")


def test_a_lora_goes_to_the_prompt_in_view(chromium: object, tmp_path: Path) -> None:
    """SD.Next's ModernUI shows one of its prompts beside our tab, and hides the one of txt2img."""
    make_lora(tmp_path / "models" / "Lora" / "style.safetensors", SD1_LAYERS, rank=2)
    with FakeHost(tmp_path, "--sdnext", *SERVED) as host, Tab(chromium, host.url) as tab:
        shown = tab.page.locator("#control_prompt textarea")
        shown.fill("a cat <lora:style:0.5>")
        tab.open("fill")
        tab.press("paste_prompt")
        tab.expect_value("row0_lora", re.compile("style"))
        tab.merge("sent")
        tab.page.locator("#loramerge_result .lm-send").click()
        expect(shown).to_have_value("a cat <lora:style:0.5> <lora:sent:1>")
        assert tab.page.locator("#txt2img_prompt textarea").input_value() == ""
        assert tab.page.locator("#loramerge_merge").is_visible(), "the tab stays in view"
