"""``loramerge bake``: LoRAs, or a difference, into a checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import interrupts
from ..errors import RecipeError
from ..recipe import SETTINGS
from .options import (
    add_inputs,
    add_json,
    add_method_options,
    add_output,
    add_settings,
    command,
    finder,
    given_fields,
    presets_of,
    target_of,
)
from .output import EXIT_DONE, in_megabytes, print_report, progress_line
from .recipes import recipe_of

_OF_ANY_BAKE = ("seed", "device", "skip_unsupported")


def add_parser(commands: Any, *, with_methods: bool) -> None:
    parser = command(
        commands,
        "bake",
        run_bake,
        "merge LoRAs into a checkpoint (Merge to Checkpoint), or add a difference to it",
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CKPT", help="file, index of shards or diffusers folder"
    )
    add_inputs(parser)
    add_output(parser, "file to write; a new folder for a folder or shards")
    parser.add_argument(
        "--add", type=Path, metavar="TUNED", help="instead of LoRAs: add what TUNED is more ..."
    )
    parser.add_argument("--minus", type=Path, metavar="BASE", help="... than BASE (Add difference)")
    parser.add_argument("--strength", type=float, metavar="X", help="of --add (default: 1)")
    parser.add_argument(
        "--rounding",
        choices=("auto", "nearest", "stochastic"),
        default="auto",
        help="auto: by chance in float8, which loses small changes, else to the nearest (default: auto)",
    )
    parser.add_argument(
        "--dtype",
        dest="checkpoint_dtype",
        choices=("same", "float32", "float16", "bfloat16"),
        default="same",
        help="precision of the denoiser's and text encoders' matrices (default: same)",
    )
    parser.add_argument(
        "--drop-ema", action="store_true", help="leave the EMA weights out, which no WebUI uses"
    )
    parser.add_argument(
        "--no-hash", action="store_true", help="no hashes, and no record of the merge for A1111"
    )
    parser.add_argument(
        "--base-te",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a text encoder in a file of its own; written as OUT.NAME.safetensors where it changes",
    )
    add_settings(parser, "bake")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    add_json(parser)
    if with_methods:
        add_method_options(parser)


def run_bake(options: argparse.Namespace) -> int:
    from ..checkpoints import BakeSettings, prepare_bake, prepare_difference

    settings = BakeSettings(
        rounding=options.rounding,
        dtype=options.checkpoint_dtype,
        drop_ema=options.drop_ema,
        hashed=not options.no_hash,
        encoders=tuple(options.base_te),
    )
    target = target_of(options)
    notes: list[str] = []
    if options.add is not None or options.minus is not None:
        if options.add is None or options.minus is None or options.loras:
            raise RecipeError("Give --add TUNED and --minus BASE together, and no LoRAs with them.")
        given = given_fields(options)
        _refuse_lora_options(given)
        prepared = prepare_difference(
            options.checkpoint,
            options.add,
            options.minus,
            1.0 if options.strength is None else options.strength,
            settings=settings,
            seed=given.get("seed", 0),
        )
    else:
        if options.strength is not None:
            raise RecipeError(
                "--strength belongs to --add. A LoRA's strength stands behind its name: "
                "a.safetensors:{strength}",
                f"{options.strength:g}",
            )
        recipe, notes = recipe_of(options)
        prepared = prepare_bake(
            recipe,
            options.checkpoint,
            find=finder(options.lora_dir),
            presets=presets_of(options),
            settings=settings,
        )
    with prepared as bake, progress_line(sys.stderr) as show:
        bake.warnings += notes
        if options.dry_run or target is None:
            if target is not None:
                bake.check(target, options.overwrite)
            report = bake.report(target)
        else:
            report = bake.run(
                target, overwrite=options.overwrite, progress=in_megabytes(show), cancel=interrupts.asked
            )
    print_report(report, options)
    return EXIT_DONE


def _refuse_lora_options(given: Mapping[str, Any]) -> None:
    """Refuse with --add what says how LoRAs are merged, and would do nothing."""
    settings = [SETTINGS[name].flag for name in given if name not in (*_OF_ANY_BAKE, "params")]
    params = [f"--{name.replace('_', '-')}" for name in given.get("params", {})]
    if settings or params:
        raise RecipeError(
            "With --add there are no LoRAs to merge, so leave {options} out.", ", ".join([*settings, *params])
        )
