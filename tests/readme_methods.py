"""The READMEs' notes on merge methods, made by ``python -m tests.readme_methods``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from lib_loramerge.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
MARKERS = "<!-- method-notes -->", "<!-- /method-notes -->"
_ADDRESS = re.compile(r"https?://[^\s,;)]+")


def japanese() -> Mapping[str, str]:
    """The words that the tab shows in Japanese."""
    return json.loads((ROOT / "localizations" / "ja_JP.json").read_text(encoding="utf-8"))


def notes(words: Mapping[str, str] | None = None) -> str:
    """One list item per method: label, what it is not for, formula, source.

    Args:
        words: English to another language; the summary is told too then, because the table of
            the English README, which tells it, is not beside this list.
    """
    lines = []
    for method in METHODS.values():
        label, summary, avoid = (
            (words or {}).get(text, text) for text in (method.label, method.summary, method.avoid)
        )
        if words is None:
            parts = [f"{label}." if not method.experimental else f"{label}, experimental."]
            parts += [f"Better not {avoid}."] if avoid else []
        else:
            parts = [f"{label}。" if not method.experimental else f"{label}（実験的）。", summary]
            parts += [f"不向き: {avoid}。"] if avoid else []
        parts += [f"`{method.formula}`", f"({_linked(method.source)})"]
        lines.append(f"- **{method.name}**: {' '.join(parts)}\n")
    return "".join(lines)


def _linked(source: str) -> str:
    return _ADDRESS.sub(lambda found: f"<{found.group()}>", source)


def regenerated(text: str, words: Mapping[str, str] | None = None) -> str:
    """A README with its notes made anew.

    Raises:
        ValueError: A marker is missing.
    """
    start, end = MARKERS
    before, found, rest = text.partition(start)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"The README has no {start} ... {end}.")
    return f"{before}{start}\n{notes(words)}{end}{after}"


def main() -> None:
    for name, words in (("README.md", None), ("README.ja.md", japanese())):
        path = ROOT / name
        path.write_text(regenerated(path.read_text(encoding="utf-8"), words), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
