"""The tab in Japanese: sentences with names and numbers in them, in a WebUI, and untouched in English."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from lib_loramerge.errors import FileError, Sentence, counted, joined
from lib_loramerge.methods import METHODS
from lib_loramerge.webui.render_analysis import PICTURES
from tests.helpers.browser import PATIENCE, SERVED, Tab
from tests.helpers.fixtures import SD1_LAYERS, SDXL_LAYERS, make_lora
from tests.helpers.hosting import ROOT, FakeHost

SLOT = re.compile(r"\{(\w+)\}")
WORDS = json.loads((ROOT / "localizations" / "ja_JP.json").read_text(encoding="utf-8"))
SCRIPT = ROOT / "javascript" / "lora_merge_words.js"


@pytest.fixture(scope="module")
def page(chromium: Any) -> Iterator[Any]:
    """An empty page with the script and the Japanese dictionary."""
    context = chromium.new_context()
    opened = context.new_page()
    opened.evaluate("words => { window.localization = words; }", WORDS)
    opened.add_script_tag(path=str(SCRIPT))
    yield opened
    context.close()


def told(page: Any, *texts: str) -> list[str | None]:
    said = [Sentence(text).to_json() for text in texts]
    return page.evaluate("said => said.map(window.loramergeTranslate)", said)


def test_every_sentence_gets_its_names_in_the_right_places(page: Any) -> None:
    pairs = []
    for key, text in WORDS.items():
        parts = {name: f"{name}.safetensors" for name in SLOT.findall(key)}
        expected = SLOT.sub(lambda slot, parts=parts: parts[slot[1]], text)
        pairs.append((Sentence(key, *parts.values()), expected))
    assert sum(bool(sentence.parts) for sentence, _ in pairs) > 400
    for (english, japanese), found in zip(pairs, told(page, *(english for english, _ in pairs)), strict=True):
        assert found == (None if english == japanese else japanese), english


@pytest.mark.parametrize(
    ("english", "japanese"),
    [
        # A sentence in a sentence, and a hint behind it.
        (
            Sentence(
                "{what}: there is no preset {written}.{hint}",
                Sentence("{name}: {field}", "'style'", Sentence("preset {written}", "A")),
                "'a.b'",
                Sentence(" Nearest: {near}.", "MIDD, ALL"),
            ),
            "'style': プリセット A: プリセット 'a.b' はありません。似た名前: MIDD, ALL。",
        ),
        (Sentence("There is no mode {mode}.{hint}", "'x'", ""), "モード 'x' はありません。"),
        (
            FileError(
                "{file} is damaged: {what}. Download it again.",
                "x.safetensors",
                Sentence("tensor {name} overlaps the one before it", "'a. B'"),
            ),
            "x.safetensors は壊れています（テンソル 'a. B' が直前のテンソルと重なっています）。"
            "ダウンロードし直してください。",
        ),
        # Names that look like sentences of ours, before one of ours.
        (
            FileError("{file} {what}", "A is empty. B has strength 0", Sentence("is a program, not a LoRA.")),
            "A is empty. B has strength 0 はプログラムで、LoRA ではありません。",
        ),
        (
            Sentence(
                "{file}: {note}", "Stopped.", Sentence("{file} has strength 0 and changes nothing.", "a")
            ),
            "Stopped.: a は強さが 0 なので、何も変えません。",
        ),
        # The same words as a name and as our own.
        (
            Sentence("{what} is empty: type a number.", "Strength"),
            "Strengthが空です。数値を入力してください。",
        ),
        (
            Sentence("{what} is empty: type a number.", Sentence("Strength")),
            "強さが空です。数値を入力してください。",
        ),
        # Several sentences in a row, and one that nobody translated among them.
        (
            joined(
                " ",
                [
                    Sentence("Nearly orthogonal: a plain sum keeps all of both."),
                    Sentence(
                        "{name} is more than three times as strong as the other at these strengths.", "Dr. X"
                    ),
                    Sentence("Not ours {file}", "y"),
                ],
            ),
            "ほぼ直交しています。単純に足しても両方がそのまま残ります。"
            "この強さでは、Dr. X がもう一方の 3 倍以上強く効きます。 Not ours y",
        ),
        # Numbers with their nouns; words of ours side by side need no space in Japanese.
        (
            Sentence(
                "A bias (diff_b) changes too in {layers}. These programs ignore it: {hosts}.",
                counted(3, "{count} layer", "{count} layers"),
                "A1111",
            ),
            "3 層ではバイアス（diff_b）も変わります。次のプログラムはこれを無視します：A1111。",
        ),
        # Nothing of ours.
        (Sentence("{file} as nobody said", "Average"), None),
        ("Just a file name, Average. Nothing else (really).", None),
        ("", None),
    ],
)
def test_sentences_are_put_together_in_japanese(page: Any, english: object, japanese: str | None) -> None:
    assert told(page, str(english)) == [japanese]


def test_names_that_look_like_markup_or_slots_stay_text(page: Any) -> None:
    nasty = "<img src=x onerror=alert(1)>{file}$&$1{name}__proto__.safetensors"
    assert told(page, Sentence("{file} has strength 0 and changes nothing.", nasty)) == [
        f"{nasty} は強さが 0 なので、何も変えません。"
    ]


def test_without_a_dictionary_nothing_is_translated(chromium: Any) -> None:
    context = chromium.new_context()
    try:
        opened = context.new_page()
        opened.add_script_tag(path=str(SCRIPT))
        said = Sentence("{what} is empty: type a number.", Sentence("Strength"))
        assert told(opened, said) == [None]
        opened.evaluate("() => { window.localization = {Merge: 'x'}; }")
        assert told(opened, said, "Merge", "constructor") == [None, "x", None]
    finally:
        context.close()


# In a WebUI


def fill(folder: Path) -> Path:
    loras = folder / "models" / "Lora"
    make_lora(loras / "style.safetensors", SD1_LAYERS, rank=4, seed=1)
    make_lora(loras / "face.safetensors", SD1_LAYERS, rank=4, seed=2)
    make_lora(loras / "large.safetensors", SDXL_LAYERS, rank=4, seed=3)
    return folder


@pytest.fixture(scope="module")
def japanese(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    folder = fill(tmp_path_factory.mktemp("japanese"))
    with FakeHost(folder, *SERVED, options={"localization": "ja_JP"}) as host, Tab(chromium, host.url) as tab:
        yield tab


@pytest.fixture(scope="module")
def english(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    folder = fill(tmp_path_factory.mktemp("english"))
    with FakeHost(folder, *SERVED) as host, Tab(chromium, host.url) as tab:
        yield tab


def test_what_a_list_holds_reads_in_japanese(japanese: Tab) -> None:
    for name, words in (("see_axis", "LoRA 1 の強さ"), ("mode", WORDS[METHODS["svd"].label])):
        place = japanese.page.locator(f"#loramerge_{name} [data-shown]").first
        expect(place).to_have_attribute("data-shown", words, timeout=PATIENCE)


def test_errors_and_warnings_of_the_library_are_told_in_japanese(japanese: Tab) -> None:
    tab = japanese
    tab.row(0, "style")
    tab.fill("row1_lora", "stile")
    tab.expect_text("row1_facts", "LoRA フォルダーに stile という LoRA はありません。もしかして: style")
    assert tab.value("row1_lora") == "stile"
    tab.fill("row0_blocks", "MIDDD")
    tab.expect_text("row0_facts", "プリセット 'MIDDD' はありません。似た名前: MIDD")
    tab.fill("row0_blocks", "1,0,1")
    tab.expect_text("row0_facts", "lbw の階層別の重みは 3 個ですが")
    tab.expect_text("row0_facts", "合うプリセット: ")
    tab.fill("row0_blocks", "")
    tab.fill("row1_lora", "large")
    tab.expect_text("facts", "ベースモデルが違います。style.safetensors は Stable Diffusion 1 用")
    tab.expect_text("facts", "large.safetensors は Stable Diffusion XL 用")
    tab.fill("row1_lora", "face")
    tab.fill("row1_strength", 0)
    tab.expect_text("facts", "face.safetensors は強さが 0 なので、何も変えません。")
    tab.fill("name", "style")
    tab.expect_text("name_message", "style.safetensors は既にあります。")
    tab.press("merge")
    tab.expect_text("message", "style.safetensors は既にあります。")
    tab.fill("name", "large")
    tab.expect_text("name_message", "large.safetensors は既にあります。")
    tab.tick("overwrite", True)
    tab.expect_text("name_message", "large.safetensors は置き換えられます。")
    expect(tab.page.locator("#loramerge_merge")).to_have_text("large を置き換える", timeout=PATIENCE)
    tab.tick("overwrite", False)
    expect(tab.page.locator("#loramerge_merge")).to_have_text(WORDS["Merge and save"], timeout=PATIENCE)
    tab.fill("name", "merged")
    tab.press("merge")
    tab.expect_text("result", "完了")
    tab.expect_text("result", re.compile(r"誤差\s*丸め誤差のみ"))
    tab.expect_text("result", "face.safetensors は強さが 0 なので、何も変えません。")
    assert tab.errors == []


def test_analyses_are_told_in_japanese(japanese: Tab) -> None:
    tab = japanese
    tab.fill("row0_lora", "style")
    tab.fill("row1_lora", "face")
    tab.fill("row0_strength", 1)
    tab.fill("row1_strength", 0.1)
    tab.wait_for_facts("ファイルサイズ")
    tab.press("analyse")
    tab.expect_text("analyse_state", "分析が終わりました。")
    tab.expect_text("analyse_result", "この強さでは、style がもう一方の 3 倍以上強く効きます。")
    verdict = tab.page.locator("#loramerge_analyse_result .lm-verdict").first.inner_text()
    assert not re.search("[A-Za-z]{3,}", verdict.replace("style", ""))
    alt = tab.page.locator("#loramerge_analyse_result img").first.get_attribute("alt")
    assert alt == WORDS[PICTURES["compare"]]


def test_choices_are_read_in_japanese_and_stay_what_the_server_knows(japanese: Tab) -> None:
    tab = japanese
    place = tab.page.locator("#loramerge_rank_rule [data-shown]")
    expect(place).to_have_attribute("data-shown", "自動", timeout=PATIENCE)
    assert tab.value("rank_rule") == "Automatic"
    tab.fill("row0_strength", 1)
    assert tab.page.locator("[id$=_lora] [data-shown], [id$=_blocks] [data-shown]").count() == 0


def test_presets_are_told_in_japanese(japanese: Tab) -> None:
    tab = japanese
    tab.show_page("ブロックプリセット")
    tab.fill("preset_text", "1,2,3")
    tab.press("preset_save")
    tab.expect_text("preset_message", "先にプリセットの名前を入力してください。")
    tab.fill("preset_name", "SHORT")
    tab.press("preset_save")
    tab.expect_text("preset_message", "ブロックウェイトが 3 個あります")
    tab.fill("preset_row", 1)
    tab.press("preset_use")
    tab.expect_text("preset_message", "1 行目でこのウェイトを使います。")
    tab.expect_value("preset_text", "1,2,3")
    tab.show_page("マージ")
    tab.expect_value("row0_blocks", "1,2,3")


def test_in_english_nothing_is_changed(english: Tab) -> None:
    tab = english
    tab.row(0, "style")
    tab.fill("row1_lora", "stile")
    tab.expect_text("row1_facts", "There is no LoRA called stile in the LoRA folder. Did you mean style")
    tab.fill("name", "style")
    tab.expect_text("name_message", "style.safetensors exists already. Choose another name")
    assert tab.page.locator("[data-shown]").count() == 0
    assert (
        tab.page.evaluate("() => /[\\u3040-\\u30ff\\u4e00-\\u9fff]/.test(document.body.innerText)") is False
    )
