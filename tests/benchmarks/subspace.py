"""What the subspace methods cost next to ``svd``: arithmetic of a whole SDXL merge, on one thread.

    python tests/benchmarks/subspace.py [--rank 32] [--repeat 5] [METHOD ..]

times every method with its own defaults and ``svd`` in one run, from the factors in memory to the rounded
tensors, on four shapes that stand for the 986 layers of an SDXL LoRA; each shape counts as often as layers
closest to it in size. CPU seconds, the least of several runs, so that ratios mean something on a busy machine
too. Nothing here is a test with a time limit.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from lib_loramerge.delta import LowRank, cut_layer  # noqa: E402
from lib_loramerge.methods import METHODS, LayerContext  # noqa: E402
from tests.benchmarks.sdxl_shapes import shape_counts  # noqa: E402

SHAPES = ((640, 640), (1280, 1280), (1280, 5120), (10240, 1280))
SUBSPACE = ("tsv", "iso", "np", "ssr", "knots", "core", "ctm")
# (method, parameters other than the defaults)
WAYS = (
    *((name, {}) for name in SUBSPACE),
    *((name, {"rule": "linear"}) for name in ("knots", "core")),
)


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    counts = represented()
    ways = [("svd", {}), *(way for way in WAYS if not options.methods or way[0] in options.methods)]
    seconds = dict.fromkeys(range(len(ways)), 0.0)
    for (out, in_), count in counts.items():
        deltas = [_random(out, in_, options.rank, seed) for seed in range(options.inputs)]
        least = dict.fromkeys(seconds, float("inf"))
        for _ in range(options.repeat):  # in turns, so that a busy moment hits all of them
            for index, (name, params) in enumerate(ways):
                least[index] = min(least[index], cpu_seconds(name, params, deltas, options.rank))
        for index in seconds:
            seconds[index] += least[index] * count
    print(
        f"{sum(counts.values())} layers, {options.inputs} x rank {options.rank}; torch {torch.__version__}\n"
    )
    print("| method | CPU s | times svd |\n|---|---:|---:|")
    for index, (name, params) in enumerate(ways):
        title = " ".join([name, *(f"{key}={value}" for key, value in params.items())])
        print(f"| {title} | {seconds[index]:.2f} | {seconds[index] / seconds[0]:.2f} |")


def represented() -> Counter[tuple[int, int]]:
    """How many SDXL layers each of the four shapes stands for: those nearest in size."""
    counts: Counter[tuple[int, int]] = Counter()
    for (out, in_), count in shape_counts().items():
        nearest = min(SHAPES, key=lambda shape: abs(sum(shape) - out - in_))
        counts[nearest] += count
    return counts


def cpu_seconds(name: str, params: dict[str, object], deltas: list[LowRank], rank: int) -> float:
    """One layer: the method, the cut to the rank, the rounding to float16 and the measured error."""
    method = METHODS[name]
    values = {param.name: param.default for param in method.params} | params
    context = LayerContext("lora_unet_a_layer", present=tuple(range(len(deltas))), rank_limit=rank)
    weights = [0.7, 0.6, 0.5, 0.4][: len(deltas)]
    start = time.process_time()
    with torch.no_grad():
        merged = method.merge(deltas, weights, context, **values)
        cut_layer(merged, torch.float16, lambda spectrum: min(rank, spectrum.rank))
    return time.process_time() - start


def _random(out: int, in_: int, rank: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    fall = torch.arange(1, rank + 1).pow(-0.5)
    up = (torch.randn(out, rank, generator=generator) * fall * 0.02).half()
    return LowRank(up, (torch.randn(rank, in_, generator=generator) * 0.02).half(), rank / 2)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", help="only these")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--inputs", type=int, default=2, choices=(2, 3, 4))
    parser.add_argument("--repeat", type=int, default=5, help="runs, of which the least counts")
    return parser.parse_args()


if __name__ == "__main__":
    main()
