"""What the pages in docs/ name exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r"^\| [^|]+ \| `([\w/]+\.py)` \| `(\w+)` \|$", re.MULTILINE)


def defined(path: Path) -> set[str]:
    """Functions, classes and methods of a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_the_functions_on_the_way_of_a_layer_are_where_the_page_says():
    rows = ROW.findall((ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    assert len(rows) > 30
    wrong = [(file, name) for file, name in rows if name not in defined(ROOT / "lib_loramerge" / file)]
    assert not wrong


def test_the_rooms_on_the_page_are_those_of_the_package():
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rooms = {path.name for path in (ROOT / "lib_loramerge").iterdir() if (path / "__init__.py").exists()}
    assert not {room for room in rooms if f"{room}/" not in text}
