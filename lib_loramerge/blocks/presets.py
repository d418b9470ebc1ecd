"""Preset files: reading ours and sd-webui-lora-block-weight's, editing ours.

Ours, ``preset.txt``, holds ``NAME:w,w,...``, ``NAME:blocks:w,...`` and ``NAME:blocks:elements:ratio,...``
lines, and ``#`` starts a comment. ``lbwpresets.txt`` has the first kind (a line with ``#`` anywhere is
a comment), ``elempresets.txt`` the second, in records parted by empty lines.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lib_loramerge.blocks.ids import BLOCK_IDS
from lib_loramerge.blocks.named import is_elemental, is_named, parts
from lib_loramerge.blocks.rules import parse_rules
from lib_loramerge.blocks.weights import check_entry, split_weights
from lib_loramerge.errors import OutputError, RecipeError, Sentence
from lib_loramerge.recipe.check import shown

LARGEST_FILE = 1_000_000  # bytes
LONGEST_PRESET_NAME = 100

_LINE = re.compile(r"([^\r\n]*)(\r\n|\n|\r|\Z)")
_BOM = b"\xef\xbb\xbf"
_editing = threading.Lock()  # two requests of one WebUI must not lose each other's change


@dataclass(frozen=True)
class Presets:
    """Named block weights and elemental rules, as their files have them.

    Attributes:
        weights: Name to a comma list of block weights.
        elements: Name to ``blocks:elements:ratio,...``.
        weight_files: Name to the file its block weights came from.
        element_files: Name to the file its rules came from.
        problems: What in the files was not understood, one sentence each.
    """

    weights: Mapping[str, str] = field(default_factory=dict)
    elements: Mapping[str, str] = field(default_factory=dict)
    weight_files: Mapping[str, Path] = field(default_factory=dict)
    element_files: Mapping[str, Path] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def bundled_preset_path() -> Path:
    """Our own ``preset.txt``: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).parent.parent
    inside = package / "preset.txt"
    return inside if inside.is_file() else package.parent / "preset.txt"


def load_presets(paths: Sequence[Path]) -> Presets:
    """All presets of some files; of equal names the earlier file's wins.

    Missing files are skipped; what cannot be read or understood is listed in
    ``problems``, so that one bad line does not stop every merge.
    """
    weights: dict[str, str] = {}
    elements: dict[str, str] = {}
    weight_files: dict[str, Path] = {}
    element_files: dict[str, Path] = {}
    problems: list[str] = []
    for path in map(Path, paths):
        own_weights, own_elements = _read(path, problems)
        for name, text in own_weights.items():
            if weights.setdefault(name, text) is text:
                weight_files.setdefault(name, path)
        for name, text in own_elements.items():
            if elements.setdefault(name, text) is text:
                element_files.setdefault(name, path)
    return Presets(weights, elements, weight_files, element_files, tuple(problems))


def _read(path: Path, problems: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    try:
        raw = _bytes(path)
        text = raw.removeprefix(_BOM).decode("utf-8")
    except FileNotFoundError:
        return {}, {}
    except UnicodeDecodeError:
        problems.append(
            Sentence("{file}: not UTF-8 text, so its presets are not used. Save it as UTF-8.", path.name)
        )
        return {}, {}
    except (OSError, RecipeError) as error:
        problems.append(
            Sentence("{file}: cannot be read, so its presets are not used ({error}).", path.name, error)
        )
        return {}, {}
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if path.name.lower() == "lbwpresets.txt":
        return _lbw_weights(text), {}
    if path.name.lower() == "elempresets.txt":
        return {}, _lbw_elements(text)
    return _own_lines(text, path, problems)


def _bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        raw = file.read(LARGEST_FILE + 1)
    if len(raw) > LARGEST_FILE:
        raise RecipeError("{file}: a preset file has at most {most} bytes", path.name, LARGEST_FILE)
    return raw


def _own_lines(text: str, path: Path, problems: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    weights: dict[str, str] = {}
    elements: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        entry = _entry_of(line)
        if entry is not None:
            name, value = entry
            (elements if is_elemental(value) else weights)[name] = value  # a later line wins
        elif line.split("#")[0].strip():
            problems.append(
                Sentence(
                    "{file}, line {number}: no preset, got {line}.", path.name, number, shown(line.strip())
                )
            )
    return weights, elements


def _entry_of(line: str) -> tuple[str, str] | None:
    """(name, value) of a line of ours; None if it holds no preset."""
    name, colon, value = line.split("#")[0].partition(":")
    if not colon or not name.strip() or not value.strip():
        return None
    return name.strip(), value.strip()


def _lbw_weights(text: str) -> dict[str, str]:
    counts = {count - 1 for count in BLOCK_IDS}
    found: dict[str, str] = {}
    for line in text.split("\n"):
        if ":" in line and "#" not in line and line.count(",") in counts:
            name, _, value = line.partition(":")
            if name.strip():
                found[name.strip()] = value.strip()
    return found


def _lbw_elements(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for record in re.split(r"\n[ \t]*\n", text):
        lines = [line.strip() for line in record.split("\n") if line.strip() and not line.startswith("#")]
        name, colon, value = ",".join(lines).partition(":")
        if colon and name.strip():
            # It passes over parts that are no rule; a record of such parts alone changes nothing.
            rules = [part.strip() for part in value.split(",") if part.count(":") == 2]
            if rules:
                found[name.strip()] = ",".join(rules)
    return found


def save_preset(path: Path, name: str, text: str) -> None:
    """Add a preset to a file of ours, or change the one of that name.

    All other lines, comments, their order, line ends and a byte-order mark stay as
    they are; the file is replaced in one step or not at all.

    Args:
        path: The file; made if it is not there.
        name: The preset's name.
        text: A comma list of block weights, block weights by name, or elemental rules.

    Raises:
        RecipeError: A name or text that makes no preset.
        OutputError: The file cannot be written.
    """
    name, text = check_preset(name, text)
    elemental = is_elemental(text)
    with _editing:
        raw, lines = _lines_to_edit(path)
        place = [i for i, (line, _) in enumerate(lines) if _is_preset(line, name, elemental)]
        if place:
            old, end = lines[place[-1]]  # the one in force
            comment = old[old.index("#") :] if "#" in old else ""
            lines[place[-1]] = (f"{name}:{text}{' ' + comment if comment else ''}", end)
        else:
            ending = _line_end(lines)
            if lines and not lines[-1][1]:
                lines[-1] = (lines[-1][0], ending)
            lines.append((f"{name}:{text}", ending))
        _write_lines(path, raw, lines)


def delete_preset(path: Path, name: str) -> None:
    """Take a preset, block weights and rules of that name, out of a file of ours.

    Raises:
        RecipeError: There is none of that name.
        OutputError: The file cannot be written.
    """
    with _editing:
        raw, lines = _lines_to_edit(path)
        kept = [
            (line, end)
            for line, end in lines
            if not (_is_preset(line, name, True) or _is_preset(line, name, False))
        ]
        if len(kept) == len(lines):
            raise RecipeError("{path} has no preset {name}.", Path(path).name, shown(name))
        _write_lines(path, raw, kept)


def check_preset(name: str, text: str) -> tuple[str, str]:
    """Name and text of a preset as they may be written, checked.

    Raises:
        RecipeError: A name that could not be used in a prompt, block weights of a
            wrong count, rules that make no sense.
    """
    if not isinstance(name, str) or not isinstance(text, str):
        raise RecipeError("A preset needs a name and a text.")
    name, text = name.strip(), text.strip()
    if not name or len(name) > LONGEST_PRESET_NAME:
        raise RecipeError(
            "A preset's name has 1 to {most} characters, got {count}.", LONGEST_PRESET_NAME, len(name)
        )
    if re.search(r"[:,#<>=@\x00-\x1f\x7f\u2028\u2029\ufeff]", name):
        raise RecipeError("A preset's name has none of : , # < > = @ in it, got {name}.", shown(name))
    if not re.search(r"[^\W\d_]", name):
        raise RecipeError(
            "A preset's name has a letter in it, so that it is no number; got {name}.", shown(name)
        )
    if "#" in text or "\0" in text:
        raise RecipeError("Preset {name}: # starts a comment and cannot be part of it.", name)
    what = Sentence("Preset {name}", name)
    if is_elemental(text):
        parse_rules(text, None, where=what)
        return name, ",".join(parts(text))
    entries = split_weights(text, what)
    for entry in entries:
        check_entry(entry, what)
    return name, ",".join(parts(text)) if is_named(text) else ",".join(entries) or text


def _is_preset(line: str, name: str, elemental: bool) -> bool:
    entry = _entry_of(line)
    return entry is not None and entry[0] == name and is_elemental(entry[1]) is elemental


def _lines_to_edit(path: Path) -> tuple[bytes, list[tuple[str, str]]]:
    """The file's bytes, and its lines, each with its own line end."""
    try:
        raw = _bytes(Path(path))
        text = raw.removeprefix(_BOM).decode("utf-8")
    except FileNotFoundError:
        return b"", []
    except UnicodeDecodeError:
        raise RecipeError(
            "{path} is not UTF-8 text, so it is not changed. Save it as UTF-8.", Path(path).name
        ) from None
    except OSError as error:
        raise OutputError(
            "{path} cannot be read: {what}.", Path(path).name, error.strerror or error
        ) from None
    lines = [(match[1], match[2]) for match in _LINE.finditer(text)]
    return raw, lines[:-1] if lines and lines[-1] == ("", "") else lines


def _line_end(lines: list[tuple[str, str]]) -> str:
    """The line end a new line gets: the one most lines have."""
    ends = [end for _, end in lines if end]
    return max(sorted(set(ends)), key=ends.count) if ends else "\n"


def _write_lines(path: Path, raw: bytes, lines: list[tuple[str, str]]) -> None:
    from lib_loramerge.files.place import write_whole  # Not where presets are only read: it loads torch.

    text = "".join(line + end for line, end in lines)
    data = (_BOM if raw.startswith(_BOM) else b"") + text.encode("utf-8")
    write_whole(Path(path).resolve(), data)  # a link stays a link
