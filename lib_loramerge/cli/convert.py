"""``loramerge convert``: other names, other precision, the same numbers."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from .. import interrupts
from ..recipe import LoraInput, MergeRecipe
from .many import run_many
from .options import add_json, add_output, add_settings, command, given_fields, output_target, plan_of
from .output import EXIT_DONE, print_report


def add_parser(commands: Any) -> None:
    parser = command(commands, "convert", run_convert, "rewrite files exactly: other names, other precision")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    add_output(
        parser, "file to write; for several files, or with a slash at its end, a folder", required=True
    )
    add_settings(parser, "convert")
    add_json(parser)


def run_convert(options: argparse.Namespace) -> int:
    from ..files import check_target
    from ..merge import run_merge
    from ..merge.plan import file_stem

    # One LoRA at strength 1 concatenated with nothing is that LoRA, factor by factor.
    recipes = [
        MergeRecipe(inputs=(LoraInput(str(file)),), mode="concat", **given_fields(options))
        for file in options.files
    ]
    options.lora_dir, options.preset_file = None, []
    if len(recipes) > 1 or options.output.endswith(("/", os.sep)):
        jobs = [(str(file), file_stem(file.name), recipe) for file, recipe in zip(options.files, recipes)]
        return run_many(jobs, options)
    target = output_target(options.output, None)
    check_target(target, options.overwrite)
    plan = plan_of(options, recipes[0])
    report = run_merge(plan, target, overwrite=options.overwrite, cancel=interrupts.asked)
    print_report(report, options)
    return EXIT_DONE
