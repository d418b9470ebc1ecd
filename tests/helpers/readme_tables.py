"""The guide's tables, made from the registries.

``python -m tests.helpers.readme_tables`` writes them anew.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

from lib_loramerge import refused
from lib_loramerge.adapters import ADAPTERS
from lib_loramerge.methods import METHODS
from lib_loramerge.models import ARCHITECTURES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "GUIDE.md"

# What comes along with a kind instead of being one.
_COMPANIONS = (
    ("alpha", "`alpha`", "alpha / rank scales the delta; none means 1, 0 means nothing, as in every WebUI."),
    ("LoRA bias", "`lora_B.bias`", "Scaled like the delta and added to the bias."),
    ("Bias", "`diff_b`", "Added to the bias of any kind."),
    (
        "Residual",
        "`bias`, or `bias_indices` `bias_values` `bias_size`",
        "Added to the delta before the scale, as A1111 does; the layer becomes dense.",
    ),
    ("scale", "`scale`", "Replaces alpha / rank, as A1111 and SD.Next do; Forge ignores it."),
    ("scalar", "`scalar`", "Ignored, as every WebUI does."),
)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = tuple(head)
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def kinds_table() -> str:
    """Every adapter kind, what comes along with one, and what is refused."""
    rows = [
        (kind.label, kind.keys, _yes(kind.exact_low_rank), _yes(kind.needs_base), kind.does)
        for kind in ADAPTERS.values()
    ]
    rows += [(label, keys, "", "no", does) for label, keys, does in _COMPANIONS]
    rows += [("Refused", f"`{slot}`", "", "", f"It {reason}.") for slot, reason in refused.SLOTS.items()]
    adapters = (kind for kind in refused.KINDS if not (kind.whole or kind.one_key))
    rows += [
        ("Refused", kind.name, "", "", f"{kind.reason[:1].upper()}{kind.reason[1:]}.") for kind in adapters
    ]
    return table(("Kind", "In the file", "Exactly low rank", "Needs `--base`", "What happens"), rows)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def models_text() -> str:
    """Every base model whose names are known."""
    known = ", ".join(entry.label for entry in ARCHITECTURES.values() if not entry.opaque)
    models = (
        f"Base models known under all of their names: {known}. For models that are not among them, LoRAs in "
        "one spelling merge with each other, and the result keeps it. Where the layers fit several models, "
        "`--base-model NAME` says which it is."
    )
    return textwrap.fill(models, 116, break_on_hyphens=False) + "\n"


def methods_table() -> str:
    """Every merge method with its parameters."""
    rows = (
        (
            f"`{method.name}`",
            method.summary,
            "yes" if method.exact else "no",
            ", ".join(
                f"`--{param.name.replace('_', '-')} {str(param.default).lower()}`" for param in method.params
            ),
        )
        for method in METHODS.values()
    )
    return table(("Mode", "What it does", "Exact sum", "Parameters and their defaults"), rows)


TABLES = {"kinds": kinds_table, "models": models_text, "methods": methods_table}


def regenerated(text: str) -> str:
    """The guide with every table made anew.

    Raises:
        ValueError: A pair of markers is missing.
    """
    for name, make in TABLES.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = text.partition(start)
        _, ended, after = rest.partition(end)
        if not found or not ended:
            raise ValueError(f"The guide has no {start} ... {end}.")
        text = f"{before}{start}\n{make()}{end}{after}"
    return text


def main() -> None:
    PAGE.write_text(regenerated(PAGE.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
