"""A sweep carried out: all checked first, then one file after another, then the table of them."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from lib_loramerge.blocks import Presets
from lib_loramerge.errors import LoraMergeError, OutputError
from lib_loramerge.files import check_target, free_space, make_folder, model_hash, read_header
from lib_loramerge.files.place import write_whole
from lib_loramerge.merge import MergePlan, Progress, Shared, plan_merge, run_merge
from lib_loramerge.merge.loudness import normalized
from lib_loramerge.metadata import read_recipe
from lib_loramerge.recipe import MergeRecipe, from_json, to_json
from lib_loramerge.report import percent

from .axes import Point

if TYPE_CHECKING:
    from lib_loramerge.report import MergeReport

MOST_FILES = 64
TABLES = ("sweep.json", "sweep.csv")
_MAPS = ("values", "kept")
_NUMBER = re.compile(r"[+-]?[0-9.]+(?:e[+-]?[0-9]+)?")


@dataclass(frozen=True)
class Sweep:
    """A sweep that has been checked.

    Attributes:
        folder: Where its files go.
        points, plans: One each for every file.
        there: Names of files that exist and hold the same recipe, so they are not written again.
    """

    folder: Path
    points: Sequence[Point]
    plans: Sequence[MergePlan]
    there: frozenset[str] = frozenset()

    @property
    def predicted_bytes(self) -> int:
        """Bytes of all files still to be written, at most."""
        return sum(
            plan.predicted_bytes
            for point, plan in zip(self.points, self.plans, strict=True)
            if point.name not in self.there
        )


class TableRow(TypedDict):
    """One file in ``sweep.json``; what is not known of it is None.

    Attributes:
        values: What varies to its value.
        kept: LoRA to its share in the file.
        seconds: Of its merge.
    """

    file: str
    values: dict[str, object]
    recipe: dict[str, object]
    error: float | None
    kept: dict[str, float] | None
    size_bytes: int | None
    seconds: float | None


@dataclass(frozen=True)
class SweepRow:
    """One file of a sweep, as the tables list it. ``error`` and the rest are None for a file that existed."""

    point: Point
    file: str
    report: MergeReport | None

    def to_text(self) -> str:
        """One line: the file, its error, its size and what is kept of each LoRA."""
        if self.report is None:
            return f"{self.file}  kept as it is"
        kept = ", ".join(
            f"{percent(max(0.0, entry.kept))} of {Path(entry.path).stem}" for entry in self.report.inputs
        )
        error = "no error" if self.report.error is None else f"error {percent(self.report.error)}"
        return f"{self.file}  {self.report.size_bytes / 1e6:,.2f} MB, {error}, keeps {kept}"

    def to_json(self) -> TableRow:
        report = self.report
        return {
            "file": self.file,
            "values": dict(self.point.values),
            "recipe": to_json(self.point.recipe),
            "error": report.error if report else None,
            "kept": {entry.name: entry.kept for entry in report.inputs} if report else None,
            "size_bytes": report.size_bytes if report else None,
            "seconds": report.seconds["total"] if report else None,
        }


def plan_sweep(
    points: Sequence[Point],
    folder: Path,
    *,
    find: Callable[[str], Path],
    presets: Presets,
    base_of: Callable[[str], Path | None] = Path,
    most: int = MOST_FILES,
    resume: bool = False,
) -> Sweep:
    """Check everything about a sweep before any work.

    Args:
        find: LoRA name to its file, as ``plan_merge`` takes it.
        base_of: The base model's file, from what a recipe calls it.
        most: Files that the sweep may have.
        resume: Skip files that exist and were made from the same recipe and sources.

    Raises:
        OutputError: Too many files, too little room, names that exist, or a table of something else.
        LoraMergeError: What stops one of the merges; the message names the point.
    """
    if len(points) > most:
        raise OutputError("This sweep makes {count} files, and --max allows {most}.", len(points), most)
    plans = []
    for point in points:
        try:
            recipe = point.recipe
            base = base_of(recipe.base) if recipe.base else None
            plans.append(plan_merge(recipe, find=find, presets=presets, base=base))
        except LoraMergeError as error:
            raise type(error)("{name}: {error}", point.name, error) from error
    sweep = Sweep(folder, points, plans)
    rows_before(folder)
    there = _existing(sweep, resume)
    sweep = replace(sweep, there=there)
    _check_room(sweep)
    return sweep


def _existing(sweep: Sweep, resume: bool) -> frozenset[str]:
    taken = [point.name for point in sweep.points if target(sweep, point).exists()]
    if not taken:
        return frozenset()
    if not resume:
        more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
        raise OutputError(
            "{folder}.safetensors exists{more}. Choose another folder, or --resume to keep what was made "
            "from the same recipes.",
            sweep.folder / taken[0],
            more,
        )
    hash_of = cache(model_hash)  # The files of a sweep share their sources.
    for point, plan in zip(sweep.points, sweep.plans, strict=True):
        if point.name in taken and not _same(target(sweep, point), plan, hash_of):
            raise OutputError(
                "{target} exists and was made from another recipe or other files. Move it away, or choose "
                "another folder.",
                target(sweep, point),
            )
    return frozenset(taken)


def _same(path: Path, plan: MergePlan, hash_of: Callable[[Path], str]) -> bool:
    """Whether a file holds what the plan would write: the same recipe, and sources of the same contents."""
    stored = read_recipe(read_header(path).metadata)
    if stored is None:
        return False
    plan = normalized(plan)
    inputs = tuple(
        replace(entry, hash=hash_of(source.path))
        for entry, source in zip(plan.recipe.inputs, plan.sources, strict=True)
    )
    return stored == _plain(replace(plan.recipe, params=dict(plan.params), inputs=inputs))


def _plain(recipe: MergeRecipe) -> MergeRecipe:
    """As a file's metadata gives it back."""
    return from_json(json.dumps(to_json(recipe)))


def _check_room(sweep: Sweep) -> None:
    folder = next(parent for parent in (sweep.folder, *sweep.folder.absolute().parents) if parent.exists())
    free, needed = free_space(folder), sweep.predicted_bytes
    if free is not None and needed > free:
        raise OutputError(
            "This sweep needs {needed} GB, and {free} GB are free in {folder}.",
            f"{needed / 1e9:.2f}",
            f"{free / 1e9:.2f}",
            folder,
        )


def target(sweep: Sweep, point: Point) -> Path:
    """The file of a point."""
    return sweep.folder / f"{point.name}.safetensors"


def run_sweep(
    sweep: Sweep,
    *,
    progress: Callable[[int, Progress], None] | None = None,
    cancel: Callable[[], bool] | None = None,
    workers: int | None = None,
) -> Iterator[SweepRow]:
    """Write the files one after another; the tables follow each, so that an interrupted sweep has them too.

    Args:
        progress: Called with the index of the file and how far it is.

    Yields:
        A row for each file, as it is complete.

    Raises:
        LoraMergeError: What stops a merge; files and tables made before stay.
    """
    make_folder(sweep.folder)
    for point in sweep.points:
        if point.name not in sweep.there:
            check_target(target(sweep, point), False)
    rows = rows_before(sweep.folder)
    shared = Shared()
    for index, (point, plan) in enumerate(zip(sweep.points, sweep.plans, strict=True)):
        path = target(sweep, point)
        report = None
        if point.name not in sweep.there:
            show = _numbered(progress, index)
            report = run_merge(plan, path, progress=show, cancel=cancel, workers=workers, shared=shared)
        row = SweepRow(point, path.name, report)
        if report or path.name not in rows:
            rows[path.name] = row.to_json()
        _write_tables(sweep.folder, [*rows.values()])
        yield row


def _numbered(
    progress: Callable[[int, Progress], None] | None, index: int
) -> Callable[[Progress], None] | None:
    return None if progress is None else lambda found: progress(index, found)


def rows_before(folder: Path) -> dict[str, TableRow]:
    """The rows of earlier sweeps into this folder, by file, as far as the files exist.

    Raises:
        OutputError: A table there is of something else, and must not be lost.
    """
    taken = [folder / name for name in TABLES if (folder / name).exists()]
    if not taken:
        return {}
    try:
        found: dict[str, TableRow] = {}
        for row in json.loads((folder / TABLES[0]).read_text(encoding="utf-8"))["files"]:
            found[str(row["file"])] = row
            if any(not isinstance(row.setdefault(name), (dict, type(None))) for name in _MAPS):
                raise TypeError
            for name in TableRow.__annotations__:
                row.setdefault(name)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise OutputError(
            "{taken} was not written by a sweep. Move it away, or choose another folder.", taken[0]
        ) from error
    return {name: row for name, row in found.items() if (folder / name).is_file()}


def _write_tables(folder: Path, rows: Sequence[TableRow]) -> None:
    text = json.dumps({"version": 1, "files": list(rows)}, ensure_ascii=False, indent=2, allow_nan=False)
    for name, content in zip(TABLES, (text + "\n", _csv(rows)), strict=True):
        write_whole(folder / name, content.encode())


def _csv(rows: Sequence[TableRow]) -> str:
    labels = list(dict.fromkeys(label for row in rows for label in row["values"] or {}))
    loras = list(dict.fromkeys(name for row in rows for name in row["kept"] or {}))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = [f"kept of {name}" for name in loras]
    writer.writerow(["file", *map(_harmless, labels), "error", *heads, "size_bytes", "seconds"])
    for row in rows:
        kept = row["kept"] or {}
        writer.writerow(
            [_harmless(row["file"]), *(_harmless((row["values"] or {}).get(label)) for label in labels)]
            + [row["error"]]
            + [kept.get(name) for name in loras]
            + [row["size_bytes"], row["seconds"]]
        )
    return out.getvalue()


def _harmless(text: object) -> object:
    """Text that a spreadsheet would take for a formula, marked as text: others chose the names of files."""
    formula = isinstance(text, str) and text[:1] in "=+-@\t\r" and not _NUMBER.fullmatch(text)
    return f"'{text}" if text and formula else text
