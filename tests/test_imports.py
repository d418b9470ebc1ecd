"""Imports go one way, and nothing outside the WebUI part needs a WebUI."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lib_loramerge"

# What each top module may import, itself aside. A package counts as one module under its name.
_GROUND = {"errors", "block_lists", "refused"}
_TYPES = _GROUND | {"delta", "recipe", "models"}
_PARTS = {"dialects", "adapters", "methods", "ranks", "blocks", "metadata", "files"}
_RESULTS = _TYPES | _PARTS | {"report", "analysis"}
ALLOWED = {
    "errors": set(),
    "block_lists": set(),
    "refused": {"errors"},
    "interrupts": set(),
    "recipe": _GROUND,
    "delta": _GROUND,
    "models": _GROUND,
    "files": _TYPES,
    "metadata": _TYPES,
    "dialects": _TYPES | {"adapters"},
    "adapters": _TYPES,
    "methods": _TYPES,
    "ranks": _TYPES,
    "blocks": _TYPES | {"files"},
    "report": _TYPES | _PARTS,
    "hosts": _TYPES | {"dialects"},
    "merge": _RESULTS - {"analysis"} | {"hosts"},
    "analysis": _RESULTS - {"analysis"} | {"merge", "hosts"},
    "checkpoints": _RESULTS | {"merge", "hosts"},
    "demo": _RESULTS | {"merge"},
    "sweep": _RESULTS | {"merge"},
    "cli": _RESULTS | {"merge", "checkpoints", "demo", "sweep", "interrupts"},
    "webui": _RESULTS | {"merge", "checkpoints", "cli", "demo", "sweep", "interrupts"},
    "comfyui": _RESULTS | {"merge"},
    "__init__": _RESULTS | {"merge"},
    "__main__": {"cli"},
    "scripts": {"webui"},
}
# cli and comfyui reach webui's figures only inside the functions that draw, and comfyui checkpoints in one.
ALLOWED_INSIDE_FUNCTIONS = {"cli": {"webui"}, "comfyui": {"webui", "checkpoints"}}

# Only webui imports these. A WebUI puts `modules` and its LoRA extension's `networks` on the path, and
# Gradio brings the others.
WEBUI_ONLY = {"gradio", "fastapi", "starlette", "pydantic", "uvicorn", "anyio", "matplotlib", "PIL"}
WEBUI_ONLY |= {"modules", "networks", "network"}
# ComfyUI's own, and only comfyui imports them.
COMFYUI_ONLY = {"comfy", "folder_paths"}
INSTALLED = {"torch", "safetensors", "numpy"}


@dataclass(frozen=True)
class Import:
    """One imported module: who imports it, where, its absolute name, and whether only inside a function."""

    importer: str
    where: str
    target: str
    in_function: bool


def _python_files() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])


def _dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def _top(dotted: str) -> str:
    """The module of the design that a dotted name belongs to: `lib_loramerge.webui.tab` is `webui`."""
    parts = dotted.split(".")
    if parts[0] != "lib_loramerge":
        return parts[0]
    return parts[1] if len(parts) > 1 else "__init__"


def _targets(node: ast.Import | ast.ImportFrom, path: Path) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        # A package's own __init__.py is one level deeper than its dotted name says.
        package = path.relative_to(ROOT).parent.parts
        above = package[: len(package) - (node.level - 1)]
        base = ".".join([*above, base] if base else above)
    if base == "lib_loramerge":
        # The version may be read anywhere; any other name counts as the module of that name.
        yield from (base if alias.name == "__version__" else f"{base}.{alias.name}" for alias in node.names)
        return
    yield base


def imports_of(path: Path, source: str) -> Iterator[Import]:
    """Every import statement of a source file, TYPE_CHECKING blocks and functions included."""
    name = _dotted(path)

    def walk(node: ast.AST, in_function: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                where = f"{path.relative_to(ROOT).as_posix()}:{child.lineno}"
                for target in _targets(child, path):
                    yield Import(name, where, target, in_function)
            else:
                is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, in_function or is_function)

    yield from walk(ast.parse(source, filename=str(path)), False)


def fault(edge: Import) -> str | None:
    """What is wrong with an import, or None."""
    importer, target = _top(edge.importer), _top(edge.target)
    if edge.target.split(".")[0] == "lib_loramerge":
        allowed = ALLOWED.get(importer)
        if allowed is None:
            return f"{edge.where}: {importer} is no module of the design; give it a place in ALLOWED"
        if edge.in_function:
            allowed = allowed | ALLOWED_INSIDE_FUNCTIONS.get(importer, set())
        # lib_loramerge itself holds the version; every module may read it.
        if target not in allowed and target != importer and target != "__init__":
            return f"{edge.where}: {importer} must not import {target}"
        return None
    if target in ("matplotlib", "PIL") and importer == "comfyui" and edge.in_function:
        return None  # A figure becomes an IMAGE there.
    for owner, names in (("webui", WEBUI_ONLY), ("comfyui", COMFYUI_ONLY)):
        if target in names and importer != owner:
            return f"{edge.where}: {importer} must not import {target}; only {owner} does"
    known = sys.stdlib_module_names | INSTALLED | WEBUI_ONLY | COMFYUI_ONLY
    if target not in known:
        return f"{edge.where}: {importer} imports {target}, which pyproject.toml does not list"
    return None


@pytest.mark.parametrize("path", _python_files(), ids=_dotted)
def test_imports_go_one_way(path):
    edges = imports_of(path, path.read_text(encoding="utf-8"))
    faults = [text for edge in edges if (text := fault(edge))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("lib_loramerge/files.py", "from lib_loramerge.merge import run_merge"),
        ("lib_loramerge/files.py", "from .merge import run_merge"),
        ("lib_loramerge/files.py", "from . import merge"),
        ("lib_loramerge/files.py", "from lib_loramerge import run_merge"),
        ("lib_loramerge/files.py", "import lib_loramerge.merge"),
        ("lib_loramerge/files.py", "import gradio as gr"),
        ("lib_loramerge/dialects/kohya.py", "from ..merge import plan_merge"),
        ("lib_loramerge/adapters/__init__.py", "from ..methods import METHODS"),
        ("lib_loramerge/methods/linear.py", "if TYPE_CHECKING:\n    from ..adapters import AdapterKind"),
        ("lib_loramerge/merge/run.py", "def f():\n    from matplotlib import pyplot"),
        ("lib_loramerge/cli/ui.py", "from lib_loramerge.webui.standalone import serve"),
        ("lib_loramerge/webui/tab.py", "import networks, scipy"),
        ("scripts/lora_merge.py", "from lib_loramerge.merge import run_merge"),
        ("lib_loramerge/webui/tab.py", "import comfy.utils"),
        ("lib_loramerge/merge/run.py", "def f():\n    import folder_paths"),
        ("lib_loramerge/comfyui/nodes.py", "import gradio"),
        ("lib_loramerge/comfyui/nodes.py", "from ..webui import plots"),
        ("lib_loramerge/surprise.py", "from lib_loramerge.errors import LoraMergeError"),
    ],
)
def test_a_forbidden_import_is_found(file, line):
    assert any(fault(edge) for edge in imports_of(ROOT / file, line))


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("lib_loramerge/files.py", "from . import errors\nfrom lib_loramerge import __version__"),
        ("lib_loramerge/dialects/kohya.py", "from . import registry\nfrom ..models import detect"),
        ("lib_loramerge/cli/ui.py", "def ui():\n    from lib_loramerge.webui.standalone import serve"),
        ("lib_loramerge/webui/host.py", "from modules import shared\nfrom ..merge import run_merge"),
    ],
)
def test_an_allowed_import_is_not_a_fault(file, line):
    assert not [text for edge in imports_of(ROOT / file, line) if (text := fault(edge))]


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=120
    )


def test_every_module_outside_webui_imports_without_a_webui():
    names = [_dotted(path) for path in _python_files() if not {"webui", "comfyui"} & set(path.parts)]
    names = [name for name in names if name.startswith("lib_loramerge.") and not name.endswith(".__main__")]
    code = f"""
import importlib, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {WEBUI_ONLY | COMFYUI_ONLY!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)
# Other projects import these only when they can, which a blocked import lets them find out.
sys.meta_path.insert(0, Block())
for name in {names!r}:
    importlib.import_module(name)
assert "torch" in sys.modules, "no module imports torch: the list of modules is wrong"
"""
    result = _run(code)
    assert result.returncode == 0, result.stderr


def test_importing_the_package_imports_neither_torch_nor_gradio():
    result = _run("import sys, lib_loramerge; print(sorted({'torch', 'numpy', 'gradio'} & set(sys.modules)))")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


HEADERS_ONLY = [
    "errors",
    "recipe",
    "files",
    "models",
    "blocks",
    "metadata",
    "report",
    "cli",
]


@pytest.mark.parametrize("module", HEADERS_ONLY)
def test_a_module_that_only_reads_headers_does_not_import_torch(module):
    result = _run(f"import sys, lib_loramerge.{module}; print('torch' in sys.modules)")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "False"


def test_help_answers_without_importing_torch():
    code = """
import runpy, sys
sys.argv = ["loramerge", "--help"]
try:
    runpy.run_module("lib_loramerge", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
assert "torch" not in sys.modules, "torch was imported"
"""
    result = _run(code)
    assert result.returncode == 0, result.stderr
    assert "merge" in result.stdout


def test_every_public_name_of_the_package_can_be_imported():
    code = "import lib_loramerge\nfor name in lib_loramerge.__all__:\n    getattr(lib_loramerge, name)"
    result = _run(code)
    assert result.returncode == 0, result.stderr
