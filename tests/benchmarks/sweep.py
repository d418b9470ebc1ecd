"""What a sweep, or the pictures of an X/Y/Z plot, of two SDXL LoRAs costs next to as many merges.

    python tests/benchmarks/sweep.py [--rank 32] [--side 5] [--folder DIR]

Three comparisons, in CPU seconds:

- arithmetic, on one thread: reading layers, merging, cutting, rounding and measuring them, for a merge by
  itself and for one of a sweep; the first of a sweep computes what the others share.
- files to files, whole processes: ``python -m lib_loramerge sweep`` with side x side strengths, and ``merge``
  (least of several runs) times their number. The sweep's files need 230 MB each at rank 32.
- pictures of a plot, on one thread: what is done before each, from its prompt to the file that the WebUI
  loads, next to the arithmetic of a merge.

Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from lib_loramerge.delta import Cache  # noqa: E402
from lib_loramerge.merge.layer import open_merger  # noqa: E402
from lib_loramerge.merge.layout import MergePlan  # noqa: E402
from lib_loramerge.merge.work import Work  # noqa: E402
from lib_loramerge.webui.host.standalone import StandaloneHost  # noqa: E402
from lib_loramerge.webui.xyz.cell import Cell  # noqa: E402
from lib_loramerge.webui.xyz.plot import CELL, Plot  # noqa: E402
from tests.benchmarks.merge_sdxl import make_lora, run  # noqa: E402
from tests.helpers import format_files as ff  # noqa: E402

_MERGES, _FURTHER = 3, 3


def main() -> None:
    options = _options()
    count = options.side**2
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for seed, stem in enumerate("ab"):
            make_lora(folder / f"{stem}.safetensors", options.rank, seed)
        alone, first, further = _arithmetic(folder, options.rank)
        merges, sweep = alone * count, first + further * (count - 1)
        print(f"{count} pairs of strengths, SDXL, rank {options.rank} and {options.rank} to {options.rank}")
        print(f"arithmetic: a merge {alone:.2f} s, first of a sweep {first:.2f}, each further {further:.2f}")
        print(f"arithmetic of {count}: sweep {sweep:.1f} s, merges {merges:.1f} s: {sweep / merges:.2f} x")
        first, further = _pictures(folder, options.rank)
        print(
            f"pictures of a plot: the first {first:.2f} s, each further {further:.2f}: "
            f"{first / alone:.2f} x and {further / alone:.2f} x the arithmetic of a merge"
        )
        one, wall = _merge(folder, options.rank)
        print(f"a merge, files to file: {one:.2f} s CPU, {wall:.2f} s wall")
        cost = run([*_program("sweep", folder, options.rank, f"0.2..1/{options.side}"), str(folder / "out")])
        merges = one * count
        print(
            f"files to files of {count}: {cost.cpu:.1f} s, merges {merges:.1f} s: {cost.cpu / merges:.2f} x"
        )
        print(f"wall: {cost.wall:.1f} s and {wall * count:.1f} s: {cost.wall / wall / count:.2f} x")


def _arithmetic(folder: Path, rank: int) -> tuple[float, float, float]:
    """CPU seconds of a merge by itself, of the first of a sweep and of each further one."""
    torch.set_num_threads(1)

    def seconds(strength: float, cache: Cache | None) -> float:
        plan = ff.plan(folder, f"a:{strength}", f"b:{1 - strength}", rank=rank)
        start = time.process_time()
        _all_layers(plan, cache)
        return time.process_time() - start

    alone = min(seconds(0.1 * n, None) for n in range(1, 1 + _MERGES))
    cache = Cache()
    first = seconds(0.1, cache)
    return alone, first, min(seconds(0.1 * n, cache) for n in range(2, 2 + _FURTHER))


class _Host(StandaloneHost):
    """Takes trials, as a WebUI does."""

    def register_trial(self, name: str, path: Path) -> None:
        pass

    def unregister_trial(self, name: str) -> None:
        pass


class _Picture:
    """The host's object for one picture."""

    def __init__(self, rank: int) -> None:
        self.prompt, self.styles = "", []
        setattr(self, CELL, Cell(rank=str(rank)))


def _pictures(folder: Path, rank: int) -> tuple[float, float]:
    """CPU seconds of the first picture of a plot over strengths and a rank, and of each further one."""
    plot, plotted, costs = Plot(_Host((folder,))), _Picture(rank), []
    plot._until_closed(plotted)
    for n in range(1, 1 + _MERGES):
        picture = copy.copy(plotted)
        picture.prompt = f"<lora:a:{0.1 * n}><lora:b:{1 - 0.1 * n}>"
        start = time.process_time()
        plot.before_process(picture)
        costs.append(time.process_time() - start)
    plot.end()
    return costs[0], min(costs[1:])


def _all_layers(plan: MergePlan, cache: Cache | None) -> None:
    with open_merger(plan, cache) as merger:
        work = Work(workers=1)
        work.each_batch(plan, lambda batch: merger.merge_together(batch, [None] * len(batch)), "merge")


def _merge(folder: Path, rank: int) -> tuple[float, float]:
    command = [*_program("merge", folder, rank, "0.6"), str(folder / "one.safetensors"), "--overwrite"]
    costs = [run(command) for _ in range(_MERGES + 1)][1:]
    return min(cost.cpu for cost in costs), min(cost.wall for cost in costs)


def _program(name: str, folder: Path, rank: int, strengths: str) -> list[str]:
    inputs = [f"{folder / stem}.safetensors:{strengths}" for stem in "ab"]
    return [sys.executable, "-m", "lib_loramerge", name, *inputs, "--rank", str(rank), "--json", "-o"]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--side", type=int, default=5, help="strengths of each LoRA")
    parser.add_argument("--folder", type=Path, help="where the files are made")
    return parser.parse_args()


if __name__ == "__main__":
    main()
