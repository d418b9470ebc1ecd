"""What a merge of two SDXL LoRAs costs, next to the other ways of doing it.

    python tests/benchmarks/merge_sdxl.py [--ranks 32 128] [--no-dense] [--folder DIR]

makes two random float16 LoRAs with the true shapes of SDXL (986 layers) per rank, merges them to the same
rank and prints one table. Three kinds of rows:

- whole processes, files in, file out: ours (``python -m lib_loramerge merge``) to the inputs' rank and with
  all ranks kept, ``compare`` and ``advise`` of the same files (in turns with ``merge``), and the floor:
  reading both files and writing one of their size with the safetensors library alone. CPU and wall seconds,
  and peak memory beyond that of Python with torch imported, mapped file pages aside (Linux).
- planning alone, from two headers that were not read before.
- arithmetic alone, on one thread: our core with the measurement of its error; ``torch.svd_lowrank`` and the
  full ``torch.linalg.svd`` of the dense sum, as other merge tools do it. Measured once per shape and
  multiplied by the number of layers of that shape (least of several runs; dense once), CPU seconds.

Run it on a quiet machine: CPU seconds grow too when other work shares the cores' caches. Nothing here is a
test with a time limit.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from lib_loramerge.delta import LowRank, cut_layer, stack  # noqa: E402
from tests.benchmarks.sdxl_shapes import sdxl_layers, shape_counts  # noqa: E402

_STRENGTHS = (0.7, 0.6)
_FLOOR = """
import sys
from safetensors.torch import load_file, save_file
first = {key: tensor.clone() for key, tensor in load_file(sys.argv[1]).items()}
second = {key: tensor.clone() for key, tensor in load_file(sys.argv[2]).items()}
save_file(first, sys.argv[3])
"""
_PLANNING = """
import gc, sys, time
gc.set_threshold(100_000)  # as the command does
from pathlib import Path
from lib_loramerge.blocks import load_presets
from lib_loramerge.merge.plan import plan_merge
from lib_loramerge.recipe import MergeRecipe, parse_inputs
from lib_loramerge import methods
recipe = MergeRecipe(inputs=parse_inputs(sys.argv[1:]))
start, wall = time.process_time(), time.perf_counter()
plan_merge(recipe, find=Path, presets=load_presets(()))
print(time.process_time() - start, time.perf_counter() - wall)
"""


@dataclass(frozen=True)
class Cost:
    """What a process took."""

    cpu: float
    wall: float
    memory: int


@dataclass(frozen=True)
class Row:
    """One line of the table; None where a way has no such number."""

    what: str
    rank: int
    cpu: float
    wall: float | None = None
    memory: float | None = None
    ratio: str = ""


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = [row for rank in options.ranks for row in benchmark(rank, Path(folder), options)]
    print(f"{_machine()}; torch {torch.__version__}; Python {platform.python_version()}\n")
    print(table(rows))


def benchmark(rank: int, folder: Path, options: argparse.Namespace) -> list[Row]:
    """All rows of one rank."""
    core = arithmetic(_ours(rank), rank, options.repeat)
    rows = [] if options.no_files else _whole_processes(rank, folder, options.repeat, core)
    rows.append(Row("our core, one thread, error measured", rank, core))
    low = arithmetic(_svd_lowrank(rank), rank, 1)
    rows.append(
        Row(
            "torch.svd_lowrank(q=rank, niter=2) of the dense sum",
            rank,
            low,
            ratio=f"{low / core:.0f} x our core",
        )
    )
    if not options.no_dense:
        dense = arithmetic(_dense_svd(rank), rank, 1)
        rows.append(
            Row("torch.linalg.svd of the dense sum", rank, dense, ratio=f"{dense / core:.0f} x our core")
        )
    return rows


def _whole_processes(rank: int, folder: Path, repeat: int, core: float) -> list[Row]:
    """Rows of whole processes.

    Args:
        core: CPU seconds of the arithmetic alone.
    """
    files = [make_lora(folder / f"r{rank}_{name}.safetensors", rank, seed) for seed, name in enumerate("ab")]
    output = folder / "merged.safetensors"
    floor = _least([sys.executable, "-c", _FLOOR, *map(str, files), str(output)], repeat)
    inputs = [f"{file}:{strength}" for file, strength in zip(files, _STRENGTHS)]
    program = [sys.executable, "-m", "lib_loramerge"]
    whole = [*program, "merge", *inputs, "-o", str(output), "--dtype", "float16", "--overwrite", "--json"]
    looks = {name: [*program, name, *inputs, "--json"] for name in ("compare", "advise")}
    ours, kept, *looking = _least_in_turns([[*whole, "--rank", str(rank)], whole, *looks.values()], repeat)
    base = _least([sys.executable, "-c", "import torch, safetensors"], repeat)
    planning = [_seconds([sys.executable, "-c", _PLANNING, *inputs]) for _ in range(repeat)]
    for file in (*files, output):
        file.unlink()

    def row(what: str, cost: Cost, ratio: str = "") -> Row:
        return Row(what, rank, cost.cpu, cost.wall, (cost.memory - base.memory) / 2**20, ratio)

    beyond = (ours.cpu - base.cpu) / core
    against = f"{ours.wall / floor.wall:.2f} x the floor; CPU beyond importing torch {beyond:.2f} x our core"
    return [
        row("merge to the inputs' rank, files to file", ours, against),
        row("merge, all ranks kept: a file twice as large", kept),
        *(
            row(f"{name}, files to report", cost, f"{cost.cpu / kept.cpu:.2f} x the CPU of merge, all ranks")
            for name, cost in zip(looks, looking, strict=True)
        ),
        Row("planning alone, two headers", rank, *map(min, zip(*planning))),
        row("the floor: safetensors reads both, writes one", floor),
    ]


def _seconds(command: list[str]) -> tuple[float, float]:
    """CPU and wall seconds that a process prints."""
    cpu, wall = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    return float(cpu), float(wall)


def make_lora(path: Path, rank: int, seed: int, layers: Mapping[str, tuple[int, int]] | None = None) -> Path:
    """A random float16 SDXL LoRA whose components fall as 1 / sqrt(j); by default of all layers."""
    generator = torch.Generator().manual_seed(seed)
    fall = torch.arange(1, rank + 1).pow(-0.5)
    tensors = {}
    for name, (out, in_) in (layers or sdxl_layers()).items():
        tensors[f"{name}.lora_up.weight"] = (torch.randn(out, rank, generator=generator) * fall * 0.02).half()
        tensors[f"{name}.lora_down.weight"] = (torch.randn(rank, in_, generator=generator) * 0.02).half()
        tensors[f"{name}.alpha"] = torch.tensor(rank / 2)
    save_file(tensors, str(path), {"ss_base_model_version": "sdxl_base_v1-0"})
    return path


def _least(command: list[str], repeat: int) -> Cost:
    """The cheapest of several runs of a process, after one that warms the file cache."""
    return _least_in_turns([command], repeat)[0]


def _least_in_turns(commands: list[list[str]], repeat: int) -> list[Cost]:
    """:func:`_least` of several processes, run in turns so that a busy moment hits all of them."""
    rounds = [[run(command) for command in commands] for _ in range(repeat + 1)][1:]
    return [
        Cost(min(c.cpu for c in costs), min(c.wall for c in costs), max(c.memory for c in costs))
        for costs in zip(*rounds)
    ]


def run(command: list[str]) -> Cost:
    """Run a process; its CPU and wall seconds, and its peak of memory that no file backs."""
    start = time.perf_counter()
    before = os.times()
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    memory = 0
    while True:
        memory = max(memory, _anonymous_memory(child.pid))
        try:
            out, err = child.communicate(timeout=0.02)
            break
        except subprocess.TimeoutExpired:
            continue
    wall = time.perf_counter() - start
    after = os.times()
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{err.decode()}")
    del out
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Cost(cpu, wall, memory)


def _anonymous_memory(pid: int) -> int:
    """Bytes of a process's resident memory that no file backs; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def arithmetic(merge: Callable[[list[LowRank]], object], rank: int, repeat: int) -> float:
    """CPU seconds of one way for all layers, on one thread: per shape, times the number of layers."""
    torch.set_num_threads(1)
    total = 0.0
    with torch.no_grad():
        for (out, in_), count in shape_counts().items():
            generator = torch.Generator().manual_seed(out + in_)
            deltas = [
                LowRank(
                    (torch.randn(out, rank, generator=generator) * 0.02).half(),
                    (torch.randn(rank, in_, generator=generator) * 0.02).half(),
                    rank / 2,
                )
                for _ in _STRENGTHS
            ]
            least = float("inf")
            for _ in range(repeat):
                start = time.process_time()
                merge(deltas)
                least = min(least, time.process_time() - start)
            total += least * count
    return total


def _ours(rank: int) -> Callable[[list[LowRank]], object]:
    def merge(deltas: list[LowRank]) -> object:
        result = stack(deltas, _STRENGTHS)
        return cut_layer(result, torch.float16, lambda spectrum: min(rank, spectrum.rank))

    return merge


def _sum(deltas: list[LowRank]) -> torch.Tensor:
    return sum(w * d.scale * (d.up.float() @ d.down.float()) for w, d in zip(_STRENGTHS, deltas))  # type: ignore


def _svd_lowrank(rank: int) -> Callable[[list[LowRank]], object]:
    def merge(deltas: list[LowRank]) -> object:
        u, s, v = torch.svd_lowrank(_sum(deltas), q=rank, niter=2)
        return (u * s).half(), v.mT.half()

    return merge


def _dense_svd(rank: int) -> Callable[[list[LowRank]], object]:
    def merge(deltas: list[LowRank]) -> object:
        u, s, vh = torch.linalg.svd(_sum(deltas))
        return (u[:, :rank] * s[:rank]).half(), vh[:rank].half()

    return merge


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| rank | way | CPU s | wall s | MiB | |", "|---:|---|---:|---:|---:|---|"]
    for row in rows:
        wall = "" if row.wall is None else f"{row.wall:.2f}"
        memory = "" if row.memory is None else f"{row.memory:.0f}"
        lines.append(f"| {row.rank} | {row.what} | {row.cpu:.2f} | {wall} | {memory} | {row.ratio} |")
    return "\n".join(lines)


def _machine() -> str:
    name = platform.processor() or platform.machine()
    try:
        info = Path("/proc/cpuinfo").read_text()
        name = next(line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 128])
    parser.add_argument(
        "--repeat", type=int, default=3, help="runs of the fast ways, of which the least counts"
    )
    parser.add_argument("--folder", type=Path, help="where the files are made; 4 GB at rank 128")
    parser.add_argument("--no-dense", action="store_true", help="leave out the dense SVD, a minute per rank")
    parser.add_argument("--no-files", action="store_true", help="only the arithmetic")
    return parser.parse_args()


if __name__ == "__main__":
    main()
