"""``loramerge sweep``: one merge for every ratio or setting of a range."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import interrupts
from .options import (
    add_inputs,
    add_json,
    add_method_options,
    add_plot,
    add_settings,
    comma_list,
    command,
    finder,
    given_fields,
    presets_of,
)
from .output import EXIT_DONE, draw, print_json, progress_line

if TYPE_CHECKING:
    from ..merge import Progress


SWEEP_EXAMPLES = """a value may be a range or a list:
  loramerge sweep style:0.2..1.0/5 subject:0.5/0.8 -o both          5 x 2 files
  loramerge sweep style:0.8 subject:1:lbw=ALL/MIDD -o blocks        two block weights
  loramerge sweep style subject --mix 0..1/5 --mode svd,ties -o mix
"""


def add_parser(commands: Any, *, with_methods: bool) -> None:
    parser = command(commands, "sweep", run_sweep_command, "merge once for every ratio or setting of a range")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = SWEEP_EXAMPLES
    add_inputs(parser)
    parser.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="folder for the files and their table"
    )
    parser.add_argument("--mix", metavar="RANGE", help="shares of the second of two LoRAs, as 0..1/5")
    parser.add_argument(
        "--zip", action="store_true", help="the n-th values of all ranges together, not every combination"
    )
    parser.add_argument("--max", type=int, default=64, metavar="N", help="files at most (default: 64)")
    parser.add_argument(
        "--resume", action="store_true", help="keep files that exist and were made from the same recipe"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and list the files")
    add_settings(parser, "merge", lists=True)
    add_plot(parser)
    add_json(parser)
    if with_methods:
        add_method_options(parser)


def run_sweep_command(options: argparse.Namespace) -> int:
    from ..sweep import expand, plan_sweep, rows_before, run_sweep, target

    fields = given_fields(options)
    params = {name: comma_list(value) for name, value in fields.pop("params", {}).items()}
    folder = Path(options.output)
    points = expand(
        options.loras,
        {name: value for name, value in fields.items() if isinstance(value, list)},
        params,
        mix=options.mix,
        zipped=options.zip,
        prefix=folder.resolve().name,
        fields={name: value for name, value in fields.items() if not isinstance(value, list)},
    )
    sweep = plan_sweep(
        points,
        folder,
        find=finder(options.lora_dir),
        presets=presets_of(options),
        most=options.max,
        resume=options.resume,
    )
    if options.dry_run:
        files = [str(target(sweep, point)) for point in points if point.name not in sweep.there]
        if options.json:
            print_json({"files": files, "predicted_bytes": sweep.predicted_bytes})
        else:
            print("\n".join(files))
            print(f"{len(files)} files, at most {sweep.predicted_bytes / 1e6:,.2f} MB")
        return EXIT_DONE
    rows = []
    with progress_line(sys.stderr) as show:
        for row in run_sweep(sweep, progress=_of_files(show, len(points)), cancel=interrupts.asked):
            rows.append(row.to_json())
            options.complete = len(rows)
            if not options.json:
                print(row.to_text())
    if options.json:
        print_json({"files": rows})
    table = rows_before(folder)  # It knows of the files that were kept, too.
    draw("sweep_figure", [table.get(row["file"], row) for row in rows], options)
    return EXIT_DONE


def _of_files(show: Callable[[Progress], None] | None, count: int) -> Callable[[int, Progress], None] | None:
    """Progress that says which of several files it is about."""
    if show is None:
        return None
    line = show
    return lambda index, found: line(replace(found, phase=f"file {index + 1} of {count}, {found.phase}"))
