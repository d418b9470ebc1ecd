"""The tab in Japanese: sentences with names and numbers in them, in a WebUI, and untouched in English."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from lib_loramerge.methods import METHODS
from lib_loramerge.webui.render_analysis import PICTURES
from tests.helpers.browser import PATIENCE, SERVED, Tab
from tests.helpers.fixtures import SD1_LAYERS, SDXL_LAYERS, make_lora
from tests.helpers.hosting import ROOT, FakeHost

SLOT = re.compile(r"\{(\d+)\*?\}")
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
    return page.evaluate("texts => texts.map(text => window.loramergeTranslate(text))", list(texts))


def test_every_sentence_gets_its_names_in_the_right_places(page: Any) -> None:
    pairs = []
    for key, text in WORDS.items():
        if not SLOT.search(key) or not (re.search(r"[.?](\{\d+\})*$", key) or len(key) > 40):
            continue
        # What follows a full stop is one more sentence, or nothing; what begins one is a name with its colon.
        for number in re.findall(r"(?<=[.}])\{(\d+)\}", key.removeprefix("{0}")):
            key = key.replace(f"{{{number}}}", "")
            text = re.sub(rf"\{{{number}\*?\}} ?", "", text)
        key, text = (re.sub(r"^\{0\}(?=[\w{])", "{0}: ", words) for words in (key, text))
        pairs.append([SLOT.sub(r"X\1.safetensors", words) for words in (key, text)])
    assert len(pairs) > 200
    for (english, japanese), found in zip(pairs, told(page, *(english for english, _ in pairs))):
        assert found == japanese, english


@pytest.mark.parametrize(
    ("english", "japanese"),
    [
        # A sentence in a sentence, and a hint behind it.
        (
            "'style': there is no preset 'a.b'. Nearest: MIDD, ALL.",
            "'style': プリセット 'a.b' はありません。似た名前: MIDD, ALL。",
        ),
        (
            "x.safetensors is damaged: tensor 'a. B' overlaps the one before it. Download it again.",
            "x.safetensors は壊れています（テンソル 'a. B' が直前のテンソルと重なっています）。"
            "ダウンロードし直してください。",
        ),
        # A name before a sentence, or a part of it.
        (
            "a b.safetensors: `scalar` was multiplied in, which no WebUI does.",
            "a b.safetensors: `scalar` を掛けました。これを行う WebUI はありません。",
        ),
        (
            "a b.safetensors is a program, not a LoRA.",
            "a b.safetensors はプログラムで、LoRA ではありません。",
        ),
        # Several sentences in a row, and a name that looks like two.
        (
            "Nearly orthogonal: a plain sum keeps all of both. "
            "Dr. Strange is more than three times as strong as the other at these strengths.",
            "ほぼ直交しています。単純に足しても両方がそのまま残ります。"
            "この強さでは、Dr. Strange がもう一方の 3 倍以上強く効きます。",
        ),
        (
            "Little related as a whole, but not in every block. "
            "They pull against each other in OUT00, OUT01: lower one of them there with block weights "
            "(lbw=1,1,0.5,0.5,1), or let one go first with mode np. "
            "They agree in IN08: there the sum is louder than either. "
            "Dr. Strange is more than three times as strong as the other in M00, OUT02.",
            "全体としてはあまり関連がありませんが、ブロックによっては違います。"
            "OUT00, OUT01 で互いに打ち消し合っています。そのブロックだけ片方をブロックウェイト"
            "（lbw=1,1,0.5,0.5,1）で下げるか、np モードで一方を優先してください。"
            "IN08 では一致しており、足すとどちらよりも強くなります。"
            "M00, OUT02 では、Dr. Strange がもう一方の 3 倍以上強く効きます。",
        ),
        # Numbers with their nouns; words of ours side by side need no space in Japanese.
        (
            "A bias (diff_b) changes too in 3 layers. These programs ignore it: A1111.",
            "3 層ではバイアス（diff_b）も変わります。次のプログラムはこれを無視します：A1111。",
        ),
        ("Strength must be a number, got 'much'.", "強さは数値にしてください（'much'）。"),
        # Nothing of ours.
        ("Just a file name, Average. Nothing else (really).", None),
        ("Average and rank", None),
        ("", None),
    ],
)
def test_sentences_are_put_together_in_japanese(page: Any, english: str, japanese: str | None) -> None:
    assert told(page, english) == [japanese]


def test_names_that_look_like_markup_or_slots_stay_text(page: Any) -> None:
    nasty = "<img src=x onerror=alert(1)>{0}$&$1{1*}.safetensors"
    assert told(page, f"{nasty} has strength 0 and changes nothing.") == [
        f"{nasty} は強さが 0 なので、何も変えません。"
    ]


def test_long_and_strange_texts_cost_little(page: Any) -> None:
    texts = [" is {0} in {1}, and: " * 180, "a: " * 1300, "x. Y " * 790, "(" * 3900, " (a" * 1300]
    seconds = page.evaluate(
        "texts => { const start = performance.now(); texts.forEach(window.loramergeTranslate);"
        " return (performance.now() - start) / 1000; }",
        texts,
    )
    assert seconds < 30  # Some milliseconds; hours where the work grows with a power of the length.


def test_without_keys_with_slots_nothing_is_translated(chromium: Any) -> None:
    context = chromium.new_context()
    try:
        opened = context.new_page()
        opened.add_script_tag(path=str(SCRIPT))
        assert told(opened, "Strength is empty: type a number.") == [None]
        opened.evaluate("() => { window.localization = {Merge: 'x'}; }")
        assert told(opened, "Merge") == [None]
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
    tab.fill("name", "merged")
    tab.press("merge")
    tab.expect_text("result", "完了")
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
