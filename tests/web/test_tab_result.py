"""Where the result goes, in a browser: no file is replaced unasked, and all that was refused is told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.helpers.browser import SERVED, Tab
from tests.helpers.fixtures import SD1_LAYERS, SDXL_LAYERS, make_lora
from tests.helpers.hosting import FakeHost


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHost]:
    folder = tmp_path_factory.mktemp("webui")
    loras = folder / "models" / "Lora"
    for seed, name in enumerate(("style", "subject", "other", "third")):
        make_lora(loras / f"{name}.safetensors", SD1_LAYERS, rank=4, seed=seed)
    make_lora(loras / "large.safetensors", SDXL_LAYERS, rank=4, seed=9)
    with FakeHost(folder, *SERVED) as running:
        yield running


@pytest.fixture
def taken(host: FakeHost) -> Iterator[Path]:
    """A file that somebody made, under a name of its own."""
    path = host.lora_dir / "taken.safetensors"
    make_lora(path, SD1_LAYERS, rank=2, seed=7)
    yield path
    path.unlink()


def expect_ticked(tab: Tab, ticked: bool) -> None:
    expect(tab.page.locator("#loramerge_overwrite input")).to_be_checked(checked=ticked)


def expect_button(tab: Tab, text: str) -> None:
    expect(tab.page.locator("#loramerge_merge")).to_have_text(text)


def pick(tab: Tab, *loras: str) -> None:
    """Fill the rows, one after the other."""
    for row, lora in enumerate(loras):
        tab.row(row, lora)
    tab.wait_for_facts(f"LoRAs {len(loras)}")


def test_a_choice_counts_although_its_list_is_open_again(tab: Tab) -> None:
    tab.field("row0_lora").click()
    option = tab.page.locator("ul.options li, ul[role=listbox] li").filter(has_text="style").first
    option.wait_for(state="attached")
    # As a click does in Gradio 3, whose list lies inside the label of its field.
    option.evaluate(
        "li => { const field = document.activeElement;"
        " li.dispatchEvent(new MouseEvent('mousedown', {bubbles: true, cancelable: true})); field.focus(); }"
    )
    tab.wait_for_facts("LoRAs 1")


def test_an_idle_page_asks_seldom(tab: Tab) -> None:
    tab.page.locator("#loramerge_jobs [data-state=idle]:not([data-labels=busy])").wait_for(state="attached")
    pressed = tab.page.evaluate(
        "() => new Promise(done => { let count = 0;"
        " document.getElementById('loramerge_do_poll').addEventListener('click', () => { count += 1; });"
        " setTimeout(() => done(count), 3000); })"
    )
    assert pressed <= 2


def test_the_facts_are_not_asked_for_again_while_an_answer_is_awaited(tab: Tab) -> None:
    """A slow server's answer to the older question would come last and stay."""
    tab.row(0, "style")
    tab.wait_for_facts("LoRAs 1")
    tab.page.evaluate(
        "() => { window.lmAsked = 0; document.addEventListener('click', event => {"
        " if (!event.target.closest('#loramerge_do_ask')) return;"
        " window.lmAsked += 1; event.stopPropagation(); }, true); }"
    )
    tab.fill("name", "slow")
    tab.page.wait_for_function("() => window.lmAsked === 1")
    tab.fill("name", "slower")
    tab.page.wait_for_timeout(6000)
    assert tab.page.evaluate("() => window.lmAsked") == 1
    tab.load()


def replacing(tab: Tab, *loras: str) -> None:
    """The form about to replace ``taken``."""
    pick(tab, *loras)
    tab.fill("name", "taken")
    tab.expect_text("name_message", "exists already")
    tab.tick("overwrite", True)
    expect_button(tab, "Replace taken")


def test_what_is_replaced_is_said_before_and_the_tick_is_for_one_merge(tab: Tab, taken: Path) -> None:
    before = taken.read_bytes()
    replacing(tab, "style", "subject")
    tab.expect_text("name_message", "taken.safetensors will be replaced.")
    expect(tab.page.locator("#loramerge_name_message .lm-warning")).to_be_visible()
    tab.merge()
    assert taken.read_bytes() != before
    expect_ticked(tab, False)
    expect_button(tab, "Merge and save")
    tab.expect_text("name_message", "exists already")
    made = taken.read_bytes()
    tab.press("merge")
    tab.expect_text("message", "taken.safetensors exists already")
    assert taken.read_bytes() == made


@pytest.mark.parametrize("change", ["another", "off", "removed", "typed"])
def test_other_loras_are_not_what_overwrite_was_ticked_for(tab: Tab, taken: Path, change: str) -> None:
    before = taken.read_bytes()
    replacing(tab, "style", "subject")
    if change == "another":
        tab.choose("row1_lora", "other")
    elif change == "typed":
        tab.fill("row1_lora", "third")
    elif change == "off":
        tab.tick("row1_on", False)
    else:
        tab.press("row1_remove")
    expect_ticked(tab, False)
    tab.press("merge")
    tab.expect_text("message", "taken.safetensors exists already")
    assert taken.read_bytes() == before


def test_a_merge_pressed_before_the_page_has_unticked_replaces_nothing(tab: Tab, taken: Path) -> None:
    before = taken.read_bytes()
    replacing(tab, "style", "subject")
    # Where the page asks nothing of the server, it does not untick.
    tab.page.evaluate("() => { const e = document.getElementById('loramerge_do_ask'); e.id = 'asleep'; }")
    try:
        tab.fill("row1_lora", "other")
        tab.page.locator("#loramerge_merge").click()
        tab.expect_text("message", "taken.safetensors exists already")
        expect_ticked(tab, False)
    finally:
        tab.page.evaluate("() => { document.getElementById('asleep').id = 'loramerge_do_ask'; }")
    assert taken.read_bytes() == before


def test_a_strength_is_no_other_lora(tab: Tab, taken: Path) -> None:
    replacing(tab, "style", "subject")
    tab.fill("row0_strength", 0.5)
    tab.press("row1_up")
    tab.expect_value("row1_strength", "0.5")
    tab.wait_for_facts("LoRAs 2")
    expect_ticked(tab, True)
    expect_button(tab, "Replace taken")


def test_clear_forgets_the_result_and_the_next_merge_has_a_free_name(
    tab: Tab, host: FakeHost, taken: Path
) -> None:
    before = taken.read_bytes()
    replacing(tab, "style", "subject")
    tab.open("result_more")
    tab.fill("activation_text", "ohwx")
    tab.fill("notes", "of the first")
    tab.press("clear")
    tab.expect_value("name", "")
    expect_ticked(tab, False)
    pick(tab, "other", "third")
    tab.expect_value("name", "other+third")
    tab.expect_value("activation_text", "")
    tab.expect_value("notes", "")
    expect_button(tab, "Merge and save")
    tab.merge()
    assert (host.lora_dir / "other+third.safetensors").is_file()
    (host.lora_dir / "other+third.safetensors").unlink()
    assert taken.read_bytes() == before


def test_the_tick_does_not_outlive_a_reload_nor_a_filled_form(tab: Tab, taken: Path) -> None:
    replacing(tab, "style", "subject")
    tab.load()
    tab.expect_value("name", "taken")
    tab.expect_text("name_message", "exists already")
    expect_ticked(tab, False)
    tab.tick("overwrite", True)
    expect_button(tab, "Replace taken")
    tab.open("fill")
    tab.fill("fill_source", "<lora:style:1><lora:subject:0.5>")
    tab.press("fill_text")
    tab.expect_value("row1_strength", "0.5")
    expect_ticked(tab, False)


def test_all_that_stops_a_merge_is_told_at_once_and_goes_with_its_cause(tab: Tab, taken: Path) -> None:
    tab.row(0, "style")
    tab.row(1, "large")
    tab.fill("name", "taken")
    tab.wait_for_facts("different base models")
    tab.press("merge")
    tab.expect_text("message", "different base models")
    tab.expect_text("message", "taken.safetensors exists already")
    tab.choose("row1_lora", "subject")
    expect(tab.page.locator("#loramerge_message").first).not_to_contain_text("base models")
    tab.expect_text("message", "taken.safetensors exists already")
    tab.fill("name", "free")
    expect(tab.page.locator("#loramerge_message .lm-error")).to_have_count(0)
    tab.fill("row0_lora", "")
    tab.fill("row1_lora", "")
    tab.wait_for_facts("Pick a LoRA")
    tab.press("merge")
    tab.expect_text("message", re.compile("Pick at least one LoRA"))
    tab.row(0, "style")
    expect(tab.page.locator("#loramerge_message .lm-error")).to_have_count(0)


def test_what_the_rank_may_lose_is_told_before_and_made_good_by_a_button(tab: Tab, host: FakeHost) -> None:
    tab.row(0, "style")
    tab.row(1, "subject")
    tab.wait_for_facts("At rank 4 the file would have")
    tab.choose("rank_rule", "Same as the inputs")
    tab.wait_for_facts("Rank 4 of up to 8: the sum may need more. Press Analyse for the error.")
    result = tab.merge("lossy")
    assert re.search("Error [0-9.]+ %", result)
    assert re.search(r"Kept of each LoRA style [0-9.]+ % \([A-Z0-9]+ [0-9.]+ %\)", result)
    assert "distance of the file from the exact result" in result
    before = tab.shown_job()
    lossy = (host.lora_dir / "lossy.safetensors").read_bytes()
    again = tab.page.locator("#loramerge_result .lm-again")
    expect(again).to_have_text(re.compile(r"^Merge again keeping everything \([0-9.]+ kB\)$"))
    again.click()
    expect(tab.page.locator("#loramerge_result .lm-result")).not_to_have_attribute("data-job", before)
    tab.expect_text("result", "Error none but rounding")
    expect(tab.page.locator("#loramerge_result .lm-again")).to_have_count(0)
    # The first file stays; the form goes on with what was pressed.
    assert (host.lora_dir / "lossy.safetensors").read_bytes() == lossy
    assert (host.lora_dir / "lossy-2.safetensors").is_file()
    tab.expect_value("rank_rule", "Keep everything")
    tab.wait_for_facts("Rank 8")
    expect(tab.page.locator("#loramerge_facts .lm-note")).to_have_count(0)


def test_a_merge_begun_elsewhere_says_so(tab: Tab, host: FakeHost, chromium: object) -> None:
    tab.row(0, "style")
    tab.wait_for_facts("LoRAs 1")
    tab.merge("mine")
    note = "Begun in another window"
    expect(tab.page.locator("#loramerge_result .lm-elsewhere")).to_be_hidden()
    with Tab(chromium, host.url) as other:
        other.expect_text("result", "mine")
        expect(other.page.locator("#loramerge_result").get_by_text(note)).to_be_visible()
    tab.load()
    tab.expect_text("result", "mine")
    expect(tab.page.locator("#loramerge_result .lm-elsewhere")).to_be_hidden()


def test_small_buttons_have_an_edge_in_a_theme_without_colours(tab: Tab) -> None:
    """As SD.Next's ModernUI is: they were words like others."""
    pick(tab, "style", "subject")
    tab.expect_text("facts", "Use this rank")
    button = tab.page.locator("#loramerge_facts .lm-button").first
    app = tab.page.locator("#loramerge_app")
    button.evaluate("element => { element.style.transition = 'none'; }")
    app.evaluate("element => element.style.setProperty('--lm-line', 'transparent')")
    edge = button.evaluate("element => getComputedStyle(element).borderTopColor")
    app.evaluate("element => element.style.removeProperty('--lm-line')")
    assert not re.search(r"[,/] 0\)$", edge), edge
