"""See it in pictures: from the form to the WebUI's X/Y/Z plot, in a browser."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from tests.fixtures import SD1_LAYERS, make_lora
from tests.web.browser import SERVED, Tab
from tests.web.hosting import FakeHost

PATIENCE = 60_000
PLOT = "#script_txt2img_xyz_plot_"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHost]:
    folder = tmp_path_factory.mktemp("webui")
    for index, name in enumerate(("style", "face")):
        make_lora(folder / "models" / "Lora" / f"{name}.safetensors", SD1_LAYERS, rank=4, seed=index)
    with FakeHost(folder, *SERVED) as running:
        yield running


def test_the_form_s_loras_and_the_axis_are_in_the_plot_and_its_pictures(
    chromium: object, host: FakeHost
) -> None:
    with Tab(chromium, host.url) as tab:
        tab.fill("row0_lora", "style")
        tab.fill("row1_lora", "face")
        tab.fill("row1_strength", 0.5)
        tab.wait_for_facts("2")
        for axis, values, labels in (
            ("Strength of LoRA 1", "0.2..1.0/5", ["<lora:style:0.2>", "<lora:style:1>"]),
            ("Mode", "svd,ties,dare_linear", ["ties", "dare_linear"]),
        ):
            tab.choose("see_axis", axis)
            tab.page.locator("#loramerge_see").click()
            prompt = tab.page.locator("#txt2img_prompt textarea")
            expect(prompt).to_have_value("<lora:style:1> <lora:face:0.5>", timeout=PATIENCE)
            expect(tab.page.locator("#script_list input")).to_have_value("X/Y/Z plot", timeout=PATIENCE)
            chosen = tab.page.locator(f"{PLOT}x_type input")
            expect(chosen).to_have_value(f"[LoRA Merge] {axis}", timeout=PATIENCE)
            expect(tab.page.locator(f"{PLOT}x_values :is(textarea, input)")).to_have_value(values)
            tab.page.locator("#txt2img_generate").click()
            pictures = tab.page.locator("#txt2img_pictures textarea")
            for label in labels:
                expect(pictures).to_have_value(containing(label), timeout=PATIENCE)
            tab._turn_to("tabs", "LoRA Merge")
        assert tab.errors == []


def containing(text: str) -> re.Pattern[str]:
    """Any value that has the text in it."""
    return re.compile(re.escape(text))


def test_a_form_that_is_wrong_says_so_and_opens_no_plot(chromium: object, host: FakeHost) -> None:
    with Tab(chromium, host.url) as tab:
        tab.fill("row0_lora", "style")
        tab.wait_for_facts("1")
        tab.fill("row0_strength", "")
        tab.page.locator("#loramerge_see").click()
        tab.expect_text("message", "Strength is empty")
        assert tab.page.locator("#loramerge_merge").is_visible()
