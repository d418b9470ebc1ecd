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
from tests.helpers.sentences import put_together, sentences, unfilled

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lib_loramerge"
SLOT = re.compile(r"\{(\w+)\}")


@pytest.fixture(scope="module")
def japanese() -> dict[str, str]:
    return json.loads((ROOT / "localizations" / "ja_JP.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def keys() -> dict[str, str]:
    """Sentence to the place where it stands first."""
    found: dict[str, str] = {}
    for sentence in sentences(PACKAGE):
        found.setdefault(sentence.key, sentence.place)
    return found


def test_no_sentence_is_put_together_by_hand() -> None:
    found = put_together(PACKAGE)
    assert not found, "write Sentence(key, parts), or give an error a key and parts\n" + "\n".join(found)


def test_every_slot_is_filled() -> None:
    assert unfilled(PACKAGE) == []


def test_every_sentence_that_the_tab_can_show_has_a_translation(
    japanese: dict[str, str], keys: dict[str, str]
) -> None:
    missing = [f'"{text}": "",  from {place}' for text, place in keys.items() if text not in japanese]
    assert not missing, "localizations/ja_JP.json lacks\n" + "\n".join(missing)


def test_every_translation_with_slots_belongs_to_a_sentence(
    japanese: dict[str, str], keys: dict[str, str]
) -> None:
    assert {key for key in japanese if SLOT.search(key)} <= set(keys)


def test_a_translation_has_the_slots_of_its_sentence(japanese: dict[str, str]) -> None:
    assert {
        key for key, text in japanese.items() if set(SLOT.findall(key)) != set(SLOT.findall(text))
    } == set()


def test_no_key_stands_twice_and_none_has_markup() -> None:
    pairs = json.loads(
        (ROOT / "localizations" / "ja_JP.json").read_text(encoding="utf-8"), object_pairs_hook=list
    )
    assert [key for key, count in Counter(key for key, _ in pairs).items() if count > 1] == []
    for key, text in pairs:
        assert key == key.strip()
        assert text == text.strip() != ""
        assert not re.search(r"</|<\w+[ >]|&\w+;", text)


def test_no_word_of_the_hosts_own_page_is_translated_in_our_sense(japanese: dict[str, str]) -> None:
    """A host translates its whole page by the file; "Error" stands over a component that failed."""
    assert "Error" not in japanese
    assert japanese["Error of the numbers"] == "誤差"


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
        '        raise FileError("{file} has {count} layers.", path.name, count)\n'
        '    notes.append(counted(count, "{count} layer" if path else "{count} key", "{count} layers"))\n'
        '    raise ValueError("this is a bug of ours")\n',
        encoding="utf-8",
    )
    (tmp_path / "demo.py").write_text('TEXT = "for the command line only"\n', encoding="utf-8")
    assert {(found.key, found.place) for found in sentences(tmp_path)} == {
        ("Try it once more.", "merge/new.py:2"),
        ("{file} has {count} layers.", "merge/new.py:6"),
        ("{count} layer", "merge/new.py:7"),
        ("{count} key", "merge/new.py:7"),
        ("{count} layers", "merge/new.py:7"),
    }
    assert put_together(tmp_path) == unfilled(tmp_path) == []


@pytest.mark.parametrize(
    "line",
    [
        'raise FileError(f"{path.name} is empty.")',
        'raise FileError(path.name + " is empty.")',
        'raise type(error)(f"{path.name}: {error}")',
        'notes.append(f"All of {path} was left as it is.")',
        'notes.append(Sentence(f"{path} is empty."))',
    ],
)
def test_what_is_put_together_by_hand_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "new.py").write_text(f"def work(path, notes, error):\n    {line}\n", encoding="utf-8")
    assert {found.split(": ")[0] for found in put_together(tmp_path)} == {"new.py:2"}


@pytest.mark.parametrize(
    "call", ['FileError("{file} is {what}.", 1)', 'Sentence("empty", 1)', 'counted(1, "{n} a {b}", "{n} b")']
)
def test_a_slot_without_a_part_is_found(tmp_path: Path, call: str) -> None:
    (tmp_path / "new.py").write_text(f"text = {call}\n", encoding="utf-8")
    assert unfilled(tmp_path) == ["new.py:1"]


# Counts above a limit, fixed ones, and some of damaged or foreign files that were never met with 1.
_PLURAL = frozenset({
    "There are {count} rows on the Merge page.",
    "{count} LoRAs are more than the {most} rows of this page. The command line takes more.",
    "This sweep makes {count} files, and --max allows {most}.",
    "This sweep has {count} combinations; at most {most} are possible.",
    "{name} means {count} files: {files}; write the subfolder too, as in 'folder/{file}'.",
    "{file} is in the recipe {count} times.",
    "{count} embedding tensors left out: {host} refuses a LoRA with more than {most} tensors that it does "
    "not know.",
    "{count} embedding tensors are kept. These programs refuse a LoRA with so many tensors that they do not "
    "know: {hosts}.",
    "{start}{count} numbered layers for the {encoder}; only files with {counts}, trained on attention alone, "
    "say by their order which layer each of them is.",
    "{where}: the residual has {count} elements where the layer has {size}.",
    "{start}... ({count} characters)",
    "ComfyUI's {field} of {count} characters was left out of the metadata.",
    "tensor {name} has a name of {count} characters",
    "cross-attention keys read {count} channels",
    "{count} bytes",
    "{file} has {count} bytes after its last tensor, which no WebUI accepts. The file is damaged; download "
    "it again.",
    "{count} bytes before {name} belong to no tensor",
})  # fmt: skip


def test_a_count_that_may_be_one_has_a_sentence_of_its_own() -> None:
    """A word after a count is plural; ``counted`` has both forms, and a slot may hold what it makes."""
    plural = re.compile(r"\{count\} (?!of )(?:\w+ )?\w+s\b")
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(call, "func", None)
            if isinstance(call, ast.Call) and isinstance(name, ast.Name) and name.id != "counted":
                keys = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
                found |= {key for key in keys if isinstance(key, str) and plural.search(key)}
    assert found == _PLURAL
