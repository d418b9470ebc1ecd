"""Methods in docs/METHODS.md and docs/GUIDE.ja.md: ``python -m tests.helpers.readme_methods``."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path

from lib_loramerge.methods import METHODS, MergeMethod
from lib_loramerge.recipe import Param

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "METHODS.md"
MARKERS = "<!-- method-notes -->", "<!-- /method-notes -->"
_A_CITATION = 90  # Letters of a source that only names a paper and a section.
_ADDRESS = re.compile(r"https?://[^\s,;)]*[^\s,;:.)]")


def japanese() -> Mapping[str, str]:
    """The words that the tab shows in Japanese."""
    return json.loads((ROOT / "localizations" / "ja_JP.json").read_text(encoding="utf-8"))


def notes(words: Mapping[str, str]) -> str:
    """The Japanese guide's list of methods: label, summary, what it is not for, formula, source.

    Args:
        words: English to Japanese.
    """
    lines = []
    for method in METHODS.values():
        label, summary, avoid = (
            words.get(text, text) for text in (method.label, method.summary, method.avoid)
        )
        parts = [f"{label}。" if not method.experimental else f"{label}（実験的）。", summary]
        parts += [f"不向き: {avoid}。"] if avoid else []
        parts += [f"`{method.formula}`", f"({_linked(method.source)})"]
        lines.append(f"- **{method.name}**: {' '.join(parts)}\n")
    return "".join(lines)


def sections() -> str:
    """docs/METHODS.md's part on each method: from the registry, and from its function's docstring."""
    return "\n".join(_section(method) for method in METHODS.values())


def _section(method: MergeMethod) -> str:
    kinds = {
        "exact sum": method.exact,
        "whole matrices": method.elementwise,
        "keeps all ranks": not method.uses_rank,
        "random, by the seed": method.random,
        "the order of the LoRAs counts": method.ordered,
        "experimental": method.experimental,
    }
    facts = [name for name, holds in kinds.items() if holds]
    params = (f"- `{p.name}` = {_plain(p.default)}{_limits(p)}: {p.help}" for p in method.params)
    lines = [
        f"### {method.name}: {method.label}",
        "",
        method.summary + (f" ({', '.join(facts)})" if facts else ""),
        "",
        f"    {method.formula}",
        "",
        *params,
        f"- Source: {_linked(method.source)}",
        *([f"- Avoid it {method.avoid}."] if method.avoid else []),
    ]
    for paragraph in _told(method):
        lines += ["", paragraph]
    return "\n".join(lines) + "\n"


def _told(method: MergeMethod) -> list[str]:
    """The paragraphs of a method's docstring beside its arguments, as Markdown."""
    whole = re.sub(r":\w+:", "", inspect.getdoc(method.merge) or "").replace("``", "`")
    before, _, rest = whole.partition("\nArgs:")
    _, _, source = rest.partition("\nSource:")
    paragraphs = [*before.strip().split("\n\n"), inspect.cleandoc(source)]
    told = [" ".join(paragraph.split()) for paragraph in paragraphs]
    # A source that only repeats the registry's says nothing more.
    return [_linked(text) for text in told if text and (text in told[:-1] or len(text) > _A_CITATION)]


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _limits(param: Param) -> str:
    if param.choices:
        return f" ({', '.join(param.choices)})"
    if param.minimum is None and param.maximum is None:
        return ""
    return f" ({param.minimum:g} to {param.maximum:g})"


def _linked(source: str) -> str:
    return _ADDRESS.sub(lambda found: f"<{found.group()}>", source)


def regenerated(text: str, made: str) -> str:
    """A page with what is between its markers made anew.

    Raises:
        ValueError: A marker is missing.
    """
    start, end = MARKERS
    before, found, rest = text.partition(start)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"The page has no {start} ... {end}.")
    return f"{before}{start}\n{made}{end}{after}"


def pages() -> dict[Path, str]:
    """Each page with such a part, and what the part is."""
    return {ROOT / "docs" / "GUIDE.ja.md": notes(japanese()), PAGE: sections()}


def main() -> None:
    for path, made in pages().items():
        text = regenerated(path.read_text(encoding="utf-8"), made)
        path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
