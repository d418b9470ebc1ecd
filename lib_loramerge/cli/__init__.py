"""The ``loramerge`` command: a module for each command, thin functions over the library.

Nothing heavy is imported until a command needs it, so ``--help`` is instant.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__, interrupts
from ..errors import Cancelled, LoraMergeError
from . import bake, convert, demo, extract, lists, look, merge, sweep, ui
from .output import EXIT_DONE, EXIT_ERROR, one_line
from .recipes import recipe_of

__all__ = ["build_parser", "main", "recipe_of", "run_and_exit"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done; 1 an error the user can fix, reported in one line on stderr; 2 wrong
        usage; 130 or 143 interrupted, with nothing left behind.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # File names may hold characters that the console's encoding lacks.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    options = argparse.Namespace()
    try:
        options = build_parser(words).parse_args(words)
        return options.run(options) or EXIT_DONE
    except (Cancelled, KeyboardInterrupt):
        complete = getattr(options, "complete", 0)  # Files of a run that writes several.
        left = f"{complete} complete files stay" if complete else "nothing was written"
        print(f"loramerge: interrupted, {left}", file=sys.stderr)
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
    # Importing torch makes 170,000 objects that stay. By default Python's collector walks through all of them
    # again and again: 0.3 s of a command, for nothing, as no tensor hangs on a cycle.
    gc.set_threshold(100_000)
    status = main()
    if interrupts.asked():
        # Nothing is half-written then. The interpreter's own way out would wait for the threads.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def build_parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The whole command line; options of the merge methods only where ``words`` need them."""
    parser = argparse.ArgumentParser(
        prog="loramerge",
        description="Merge LoRA files exactly, with the error stated.",
        epilog=merge.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"loramerge {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = next((word for word in words if not word.startswith("-")), "")
    merge.add_parser(commands, with_methods=command == "merge")
    sweep.add_parser(commands, with_methods=command == "sweep")
    bake.add_parser(commands, with_methods=command == "bake")
    extract.add_parser(commands)
    merge.add_subtract_parser(commands)
    convert.add_parser(commands)
    look.add_parsers(commands, with_methods=command == "advise")
    lists.add_parsers(commands)
    ui.add_parser(commands)
    demo.add_parser(commands)
    return parser
