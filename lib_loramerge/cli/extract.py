"""``loramerge extract``: a LoRA of what one checkpoint is more than another."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .. import interrupts
from ..errors import RecipeError
from .options import add_json, add_output, add_plot, add_settings, command, given_fields, target_of
from .output import EXIT_DONE, draw, in_megabytes, print_report, progress_line


def add_parser(commands: Any) -> None:
    parser = command(
        commands, "extract", run_extract, "make a LoRA of what one checkpoint is more than another (A - B)"
    )
    parser.add_argument("tuned", type=Path, metavar="TUNED", help="the fine-tuned checkpoint")
    parser.add_argument("base", type=Path, metavar="BASE", help="the checkpoint that it was trained from")
    add_output(parser, "LoRA to write")
    parser.add_argument(
        "--rank",
        type=_extract_rank,
        metavar="N",
        help="a number, or auto: what stands out of the files' rounding (default: 64)",
    )
    parser.add_argument(
        "--conv-rank",
        type=int,
        metavar="N",
        help="of k x k convolutions; 0 for none (default: at most 32)",
    )
    parser.add_argument("--retain", type=float, metavar="F", help="share of each layer's norm to keep")
    parser.add_argument(
        "--size", type=float, metavar="MB", help="best ranks for a file of at most MB x 1,000,000 bytes"
    )
    parser.add_argument(
        "--max-rank", type=int, metavar="N", help="limit of auto, retain and size (default: 128)"
    )
    parser.add_argument("--parts", metavar="P,...", help="unet, te, te1, te2, te3 (default: all)")
    parser.add_argument(
        "--vectors",
        choices=("unet", "none", "all"),
        default="unet",
        help="biases and norms to write: the U-Net's, none, or all, over which Forge may refuse the file",
    )
    parser.add_argument(
        "--dtype",
        dest="lora_dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float16",
        help="precision of the LoRA (default: float16)",
    )
    parser.add_argument("--no-hash", action="store_true", help="do not hash the checkpoints for the metadata")
    add_settings(parser, "extract")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="read everything, show what each rank would cost and lose, write nothing",
    )
    add_json(parser)
    add_plot(parser)


def _extract_rank(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number or auto, got {text!r}")
    return text if text == "auto" else int(text)


def run_extract(options: argparse.Namespace) -> int:
    from ..checkpoints import extract, foresee
    from ..checkpoints.rewriting import check_room
    from ..files import check_target

    if options.plot and not options.dry_run:
        raise RecipeError("--plot draws what --dry-run tells of ranks. Give both, or leave it out.")
    target, settings = target_of(options), _extract_settings(options)
    if options.dry_run and target is not None:
        check_target(target, options.overwrite)
        check_room(target, foresee(options.tuned, options.base, settings, target).disk_bytes)
    with progress_line(sys.stderr) as show:
        report = extract(
            options.tuned,
            options.base,
            None if options.dry_run else target,
            settings,
            overwrite=options.overwrite,
            progress=in_megabytes(show),
            cancel=interrupts.asked,
        )
    print_report(report, options)
    draw("advise_figure", report.advice, options)
    return EXIT_DONE


def _extract_settings(options: argparse.Namespace) -> Any:
    from ..checkpoints import ExtractSettings
    from ..checkpoints.differing import ONE_RULE

    if sum(rule is not None for rule in (options.rank, options.retain, options.size)) > 1:
        raise RecipeError(ONE_RULE)
    parts = tuple(part.strip() for part in (options.parts or "").split(",") if part.strip())
    given = given_fields(options)
    return ExtractSettings(
        rank=64 if options.rank is None else options.rank,
        conv_rank=options.conv_rank,
        retain=options.retain,
        size=options.size,
        max_rank=options.max_rank,
        parts=parts,
        vectors=options.vectors,
        dtype=options.lora_dtype,
        dialect=given.get("dialect", "auto"),
        skip_unsupported=given.get("skip_unsupported", False),
        hashed=not options.no_hash,
    )
