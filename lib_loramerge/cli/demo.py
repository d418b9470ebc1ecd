"""``loramerge demo``: two small samples, merged."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import command


def add_parser(commands: Any) -> None:
    parser = command(
        commands, "demo", run_demo, "make two small sample LoRAs, merge them and print the report"
    )
    parser.add_argument(
        "--dir", type=Path, default=Path("loramerge-demo"), metavar="D", help="folder for the samples"
    )


def run_demo(options: argparse.Namespace) -> int:
    from ..demo import make_samples
    from . import main

    style, subject = make_samples(options.dir)
    words = [
        "merge", f"{style}:0.8", f"{subject}:0.5:lbw=MIDD",
        "-o", str(options.dir / "merged.safetensors"), "--overwrite",
    ]  # fmt: skip
    print(f"$ loramerge {' '.join(words)}\n")
    return main(words)
