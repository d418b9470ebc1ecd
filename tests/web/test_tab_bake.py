"""Baking and extracting in a browser: facts before, report after, and a form that survives errors."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from tests.helpers.browser import SERVED, Tab
from tests.helpers.hosting import FakeHost
from tests.web.test_api_checkpoints import fill


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHost]:
    folder = tmp_path_factory.mktemp("webui")
    fill(folder)
    with FakeHost(folder, *SERVED, "--api") as running:
        yield running


@pytest.fixture
def tab(chromium: object, host: FakeHost) -> Iterator[Tab]:
    with Tab(chromium, host.url) as opened:
        yield opened
        assert opened.errors == []


def make(tab: Tab, kind: str) -> None:
    tab.page.locator("#loramerge_result_kind label").filter(has_text=kind).click()


def shown(tab: Tab, name: str) -> bool:
    return tab.page.locator(f"#loramerge_{name}").first.is_visible()


def choose_bake(tab: Tab) -> None:
    tab.row(0, "style", 0.5)
    tab.wait_for_facts("LoRAs 1")
    make(tab, "Checkpoint")
    expect(tab.page.locator("#loramerge_bake_base").first).to_be_visible()
    tab.choose("bake_base", "base.safetensors")
    tab.wait_for_facts("Free disk space")


def test_a_checkpoint_is_baked_with_facts_before_and_a_report_after(tab: Tab, host: FakeHost) -> None:
    choose_bake(tab)
    assert "1 layer, 1 tensor (" in tab.text("facts")
    expect(tab.page.locator("#loramerge_merge")).to_have_text("Bake and save")
    for name in ("rank_rule", "dtype", "subfolder", "result_more", "try"):
        assert not shown(tab, name), name
    tab.expect_value("name", re.compile("^base-style"))
    text = tab.merge("from the tab")
    assert "Survives 100 %" in text
    assert "from the tab.safetensors" in text
    assert (host.data_dir / "models" / "Stable-diffusion" / "from the tab.safetensors").is_file()
    # The name is taken now; what was chosen stays.
    tab.expect_text("name_message", "exists already")
    tab.press("merge")
    tab.expect_text("message", "exists already")
    tab.expect_value("bake_base", "base.safetensors")
    tab.expect_value("row0_lora", re.compile("^style"))
    make(tab, "LoRA file")
    expect(tab.page.locator("#loramerge_rank_rule").first).to_be_visible()
    expect(tab.page.locator("#loramerge_bake_base").first).not_to_be_visible()
    expect(tab.page.locator("#loramerge_merge")).to_have_text("Merge and save")


def test_a_reload_keeps_that_a_checkpoint_is_to_be_made(tab: Tab) -> None:
    choose_bake(tab)
    tab.expect_text("facts", "Free disk space")
    tab.page.wait_for_function("() => (sessionStorage.loramerge_draft || '').includes('base.safetensors')")
    tab.load()
    tab.expect_value("bake_base", "base.safetensors")
    expect(tab.page.locator("#loramerge_bake_base").first).to_be_visible()
    assert not shown(tab, "rank_rule")


def test_a_checkpoint_that_cannot_be_baked_into_is_told_in_the_facts(tab: Tab) -> None:
    choose_bake(tab)
    tab.choose("bake_base", "old.ckpt")
    tab.wait_for_facts("old.ckpt")
    tab.expect_value("bake_base", "old.ckpt")
    tab.choose("bake_base", "base.safetensors")
    tab.wait_for_facts("Free disk space")


def test_a_lora_is_extracted_and_an_error_costs_no_input(tab: Tab, host: FakeHost) -> None:
    tab.show_page("Extract")
    tab.choose("extract_tuned", "base.safetensors")
    tab.choose("extract_base", "base.safetensors")
    tab.expect_text("extract_facts", "same file")
    tab.fill("extract_rank", 4)
    tab.choose("extract_tuned", "tuned.safetensors")
    tab.expect_text("extract_facts", "Free disk space")
    expect(tab.field("extract_name")).to_have_attribute("placeholder", "tuned-lora")
    tab.press("extract")
    tab.expect_text("extract_result", "tuned-lora")
    tab.expect_text("extract_result", "Error")
    assert (host.lora_dir / "tuned-lora.safetensors").is_file()
    tab.fill("extract_name", "tuned-lora")
    tab.press("extract")
    tab.expect_text("extract_message", "exists already")
    tab.expect_value("extract_name", "tuned-lora")
    tab.expect_value("extract_rank", "4")
    tab.choose("extract_rule", "Keep a share")
    expect(tab.page.locator("#loramerge_extract_retain").first).to_be_visible()
    assert not shown(tab, "extract_rank")
    tab.choose("extract_rule", "Fit a size")
    expect(tab.page.locator("#loramerge_extract_size").first).to_be_visible()
    tab.fill("extract_size", 0.01)
    tab.fill("extract_name", "of 10 kB")
    tab.expect_text("extract_facts", "10.0 kB")
    tab.press("extract")
    tab.expect_text("extract_result", "of 10 kB")
    assert (host.lora_dir / "of 10 kB.safetensors").stat().st_size <= 10_000
    # The new LoRA is in the lists of the Merge page.
    tab.show_page("Merge")
    tab.choose("row1_lora", "tuned-lora")


def test_an_analysis_shows_every_rank_and_a_click_takes_one(tab: Tab, host: FakeHost) -> None:
    before = sorted(host.lora_dir.iterdir())
    tab.show_page("Extract")
    tab.press("extract_analyse")
    tab.expect_text("extract_message", "Choose the fine-tuned checkpoint")
    tab.choose("extract_base", "base.safetensors")
    tab.choose("extract_tuned", "tuned.safetensors")
    tab.expect_text("extract_facts", "Free disk space")
    tab.press("extract_analyse")
    tab.expect_text("extract_result", "Analysed.")
    page = tab.page.locator("#loramerge_extract_analysis").first
    expect(page).to_contain_text("What each rank would cost and lose")
    text = tab.text("extract_analysis")
    assert "Rounding noise" in text
    assert "unet" in text
    assert "Worst layers" in text
    image = page.locator("img")
    expect(image).to_have_count(1)
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth > 800)")
    page.locator("[data-table=ranks] .lm-use").nth(1).click()
    tab.expect_value("extract_rank", "2")
    page.locator("[data-table=auto] .lm-use").click()
    tab.expect_value("extract_rule", "What stands out of the rounding")
    expect(tab.page.locator("#loramerge_extract_max_rank").first).to_be_visible()
    assert not shown(tab, "extract_rank")
    # What is asked for next leaves it there; it is not sent again with each answer.
    page.evaluate("element => { element.querySelector('.lm-analysis').dataset.mark = 'kept'; }")
    tab.fill("extract_name", "of the analysis")
    tab.press("extract")
    tab.expect_text("extract_result", "of the analysis")
    made = set(host.lora_dir.iterdir()) - set(before)
    assert {path.name for path in made} == {"of the analysis.safetensors"}
    expect(page.locator("[data-mark=kept]")).to_have_count(1)
    tab.load()
    tab.show_page("Extract")
    tab.expect_text("extract_analysis", "What each rank would cost and lose")


def test_where_others_come_in_the_page_says_that_it_is_closed(chromium: object, host: FakeHost) -> None:
    with (
        FakeHost(host.data_dir, *SERVED, "--listen") as closed,
        Tab(chromium, closed.url) as tab,
    ):
        assert not shown(tab, "result_kind")
        tab.show_page("Extract")
        tab.expect_text("extract_closed", "--enable-insecure-extension-access")
