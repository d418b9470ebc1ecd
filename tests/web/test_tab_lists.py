"""The lists of LoRAs, in a browser: search by several words, labels that come later, broken files last."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.helpers.browser import SERVED, Tab
from tests.helpers.fixtures import SD1_LAYERS, SDXL_LAYERS, make_lora
from tests.helpers.hosting import FakeHost

ON_TOP = """item => {
    const place = item.getBoundingClientRect();
    return item.contains(document.elementFromPoint(place.x + 9, place.y + 9));
}"""
# Of Gradio and of ours.
OPTIONS = "#loramerge_row0_lora :is(ul.options, ul[role=listbox]):visible li"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHost]:
    folder = tmp_path_factory.mktemp("webui")
    loras = folder / "models" / "Lora"
    make_lora(loras / "styles" / "ghibli xl.safetensors", SDXL_LAYERS, rank=4, seed=1)
    make_lora(loras / "styles" / "ghibli.safetensors", SD1_LAYERS, rank=8, seed=2)
    make_lora(loras / "people" / "face.safetensors", SD1_LAYERS, rank=4, seed=3)
    (loras / "0 empty.safetensors").write_bytes(b"")
    (loras / "0 page.safetensors").write_bytes(b"<!DOCTYPE html><html>Not found</html>")
    with FakeHost(folder, *SERVED) as running:
        yield running


@pytest.fixture
def own(chromium: object, host: FakeHost) -> Iterator[Tab]:
    """A window that no other test uses: what was typed into a list of Gradio 3 outlives a fresh form."""
    with Tab(chromium, host.url) as opened:
        yield opened
        assert opened.errors == []


def search(tab: Tab, text: str, *found: str) -> None:
    """Type into the first row's list until it shows what is looked for, in any order."""
    field = tab.field("row0_lora")
    options = tab.page.locator(OPTIONS)
    for _ in range(10):
        field.click()
        field.fill("")
        field.press_sequentially(text)
        try:
            expect(options).to_have_count(len(found), timeout=6000)
            break
        except AssertionError:
            field.press("Escape")  # An answer of the server has closed the list.
            field.blur()
    texts = sorted(text.replace("✓", "").strip() for text in options.all_inner_texts())
    assert texts == sorted(found)


def test_every_word_may_stand_anywhere_in_name_folder_base_model_or_rank(tab: Tab) -> None:
    for words in ("ghibli sdxl", "SDXL ghi", "styles rank 4"):
        search(tab, words, "styles/ghibli xl · SDXL · rank 4")
    search(tab, "sd 1", "styles/ghibli · SD 1 · rank 8", "people/face · SD 1 · rank 4")
    search(tab, "SDXL", "styles/ghibli xl · SDXL · rank 4")
    leave(tab)


def leave(tab: Tab) -> None:
    """Leave the first row's list without choosing: Gradio 3 keeps what was typed in view for ever."""
    field = tab.field("row0_lora")
    field.fill("")
    field.press("Escape")
    field.blur()


def drop(tab: Tab, row: int, kind: str, text: str) -> None:
    """A file let go over a row, as Chromium (a file) or Firefox on Linux (an address, too) hand it over."""
    tab.page.evaluate(
        """([row, kind, text]) => {
            const transfer = new DataTransfer();
            if (kind === "file") transfer.items.add(new File(["x"], text));
            else transfer.setData("text/uri-list", text);
            const line = document.querySelector(`#loramerge_row${row}_line`);
            for (const name of ["dragover", "drop"]) {
                const how = { dataTransfer: transfer, bubbles: true, cancelable: true };
                line.dispatchEvent(new DragEvent(name, how));
            }
        }""",
        [row, kind, text],
    )


def test_a_file_dropped_onto_a_row_is_the_lora_of_its_name(tab: Tab) -> None:
    drop(tab, 0, "file", "ghibli.safetensors")
    tab.expect_value("row0_lora", "styles/ghibli · SD 1 · rank 8")
    drop(tab, 1, "address", "file:///somewhere/else/face.safetensors")
    tab.expect_value("row1_lora", "people/face · SD 1 · rank 4")
    tab.wait_for_facts("2")
    drop(tab, 1, "file", "stranger.safetensors")
    tab.expect_text("row1_facts", "There is no LoRA called stranger")


def test_what_several_words_found_is_in_view(own: Tab) -> None:
    tab = own
    search(tab, "rank sd 1", "styles/ghibli · SD 1 · rank 8", "people/face · SD 1 · rank 4")
    for item in tab.page.locator(".lm-found li").all():
        # Neither cut off by the field's box nor behind what stands below it.
        assert item.evaluate(ON_TOP)
    leave(tab)


def test_what_several_words_found_is_chosen_by_mouse_and_by_keyboard(tab: Tab) -> None:
    search(tab, "ghibli sdxl", "styles/ghibli xl · SDXL · rank 4")
    tab.page.locator(OPTIONS).first.click()
    tab.expect_value("row0_lora", "styles/ghibli xl · SDXL · rank 4")
    tab.wait_for_facts("Stable Diffusion XL")
    search(tab, "rank sd 1", "styles/ghibli · SD 1 · rank 8", "people/face · SD 1 · rank 4")
    first = tab.page.locator(OPTIONS).nth(1).inner_text()
    tab.field("row0_lora").press("ArrowDown")
    tab.field("row0_lora").press("Enter")
    tab.expect_value("row0_lora", first)
    tab.wait_for_facts("Stable Diffusion 1")
    expect(tab.page.locator(".lm-found")).to_have_count(0)


def test_several_words_are_enough_without_choosing_when_one_lora_has_them(tab: Tab) -> None:
    tab.fill("row0_lora", "xl ghibli")
    tab.expect_value("row0_lora", "styles/ghibli xl · SDXL · rank 4")


def test_broken_files_are_last_and_marked(tab: Tab) -> None:
    tab.field("row0_lora").click()
    options = tab.page.locator(OPTIONS)
    expect(options.last).to_contain_text("broken")
    texts = [text.replace("✓", "").strip() for text in options.all_inner_texts()]
    assert texts[-2:] == ["0 empty · broken", "0 page · broken"]
    assert "broken" not in "".join(texts[:-2])
    leave(tab)


def test_new_files_get_their_labels_after_refresh_without_another_press(tab: Tab, host: FakeHost) -> None:
    paths = [host.lora_dir / f"new {index}.safetensors" for index in range(3)]
    for path in paths:
        make_lora(path, SDXL_LAYERS, rank=2, seed=5)
    try:
        tab.press("refresh")
        known = tab.page.locator("#loramerge_names [data-names]")
        expect(known).to_have_attribute("data-names", re.compile("new 2 · SDXL · rank 2"))
        search(tab, "new sdxl", *(f"new {index} · SDXL · rank 2" for index in range(3)))
    finally:
        leave(tab)
        for path in paths:
            path.unlink()
        tab.press("refresh")


def test_a_file_that_is_gone_has_one_name(tab: Tab, host: FakeHost) -> None:
    path = host.lora_dir / "gone.safetensors"
    make_lora(path, SD1_LAYERS, rank=2, seed=5)
    tab.press("refresh")
    tab.choose("row0_lora", "gone")
    tab.wait_for_facts("LoRAs 1")
    path.unlink()
    tab.press("merge")
    tab.expect_text("message", "There is no LoRA called gone in the LoRA folder.")
    tab.press("refresh")
    tab.expect_text("row0_facts", "There is no LoRA called gone in the LoRA folder.")


def test_people_see_the_pictures_of_their_loras(tab: Tab, host: FakeHost) -> None:
    picture = host.lora_dir / "people" / "face.preview.png"
    Image.new("RGB", (600, 900), (200, 30, 30)).save(picture)
    (host.lora_dir / "styles" / "ghibli.png").write_bytes(b"no picture")
    try:
        tab.row(0, "face")
        tab.row(1, "ghibli ·")
        thumb = tab.page.locator("#loramerge_row0_facts img.lm-thumb")
        expect(thumb).to_be_visible()
        size = thumb.evaluate(
            "async image => { await image.decode(); return [image.naturalWidth, image.naturalHeight]; }"
        )
        assert size == [64, 96]
        assert len(thumb.get_attribute("src") or "") < 8000
        tab.wait_for_facts("LoRAs 2")
        expect(tab.page.locator("#loramerge_row1_facts img")).to_have_count(0)
    finally:
        picture.unlink()
        (host.lora_dir / "styles" / "ghibli.png").unlink()


def test_the_lists_show_the_pictures_too(own: Tab, host: FakeHost) -> None:
    tab = own
    picture = host.lora_dir / "people" / "face.preview.png"
    Image.new("RGB", (600, 900), (200, 30, 30)).save(picture)
    try:
        tab.press("refresh")
        tab.field("row0_lora").click()
        with_picture = tab.page.locator(f"{OPTIONS}.lm-pictured")
        expect(with_picture).to_have_count(1)
        expect(with_picture).to_contain_text("people/face")
        expect(with_picture).to_have_attribute("style", re.compile("data:image/jpeg;base64,"))
        # Gradio uses its elements again for other names while one types.
        tab.field("row0_lora").fill("ghibli")
        expect(with_picture).to_have_count(0)
        search(tab, "face sd", "people/face · SD 1 · rank 4")
        expect(with_picture).to_have_count(1)
        leave(tab)
    finally:
        picture.unlink()
    tab.press("refresh")
    tab.field("row0_lora").click()
    expect(tab.page.locator(OPTIONS).first).to_be_visible()
    expect(with_picture).to_have_count(0)
    leave(tab)


def test_an_empty_name_shows_the_one_that_will_be_taken(tab: Tab) -> None:
    tab.row(0, "face")
    tab.expect_value("name", "face-2")
    tab.fill("name", "")
    expect(tab.field("name")).to_have_attribute("placeholder", "face-2")
    tab.expect_value("name", "")


def test_presets_go_to_a_row_that_is_called_by_its_lora(tab: Tab) -> None:
    tab.row(0, "face")
    tab.row(1, "ghibli ·")
    tab.wait_for_facts("LoRAs 2")
    tab.show_page("Block presets")
    tab.expect_value("preset_row", re.compile("^1: people/face"))
    tab.fill("preset_text", "1,1,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0")
    tab.choose("preset_row", "ghibli")
    tab.press("preset_use")
    tab.expect_text("preset_message", "Row 2 uses these weights now.")
    tab.show_page("Merge")
    tab.expect_value("row1_blocks", re.compile("^1,1,0"))
    tab.expect_value("row0_blocks", "")


def labels(tab: Tab, *names: str) -> list[float]:
    return [
        tab.page.locator(f"#loramerge_{name} span[data-testid=block-info]").first.bounding_box()["y"]
        for name in names
    ]


def test_labels_in_one_line_stand_at_one_height(tab: Tab) -> None:
    for names in (
        ("name", "subfolder"),
        ("row0_strength", "row0_te", "row0_blocks"),
        ("mode", "rank_rule", "dtype"),
    ):
        heights = labels(tab, *names)
        assert max(heights) - min(heights) < 1, names


def test_a_narrow_window_with_an_analysis_needs_no_sideways_scrolling(
    chromium: object, host: FakeHost
) -> None:
    with Tab(chromium, host.url, width=400) as tab:
        said: list[str] = []
        tab.page.on("console", lambda message: said.append(message.text))
        tab.row(0, "face")
        tab.row(1, "ghibli ·")
        tab.wait_for_facts("LoRAs 2")
        tab.press("analyse")
        page = tab.page.locator("#loramerge_analyse_result .lm-analysis")
        # It opens in view by itself.
        expect(page).to_be_in_viewport()
        expect(page.locator("img").first).to_be_visible()
        wide = tab.page.evaluate(
            # A table of many columns scrolls in its own box.
            "() => [...document.querySelectorAll('#loramerge_app .lm-analysis :not(.lm-tables *)')]"
            ".filter(e => e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 80))"
        )
        assert wide == []
        assert tab.page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
        assert [text for text in said if "Too many arguments" in text] == []
        assert tab.errors == []
