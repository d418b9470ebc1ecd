"""See it in pictures: from the form to the WebUI's X/Y/Z plot, in a browser."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from lib_loramerge.files import read_header
from lib_loramerge.metadata import read_recipe
from lib_loramerge.methods import METHODS
from tests.helpers.browser import SERVED, Tab
from tests.helpers.fixtures import SD1_LAYERS, make_lora
from tests.helpers.hosting import FakeHost

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


def test_the_merge_of_a_picture_is_saved_with_one_click(chromium: object, host: FakeHost) -> None:
    with Tab(chromium, host.url) as tab:
        tab.fill("row0_lora", "style")
        tab.fill("row0_strength", 0.3)
        tab.fill("row1_lora", "face")
        tab.wait_for_facts("2")
        tab.choose("see_axis", "Mode")
        tab.page.locator("#loramerge_see").click()
        values = tab.page.locator(f"{PLOT}x_values :is(textarea, input)")
        expect(values).to_have_value("svd,ties,dare_linear", timeout=PATIENCE)
        tab.page.locator("#txt2img_generate").click()
        expect(tab.page.locator("#html_info_txt2img").first).to_contain_text("dare_linear", timeout=PATIENCE)
        tab.page.locator("#loramerge_keep_txt2img").click()
        # The page turns to the merge, whose form is that of the picture, though it held another mode.
        tab.expect_text("result", "Written")
        tab.expect_value("mode", METHODS["dare_linear"].label)
        tab.expect_value("row0_strength", "0.3")
        files = list(host.lora_dir.glob("style+face*.safetensors"))
        assert len(files) == 1
        recipe = read_recipe(read_header(files[0]).metadata)
        assert recipe is not None
        assert (recipe.mode, [(one.name, one.unet) for one in recipe.inputs]) == (
            "dare_linear",
            [("style", 0.3), ("face", 1)],
        )
        # The host says which of several pictures is chosen; none may be.
        tab._turn_to("tabs", "txt2img")
        tab.page.evaluate("() => { window.selected_gallery_index = () => -1; }")
        tab.page.locator("#loramerge_keep_txt2img").click()
        tab.expect_text("message", "Choose a picture first")
        tab._turn_to("tabs", "txt2img")
        tab.page.evaluate("() => { window.selected_gallery_index = () => 1; }")
        tab.page.locator("#loramerge_keep_txt2img").click()
        tab.expect_value("mode", METHODS["ties"].label)
        tab.expect_text("result", "style+face-2")
        tab.page.evaluate("() => { delete window.selected_gallery_index; }")
        # A picture without LoRAs is refused, and nothing of the form is lost.
        tab._turn_to("tabs", "txt2img")
        tab.page.evaluate(
            "() => { document.querySelector('#html_info_txt2img').innerHTML = '<p>a cat</p>'; }"
        )
        tab.page.locator("#loramerge_keep_txt2img").click()
        tab.expect_text("message", "without a LoRA")
        tab.expect_value("row0_strength", "0.3")
        assert tab.errors == []
        assert len(list(host.lora_dir.glob("*.safetensors"))) == 4


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
