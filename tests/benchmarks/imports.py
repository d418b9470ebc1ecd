"""What our import adds to the start of a WebUI, next to what the WebUI itself imports.

    python tests/benchmarks/imports.py [--repeat 10]

imports, in a fresh process each time, torch, Gradio and FastAPI as a WebUI has them, then the extension as
``scripts/lora_merge.py`` does, then the tab as building the pages does. With ``loramerge --help`` and
``loramerge presets`` as whole processes, and an interpreter that does nothing beside them. CPU milliseconds,
the least of several runs; the first run, which may have to compile, does not count. Needs Gradio. Nothing
here is a test with a time limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

STEPS = {
    "torch, Gradio, FastAPI": "import torch, safetensors, numpy, gradio, fastapi",
    "the extension": "import lib_loramerge.webui.extension",
    "the tab, when the pages are built": "import lib_loramerge.webui.tab",
}
CHILD = """
import json, sys, time
took = []
for line in json.loads(sys.argv[1]):
    start = time.process_time()
    exec(line)
    took.append(time.process_time() - start)
print(json.dumps(took))
"""
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "loramerge --help": ["-m", "lib_loramerge", "--help"],
    "loramerge presets": ["-m", "lib_loramerge", "presets"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=10, help="runs, of which the least counts")
    repeat = parser.parse_args().repeat
    with tempfile.TemporaryDirectory() as compiled:
        # Compiled files of our own, so that we measure as after the first start, and leave nothing behind.
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": compiled}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        print_imports(repeat, environment)
        print_commands(repeat, environment)


def print_imports(repeat: int, environment: dict[str, str]) -> None:
    runs = [import_seconds(environment) for _ in range(repeat + 1)][1:]
    host, *ours = (min(step) for step in zip(*runs, strict=True))
    ours.append(sum(ours))
    print("| import | CPU ms | share of torch, Gradio and FastAPI |\n|---|---:|---:|")
    for name, seconds in zip([*STEPS, "both"], [host, *ours], strict=True):
        print(f"| {name} | {seconds * 1e3:.0f} | {seconds / host:.1%} |")


def import_seconds(environment: dict[str, str]) -> list[float]:
    """CPU seconds of each of :data:`STEPS` in one fresh process."""
    command = [sys.executable, "-c", CHILD, json.dumps(list(STEPS.values()))]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def print_commands(repeat: int, environment: dict[str, str]) -> None:
    print("\n| command | CPU ms |\n|---|---:|")
    for name, words in COMMANDS.items():
        least = min([command_seconds(words, environment) for _ in range(repeat + 1)][1:])
        print(f"| {name} | {least * 1e3:.0f} |")


def command_seconds(words: list[str], environment: dict[str, str]) -> float:
    """CPU seconds of a whole process; wall seconds where the system does not tell those of a child."""
    start, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, *words], env=environment, stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return used or time.perf_counter() - start


if __name__ == "__main__":
    main()
