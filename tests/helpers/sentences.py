"""Every sentence of the library that the tab can show, found in the source.

A sentence with names and numbers in it is a key with slots, written out where ``Sentence``, ``counted`` or an
error is made of it. One without may stand anywhere: labels, tables, hints.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
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
# What makes names and labels for lists, pictures, files and the terminal: no sentence of the page.
_NAMING = frozenset({
    "_name", "_rank_words", "_strength", "_block_weights", "words", "model_lists", "_recipe_text",
    "histogram_text",
})  # fmt: skip
# What makes sentences besides errors: which of its arguments are keys, and where what fills the slots begins.
_MAKERS = {"Sentence": ((0,), 1), "counted": ((1, 2), 3), "_damaged": ((1,), 2)}
_ERRORS = frozenset({
    "LoraMergeError", "FileError", "UnsupportedError", "UnknownKeyError", "RecipeError", "IncompatibleError",
    "OutputError", "Cancelled", "ConflictError", "UnknownNameError", "ClosedError",
})  # fmt: skip
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
_SLOT = re.compile(r"\{(\w+)\}")
_MARKUP = re.compile(r"</|&&|class=\"|role=|data-\w+=|=>|\(\?|\\[dwb]|https?://|^\s*<[a-z]")


@dataclass(frozen=True)
class Found:
    """A sentence, and where it stands."""

    key: str
    place: str


@dataclass
class _Module:
    name: str
    tree: ast.Module
    constants: dict[str, str] = field(default_factory=dict)
    parents: dict[ast.AST, ast.AST] = field(default_factory=dict)

    def above(self, node: ast.AST) -> Iterator[ast.AST]:
        while node in self.parents:
            node = self.parents[node]
            yield node

    def place(self, node: ast.AST) -> str:
        return f"{self.name}:{getattr(node, 'lineno', 0)}"


def sentences(root: Path) -> list[Found]:
    """The sentences of a package that its tab can show, each as often as it stands there."""
    modules = _modules(root)
    unreached = _unreached(modules)
    return [
        Found(text.strip(), module.place(node))
        for module in modules
        if module.name not in NOT_OF_THE_TAB
        for keys in [{key for _, keys, _ in _makers(module) for key in keys}]
        for node in _shown(module, unreached)
        if not isinstance(node, ast.JoinedStr)
        for text in [_text(node, module)]
        if is_prose(text) or (node in keys and _WORD.search(_SLOT.sub(" ", text)))
    ]


def put_together(root: Path) -> list[str]:
    """Sentences that are no keys: f-strings and sums in errors, and wherever the tab can show them."""
    modules = _modules(root)
    unreached = _unreached(modules)
    found = []
    for module in modules:
        found += [
            f"{module.place(key)}: {ast.unparse(key)}"
            for _, keys, _ in _makers(module)
            for key in keys
            if isinstance(key, (ast.JoinedStr, ast.BinOp))
        ]
        if module.name not in NOT_OF_THE_TAB:
            found += [
                f"{module.place(node)}: {ast.unparse(node)}"
                for node in _shown(module, unreached)
                if isinstance(node, ast.JoinedStr)
                and is_prose(_own_words(node))
                and not any(getattr(other, "name", "") in _NAMING for other in module.above(node))
            ]
    return found


def unfilled(root: Path) -> list[str]:
    """Keys that have another number of slots than there is to put into them."""
    return [
        module.place(key)
        for module in _modules(root)
        for call, keys, first in _makers(module)
        for key in keys
        if isinstance(key, ast.Constant)
        and not any(isinstance(part, ast.Starred) for part in call.args)
        # ``counted`` fills the first slot with its count.
        and len(set(_SLOT.findall(key.value))) != len(call.args[first:]) + (len(keys) > 1 and first == 3)
        and (len(call.args) > first or first == 3)
    ]


def is_prose(text: str) -> bool:
    """Whether a text has words for people in it: two, or one beside a slot, and not a proper name alone."""
    words = _WORD.findall(_SLOT.sub(" ", text))
    if " " not in text or _MARKUP.search(text):
        return False
    if len(words) == 1:
        return "{" in text and len(words[0]) > 3
    return len(words) > 1 and any(word.islower() for word in words)


@cache
def _modules(root: Path) -> list[_Module]:
    return [_read(path, root) for path in sorted(root.rglob("*.py"))]


def _read(path: Path, root: Path) -> _Module:
    module = _Module(path.relative_to(root).as_posix(), ast.parse(path.read_text(encoding="utf-8")))
    for node in ast.walk(module.tree):
        for child in ast.iter_child_nodes(node):
            module.parents[child] = node
    for node in module.tree.body:
        value = getattr(node, "value", None)
        if isinstance(node, ast.Assign) and isinstance(value, ast.Constant) and isinstance(value.value, str):
            module.constants[_name(node.targets[0])] = value.value
    return module


def _name(node: ast.AST) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def _makers(module: _Module) -> Iterator[tuple[ast.Call, list[ast.expr], int]]:
    """Calls that make a sentence, the keys among their arguments, and where what fills the slots begins."""
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        name = _name(node.func)
        of_type = isinstance(node.func, ast.Call) and _name(node.func.func) == "type"
        places, first = _MAKERS.get(name, ((0,), 1))
        if name in _MAKERS or name in _ERRORS or of_type:
            yield node, [key for at in places for key in _choices(node.args[at : at + 1])], first


def _choices(nodes: list[ast.expr]) -> list[ast.expr]:
    return [
        part
        for node in nodes
        for part in (_choices([node.body, node.orelse]) if isinstance(node, ast.IfExp) else [node])
    ]


def _own_words(node: ast.JoinedStr) -> str:
    return "".join(part.value if isinstance(part, ast.Constant) else "{_}" for part in node.values)


def _text(node: ast.expr, module: _Module) -> str:
    """A text, or a constant of the module with one behind it."""
    if isinstance(node, ast.BinOp):
        return _text(node.left, module) + _text(node.right, module)
    return module.constants.get(_name(node), "") if isinstance(node, ast.Name) else getattr(node, "value", "")


def _is_text(node: ast.AST, module: _Module) -> bool:
    if isinstance(node, ast.BinOp):
        return _is_text(node.left, module) and _is_text(node.right, module)
    constant = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return constant or (isinstance(node, ast.Name) and node.id in module.constants)


def _shown(module: _Module, unreached: set[str]) -> Iterator[ast.expr]:
    """Texts that may be shown."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Name) or not (isinstance(node, ast.JoinedStr) or _is_text(node, module)):
            continue
        above = list(module.above(node))
        if isinstance(above[0], ast.JoinedStr) or (
            isinstance(node, ast.Constant) and _is_text(above[0], module)
        ):
            continue
        if not any(_hides(other, below, unreached) for below, other in zip([node, *above], above)):
            yield node  # type: ignore[misc]


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
        return _name(node.func) in _NOT_SHOWN_BY
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
            name = _name(node)
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
