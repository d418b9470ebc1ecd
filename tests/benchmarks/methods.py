"""What the merge methods cost for two SDXL LoRAs, and TIES beside PEFT's way of doing it.

    python tests/benchmarks/methods.py [--rank 32] [--methods ties della] [--no-peft] [--all-shapes]

Arithmetic alone, float16 factors in, float16 factors of the same rank out, CPU seconds on one thread. Each
shape is measured once (least of ``--repeat`` runs; PEFT's way once) and multiplied by the number of SDXL's
layers of that shape. By default four shapes that stand for the others, each of the 986 layers counted with
the nearest in size; ``--all-shapes`` measures all twelve.

PEFT's way is its ``ties_svd``: deltas formed whole, ``peft.utils.merge_utils.ties`` (trim by topk), and
``torch.linalg.svd`` with full matrices. The last column is how far our truncated error is above the least
possible, by the singular values of that SVD. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from peft.utils import merge_utils as peft
from torch import Tensor

from lib_loramerge.delta import Delta, LowRank, Stored, cut_layer
from lib_loramerge.methods import METHODS, LayerContext
from tests.benchmarks.sdxl_shapes import shape_counts

_FEW = ((640, 640), (1280, 1280), (1280, 5120), (10240, 1280))
_DENSITY = 0.5


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    counts = shape_counts() if options.all_shapes else _few_counts()
    print(f"rank {options.rank}, density {_DENSITY}, {sum(counts.values())} layers, CPU seconds")
    with torch.no_grad():
        for name in options.methods:
            _print_method(name, counts, options)
        if options.peft:
            _print_peft(counts, options)


def _print_method(name: str, counts: Counter[tuple[int, int]], options: argparse.Namespace) -> None:
    """One line: all layers, and a layer of each shape, merging and cutting apart."""
    total, cells = 0.0, []
    for shape, count in counts.items():
        deltas = _deltas(shape, options.rank)
        merging, merged = _least(lambda deltas=deltas: _merge(name, deltas), options.repeat)
        cutting, _ = _least(lambda merged=merged: _cut(merged, options.rank), options.repeat)
        total += count * (merging + cutting)
        cells.append(f"{shape[0]}x{shape[1]} {1e3 * merging:.0f}+{1e3 * cutting:.0f} ms")
    print(f"{name:16}{total:9.2f} s   {', '.join(cells)}", flush=True)


def _print_peft(counts: Counter[tuple[int, int]], options: argparse.Namespace) -> None:
    ours, theirs = 0.0, 0.0
    for shape, count in counts.items():
        deltas = _deltas(shape, options.rank)
        own, stored = _least(lambda deltas=deltas: _cut(_merge("ties", deltas), options.rank), options.repeat)
        other, values = _least(lambda deltas=deltas: _peft_ties(deltas, options.rank), 1)
        ours, theirs = ours + count * own, theirs + count * other
        least = float(values[options.rank :].double().square().sum()) ** 0.5
        excess = _error_before_rounding(_merge("ties", deltas), options.rank) / least - 1
        lost = (stored.error_sq / stored.exact_sq) ** 0.5
        print(
            f"{shape[0]}x{shape[1]}: ties {own:.3f} s, PEFT {other:.3f} s, {other / own:.1f} times; "
            f"the rank loses {lost:.0%}, excess {excess:.1e}",
            flush=True,
        )
    print(f"all layers: ties {ours:.0f} s, PEFT {theirs:.0f} s, {theirs / ours:.1f} times")


def _merge(name: str, deltas: list[LowRank]) -> Delta:
    method = METHODS[name]
    params = {param.name: param.default for param in method.params}
    params |= {"density": _DENSITY} if "density" in params else {}
    return method.merge(deltas, [1.0] * len(deltas), LayerContext("a.layer", strengths=(1.0, 1.0)), **params)


def _cut(delta: Delta, rank: int) -> Stored:
    stored = cut_layer(delta, torch.float16, lambda spectrum: min(rank, spectrum.rank), most=rank)
    assert stored is not None
    return stored


def _error_before_rounding(delta: Delta, rank: int) -> float:
    stored = cut_layer(delta, torch.float64, lambda spectrum: min(rank, spectrum.rank), most=rank)
    assert stored is not None
    return stored.error_sq**0.5


def _peft_ties(deltas: list[LowRank], rank: int) -> Tensor:
    dense = [delta.scale * (delta.up.float() @ delta.down.float()) for delta in deltas]
    merged = peft.ties(dense, torch.ones(len(dense)), _DENSITY)
    u, s, vh = torch.linalg.svd(merged)
    (u[:, :rank] * s[:rank]).half()
    vh[:rank].half()
    return s


def _deltas(shape: tuple[int, int], rank: int) -> list[LowRank]:
    generator = torch.Generator().manual_seed(sum(shape))
    return [
        LowRank(
            (torch.randn(shape[0], rank, generator=generator) * 0.02).half(),
            (torch.randn(rank, shape[1], generator=generator) * 0.02).half(),
            rank / 2,
        )
        for _ in range(2)
    ]


def _least(run: Callable[[], object], repeat: int) -> tuple[float, object]:
    least, result = float("inf"), None
    for _ in range(repeat):
        start = time.process_time()
        result = run()
        least = min(least, time.process_time() - start)
    return least, result


def _few_counts() -> Counter[tuple[int, int]]:
    """SDXL's layers, each under the nearest in size of the few shapes."""
    counts: Counter[tuple[int, int]] = Counter()
    for (out, in_), count in shape_counts().items():
        nearest = min(_FEW, key=lambda few: abs(few[0] * few[1] - out * in_))
        counts[nearest] += count
    return counts


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=2, help="runs, of which the least counts")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--no-peft", dest="peft", action="store_false", help="leave out PEFT's way, a minute")
    parser.add_argument("--all-shapes", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
