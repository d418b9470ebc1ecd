"""What the READMEs say is there: every command, option, route and example is tried."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib_loramerge import cli
from lib_loramerge.blocks import BLOCK_IDS
from lib_loramerge.recipe import from_json
from lib_loramerge.webui.routes import ROUTES
from tests.helpers import readme_methods

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.ja.md")
# Each README has a guide, which says what a first reading need not.
GUIDES = {"README.md": "docs/GUIDE.md", "README.ja.md": "docs/GUIDE.ja.md"}
# Options of other programs that the text names: the WebUI's, pytest's.
FOREIGN_OPTIONS = {
    *("--api", "--api-auth", "--nowebui", "--share", "--listen", "--enable-insecure-extension-access"),
    *("--auth", "--auth-file", "--lora-dirs", "--ignore"),
    "--server-name",
    "--cors-allow-origins",
}
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_GENERATED = re.compile(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", re.DOTALL)


def text_of(name: str) -> str:
    """A README and its guide."""
    return "".join((ROOT / page).read_text(encoding="utf-8") for page in (name, GUIDES[name]))


def blocks(name: str, language: str) -> list[str]:
    return [body for found, body in _BLOCK.findall(text_of(name)) if found == language]


def commands(name: str) -> list[list[str]]:
    """The arguments of every ``loramerge ...`` line and of every one within a sentence."""
    prose = " ".join(_BLOCK.sub("", text_of(name)).split())
    lines = [line for block in blocks(name, "sh") for line in block.splitlines()]
    lines += re.findall(r"`(loramerge [^`]+)`", prose)
    return [shlex.split(line)[1:] for line in lines if line.startswith("loramerge ")]


def options_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from options_of(sub)


@pytest.mark.parametrize("name", READMES)
def test_every_command_is_understood(name):
    found = commands(name)
    assert len(found) > 20
    for words in found:
        if words[-1] in ("--version", "--help"):
            continue
        if words[0] == "inspect" and words[-1] == "--json":
            words = [*words, "file.safetensors"]  # "inspect --json for the files"
        if words in (["compare"], ["convert"], ["inspect"]):
            words = [*words, "file.safetensors", *(["-o", "out"] if words == ["convert"] else [])]
        assert callable(cli.build_parser(words).parse_args(words).run), words


@pytest.mark.parametrize("name", READMES)
def test_every_option_exists(name):
    told = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text_of(name)))
    assert told
    assert told <= FOREIGN_OPTIONS | set(options_of(cli.build_parser(["merge"])))


def test_the_examples_with_the_samples_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    """Those of the English README; the other has the same."""
    monkeypatch.chdir(tmp_path)
    run = [words for words in commands("README.md") if any("samples" in word for word in words)]
    assert len(run) > 10
    for words in run:
        assert cli.main(words) == 0, (words, capsys.readouterr().err)
    for example in blocks("README.md", "python"):
        exec(compile(example, "README.md", "exec"), {})
    assert re.search(r"^\d+ layers, error 0\.\d+%$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("name", READMES)
def test_the_figures_shown_are_those_of_the_demo(name, tmp_path, monkeypatch, capsys):
    """Sizes, ranks and errors in the sample output, wherever a line is not cut short."""
    monkeypatch.chdir(tmp_path)
    merge, advise = (
        next(words for words in commands(name) if words[0] == command and "samples" in words[1])
        for command in ("merge", "advise")
    )
    cli.main(["demo", "--dir", "samples"])
    capsys.readouterr()
    for words, shown in zip((merge, advise), blocks(name, "text")):
        assert cli.main(words) == 0
        printed = capsys.readouterr().out.splitlines()
        for line in shown.splitlines():
            if line.strip() != "...":
                assert line in printed, line


@pytest.mark.parametrize("name", READMES)
def test_recipes_in_json_are_recipes(name):
    (recipe,) = blocks(name, "json")
    assert len(from_json(recipe).inputs) == 2
    (body,) = re.findall(r"-d '(\{.*?\})'$", text_of(name), re.MULTILINE)
    assert from_json(json.loads(body)["recipe"]).inputs[0].unet == 0.8


@pytest.mark.parametrize("name", READMES)
def test_every_route_is_reported_and_none_is_made_up(name):
    there = {(route.method, route.path) for route in ROUTES}
    told = set(re.findall(r"`(GET|POST|DELETE) (/[^`]+)`", text_of(name)))
    assert {(method, path.replace("{job_id}", "{id}")) for method, path in there} == told


@pytest.mark.parametrize("name", READMES)
def test_the_blocks_are_those_of_the_library(name):
    rows = dict(re.findall(r"^\| (12|17|20|26|61) \| [^|]+ \| ([^|]+) \|$", text_of(name), re.MULTILINE))
    assert {int(count) for count in rows} == set(BLOCK_IDS)
    for count, row in rows.items():
        told = [block for word in row.split() for block in _between(word)]
        assert told == list(BLOCK_IDS[int(count)])


def _between(word: str) -> list[str]:
    """``IN00-IN02`` as three blocks."""
    first, _, last = word.partition("-")
    if not last:
        return [first]
    letters = first.rstrip("0123456789")
    return [f"{letters}{n:02}" for n in range(int(first[len(letters) :]), int(last[len(letters) :]) + 1)]


@pytest.mark.parametrize(
    ("page", "made"), readme_methods.pages().items(), ids=lambda value: getattr(value, "name", "")
)
def test_notes_on_methods_are_those_of_the_registry(page, made):
    text = page.read_text(encoding="utf-8")
    assert text == readme_methods.regenerated(text, made), "run: python -m tests.helpers.readme_methods"


def test_both_languages_say_the_same():
    english, japanese = (_GENERATED.sub("", text_of(name)) for name in READMES)
    for pattern in (r"^(#+) ", r"^```(\w*)$", r"^(\d\. |- )"):
        here, there = (re.findall(pattern, text, re.MULTILINE) for text in (english, japanese))
        assert here == there, pattern
    assert commands("README.md") == commands("README.ja.md")
    for language in ("sh", "python", "json"):
        assert blocks("README.md", language) == blocks("README.ja.md", language)


@pytest.mark.parametrize("name", [*READMES, *GUIDES.values()])
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"(?:\]\(|src=\"|srcset=\")([^)\"\s]+)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.is_file(), target
        assert not anchor or anchor in _anchors(found), target


def _anchors(page: Path) -> set[str]:
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    return {_anchor(title) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def test_the_readme_is_read_in_ten_minutes_or_a_little_more():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 3000


def _anchor(title: str) -> str:
    """The id that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_the_first_screen_has_the_two_commands_of_a_fresh_machine():
    lines = [line for block in blocks("README.md", "sh") for line in block.splitlines()]
    assert [line.rpartition("&& ")[2] for line in lines if line.startswith("python3 -m venv ")] == [
        ".venv/bin/loramerge demo",
        ".venv/bin/pytest -n auto --ignore=tests/web",
    ]
