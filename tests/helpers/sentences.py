"""Every sentence of the library that the tab can show, found in the source.

A sentence is a string or f-string with words in it. What stands in it for a name or a number becomes
``{0}``, ``{1}`` ..., in order, which is how ``localizations/ja_JP.json`` spells it.
"""

from __future__ import annotations

import ast
import builtins
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Their texts reach the command line, the REST pages or the console, never the tab.
NOT_OF_THE_TAB = frozenset({
    *(f"cli/{name}.py" for name in (
        "__init__", "bake", "convert", "demo", "extract", "lists", "look", "many", "merge", "options",
        "output", "recipes", "sweep", "ui",
    )),
    "__main__.py", "demo.py",  # the command line
    "checkpoints/looking.py",
    "sweep/axes.py", "sweep/running.py", "merge/simple.py",  # the command line and the library
    "webui/standalone.py",  # what it says when it starts
    # REST, whose words are English
    "webui/api.py", "webui/routes.py", "webui/fields.py", "webui/checkpoint_api.py", "webui/schema.py",
    "webui/access.py", "webui/guard.py",
    "webui/enter.py",  # before the page, in both languages
    "models/flux.py", "models/image.py",  # tables of names
    "models/sd.py", "models/video.py", "models/table.py",
    "analysis/hosts.py",  # which hosts load a file: the command line and REST tell it
    "webui/plots.py",  # drawn, see test_localization.py
    # ComfyUI's pages
    "comfyui/baking.py", "comfyui/inputs.py", "comfyui/merging.py", "comfyui/nodes.py", "comfyui/pictures.py",
})  # fmt: skip
# Arguments that describe a method or kind in the README and in REST.
_FOR_READERS = frozenset({"source", "formula", "keys", "does", "description", "elem_id"})
# Calls whose texts are patterns, log lines or words of tables for readers.
_NOT_SHOWN_BY = frozenset({"compile", "split", "log", "_log", "print", "Dialect"})
_NOT_SHOWN_BY |= {"setting"}  # Help of the command line and of REST.
_SLOT = "\0"
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
_MARKUP = re.compile(r"</|&&|class=\"|data-\w+=|=>|\(\?|\\[dwb]|https?://|^\s*<[a-z]")


@dataclass(frozen=True)
class Sentence:
    """A sentence with its slots, and where it stands."""

    template: str
    place: str


@dataclass
class _Module:
    name: str
    tree: ast.Module
    constants: dict[str, ast.expr] = field(default_factory=dict)
    parents: dict[ast.AST, ast.AST] = field(default_factory=dict)

    def above(self, node: ast.AST) -> Iterator[ast.AST]:
        while node in self.parents:
            node = self.parents[node]
            yield node


def sentences(root: Path) -> list[Sentence]:
    """The sentences of a package that its tab can show, each as often as it stands there."""
    modules = [_read(path, root) for path in sorted(root.rglob("*.py"))]
    unreached = _unreached(modules)
    found = []
    for module in modules:
        if module.name not in NOT_OF_THE_TAB:
            found += [
                Sentence(template, f"{module.name}:{node.lineno}")
                for node in _texts(module, unreached)
                for template in _templates(node, module)
                if is_prose(template)
            ]
    return found


def is_prose(template: str) -> bool:
    """Whether a text has words for people in it: two, or one beside a slot, and not a proper name alone."""
    words = _WORD.findall(re.sub(r"\{\d+\}", " ", template))
    if " " not in template or _MARKUP.search(template):
        return False
    if len(words) == 1:
        return "{" in template and len(words[0]) > 3
    return len(words) > 1 and any(word.islower() for word in words)


def _read(path: Path, root: Path) -> _Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module = _Module(path.relative_to(root).as_posix(), tree)
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            module.parents[child] = node
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant) and isinstance(value.value, str):
            module.constants[target.id] = value
    return module


def _texts(module: _Module, unreached: set[str]) -> Iterator[ast.expr]:
    """The outermost string expressions that may be shown."""
    inlined = _inlined(module)
    for node in ast.walk(module.tree):
        if not _is_text(node) or not isinstance(node, ast.expr) or node in inlined:
            continue
        above = list(module.above(node))
        if any(_is_text(other) or isinstance(other, ast.FormattedValue) for other in above[:1]):
            continue
        if not any(_hides(other, below, unreached) for below, other in zip([node, *above], above)):
            yield node


def _is_text(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Add) and (_is_text(node.left) or _is_text(node.right))
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _inlined(module: _Module) -> set[ast.AST]:
    """Values of constants that stand within sentences and nowhere else."""
    loads: dict[str, list[bool]] = defaultdict(list)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in module.constants:
            above = module.parents[node]
            added = isinstance(above, ast.BinOp) and _is_text(above)
            loads[node.id].append(added or isinstance(above, ast.FormattedValue))
    return {module.constants[name] for name, within in loads.items() if all(within)}


def _hides(node: ast.AST, below: ast.AST, unreached: set[str]) -> bool:
    """Whether a text below this node is no text of the tab."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)  # a docstring
    if isinstance(node, ast.Raise):
        call = node.exc
        return isinstance(call, ast.Call) and hasattr(builtins, getattr(call.func, "id", ""))  # a bug of ours
    if isinstance(node, ast.keyword):
        return node.arg in _FOR_READERS
    if isinstance(node, ast.Call):
        return getattr(node.func, "id", getattr(node.func, "attr", "")) in _NOT_SHOWN_BY
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return node.name in unreached or node.name.startswith("__getattr")
    return isinstance(node, ast.Compare) or (isinstance(node, ast.arg) and below is node.annotation)


def _unreached(modules: list[_Module]) -> set[str]:
    """Names of functions that only the command line and REST call, directly or through others."""
    callers: dict[str, set[str]] = defaultdict(set)
    defined: set[str] = set()
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef):
                defined.add(node.name)
            name = getattr(node, "id", getattr(node, "attr", None))
            if isinstance(node, (ast.Name, ast.Attribute)) and name:
                inside = [n.name for n in module.above(node) if isinstance(n, ast.FunctionDef)]
                outside = module.name in NOT_OF_THE_TAB
                callers[name].add("" if outside else inside[-1] if inside else "(module)")
    unreached: set[str] = set()
    while True:
        more = {
            name
            for name in defined - unreached
            if not name.startswith("__")
            and callers[name] - {name}
            and callers[name] - {name, ""} <= unreached
        }
        if not more:
            return unreached
        unreached |= more


def _templates(node: ast.expr, module: _Module) -> list[str]:
    """A text with slots, once for each choice of words that stands in it."""
    made = []
    for text in _spelled(node, module):
        counter = itertools.count()
        made.append(re.sub(_SLOT, lambda _, c=counter: f"{{{next(c)}}}", text).strip())
    return made


def _spelled(node: ast.expr, module: _Module) -> list[str]:
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else [_SLOT]
    if isinstance(node, ast.Name) and node.id in module.constants:
        return _spelled(module.constants[node.id], module)
    if isinstance(node, ast.FormattedValue):
        return _spelled(node.value, module) if node.conversion == -1 else [_SLOT]
    if isinstance(node, ast.JoinedStr):
        parts = [_spelled(part, module) for part in node.values]
        return ["".join(choice) for choice in itertools.product(*parts)]
    if isinstance(node, ast.IfExp):
        return [*_spelled(node.body, module), *_spelled(node.orelse, module)]
    if isinstance(node, ast.BinOp) and _is_text(node):
        pairs = itertools.product(_spelled(node.left, module), _spelled(node.right, module))
        return [left + right for left, right in pairs]
    return [_SLOT]
