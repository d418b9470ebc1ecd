"""``loramerge methods`` and ``presets``: what there is to choose from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import add_json, command, presets_of
from .output import EXIT_DONE, one_line, print_json


def add_parsers(commands: Any) -> None:
    parser = command(commands, "methods", run_methods, "list the merge methods with their parameters")
    add_json(parser)
    parser = command(commands, "presets", run_presets, "list the block-weight presets")
    parser.add_argument("--preset-file", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument(
        "--elements", metavar="MODEL", help="list the words that lbwe= has for the elements of a base model"
    )
    add_json(parser)


def run_methods(options: argparse.Namespace) -> int:
    from ..methods import METHODS

    if options.json:
        print_json([method.to_json() for method in METHODS.values()])
        return EXIT_DONE
    for method in METHODS.values():
        print(f"{method.name:<16}{method.summary}")
        for param in method.params:
            print(f"{'':<18}--{param.name.replace('_', '-')} {param.range_text()}: {param.help}")
    return EXIT_DONE


def run_presets(options: argparse.Namespace) -> int:
    from ..blocks import blocks_help

    if options.elements is not None:
        return _run_elements(options)
    presets = presets_of(options)
    if options.json:
        print_json({"weights": dict(presets.weights), "elements": dict(presets.elements)})
        return EXIT_DONE
    for title, table in (("Block weights (lbw=)", presets.weights), ("Elements (lbwe=)", presets.elements)):
        print(title)
        for name, text in table.items():
            print(f"  {name:<18}{one_line(text)}")
    print(blocks_help())
    return EXIT_DONE


def _run_elements(options: argparse.Namespace) -> int:
    from ..blocks import WORDS, elements_of
    from ..merge.base_model import model_id

    found = elements_of(model_id(options.elements))
    if options.json:
        print_json({word: {"means": WORDS[word], "example": layer} for word, layer in found.items()})
        return EXIT_DONE
    for word, layer in found.items():
        print(f"  {word:<18}{WORDS[word]}, such as {layer}")
    print("In a rule: lbwe=B00-B09:MLP:0.5 or lbwe=:NOT ATTENTION:0; blocks as presets lists them.")
    return EXIT_DONE
