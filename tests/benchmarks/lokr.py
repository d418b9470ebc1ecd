"""What layers of whole-matrix LoKr cost, alone and merged with a LoRA, in CPU seconds on one thread.

    python tests/benchmarks/lokr.py [--side 4096]

A layer of Klein 9B is 4096 x 4096, of Flux.1 3072 x 3072 up to 3072 x 12288, of Z-Image 3840 x 3840. Peak
memory is that of the process, torch included.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from lib_loramerge.adapters import build
from lib_loramerge.delta import LowRank, cut_layer, decompose, stack
from lib_loramerge.merge.memory import peak_memory_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=32)
    options = parser.parse_args()
    side, rank = options.side, options.rank
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    fall = torch.arange(1, side // 8 + 1, dtype=torch.float32) ** -0.7
    slots = {
        "lokr_w1": torch.randn(8, 8, generator=generator),
        "lokr_w2": torch.randn(side // 8, side // 8, generator=generator) * fall,
    }
    up, down = torch.randn(side, rank, generator=generator), torch.randn(rank, side, generator=generator)
    lora = LowRank(0.3 * up, 0.3 * down, float(rank))
    lokr = build(slots, where="layer").weight
    assert isinstance(lokr, LowRank)
    both = stack([lokr, lora], [0.8, 0.7])
    report("read", lambda: build(slots, where="layer"))
    report("inspect", lambda: decompose(lokr, vectors=False))
    half = torch.float16
    report(f"resize to {rank}", lambda: cut_layer(stack([lokr], [0.8]), half, lambda s: rank, most=rank))
    report(f"merge with a LoRA to {rank}", lambda: cut_layer(both, half, lambda s: rank, most=rank))
    report("merge with a LoRA, all ranks", lambda: cut_layer(both, half, lambda s: s.rank, most=side))
    print(f"peak memory {(peak_memory_bytes() or 0) / 1e6:,.0f} MB")


def report(what: str, work: Callable[[], object]) -> None:
    start = time.process_time()
    work()
    print(f"{what:<32}{time.process_time() - start:8.2f} s")


if __name__ == "__main__":
    main()
