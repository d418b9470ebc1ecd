"""``loramerge merge``: LoRAs into one file; ``subtract`` is the same with signs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import interrupts
from ..errors import RecipeError
from ..recipe import MergeRecipe, parse_inputs
from .many import many_merges, run_many
from .options import (
    add_inputs,
    add_json,
    add_method_options,
    add_output,
    add_settings,
    command,
    finder,
    plan_of,
    target_of,
)
from .output import EXIT_DONE, print_json, print_notes, progress_line
from .recipes import recipe_of

if TYPE_CHECKING:
    from ..analysis.outside import OutsideReport
    from ..merge import MergePlan


EXAMPLES = """examples:
  loramerge merge style.safetensors:0.8 subject.safetensors:0.5:lbw=MIDD -o both.safetensors
  loramerge merge "<lora:style:0.8><lora:subject:0.5>" --lora-dir models/Lora -o both --rank 32
  loramerge merge big.safetensors -o small.safetensors --retain 0.98      one file alone is resized
  loramerge merge --recipe both.safetensors --lora-dir models/Lora -o again
"""


def add_parser(commands: Any, *, with_methods: bool) -> None:
    parser = command(commands, "merge", run_merges, "merge LoRAs into one file; one LoRA alone is resized")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    add_inputs(parser)
    add_output(parser, "file to write: a path, or a name within --lora-dir")
    add_settings(parser, "merge")
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
    add_json(parser)
    if with_methods:
        add_method_options(parser)


def run_merges(options: argparse.Namespace, look: Callable[..., OutsideReport] | None = None) -> int:
    """Merges as options ask for.

    Args:
        look: Tells something of a plan, which is shown below the report of its merge.
    """
    from ..delta.device import compute_device
    from ..files import check_target, refuse_inputs

    if options.each or (options.recipe is not None and options.recipe.suffix.lower() == ".jsonl"):
        return run_many(many_merges(options), options)
    recipe, notes = recipe_of(options)
    target = target_of(options, options.lora_dir)
    merges: list[tuple[MergePlan, Path | None]] = []
    for name, part in _parts(options, recipe).items():
        own = target and target.with_name(f"{target.stem}{name}{target.suffix}")
        if own is not None:
            check_target(own, options.overwrite)
        merges.append((plan_of(options, part, check_hashes=not options.allow_changed_sources), own))
    inputs = [path for plan, _ in merges for path in plan.files()]
    for _, own in merges:
        if own is not None:
            refuse_inputs(own, inputs)
    if options.dry_run or target is None:
        compute_device(recipe.device)  # the one thing of a run that a plan does not look at
        if options.json:
            plans = [_plan_json(plan, own, notes) for plan, own in merges]
            print_json(plans if options.pairs else plans[0])
        else:
            for plan, own in merges:
                _show_plan(plan, own, notes)
        return EXIT_DONE
    _merge_all(merges, options, notes, look)
    return EXIT_DONE


def _parts(options: argparse.Namespace, recipe: MergeRecipe) -> Mapping[str, MergeRecipe]:
    """End of the output's name to the recipe of that file: one, or with ``--pairs`` two."""
    if not options.pairs:
        return {"": recipe}
    from ..merge.noise import by_noise

    return {f"_{kind}_noise": part for kind, part in by_noise(recipe, finder(options.lora_dir)).items()}


def _merge_all(
    merges: Sequence[tuple[MergePlan, Path | None]],
    options: argparse.Namespace,
    notes: Sequence[str],
    look: Callable[..., OutsideReport] | None,
) -> None:
    from ..merge import run_merge

    shown: list[dict[str, Any]] = []
    for plan, own in merges:
        assert own is not None
        with progress_line(sys.stderr) as show:
            seen = look(plan, progress=show, cancel=interrupts.asked) if look is not None else None
            report = run_merge(plan, own, overwrite=options.overwrite, progress=show, cancel=interrupts.asked)
        warnings = [*notes, *report.warnings]
        shown.append(
            {**report.to_json(), "warnings": warnings, **(seen.to_json() if seen is not None else {})}
        )
        options.complete = len(shown)
        if not options.json:
            print(report.to_text())
            if seen is not None and seen.shares:
                print(seen.to_text())
            print_notes(notes)
    if options.json:
        print_json(shown if options.pairs else shown[0])


def _plan_json(plan: MergePlan, target: Path | None, notes: Sequence[str]) -> dict[str, Any]:
    output = str(target) if target else None
    return {**plan.to_json(), "output": output, "warnings": [*notes, *plan.warnings]}


def _show_plan(plan: MergePlan, target: Path | None, notes: Sequence[str]) -> None:
    from ..report import count_text, histogram_text, smaller_text

    facts = plan.to_json()
    at_most = "" if plan.ranks_known else "at most "
    print(f"Would write  {target or 'nothing (no -o)'}")
    size = f"{plan.predicted_bytes / 1e6:,.2f} MB, {plan.dtype}"
    print(f"Size         {at_most}{size}{smaller_text(facts['smaller'])}")
    print(f"Base model   {facts['base_model']}")
    print(f"Layers       {facts['layers']} ({facts['layers_left_out']} left out)")
    print(f"Ranks        {at_most}{histogram_text(plan.rank_histogram) or 'none'}")
    for source in plan.sources:
        layers = count_text(len(source.source.layers), "layer")
        print(f"Input        {source.path.name}: {layers}, {source.source.dialect}")
    print_notes([*notes, *plan.warnings], plan.skipped)


def add_subtract_parser(commands: Any) -> None:
    parser = command(
        commands, "subtract", run_subtract, "take LoRAs out of a LoRA that they were merged into: AB minus B"
    )
    parser.add_argument("minuend", metavar="AB", help="the merged LoRA")
    add_inputs(parser)
    add_output(parser, "file to write")
    add_settings(parser, "subtract")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    add_json(parser)


def run_subtract(options: argparse.Namespace) -> int:
    """A merge in which all LoRAs but the first count negatively."""
    from ..analysis.outside import outside_of

    if not options.loras:
        raise RecipeError("Name what to take away: loramerge subtract AB B -o A")
    options.loras = [options.minuend, *options.loras]
    options.allow_changed_sources, options.pairs, options.each = True, False, False
    options.recipe = None
    first, *others = parse_inputs(options.loras)
    names = ("te", "unet", "te1", "te2", "te3")
    taken = [replace(one, **{n: -v for n in names if (v := getattr(one, n)) is not None}) for one in others]
    options.inputs = (first, *taken)
    # All ranks of a difference would be the rounding of the file that is taken apart.
    options.rank = options.rank or "same"
    return run_merges(options, outside_of)
