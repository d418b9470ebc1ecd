"""The tab in a browser: from rows to a file whose numbers are right."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import expect
from safetensors import safe_open

from tests.helpers.browser import SERVED, Tab
from tests.helpers.fixtures import SD1_LAYERS, SDXL_LAYERS, dense_deltas, make_lora, relative_error
from tests.helpers.hosting import FakeHost


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHost]:
    folder = tmp_path_factory.mktemp("webui")
    loras = folder / "models" / "Lora"
    make_lora(loras / "style.safetensors", SD1_LAYERS, rank=4, alpha=2.0, seed=1)
    make_lora(loras / "people" / "face.safetensors", SD1_LAYERS, rank=8, seed=2)
    make_lora(loras / "large.safetensors", SDXL_LAYERS, rank=4, seed=3)
    (loras / "style.json").write_text(json.dumps({"activation text": "ink, brush"}), encoding="utf-8")
    (loras / "people" / "face.json").write_text(json.dumps({"activation text": "ohwx"}), encoding="utf-8")
    with FakeHost(folder, *SERVED) as running:
        yield running


def error_of(written: Path, parts: dict[Path, tuple[float, float]]) -> float:
    """Relative Frobenius error of a file against the weighted sum, in float64, by a route of the test's own.

    Args:
        parts: File to its strengths (text encoder, denoiser).
    """
    wanted: dict[str, torch.Tensor] = {}
    for path, (te, unet) in parts.items():
        for layer, delta in dense_deltas(path).items():
            weight = te if layer.startswith("lora_te") else unet
            name = canonical(layer)
            wanted[name] = wanted.get(name, torch.zeros_like(delta)) + weight * delta
    return relative_error({canonical(layer): delta for layer, delta in dense_deltas(written).items()}, wanted)


def canonical(layer: str) -> str:
    """diffusers' names of the fixtures' blocks of Stable Diffusion 1, as the checkpoint has them."""
    for one, other in (
        ("down_blocks_0_attentions_0", "input_blocks_1_1"),
        ("mid_block_attentions_0", "middle_block_1"),
        ("up_blocks_1_attentions_2", "output_blocks_5_1"),
    ):
        layer = layer.replace(one, other)
    return layer


def test_two_loras_are_merged_and_the_file_holds_their_weighted_sum(tab: Tab, host: FakeHost) -> None:
    tab.row(0, "style", 0.8)
    tab.row(1, "face", -0.5)
    tab.choose("rank_rule", "Keep everything")
    tab.wait_for_facts("Rank 12")
    result = tab.merge("both")
    assert "Done" in result
    assert "Send to txt2img prompt" in result
    written = host.lora_dir / "both.safetensors"
    link = tab.page.locator("#loramerge_result .lm-written a").get_attribute("href")
    with urllib.request.urlopen(f"{host.url.rstrip('/')}/{link}") as answer:
        assert answer.read() == written.read_bytes()
    parts = {
        host.lora_dir / "style.safetensors": (0.8, 0.8),
        host.lora_dir / "people" / "face.safetensors": (-0.5, -0.5),
    }
    assert error_of(written, parts) < 1e-5
    stored = json.loads(written.with_suffix(".json").read_text(encoding="utf-8"))
    assert stored["activation text"] == "ink, brush, ohwx"
    # Merge again keeps every input, and proposes a new name or says that this one is taken.
    assert tab.value("row0_strength") == "0.8"
    tab.expect_text("name_message", "exists already")
    # Nobody did anything wrong: it is told, not shown as an error, and the facts stay.
    expect(tab.page.locator("#loramerge_name_message .lm-warning")).to_be_visible()
    expect(tab.page.locator("#loramerge_name_message .lm-error")).to_have_count(0)
    tab.wait_for_facts("Rank 12")


def test_the_text_encoder_follows_strength_until_it_gets_a_number_of_its_own(
    tab: Tab, host: FakeHost
) -> None:
    tab.row(0, "style", 0.7)
    tab.expect_value("row0_te", "0.7")
    tab.fill("row0_te", 0.25)
    tab.fill("row0_strength", 1.5)
    tab.expect_value("row0_te", "0.25")
    tab.choose("mode", "all ranks")
    tab.wait_for_facts("Rank 4")
    tab.merge("apart")
    parts = {host.lora_dir / "style.safetensors": (0.25, 1.5)}
    assert error_of(host.lora_dir / "apart.safetensors", parts) < 1e-5
    tab.tick("row0_linked", True)
    tab.expect_value("row0_te", "1.5")


def test_the_slider_moves_the_number_and_the_number_may_leave_the_slider(tab: Tab) -> None:
    slider = tab.page.locator("#loramerge_row0_slide input[type=range]")
    slider.fill("-1.25")
    tab.expect_value("row0_strength", "-1.25")
    tab.expect_value("row0_te", "-1.25")
    tab.fill("row0_strength", 7.5)
    tab.expect_value("row0_te", "7.5")
    expect(slider).to_have_value("2")


def test_the_mode_decides_which_controls_are_seen(tab: Tab) -> None:
    assert tab.page.locator("#loramerge_rank_rule").is_visible()
    tab.expect_text("mode_text", "least possible error")
    tab.choose("mode", "all ranks")
    tab.page.locator("#loramerge_rank_rule").wait_for(state="hidden")
    expect(tab.page.locator("#loramerge_mode_text").first).not_to_contain_text("least possible error")
    tab.choose("mode", "Exact sum")
    for rule, control in (("A number", "rank"), ("Keep a share", "retain"), ("Fit a size", "size")):
        tab.choose("rank_rule", rule)
        tab.page.locator(f"#loramerge_{control}").wait_for(state="visible")
    tab.page.locator("#loramerge_rank").wait_for(state="hidden")


def test_facts_come_before_any_merge_and_tell_what_will_come_out(tab: Tab, host: FakeHost) -> None:
    tab.row(0, "style")
    tab.wait_for_facts("Stable Diffusion 1")
    tab.expect_text("row0_facts", "rank 4")
    tab.choose("rank_rule", "A number")
    tab.fill("rank", 2)
    tab.wait_for_facts("Rank 2")
    tab.merge("two")
    with safe_open(host.lora_dir / "two.safetensors", "pt") as file:
        ranks = {file.get_slice(key).get_shape()[0] for key in file.keys() if "lora_down" in key}  # noqa: SIM118
    assert ranks == {2}


def test_a_lora_of_another_base_model_is_refused_beside_what_it_is(tab: Tab) -> None:
    tab.row(0, "style")
    tab.row(1, "large")
    tab.wait_for_facts("different base models")
    expect(tab.page.locator("#loramerge_row1_facts .lm-other")).not_to_have_count(0)
    tab.press("merge")
    tab.expect_text("message", "different base models")
    assert tab.value("row1_lora").startswith("large")


def test_wrong_fields_are_marked_beside_themselves_and_nothing_typed_is_lost(
    tab: Tab, host: FakeHost
) -> None:
    tab.row(0, "style")
    tab.fill("row1_lora", "stile")
    tab.expect_text("row1_facts", "There is no LoRA called stile")
    tab.fill("row1_lora", "")
    tab.fill("row0_blocks", "MIDDD")
    tab.expect_text("row0_facts", "MIDD")
    tab.fill("row0_blocks", "1,0,1")
    tab.expect_text("row0_facts", "17")
    tab.fill("row0_blocks", "")
    tab.wait_for_facts("Stable Diffusion 1")
    tab.fill("name", "a/../../b")
    tab.expect_text("name_message", "b")
    expect(tab.page.locator("#loramerge_name_message .lm-error")).not_to_have_count(0)
    tab.press("merge")
    tab.page.wait_for_selector("#loramerge_message .lm-error")
    tab.fill("name", "style")
    tab.expect_text("name_message", "exists already")
    assert tab.value("row0_lora").startswith("style")
    assert not list(host.lora_dir.rglob("b.safetensors"))


def test_a_part_of_a_name_is_enough_when_only_one_lora_has_it(tab: Tab) -> None:
    tab.fill("row0_lora", "fac")
    tab.wait_for_facts("LoRAs 1")
    tab.expect_value("row0_lora", re.compile("face"))


def test_a_prompt_fills_the_rows_and_the_rows_make_the_prompt(tab: Tab) -> None:
    tab.open("fill")
    tab.fill(
        "fill_source",
        "a cat <lora:style:0.6:0.9:lbw=MIDD> by <lyco:face:-1:start=5>, <lora:style:te=0:unet=1>",
    )
    tab.press("fill_text")
    tab.expect_value("row0_strength", "0.9")
    tab.expect_value("row2_te", "0")
    for index, name in enumerate(("style", "people/face", "style")):
        tab.expect_value(f"row{index}_lora", re.compile(f"^{name}( |$)"))
    assert len(tab.rows()) == 3
    tab.expect_value("row0_te", "0.6")
    tab.expect_value("row0_blocks", "MIDD")
    tab.expect_text("rows_message", "start")
    tab.open("copy")
    tab.press("copy_prompt")
    tab.expect_value("copy_text", "<lora:style:0.6:0.9:lbw=MIDD><lora:face:-1><lora:style:0:1>")


def test_the_prompt_of_txt2img_can_be_taken_over(tab: Tab) -> None:
    tab.page.evaluate(
        "() => { const a = document.querySelector('#txt2img_prompt textarea'); a.value = '<lora:style:0.3>';"
        " a.dispatchEvent(new Event('input', {bubbles: true})); }"
    )
    tab.open("fill")
    tab.press("paste_prompt")
    tab.expect_value("row0_strength", "0.3")


def test_a_merged_file_fills_the_whole_form(tab: Tab, host: FakeHost) -> None:
    tab.row(0, "style", 0.4)
    tab.choose("rank_rule", "Keep a share")
    tab.fill("retain", 90)
    tab.choose("dtype", "bfloat16")
    tab.open("result_more")
    tab.fill("activation_text", "by hand")
    tab.fill("preferred_weight", 0.7)
    tab.fill("notes", "a note")
    tab.wait_for_facts("bfloat16")
    tab.merge("remembered")
    for name in ("activation_text", "notes", "preferred_weight"):
        tab.fill(name, "")
    tab.press("clear")
    tab.expect_value("row0_lora", "")
    tab.choose("rank_rule", "Same")
    tab.choose("dtype", "Same")
    tab.open("fill")
    tab.press("refresh")
    tab.choose("fill_name", "remembered")
    tab.press("fill_file")
    tab.expect_value("row0_strength", "0.4")
    tab.expect_value("dtype", "bfloat16")
    tab.expect_value("rank_rule", "Keep a share")
    tab.expect_value("retain", "90")
    tab.expect_value("activation_text", "by hand")
    tab.expect_value("preferred_weight", "0.7")
    tab.expect_value("notes", "a note")
    # The recipe's hash of the source came along.
    tab.expect_value("row0_origin", re.compile("^[0-9a-f]{64} style$"))


def test_a_recipe_copied_is_a_recipe_pasted(tab: Tab) -> None:
    tab.row(0, "style", 0.3)
    tab.fill("row0_blocks", "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1")
    tab.open("copy")
    tab.press("copy_recipe")
    tab.expect_value("copy_text", re.compile('"unet": 0.3'))
    recipe = tab.value("copy_text")
    assert json.loads(recipe)["inputs"][0]["lbw"].startswith("1,0,0")
    tab.press("copy_command")
    tab.expect_value("copy_text", re.compile("^loramerge merge .*style:0.3"))
    tab.press("clear")
    tab.expect_value("row0_lora", "")
    tab.open("fill")
    tab.fill("fill_source", recipe)
    tab.press("fill_text")
    tab.expect_value("row0_strength", "0.3")
    tab.expect_value("row0_blocks", re.compile("^1,0,0"))


def test_sixteen_rows_can_be_added_moved_and_removed(tab: Tab, host: FakeHost) -> None:
    tab.open("fill")
    tab.fill("fill_source", "".join(f"<lora:{('face', 'style')[index % 2]}:0.1>" for index in range(14)))
    tab.press("fill_text")
    for index in (14, 15):
        tab.page.locator(f"#loramerge_row{index - 1}_line").wait_for(state="visible")
        tab.press("add")
        tab.page.locator(f"#loramerge_row{index}_line").wait_for(state="visible")
    tab.press("add")
    tab.expect_text("rows_message", "16")
    tab.row(14, "face", 0.1)
    tab.row(15, "style", 0.9)
    tab.wait_for_facts("LoRAs 16")
    tab.press("row15_up")
    tab.expect_value("row14_strength", "0.9")
    tab.expect_value("row15_lora", re.compile("^people/face"))
    tab.press("row0_remove")
    tab.page.locator("#loramerge_row15_line").wait_for(state="hidden")
    tab.expect_value("row13_strength", "0.9")
    tab.wait_for_facts("LoRAs 15")
    tab.tick("row0_on", False)
    tab.wait_for_facts("LoRAs 14")
    tab.choose("mode", "all ranks")
    tab.wait_for_facts("Rank 84")
    tab.merge("many")
    strengths = [float(tab.value(f"row{index}_strength")) for index in range(1, 15)]
    kinds = [tab.value(f"row{index}_lora").startswith("style") for index in range(1, 15)]
    parts = {
        host.lora_dir / "style.safetensors": (sum(s for s, k in zip(strengths, kinds) if k),) * 2,
        host.lora_dir / "people" / "face.safetensors": (sum(s for s, k in zip(strengths, kinds) if not k),)
        * 2,
    }
    assert error_of(host.lora_dir / "many.safetensors", parts) < 1e-5


def test_where_others_see_the_page_the_result_names_the_file_inside_the_lora_folder(
    chromium: object, tmp_path: Path
) -> None:
    make_lora(tmp_path / "models" / "Lora" / "style.safetensors", SD1_LAYERS, rank=4)
    with FakeHost(tmp_path, "--listen", *SERVED) as host, Tab(chromium, host.url) as tab:
        tab.row(0, "style")
        tab.wait_for_facts("LoRAs 1")
        tab.fill("subfolder", "made")
        result = tab.merge("new")
        assert "Written made/new.safetensors" in result
        tab.fill("name", "other")
        tab.open("copy")
        tab.press("copy_command")
        tab.expect_value("copy_text", re.compile("^loramerge merge .*style"))
        (host.lora_dir / "style.safetensors").write_bytes(b"")
        tab.press("merge")
        tab.page.wait_for_selector("#loramerge_message [role=alert]")
        assert str(tmp_path) not in tab.page.locator("#loramerge_app").inner_html()
        assert tmp_path.name not in tab.value("copy_text")


def test_what_files_say_of_themselves_is_shown_as_text(tab: Tab, host: FakeHost) -> None:
    name = "x'<img src=x onerror=alert(1)>&amp;"
    make_lora(host.lora_dir / f"{name}.safetensors", SD1_LAYERS, rank=2, seed=9)
    try:
        alerts: list[str] = []
        tab.page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
        tab.press("refresh")
        tab.choose("row0_lora", "onerror")
        tab.wait_for_facts("LoRAs 1")
        result = tab.merge("plain")
        assert "Done" in result
        tab.page.locator("#loramerge_result summary").last.click()
        assert "onerror" in tab.text("result")
        assert alerts == []
        assert tab.page.locator("#loramerge_app img").count() == 0
    finally:
        (host.lora_dir / f"{name}.safetensors").unlink()
