"""Many merges one after another into a folder: ``--each``, lists of recipes, ``convert``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import interrupts
from ..errors import Cancelled, LoraMergeError, OutputError, RecipeError
from ..recipe import MergeRecipe, from_json, parse_inputs
from ..recipe.stored import read_json
from .options import finder, given_fields, plan_of
from .output import EXIT_DONE, EXIT_ERROR, one_line, print_json, progress_line
from .recipes import replaced, text_of

if TYPE_CHECKING:
    import argparse


def many_merges(options: argparse.Namespace) -> list[tuple[str, str, MergeRecipe]]:
    """What to call each merge in messages, the name of its file, and its recipe.

    Raises:
        RecipeError: Options that do not go together, or a line that is no recipe.
    """
    from ..merge.plan import file_stem

    if options.pairs or options.dry_run:
        raise RecipeError("--pairs and --dry-run are for a single merge.")
    fields = given_fields(options)
    if options.each:
        if options.recipe is not None:
            raise RecipeError("Give either --each with LORAs or --recipe FILE, not both.")
        inputs = parse_inputs(options.loras, skip_unsupported=bool(options.skip_unsupported))
        return [(entry.name, file_stem(entry.name), MergeRecipe((entry,), **fields)) for entry in inputs]
    if options.loras:
        raise RecipeError("Give either LORAs or --recipe FILE, not both.")
    found = []
    # Names may hold characters, such as U+2028, at which splitlines() would split too.
    for number, line in enumerate(text_of(options.recipe).split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            given = read_json(line)
            name = given.pop("output", "") if isinstance(given, dict) else ""
            recipe = replaced(from_json(given), fields)
        except RecipeError as error:
            raise RecipeError("{recipe}, {where}: {error}", options.recipe.name, where, error) from None
        if not isinstance(name, str) or (name and not file_stem(name).strip(". ")):
            raise RecipeError(
                "{recipe}, {where}: output must be the name of a file.", options.recipe.name, where
            )
        found.append((where, file_stem(name) if name else f"merge-{number:03}", recipe))
    if not found:
        raise RecipeError("{recipe} holds no recipe.", options.recipe.name)
    return found


def run_many(jobs: Sequence[tuple[str, str, MergeRecipe]], options: argparse.Namespace) -> int:
    """One merge after another into a folder; one that fails is named, and the others are done.

    Raises:
        LoraMergeError: Nothing can be written there, or two results would have one name.
    """
    from ..files import check_target, make_folder, refuse_inputs
    from ..merge import run_merge

    if options.output is None:
        raise RecipeError("Say where to write the results: -o FOLDER.")
    folder = Path(options.output)
    seen: dict[str, str] = {}
    for label, name, _ in jobs:
        if other := seen.get(name.lower()):
            raise OutputError(
                "{other} and {label} would both be written to {folder}.safetensors.",
                other,
                label,
                folder / name,
            )
        seen[name.lower()] = label
    make_folder(folder)
    inputs = _files_of(jobs, options) if options.overwrite else []
    reports, failures = [], []
    for label, name, recipe in jobs:
        path = folder / f"{name}.safetensors"
        try:
            check_target(path, options.overwrite)
            if path.exists():
                refuse_inputs(path, inputs)  # Of all merges: what a later one reads is not replaced before.
            plan = plan_of(options, recipe, check_hashes=not getattr(options, "allow_changed_sources", False))
            with progress_line(sys.stderr) as show:
                report = run_merge(
                    plan, path, overwrite=options.overwrite, progress=show, cancel=interrupts.asked
                )
        except Cancelled:
            raise
        except LoraMergeError as error:
            failures.append({"name": label, "error": str(error)})
            print(f"loramerge: {label}: {one_line(str(error))}", file=sys.stderr)
            continue
        reports.append(report)
        options.complete = len(reports)
        if not options.json:
            print(f"{path}  {report.size_bytes / 1e6:,.2f} MB")
    if options.json:
        print_json({"files": [report.to_json() for report in reports], "failed": failures})
    else:
        print(f"{len(reports)} written, {len(failures)} failed")
    return EXIT_ERROR if failures else EXIT_DONE


def _files_of(jobs: Sequence[tuple[str, str, MergeRecipe]], options: argparse.Namespace) -> list[Path]:
    """The LoRAs of all merges, as far as they are found."""
    find = finder(options.lora_dir)
    files: dict[Path, None] = {}
    for name in dict.fromkeys(entry.name for _, _, recipe in jobs for entry in recipe.inputs):
        with contextlib.suppress(LoraMergeError):
            files[find(name)] = None
    return list(files)
