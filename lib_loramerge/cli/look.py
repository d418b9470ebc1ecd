"""``loramerge inspect``, ``compare`` and ``advise``: what files are, before anything is merged."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import interrupts
from ..errors import RecipeError
from .options import (
    add_inputs,
    add_json,
    add_lora_dir,
    add_method_options,
    add_plot,
    add_settings,
    command,
    finder,
    plan_of,
)
from .output import EXIT_DONE, draw, in_megabytes, print_json, print_report, progress_line
from .recipes import recipe_of

LONG_SECONDS = 60.0  # Work that is expected to take longer says so before it begins.


def add_parsers(commands: Any, *, with_methods: bool) -> None:
    """The three commands; ``advise`` with the parameters of the merge methods where they are needed."""
    _inspect_parser(commands)
    _compare_parser(commands)
    _advise_parser(commands, with_methods=with_methods)


def _inspect_parser(commands: Any) -> None:
    parser = command(commands, "inspect", run_inspect, "say what a LoRA or a checkpoint is")
    parser.add_argument("files", nargs="+", metavar="FILE")
    add_lora_dir(parser)
    add_settings(parser, "inspect")
    add_json(parser)
    add_plot(parser)


def run_inspect(options: argparse.Namespace) -> int:
    from ..analysis import inspect
    from ..checkpoints import is_checkpoint, look

    _refuse_plot(options, options.files)
    find = finder(options.lora_dir)
    reports: list[Any] = [
        look(Path(name)) if is_checkpoint(Path(name)) else inspect(find(name), base_model=options.base_model)
        for name in options.files
    ]
    if options.json:
        print_json(reports[0].to_json() if len(reports) == 1 else [report.to_json() for report in reports])
    else:
        print("\n\n".join(report.to_text() for report in reports))
    draw("inspect_figure", reports, options)
    return EXIT_DONE


def _refuse_plot(options: argparse.Namespace, names: Sequence[str]) -> None:
    from ..checkpoints import is_checkpoint

    if options.plot and (found := next((name for name in names if is_checkpoint(Path(name))), None)):
        raise RecipeError("--plot draws LoRAs, and {file} is a checkpoint. Leave it out.", Path(found).name)


def _compare_parser(commands: Any) -> None:
    parser = command(
        commands,
        "compare",
        run_compare,
        "show where LoRAs agree, overlap and fight, or what TUNED differs by from BASE, two checkpoints",
    )
    add_inputs(parser)
    add_settings(parser, "compare")
    add_json(parser)
    add_plot(parser)


def run_compare(options: argparse.Namespace) -> int:
    from ..analysis import compare
    from ..checkpoints import ExtractSettings, extract, is_checkpoint

    if len(options.loras) == 2 and any(is_checkpoint(Path(name)) for name in options.loras):
        tuned, base = (Path(name) for name in options.loras)
        with progress_line(sys.stderr) as show:
            found = extract(
                tuned,
                base,
                None,
                ExtractSettings(hashed=False),
                progress=in_megabytes(show),
                cancel=interrupts.asked,
            )
        print_report(found, options)
        draw("advise_figure", found.advice, options)
        return EXIT_DONE
    recipe, _ = recipe_of(options)
    plan = plan_of(options, recipe)
    with progress_line(sys.stderr) as progress:
        report = compare(plan, progress=progress, cancel=interrupts.asked)
    print_report(report, options)
    draw("compare_figure", report, options)
    return EXIT_DONE


def _advise_parser(commands: Any, *, with_methods: bool) -> None:
    parser = command(commands, "advise", run_advise, "show error and size against the rank, before merging")
    add_inputs(parser)
    add_settings(parser, "advise")
    add_json(parser)
    add_plot(parser)
    if with_methods:
        add_method_options(parser)


def run_advise(options: argparse.Namespace) -> int:
    from ..analysis import advise, expected_seconds

    recipe, _ = recipe_of(options)
    plan = plan_of(options, recipe)
    expected = expected_seconds(plan)
    if expected >= LONG_SECONDS:
        sys.stderr.write(
            f"note: Mode {plan.method.name} produces full-rank layers; computing all singular values takes "
            f"about {expected / 60:.0f} min on this machine. Ctrl-C stops.\n"
        )
    with progress_line(sys.stderr) as progress:
        report = advise(plan, progress=progress, cancel=interrupts.asked)
    print_report(report, options)
    draw("advise_figure", report, options)
    return EXIT_DONE
