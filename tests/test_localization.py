"""The Japanese of the tab: every sentence has a translation, and every translation a sentence."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from lib_loramerge.analysis.compare import AGREEMENTS
from lib_loramerge.blocks.ids import counts_text
from tests.helpers.sentences import sentences

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lib_loramerge"
SLOT = re.compile(r"\{(\d+)(\*?)\}")
# Made of pieces at run time, so that no string in the source is like them; or the text of an error of
# Python's that becomes a part of a sentence.
NOT_IN_ONE_PIECE = {
    "{0} tensor", "{0} tensors", "{0} alpha", "{0} alphas", "{0} more layer", "{0} more layers",
    "{0}, and {1}", "{0} to {1}", "{0} and {1} will be replaced.", "{0} and {1} and {2} will be replaced.",
    "the name {0} occurs twice", "{0} is not a number of JSON",
}  # fmt: skip


@pytest.fixture(scope="module")
def japanese() -> dict[str, str]:
    return json.loads((ROOT / "localizations" / "ja_JP.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def templates() -> dict[str, str]:
    """Sentence to the place where it stands first."""
    found: dict[str, str] = {}
    for sentence in sentences(PACKAGE):
        found.setdefault(sentence.template, sentence.place)
    return found


def test_every_sentence_that_the_tab_can_show_has_a_translation(
    japanese: dict[str, str], templates: dict[str, str]
) -> None:
    missing = [f'"{text}": "",  from {place}' for text, place in templates.items() if text not in japanese]
    assert not missing, "localizations/ja_JP.json lacks\n" + "\n".join(missing)


def test_every_translation_with_slots_belongs_to_a_sentence(
    japanese: dict[str, str], templates: dict[str, str]
) -> None:
    assert {key for key in japanese if SLOT.search(key)} - set(templates) <= NOT_IN_ONE_PIECE


def test_a_translation_has_the_slots_of_its_sentence(japanese: dict[str, str]) -> None:
    for key, text in japanese.items():
        wanted = [number for number, _ in SLOT.findall(key)]
        assert wanted == [str(index) for index in range(len(wanted))], key
        assert Counter(number for number, _ in SLOT.findall(text)) == Counter(wanted), key


def test_no_key_stands_twice_and_none_has_markup() -> None:
    pairs = json.loads(
        (ROOT / "localizations" / "ja_JP.json").read_text(encoding="utf-8"), object_pairs_hook=list
    )
    assert [key for key, count in Counter(key for key, _ in pairs).items() if count > 1] == []
    for key, text in pairs:
        assert key == key.strip()
        assert text == text.strip() != ""
        assert not re.search(r"</|<\w+[ >]|&\w+;", text)


def test_texts_that_are_put_together_have_a_translation(japanese: dict[str, str]) -> None:
    assert counts_text() in japanese
    assert set(AGREEMENTS) <= set(japanese)


def test_words_that_a_sentence_is_about_have_a_translation(japanese: dict[str, str]) -> None:
    missing = {word for path in PACKAGE.rglob("*.py") for word in _subjects(path)} - set(japanese)
    assert missing == set()


def _subjects(path: Path) -> list[str]:
    """Texts given to the parameter ``what`` of a function of the same file, as in "{what} is empty"."""
    if path.name == "api.py" or path.parent.name == "cli":
        return []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    places = {
        node.name: [argument.arg for argument in node.args.args].index("what")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any(a.arg == "what" for a in node.args.args)
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    given = [
        call.args[places[call.func.id]]
        for call in calls
        if isinstance(call.func, ast.Name) and len(call.args) > places.get(call.func.id, 99)
    ]
    return [node.value for node in given if isinstance(node, ast.Constant)]


def test_a_new_sentence_is_found_wherever_it_stands(tmp_path: Path) -> None:
    (tmp_path / "merge").mkdir()
    (tmp_path / "merge" / "new.py").write_text(
        '"""A module about nothing at all."""\n'
        'AGAIN = "Try it once more."\n'
        "def work(path, count, notes):\n"
        '    """Does some work for a test."""\n'
        "    if count:\n"
        "        raise NewError(f\"{path.name} has {count} layer{'' if count == 1 else 's'} \" + AGAIN)\n"
        '    notes.append("All of " + str(path) + " was left as it is.")\n'
        '    raise ValueError("this is a bug of ours")\n',
        encoding="utf-8",
    )
    (tmp_path / "demo.py").write_text('TEXT = "for the command line only"\n', encoding="utf-8")
    assert {(found.template, found.place) for found in sentences(tmp_path)} == {
        ("{0} has {1} layer Try it once more.", "merge/new.py:6"),
        ("{0} has {1} layers Try it once more.", "merge/new.py:6"),
        ("All of {0} was left as it is.", "merge/new.py:7"),
    }
