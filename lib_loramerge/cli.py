"""The ``loramerge`` command: one thin function per command over the library.

Nothing heavy is imported until a command needs it, so ``--help`` is instant.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from . import __version__, interrupts
from .errors import Cancelled, LoraMergeError, OutputError, RecipeError
from .recipe import (
    SETTINGS,
    MergeRecipe,
    Param,
    from_json,
    parse_inputs,
    parse_rank,
)

if TYPE_CHECKING:
    from .blocks import Presets
    from .merge import MergePlan, Progress

EXIT_DONE, EXIT_ERROR, EXIT_USAGE = 0, 1, 2
LONG_SECONDS = 60.0  # Work that is expected to take longer says so before it begins.

EXAMPLES = """examples:
  loramerge merge style.safetensors:0.8 subject.safetensors:0.5:lbw=MIDD -o both.safetensors
  loramerge merge "<lora:style:0.8><lora:subject:0.5>" --lora-dir models/Lora -o both --rank 32
  loramerge merge big.safetensors -o small.safetensors --retain 0.98      one file alone is resized
  loramerge merge --recipe both.safetensors --lora-dir models/Lora -o again
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done; 1 an error the user can fix, told in one line on stderr; 2 wrong
        usage; 130 or 143 interrupted, with nothing left behind.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # File names may hold characters that the console's encoding lacks.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        options = build_parser(words).parse_args(words)
        return options.run(options) or EXIT_DONE
    except (Cancelled, KeyboardInterrupt):
        print("loramerge: interrupted, nothing was written", file=sys.stderr)
        return interrupts.exit_status()
    except LoraMergeError as error:
        print(f"loramerge: {one_line(str(error))}", file=sys.stderr)
        return EXIT_ERROR
    except BrokenPipeError:
        # The reader of our output (a pager, head) has gone; that is no error of ours.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE


def run_and_exit() -> NoReturn:
    """The console script: an interrupted command ends at once, whatever its threads are in the middle of."""
    interrupts.listen()
    status = main()
    if interrupts.asked():
        # Nothing is half-written then. The interpreter's own way out would wait for the threads.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def one_line(text: str) -> str:
    """A message on one line, whatever a file name holds."""
    return " ".join(text.splitlines())


def build_parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The whole command line; options of the merge methods only where ``words`` need them."""
    parser = argparse.ArgumentParser(
        prog="loramerge",
        description="Merge LoRA files exactly, with the error stated.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"loramerge {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = next((word for word in words if not word.startswith("-")), "")
    _merge_parser(commands, with_methods=command == "merge")
    _sweep_parser(commands, with_methods=command == "sweep")
    _bake_parser(commands, with_methods=command == "bake")
    _extract_parser(commands)
    _subtract_parser(commands)
    _convert_parser(commands)
    _inspect_parser(commands)
    _compare_parser(commands)
    _advise_parser(commands, with_methods=command == "advise")
    _list_parsers(commands)
    _ui_parser(commands)
    _demo_parser(commands)
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> Any:
    parser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
    parser.set_defaults(run=run)
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON, alone, on stdout")


def _add_lora_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lora-dir", type=Path, metavar="D", help="folder in which names are looked up")


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it too (needs matplotlib)")


# --- merge -------------------------------------------------------------------------------------


def _merge_parser(commands: Any, *, with_methods: bool) -> None:
    parser = _command(
        commands, "merge", run_merge_command, "merge LoRAs into one file; one LoRA alone is resized"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    _add_inputs(parser)
    parser.add_argument(
        "-o", "--output", metavar="OUT", help="file to write: a path, or a name within --lora-dir"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT when it exists")
    _add_settings(parser, "merge")
    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="take everything from a merged file, a JSON recipe, or a "
        ".jsonl file with a recipe on each line (the results go into the folder OUT)",
    )
    parser.add_argument(
        "--allow-changed-sources",
        action="store_true",
        help="with --recipe: use sources whose contents have changed",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and foresee the size, write nothing"
    )
    parser.add_argument(
        "--each",
        action="store_true",
        help="every LORA alone, into the folder OUT under its own name: resizes many files in one run",
    )
    parser.add_argument(
        "--pairs",
        action="store_true",
        help="Wan 2.2: merge the high-noise LoRAs and the low-noise ones each on their own, into "
        "OUT_high_noise and OUT_low_noise",
    )
    _add_json(parser)
    if with_methods:
        _add_method_options(parser)


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "loras",
        nargs="*",
        metavar="LORA",
        help="NAME[:TE[:UNET]][:lbw=BLOCKS]..., a path, or a prompt's <lora:...> tags",
    )
    _add_lora_dir(parser)
    parser.add_argument(
        "--preset-file",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="more block-weight presets",
    )


def _add_settings(parser: argparse.ArgumentParser, command: str, *, lists: bool = False) -> None:
    """One option for each setting of the recipe that the command takes.

    Args:
        lists: Several values may be given, with commas between them.
    """
    for name, entry in SETTINGS.items():
        if command not in entry.commands:
            continue
        if lists and entry.kind is not bool:
            metavar = entry.metavar or "|".join(entry.words)
            parser.add_argument(
                entry.flag, dest=name, type=_comma_list, metavar=f"{metavar},...", help=entry.help
            )
            continue
        if entry.kind is bool:
            parser.add_argument(entry.flag, dest=name, action="store_true", default=None, help=entry.help)
            continue
        default = "" if entry.optional else f" (default: {entry.default})"
        parser.add_argument(
            entry.flag,
            dest=name,
            type=parse_rank if name == "rank" else entry.kind,
            choices=entry.words if entry.words and entry.metavar is None else None,
            metavar=entry.metavar,
            help=entry.help + default,
        )


def _comma_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _add_method_options(parser: argparse.ArgumentParser) -> None:
    """One option for each parameter of any method, from the same table that the tab reads."""
    from .methods import METHODS

    owners: dict[str, list[tuple[str, Param]]] = {}
    for method in METHODS.values():
        for param in method.params:
            owners.setdefault(param.name, []).append((method.name, param))
    group = parser.add_argument_group("parameters of merge methods")
    for name, uses in owners.items():
        param = uses[0][1]
        defaults = " or ".join(sorted({str(use.default) for _, use in uses}))
        text = f"{param.help} For {', '.join(owner for owner, _ in uses)}; default {defaults}."
        group.add_argument(
            f"--{name.replace('_', '-')}",
            dest=f"param_{name}",
            metavar="|".join(param.choices) if param.choices else "X",
            help=text.replace("%", "%%"),
        )


def run_merge_command(options: argparse.Namespace) -> int:
    from .files import refuse_inputs
    from .merge.device import compute_device

    if options.each or (options.recipe is not None and options.recipe.suffix.lower() == ".jsonl"):
        return _run_many(_many_merges(options), options)
    recipe, notes = recipe_of(options)
    if options.output is None and not options.dry_run:
        raise RecipeError("Say where to write the result: -o OUT (or --dry-run to write nothing).")
    target = None if options.output is None else output_target(options.output, options.lora_dir)
    merges: list[tuple[MergePlan, Path | None]] = []
    for name, part in _parts(options, recipe).items():
        own = target and target.with_name(f"{target.stem}{name}{target.suffix}")
        if own is not None:
            _check_output(own, options.overwrite)
        merges.append((_plan(options, part, check_hashes=not options.allow_changed_sources), own))
    inputs = [path for plan, _ in merges for path in plan.files()]
    for _, own in merges:
        if own is not None:
            refuse_inputs(own, inputs)
    if options.dry_run or target is None:
        compute_device(recipe.device)  # the one thing of a run that a plan does not look at
        if options.json:
            told = [_plan_json(plan, own, notes) for plan, own in merges]
            _print_json(told if options.pairs else told[0])
        else:
            for plan, own in merges:
                _show_plan(plan, own, notes)
        return EXIT_DONE
    _merge_all(merges, options, notes)
    return EXIT_DONE


def _many_merges(options: argparse.Namespace) -> list[tuple[str, str, MergeRecipe]]:
    """What to call each merge in messages, the name of its file, and its recipe.

    Raises:
        RecipeError: Options that do not go together, or a line that is no recipe.
    """
    from .merge.plan import file_stem

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
    for number, line in enumerate(_text_of(options.recipe).splitlines(), 1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            given = json.loads(line)
            name = given.pop("output", "") if isinstance(given, dict) else ""
            recipe = _replaced(from_json(given), fields)
        except (RecipeError, ValueError) as error:
            raise RecipeError(f"{options.recipe.name}, {where}: {error}") from None
        if not isinstance(name, str):
            raise RecipeError(f"{options.recipe.name}, {where}: output must be the name of a file.")
        found.append((where, file_stem(name) if name else f"merge-{number:03}", recipe))
    if not found:
        raise RecipeError(f"{options.recipe.name} holds no recipe.")
    return found


def _run_many(jobs: Sequence[tuple[str, str, MergeRecipe]], options: argparse.Namespace) -> int:
    """One merge after another into a folder; one that fails is named, and the others are done.

    Raises:
        LoraMergeError: Nothing can be written there, or two results would have one name.
    """
    from .files import make_folder
    from .merge import run_merge

    if options.output is None:
        raise RecipeError("Say where to write the results: -o FOLDER.")
    folder = Path(options.output)
    seen: dict[str, str] = {}
    for label, name, _ in jobs:
        other = seen.setdefault(name.lower(), label)
        if other is not label:
            raise OutputError(f"{other} and {label} would both be written to {folder / name}.safetensors.")
    make_folder(folder)
    reports, failures = [], []
    for label, name, recipe in jobs:
        path = folder / f"{name}.safetensors"
        try:
            _check_output(path, options.overwrite)
            plan = _plan(options, recipe, check_hashes=not getattr(options, "allow_changed_sources", False))
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
        if not options.json:
            print(f"{path}  {report.size_bytes / 1e6:,.2f} MB")
    if options.json:
        _print_json({"files": [report.to_json() for report in reports], "failed": failures})
    else:
        print(f"{len(reports)} written, {len(failures)} failed")
    return EXIT_ERROR if failures else EXIT_DONE


def _parts(options: argparse.Namespace, recipe: MergeRecipe) -> Mapping[str, MergeRecipe]:
    """End of the output's name to the recipe of that file: one, or with ``--pairs`` two."""
    if not options.pairs:
        return {"": recipe}
    from .merge.noise import by_noise

    return {f"_{kind}_noise": part for kind, part in by_noise(recipe, finder(options.lora_dir)).items()}


def _merge_all(
    merges: Sequence[tuple[MergePlan, Path | None]], options: argparse.Namespace, notes: Sequence[str]
) -> None:
    from .merge import run_merge

    reports = []
    for plan, own in merges:
        assert own is not None
        with progress_line(sys.stderr) as show:
            report = run_merge(plan, own, overwrite=options.overwrite, progress=show, cancel=interrupts.asked)
        reports.append(report)
        if not options.json:
            print(report.to_text())
            _print_notes(notes)
    if options.json:
        told = [{**report.to_json(), "warnings": [*notes, *report.warnings]} for report in reports]
        _print_json(told if options.pairs else told[0])


def recipe_of(options: argparse.Namespace) -> tuple[MergeRecipe, list[str]]:
    """The recipe that the options ask for, and notes on what was skipped in it."""
    notes: list[str] = []
    fields = given_fields(options)
    if getattr(options, "recipe", None) is not None:
        if options.loras:
            raise RecipeError("Give either LORAs or --recipe FILE, not both.")
        recipe = read_recipe_file(options.recipe)
        if options.allow_changed_sources:
            from dataclasses import replace

            recipe = replace(recipe, inputs=tuple(replace(entry, hash=None) for entry in recipe.inputs))
        return _replaced(recipe, fields), notes
    if not options.loras:
        raise RecipeError(
            "Name at least one LoRA to merge, for example: loramerge merge a.safetensors:0.8 -o out"
        )
    if getattr(options, "inputs", None):
        return MergeRecipe(inputs=options.inputs, **fields), notes
    inputs = parse_inputs(
        options.loras, skip_unsupported=bool(getattr(options, "skip_unsupported", None)), notes=notes
    )
    return MergeRecipe(inputs=inputs, **fields), notes


def given_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Recipe fields for the options that were given; the others keep their defaults."""
    fields = {name: value for name in SETTINGS if (value := getattr(options, name, None)) is not None}
    params = {
        name.removeprefix("param_"): value
        for name, value in vars(options).items()
        if name.startswith("param_") and value is not None
    }
    if params:
        fields["params"] = params
    return fields


def _replaced(recipe: MergeRecipe, fields: Mapping[str, Any]) -> MergeRecipe:
    """A stored recipe with the options that were given instead of its own, and without those they exclude."""
    from dataclasses import replace

    if any(name in fields for name in ("retain", "size")):
        recipe = replace(recipe, rank="same", conv_rank=None, retain=None, size=None)
    elif any(name in fields for name in ("rank", "conv_rank")):
        recipe = replace(recipe, retain=None, size=None)
    if fields.get("mode", recipe.mode) != recipe.mode:
        recipe = replace(recipe, params={})
    elif "params" in fields:
        fields = {**fields, "params": {**recipe.params, **fields["params"]}}
    return replace(recipe, **fields)


def read_recipe_file(path: Path) -> MergeRecipe:
    """The recipe in a merged file's metadata, or in a JSON file."""
    from .files import LORA_SUFFIXES, read_header
    from .metadata import read_recipe

    if path.suffix.lower() not in LORA_SUFFIXES:
        return from_json(_text_of(path))
    recipe = read_recipe(read_header(path).metadata)
    if recipe is None:
        raise RecipeError(f"{path.name} holds no recipe: it was not made by LoRA Merge.")
    return recipe


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # editors on Windows begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as a recipe: {error}.") from error


def output_target(output: str, lora_dir: Path | None) -> Path:
    """Where ``-o`` points: a path as it is, a bare name within the LoRA folder.

    Raises:
        OutputError: It names no file.
    """
    if not output.strip() or output.endswith(("/", os.sep)) or Path(output).name in ("", ".", ".."):
        raise OutputError(f"-o {output!r} is a folder or nothing; give the name of a file.")
    path = Path(output)
    if path.suffix.lower() != ".safetensors":
        path = path.with_name(f"{path.name}.safetensors")
    bare = not path.is_absolute() and path.parent == Path(".") and not output.startswith(("./", ".\\"))
    return lora_dir / path if bare and lora_dir is not None else path


def _check_output(target: Path, overwrite: bool) -> None:
    from .files import check_target

    check_target(target, overwrite)


def _plan(options: argparse.Namespace, recipe: MergeRecipe, *, check_hashes: bool = True) -> MergePlan:
    from .merge import plan_merge

    return plan_merge(
        recipe,
        find=finder(options.lora_dir),
        presets=presets_of(options),
        base=Path(recipe.base) if recipe.base else None,
        check_hashes=check_hashes,
    )


def finder(lora_dir: Path | None) -> Callable[[str], Path]:
    """Look LoRAs up as the command line does: a path as it is, a name within the folder."""
    from .files import LoraFolder

    return LoraFolder([lora_dir] if lora_dir else [], allow_paths=True).find


def presets_of(options: argparse.Namespace) -> Presets:
    from .blocks import bundled_preset_path, load_presets

    return load_presets([*options.preset_file, bundled_preset_path()])


def _plan_json(plan: MergePlan, target: Path | None, notes: Sequence[str]) -> dict[str, Any]:
    output = str(target) if target else None
    return {**plan.to_json(), "output": output, "warnings": [*notes, *plan.warnings]}


def _show_plan(plan: MergePlan, target: Path | None, notes: Sequence[str]) -> None:
    from .report import histogram_text

    facts = plan.to_json()
    at_most = "" if plan.exact_prediction else "at most "
    print(f"Would write  {target or 'nothing (no -o)'}")
    print(f"Size         {at_most}{plan.predicted_bytes / 1e6:,.2f} MB, {plan.dtype}")
    print(f"Base model   {facts['base_model']}")
    print(f"Layers       {facts['layers']} ({facts['layers_left_out']} left out)")
    print(f"Ranks        {at_most}{histogram_text(plan.rank_histogram) or 'none'}")
    for source in plan.sources:
        print(f"Input        {source.path.name}: {len(source.source.layers)} layers, {source.source.dialect}")
    _print_notes([*notes, *plan.warnings], plan.skipped)


def _print_notes(warnings: Sequence[str], skipped: Sequence[str] = ()) -> None:
    for text in skipped:
        print(f"{'Skipped':<13}{text}")
    for text in warnings:
        print(f"{'Warning':<13}{text}")


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False))


def _print_report(report: Any, options: argparse.Namespace) -> None:
    _print_json(report.to_json()) if options.json else print(report.to_text())


def _draw(figure: str, subject: Any, options: argparse.Namespace) -> None:
    """Draw ``subject`` with a function of ``webui.plots``, where ``--plot`` asks for it."""
    if options.plot:
        from .webui import plots

        plots.save(getattr(plots, figure)(subject), options.plot)


@contextlib.contextmanager
def progress_line(stream: TextIO) -> Iterator[Callable[[Progress], None] | None]:
    """A progress line on a terminal; nothing at all elsewhere."""
    if not stream.isatty():
        yield None
        return
    last = 0.0

    def show(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < 0.1 and progress.done < progress.total:
            return
        last = now
        left = f", {progress.eta:.0f} s left" if progress.eta is not None and progress.eta >= 1 else ""
        stream.write(f"\r\x1b[K{progress.phase}: {progress.done} of {progress.total}{left}")
        stream.flush()

    try:
        yield show
    finally:
        stream.write("\r\x1b[K")
        stream.flush()


# --- bake --------------------------------------------------------------------------------------


def _bake_parser(commands: Any, *, with_methods: bool) -> None:
    parser = _command(
        commands,
        "bake",
        run_bake,
        "merge LoRAs into a checkpoint (Merge to Checkpoint), or add a difference to it",
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CKPT", help="file, index of shards or diffusers folder"
    )
    _add_inputs(parser)
    parser.add_argument(
        "-o", "--output", metavar="OUT", help="file to write; a new folder for a folder or shards"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT when it exists")
    parser.add_argument(
        "--add", type=Path, metavar="TUNED", help="instead of LoRAs: add what TUNED is more ..."
    )
    parser.add_argument("--minus", type=Path, metavar="BASE", help="... than BASE (Add difference)")
    parser.add_argument("--strength", type=float, default=1.0, metavar="X", help="of --add (default: 1)")
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
    _add_settings(parser, "bake")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    _add_json(parser)
    if with_methods:
        _add_method_options(parser)


def run_bake(options: argparse.Namespace) -> int:
    from .checkpoints import BakeSettings, prepare_bake, prepare_difference

    settings = BakeSettings(
        rounding=options.rounding,
        dtype=options.checkpoint_dtype,
        drop_ema=options.drop_ema,
        hashed=not options.no_hash,
        encoders=tuple(options.base_te),
    )
    if options.output is None and not options.dry_run:
        raise RecipeError("Say where to write the result: -o OUT (or --dry-run to write nothing).")
    target = None if options.output is None else output_target(options.output, None)
    notes: list[str] = []
    if options.add is not None or options.minus is not None:
        if options.add is None or options.minus is None or options.loras:
            raise RecipeError("Give --add TUNED and --minus BASE together, and no LoRAs with them.")
        if not math.isfinite(options.strength):
            raise RecipeError(f"strength must be a number, got {options.strength}.")
        seed = given_fields(options).get("seed", 0)
        prepared = prepare_difference(
            options.checkpoint, options.add, options.minus, options.strength, settings=settings, seed=seed
        )
    else:
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
            report = bake.report(target)
        else:
            report = bake.run(
                target, overwrite=options.overwrite, progress=in_megabytes(show), cancel=interrupts.asked
            )
    _print_report(report, options)
    return EXIT_DONE


def in_megabytes(show: Callable[[Progress], None] | None) -> Callable[[Progress], None] | None:
    """A progress line that counts bytes by the million."""
    from dataclasses import replace

    if show is None:
        return None
    return lambda progress: show(
        replace(
            progress,
            phase=f"{progress.phase}, MB",
            done=progress.done // 1_000_000,
            total=progress.total // 1_000_000,
        )
    )


# --- extract, subtract ---------------------------------------------------------------------------


def _extract_parser(commands: Any) -> None:
    parser = _command(
        commands, "extract", run_extract, "make a LoRA of what one checkpoint is more than another (A - B)"
    )
    parser.add_argument("tuned", type=Path, metavar="TUNED", help="the fine-tuned checkpoint")
    parser.add_argument("base", type=Path, metavar="BASE", help="the checkpoint that it was trained from")
    parser.add_argument("-o", "--output", metavar="OUT", help="LoRA to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT when it exists")
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
        "--max-rank", type=int, default=128, metavar="N", help="limit of auto and retain (default: 128)"
    )
    parser.add_argument("--parts", metavar="P,...", help="unet, te, te1, te2, te3 (default: all)")
    parser.add_argument(
        "--vectors", choices=("unet", "none"), default="unet", help="write the U-Net's biases and norms"
    )
    parser.add_argument(
        "--dtype",
        dest="lora_dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float16",
        help="precision of the LoRA (default: float16)",
    )
    parser.add_argument("--no-hash", action="store_true", help="do not hash the checkpoints for the metadata")
    _add_settings(parser, "extract")
    parser.add_argument("--dry-run", action="store_true", help="read and tell everything, write nothing")
    _add_json(parser)


def _extract_rank(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number or auto, got {text!r}")
    return text if text == "auto" else int(text)


def run_extract(options: argparse.Namespace) -> int:
    from .checkpoints import extract

    if options.output is None and not options.dry_run:
        raise RecipeError("Say where to write the LoRA: -o OUT (or --dry-run to write nothing).")
    target = None if options.dry_run else output_target(options.output, None)
    with progress_line(sys.stderr) as show:
        report = extract(
            options.tuned,
            options.base,
            target,
            _extract_settings(options),
            overwrite=options.overwrite,
            progress=show,
            cancel=interrupts.asked,
        )
    _print_report(report, options)
    return EXIT_DONE


def _extract_settings(options: argparse.Namespace) -> Any:
    from .checkpoints import ExtractSettings
    from .checkpoints.differing import PARTS

    if options.retain is not None and options.rank is not None:
        raise RecipeError("retain and rank exclude each other: give one rule for the rank.")
    rank = 64 if options.rank is None else options.rank
    if rank != "auto" and not 1 <= rank <= 4096:
        raise RecipeError(f"rank must be a whole number from 1 to 4096, or auto, got {rank}.")
    if options.retain is not None and not 0 < options.retain <= 1:
        raise RecipeError(f"retain must be above 0 and at most 1, got {options.retain:g}.")
    if not 1 <= options.max_rank <= 4096 or (options.conv_rank or 0) < 0:
        raise RecipeError("max-rank must be from 1 to 4096, and conv-rank not below 0.")
    parts = tuple(part.strip() for part in (options.parts or "").split(",") if part.strip())
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise RecipeError(f"There is no part {unknown[0]!r}. Parts: {', '.join(PARTS)}.")
    given = given_fields(options)
    return ExtractSettings(
        rank=rank,
        conv_rank=options.conv_rank,
        retain=options.retain,
        max_rank=options.max_rank,
        parts=parts,
        vectors=options.vectors,
        dtype=options.lora_dtype,
        dialect=given.get("dialect", "auto"),
        skip_unsupported=given.get("skip_unsupported", False),
        hashed=not options.no_hash,
    )


def _subtract_parser(commands: Any) -> None:
    parser = _command(
        commands, "subtract", run_subtract, "take LoRAs out of a LoRA that they were merged into: AB minus B"
    )
    parser.add_argument("minuend", metavar="AB", help="the merged LoRA")
    _add_inputs(parser)
    parser.add_argument("-o", "--output", metavar="OUT", help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT when it exists")
    _add_settings(parser, "subtract")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    _add_json(parser)


def run_subtract(options: argparse.Namespace) -> int:
    """A merge in which all LoRAs but the first count negatively."""
    from dataclasses import replace

    if not options.loras:
        raise RecipeError("Name what to take away: loramerge subtract AB B -o A")
    options.loras = [options.minuend, *options.loras]
    options.allow_changed_sources, options.pairs, options.each = True, False, False
    options.recipe = None
    first, *others = parse_inputs(options.loras)
    names = ("te", "unet", "te1", "te2", "te3")
    taken = [replace(one, **{n: -v for n in names if (v := getattr(one, n)) is not None}) for one in others]
    options.inputs = (first, *taken)
    return run_merge_command(options)


# --- sweep -------------------------------------------------------------------------------------


def _sweep_parser(commands: Any, *, with_methods: bool) -> None:
    parser = _command(
        commands, "sweep", run_sweep_command, "merge once for every ratio or setting of a range"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = SWEEP_EXAMPLES
    _add_inputs(parser)
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
    _add_settings(parser, "merge", lists=True)
    _add_json(parser)
    if with_methods:
        _add_method_options(parser)


SWEEP_EXAMPLES = """a value may be a range or a list:
  loramerge sweep style:0.2..1.0/5 subject:0.5/0.8 -o both          5 x 2 files
  loramerge sweep style:0.8 subject:1:lbw=ALL/MIDD -o blocks        two block weights
  loramerge sweep style subject --mix 0..1/5 --mode svd,ties -o mix
"""


def run_sweep_command(options: argparse.Namespace) -> int:
    from .sweep import expand, plan_sweep, run_sweep, target

    fields = given_fields(options)
    params = {name: _comma_list(value) for name, value in fields.pop("params", {}).items()}
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
            _print_json({"files": files, "predicted_bytes": sweep.predicted_bytes})
        else:
            print("\n".join(files))
            print(f"{len(files)} files, at most {sweep.predicted_bytes / 1e6:,.2f} MB")
        return EXIT_DONE
    rows = []
    with progress_line(sys.stderr) as show:
        for row in run_sweep(sweep, progress=_of_files(show, len(points)), cancel=interrupts.asked):
            rows.append(row.to_json())
            if not options.json:
                print(row.to_text())
    if options.json:
        _print_json({"files": rows})
    return EXIT_DONE


def _of_files(show: Callable[[Progress], None] | None, count: int) -> Callable[[int, Progress], None] | None:
    """Progress that says which of several files it is about."""
    if show is None:
        return None
    from dataclasses import replace

    line = show
    return lambda index, found: line(replace(found, phase=f"file {index + 1} of {count}, {found.phase}"))


# --- convert -----------------------------------------------------------------------------------


def _convert_parser(commands: Any) -> None:
    parser = _command(commands, "convert", run_convert, "rewrite files exactly: other names, other precision")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="file to write; for several files, or with a slash at its end, a folder",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT when it exists")
    _add_settings(parser, "convert")
    _add_json(parser)


def run_convert(options: argparse.Namespace) -> int:
    from .merge import run_merge
    from .merge.plan import file_stem
    from .recipe import LoraInput

    # One LoRA at strength 1 concatenated with nothing is that LoRA, factor by factor.
    recipes = [
        MergeRecipe(inputs=(LoraInput(str(file)),), mode="concat", **given_fields(options))
        for file in options.files
    ]
    options.lora_dir, options.preset_file = None, []
    if len(recipes) > 1 or options.output.endswith(("/", os.sep)):
        jobs = [(file.name, file_stem(file.name), recipe) for file, recipe in zip(options.files, recipes)]
        return _run_many(jobs, options)
    target = output_target(options.output, None)
    _check_output(target, options.overwrite)
    plan = _plan(options, recipes[0])
    report = run_merge(plan, target, overwrite=options.overwrite, cancel=interrupts.asked)
    _print_report(report, options)
    return EXIT_DONE


# --- looking at files --------------------------------------------------------------------------


def _inspect_parser(commands: Any) -> None:
    parser = _command(commands, "inspect", run_inspect, "say what a LoRA or a checkpoint is")
    parser.add_argument("files", nargs="+", metavar="FILE")
    _add_lora_dir(parser)
    _add_settings(parser, "inspect")
    _add_json(parser)
    _add_plot(parser)


def run_inspect(options: argparse.Namespace) -> int:
    from .analysis import inspect
    from .checkpoints import is_checkpoint, look

    find = finder(options.lora_dir)
    reports: list[Any] = [
        look(Path(name)) if is_checkpoint(Path(name)) else inspect(find(name), base_model=options.base_model)
        for name in options.files
    ]
    if options.json:
        _print_json(reports[0].to_json() if len(reports) == 1 else [report.to_json() for report in reports])
    else:
        print("\n\n".join(report.to_text() for report in reports))
    _draw("inspect_figure", reports, options)
    return EXIT_DONE


def _compare_parser(commands: Any) -> None:
    parser = _command(
        commands,
        "compare",
        run_compare,
        "show where LoRAs agree, overlap and fight, or checkpoints differ",
    )
    _add_inputs(parser)
    _add_settings(parser, "compare")
    _add_json(parser)
    _add_plot(parser)


def run_compare(options: argparse.Namespace) -> int:
    from .analysis import compare
    from .checkpoints import ExtractSettings, extract, is_checkpoint

    if len(options.loras) == 2 and all(is_checkpoint(Path(name)) for name in options.loras):
        tuned, base = (Path(name) for name in options.loras)
        with progress_line(sys.stderr) as show:
            found = extract(
                tuned,
                base,
                None,
                ExtractSettings(hashed=False),
                progress=show,
                cancel=interrupts.asked,
            )
        _print_report(found, options)
        return EXIT_DONE
    recipe, _ = recipe_of(options)
    plan = _plan(options, recipe)
    with progress_line(sys.stderr) as progress:
        report = compare(plan, progress=progress, cancel=interrupts.asked)
    _print_report(report, options)
    _draw("compare_figure", report, options)
    return EXIT_DONE


def _advise_parser(commands: Any, *, with_methods: bool) -> None:
    parser = _command(commands, "advise", run_advise, "show error and size against the rank, before merging")
    _add_inputs(parser)
    _add_settings(parser, "advise")
    _add_json(parser)
    _add_plot(parser)
    if with_methods:
        _add_method_options(parser)


def run_advise(options: argparse.Namespace) -> int:
    from .analysis import advise, expected_seconds

    recipe, _ = recipe_of(options)
    plan = _plan(options, recipe)
    expected = expected_seconds(plan)
    if expected >= LONG_SECONDS:
        sys.stderr.write(
            f"note: Mode {plan.method.name} gives whole layers, and all of their singular values are needed: "
            f"about {expected / 60:.0f} min on this machine. Ctrl-C stops.\n"
        )
    with progress_line(sys.stderr) as progress:
        report = advise(plan, progress=progress, cancel=interrupts.asked)
    _print_report(report, options)
    _draw("advise_figure", report, options)
    return EXIT_DONE


# --- lists -------------------------------------------------------------------------------------


def _list_parsers(commands: Any) -> None:
    parser = _command(commands, "methods", run_methods, "list the merge methods with their parameters")
    _add_json(parser)
    parser = _command(commands, "presets", run_presets, "list the block-weight presets")
    parser.add_argument("--preset-file", type=Path, action="append", default=[], metavar="FILE")
    _add_json(parser)


def run_methods(options: argparse.Namespace) -> int:
    from .methods import METHODS

    if options.json:
        _print_json([method.to_json() for method in METHODS.values()])
        return EXIT_DONE
    for method in METHODS.values():
        print(f"{method.name:<16}{method.summary}")
        for param in method.params:
            print(f"{'':<18}--{param.name.replace('_', '-')} {param.range_text()}: {param.help}")
    return EXIT_DONE


def run_presets(options: argparse.Namespace) -> int:
    from .blocks import blocks_help

    presets = presets_of(options)
    if options.json:
        _print_json({"weights": dict(presets.weights), "elements": dict(presets.elements)})
        return EXIT_DONE
    for title, table in (("Block weights (lbw=)", presets.weights), ("Elements (lbwe=)", presets.elements)):
        print(title)
        for name, text in table.items():
            print(f"  {name:<18}{one_line(text)}")
    print(blocks_help())
    return EXIT_DONE


# --- the tab without a WebUI, and the demo -----------------------------------------------------


def _ui_parser(commands: Any) -> None:
    parser = _command(commands, "ui", run_ui, "open the LoRA Merge tab without a WebUI, for you alone")
    _add_lora_dir(parser)
    parser.add_argument(
        "--base-dir", type=Path, action="append", default=[], metavar="D", help="folder of checkpoints"
    )
    parser.add_argument(
        "--port", type=int, metavar="P", help="port to listen on (default: a free one from 7865)"
    )
    parser.add_argument("--demo", action="store_true", help="start with sample LoRAs")
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser window")
    parser.add_argument(
        "--listen",
        action="store_true",
        help="let other machines in; asks for a password, or takes it from LORAMERGE_PASSWORD",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME[:PORT]",
        help="a further name by which the page may be opened, as of a proxy",
    )


def run_ui(options: argparse.Namespace) -> int:
    try:
        from .webui import standalone
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "gradio":
            raise
        raise RecipeError('The tab needs Gradio: pip install "sd-webui-lora-merge[ui]".') from error
    standalone.serve(
        lora_dir=options.lora_dir,
        port=options.port,
        demo=options.demo,
        open_browser=not options.no_browser,
        base_dirs=options.base_dir,
        listen=options.listen,
        allow_hosts=options.allow_host,
    )
    return EXIT_DONE


def _demo_parser(commands: Any) -> None:
    parser = _command(
        commands, "demo", run_demo, "make two small sample LoRAs, merge them and print the report"
    )
    parser.add_argument(
        "--dir", type=Path, default=Path("loramerge-demo"), metavar="D", help="folder for the samples"
    )


def run_demo(options: argparse.Namespace) -> int:
    from .demo import make_samples

    style, subject = make_samples(options.dir)
    words = [
        "merge", f"{style}:0.8", f"{subject}:0.5:lbw=MIDD",
        "-o", str(options.dir / "merged.safetensors"), "--overwrite",
    ]  # fmt: skip
    print(f"$ loramerge {' '.join(words)}\n")
    return main(words)
