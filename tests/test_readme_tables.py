"""The guide's tables are those of the registries."""

from __future__ import annotations

import pytest

from lib_loramerge.adapters import ADAPTERS
from lib_loramerge.methods import METHODS
from tests.helpers.readme_tables import PAGE, TABLES, regenerated


@pytest.mark.parametrize("name", TABLES)
def test_the_table_is_what_the_registry_says(name):
    text = PAGE.read_text(encoding="utf-8")
    shown = text.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0]
    assert shown == TABLES[name](), "run: python -m tests.helpers.readme_tables"


def test_making_the_tables_anew_changes_nothing_else():
    text = PAGE.read_text(encoding="utf-8")
    emptied = text
    for name in TABLES:
        before, _, rest = emptied.partition(f"<!-- {name} -->")
        emptied = f"{before}<!-- {name} -->\n<!-- /{name} -->{rest.partition(f'<!-- /{name} -->')[2]}"
    assert regenerated(emptied) == text


@pytest.mark.parametrize(
    ("table", "entries"),
    [
        ("kinds", [kind.label for kind in ADAPTERS.values()]),
        ("models", ["Stable Diffusion XL", "Flux.1", "Z-Image"]),
        ("methods", [f"`{name}`" for name in METHODS]),
    ],
)
def test_every_entry_has_its_row(table, entries):
    rows = TABLES[table]().splitlines()
    for entry in entries:
        assert sum(entry in row for row in rows) >= 1, entry


def test_no_row_is_broken_by_its_text():
    for make in TABLES.values():
        width = 0
        for line in make().splitlines():
            if not line.startswith("|"):
                width = 0
                continue
            cells = line.replace("\\|", "").count("|")
            assert width in (0, cells), line
            width = cells
