"""Options that several commands take, and what they stand for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError, RecipeError
from ..recipe import NORMALIZE, SETTINGS, MergeRecipe, Param, parse_rank

if TYPE_CHECKING:
    from ..blocks import Presets
    from ..merge import MergePlan


def command(commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> Any:
    parser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
    parser.set_defaults(run=run)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON, alone, on stdout")


def add_lora_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lora-dir", type=Path, metavar="D", help="folder in which names are looked up")


def add_output(parser: argparse.ArgumentParser, text: str, **more: Any) -> None:
    """``-o`` and ``--overwrite``."""
    parser.add_argument("-o", "--output", metavar="OUT", help=text, **more)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT when it exists")


def add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it too (needs matplotlib)")


def add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "loras",
        nargs="*",
        metavar="LORA",
        help="NAME[:TE[:UNET]][:lbw=BLOCKS]..., a path, or a prompt's <lora:...> tags",
    )
    add_lora_dir(parser)
    parser.add_argument(
        "--preset-file",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="more block-weight presets",
    )


def add_settings(parser: argparse.ArgumentParser, command: str, *, lists: bool = False) -> None:
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
                entry.flag, dest=name, type=comma_list, metavar=f"{metavar},...", help=entry.help
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


def comma_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """One option for each parameter of any method, from the same table that the tab reads."""
    from ..methods import METHODS

    owners: dict[str, list[tuple[str, Param]]] = {}
    for method in METHODS.values():
        for param in method.params:
            owners.setdefault(param.name, []).append((method.name, param))
    group = parser.add_argument_group("parameters of merge methods")
    settings = {entry.flag for entry in SETTINGS.values()}
    for name, uses in owners.items():
        param = uses[0][1]
        if f"--{name}" in settings:
            continue  # One option for both, see `given_fields`: their words differ.
        defaults = " or ".join(sorted({str(use.default) for _, use in uses}))
        text = f"{param.help} For {', '.join(owner for owner, _ in uses)}; default {defaults}."
        group.add_argument(
            f"--{name.replace('_', '-')}",
            dest=f"param_{name}",
            metavar="|".join(param.choices) if param.choices else "X",
            help=text.replace("%", "%%"),
        )


def given_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Recipe fields for the options that were given; the others keep their defaults."""
    fields = {name: value for name in SETTINGS if (value := getattr(options, name, None)) is not None}
    params = {
        name.removeprefix("param_"): value
        for name, value in vars(options).items()
        if name.startswith("param_") and value is not None
    }
    if not _are_words(fields.get("normalize"), NORMALIZE):
        params["normalize"] = fields.pop("normalize")
    if params:
        fields["params"] = params
    return fields


def _are_words(value: object, words: Sequence[str]) -> bool:
    """Whether an option was not given, or holds words of a setting; a sweep has lists of them."""
    return value is None or all(word in words for word in (value if isinstance(value, list) else [value]))


def target_of(options: argparse.Namespace, folder: Path | None = None) -> Path | None:
    """The file to write; None for a run that only checks.

    Raises:
        RecipeError: Neither ``-o`` nor ``--dry-run``.
        OutputError: It names no file.
    """
    if options.output is None:
        if options.dry_run:
            return None
        raise RecipeError("Say where to write the result: -o OUT (or --dry-run to write nothing).")
    return output_target(options.output, folder)


def output_target(output: str, lora_dir: Path | None) -> Path:
    """Where ``-o`` points: a path as it is, a bare name within the LoRA folder.

    Raises:
        OutputError: It names no file.
    """
    if not output.strip() or output.endswith(("/", os.sep)) or Path(output).name in ("", ".", ".."):
        raise OutputError("-o {output} is a folder or nothing; give the name of a file.", repr(output))
    path = Path(output)
    if path.suffix.lower() != ".safetensors":
        path = path.with_name(f"{path.name}.safetensors")
    bare = not path.is_absolute() and path.parent == Path(".") and not output.startswith(("./", ".\\"))
    return lora_dir / path if bare and lora_dir is not None else path


def finder(lora_dir: Path | None) -> Callable[[str], Path]:
    """Look LoRAs up as the command line does: a path as it is, a name within the folder."""
    from ..files import LoraFolder

    return LoraFolder([lora_dir] if lora_dir else [], allow_paths=True).find


def presets_of(options: argparse.Namespace) -> Presets:
    from ..blocks import bundled_preset_path, load_presets

    return load_presets([*options.preset_file, bundled_preset_path()])


def plan_of(options: argparse.Namespace, recipe: MergeRecipe, *, check_hashes: bool = True) -> MergePlan:
    from ..merge import plan_merge

    return plan_merge(
        recipe,
        find=finder(options.lora_dir),
        presets=presets_of(options),
        base=Path(recipe.base) if recipe.base else None,
        check_hashes=check_hashes,
    )
