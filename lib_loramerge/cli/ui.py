"""``loramerge ui``: the tab without a WebUI."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from .options import add_lora_dir, command
from .output import EXIT_DONE


def add_parser(commands: Any) -> None:
    parser = command(commands, "ui", run_ui, "open the LoRA Merge tab without a WebUI, for you alone")
    add_lora_dir(parser)
    parser.add_argument(
        "--base-dir", type=Path, action="append", default=[], metavar="D", help="folder of checkpoints"
    )
    parser.add_argument(
        "--ckpt-dir",
        type=Path,
        metavar="D",
        help="folder of checkpoints, read and written: adds baking and extracting to the page",
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
        from ..webui import standalone
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
        checkpoint_dir=options.ckpt_dir,
        listen=options.listen,
        allow_hosts=options.allow_host,
    )
    return EXIT_DONE
