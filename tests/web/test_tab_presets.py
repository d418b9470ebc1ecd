"""The page of presets in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from lib_loramerge.analysis import inspect
from lib_loramerge.webui.host import StandaloneHost
from lib_loramerge.webui.standalone import Page
from lib_loramerge.webui.tab.presets import model_lists
from tests.helpers.browser import Tab
from tests.helpers.fixtures import SD1_LAYERS, make_lora

# Labels of fields that only the page's script sees.
HIDDEN = ("fitted", "plot", "argument", "draft", "proposed", "copied", "started", "refused", "rows", "origin")
PRESETS = (
    "# mine\nFIRST:1,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0\n\n"
    "# the second\nSECOND:R,U,X,1,1,1,1,1,1,1,1,1\nELEM:IN04:attn:0.5\n"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Page, Path]]:
    folder = tmp_path_factory.mktemp("alone")
    make_lora(folder / "loras" / "style.safetensors", SD1_LAYERS, rank=4, seed=1)
    presets = folder / "preset.txt"
    presets.write_text(PRESETS, encoding="utf-8")
    served = Page(folder / "loras", host=StandaloneHost([folder / "loras"], preset_path=presets))
    try:
        yield served, presets
    finally:
        served.close()


@pytest.fixture
def tab(chromium: object, page: tuple[Page, Path]) -> Iterator[Tab]:
    with Tab(chromium, page[0].entrance, title=None) as opened:
        yield opened
        assert opened.errors == []


def test_a_preset_is_edited_by_sliders_saved_and_kept_with_the_comments(
    tab: Tab, page: tuple[Page, Path]
) -> None:
    tab.show_page("Block presets")
    tab.choose("preset_pick", "FIRST")
    tab.expect_value("preset_text", "1,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0")
    sliders = tab.page.locator("#loramerge_sliders label")
    expect(sliders).to_have_count(17)
    sliders.nth(3).locator("input[type=range]").fill("0.55")
    tab.expect_value("preset_text", "1,0,0,0.55,0,0,0,0,0,0,0,0,0,0,0,0,0")
    # The text decides, also before the sliders have followed it.
    tab.page.evaluate(
        "() => { const text = document.querySelector('#loramerge_preset_text textarea');"
        " text.value = text.value.replace('0.55', '0.25'); text.dispatchEvent(new Event('input'));"
        " const slider = document.querySelectorAll('#loramerge_sliders input[type=range]')[1];"
        " slider.value = '1.5'; slider.dispatchEvent(new Event('input')); }"
    )
    tab.expect_value("preset_text", "1,1.5,0,0.25,0,0,0,0,0,0,0,0,0,0,0,0,0")
    expect(sliders.nth(3).locator("input[type=text]")).to_have_value("0.25")
    tab.fill("preset_text", "1,0,0,0.55,0,0,0,0,0,0,0,0,0,0,0,0,0")
    sliders.nth(4).locator("input[type=text]").fill("X+0.1")
    tab.expect_value("preset_text", "1,0,0,0.55,X+0.1,0,0,0,0,0,0,0,0,0,0,0,0")
    expect(sliders.nth(4).locator("input[type=range]")).to_be_disabled()
    tab.fill("preset_name", "MINE")
    tab.press("preset_save")
    tab.expect_text("preset_message", "MINE")
    text = page[1].read_text(encoding="utf-8")
    assert text.startswith(PRESETS)
    assert "MINE:1,0,0,0.55,X+0.1,0,0,0,0,0,0,0,0,0,0,0,0" in text
    # It is in the lists of the rows at once, and after the page is loaded again.
    tab.show_page("Merge")
    tab.row(0, "style")
    tab.choose("row0_blocks", "MINE")
    tab.page.wait_for_function("() => (sessionStorage.getItem('loramerge_draft') || '').includes('MINE')")
    tab.load()
    tab.expect_value("row0_blocks", "MINE")
    tab.show_page("Block presets")
    tab.choose("preset_pick", "MINE")
    tab.press("preset_delete")
    tab.expect_text("preset_message", "deleted")
    assert page[1].read_text(encoding="utf-8") == PRESETS


def test_lists_of_every_length_get_their_sliders(tab: Tab) -> None:
    tab.show_page("Block presets")
    for count in (12, 17, 20, 26, 61):
        tab.choose("preset_layout", f": {count}")
        tab.page.wait_for_function(
            "n => document.querySelectorAll('#loramerge_sliders label').length === n", arg=count
        )


def test_every_base_model_has_sliders_for_its_blocks(tab: Tab) -> None:
    tab.show_page("Block presets")
    for label, ids in (("Z-Image", "B29"), ("Qwen-Image", "B59"), ("Wan", "B39")):
        found = next(
            (name, entry) for name, entry in model_lists().items() if name.startswith(label) and ids in entry
        )
        tab.choose("preset_layout", found[0])
        tab.page.wait_for_function(
            "ids => [...document.querySelectorAll('#loramerge_sliders label span')]"
            ".map((one) => one.textContent).join() === ids",
            arg=",".join(found[1]),
        )


def test_sliders_show_how_strong_each_block_of_the_rows_lora_is(tab: Tab, page: tuple[Page, Path]) -> None:
    tab.row(0, "style")
    tab.wait_for_facts("File size")
    tab.press("analyse")
    tab.expect_text("analyse_state", "Analysed.")
    tab.show_page("Block presets")
    tab.choose("preset_layout", "SD 1 and 2: 17")
    tab.page.wait_for_function("() => document.querySelector('#loramerge_sliders label[data-norm=\"100\"]')")
    strongest = tab.page.locator("#loramerge_sliders label[data-norm='100'] span")
    norms = inspect(page[1].parent / "loras" / "style.safetensors").norm_by_block
    expect(strongest).to_have_text(max(norms, key=norms.get))


def test_elemental_presets_are_edited_as_text(tab: Tab, page: tuple[Page, Path]) -> None:
    tab.show_page("Block presets")
    tab.page.locator("#loramerge_preset_kind label").filter(has_text="Elemental").click()
    tab.page.locator("#loramerge_sliders").wait_for(state="hidden")
    tab.choose("preset_pick", "ELEM")
    tab.expect_value("preset_text", "IN04:attn:0.5")
    tab.fill("preset_text", "IN04 IN05:attn2:0.25")
    tab.fill("preset_name", "ELEM2")
    tab.press("preset_save")
    tab.expect_text("preset_message", "ELEM2")
    assert "ELEM2:IN04 IN05:attn2:0.25" in page[1].read_text(encoding="utf-8")
    tab.press("preset_delete")
    tab.expect_text("preset_message", "deleted")


def test_a_wrong_preset_is_refused_and_stays_in_the_editor(tab: Tab, page: tuple[Page, Path]) -> None:
    before = page[1].read_bytes()
    tab.show_page("Block presets")
    tab.fill("preset_text", "1,2,3")
    tab.press("preset_save")
    tab.expect_text("preset_message", "name")
    tab.fill("preset_name", "SHORT")
    tab.press("preset_save")
    tab.expect_text("preset_message", "17")
    tab.expect_value("preset_text", "1,2,3")
    assert page[1].read_bytes() == before


def test_weights_can_be_put_into_a_row_without_saving(tab: Tab) -> None:
    tab.show_page("Block presets")
    tab.choose("preset_pick", "SECOND")
    tab.expect_value("preset_text", "R,U,X,1,1,1,1,1,1,1,1,1")
    tab.fill("preset_row", 2)
    tab.press("preset_use")
    tab.expect_text("preset_message", "2")
    tab.show_page("Merge")
    tab.expect_value("row1_blocks", "R,U,X,1,1,1,1,1,1,1,1,1")


def test_the_page_speaks_japanese_when_asked(chromium: object, page: tuple[Page, Path]) -> None:
    with Tab(chromium, page[0].entrance, title=None, query="?lang=ja_JP") as tab:
        tab.expect_text("merge", "マージして保存")
        tab.expect_text("facts", "LoRA を選ぶと")
        tab.fill("row0_lora", "stile")
        tab.expect_text("row0_facts", "stile という LoRA はありません。")
        tab.page.wait_for_function(
            "() => (document.querySelector('#loramerge_merge').title || '').includes('フォルダー')"
        )
        english = tab.page.evaluate(
            "() => [...document.querySelectorAll("
            "'#loramerge_app [data-testid=block-info], #loramerge_app h3 span')]"
            ".map(e => e.textContent.trim()).filter(t => /^[A-Za-z ]{3,}$/.test(t) && t !== 'LoRA')"
        )
        assert [text for text in english if text not in HIDDEN] == []
