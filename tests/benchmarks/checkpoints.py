"""What baking and extracting cost, as ratios of one run.

    python tests/benchmarks/checkpoints.py [--gigabytes 3] [--rank 64]

Baking: a float16 file of SDXL's linear layers, as many as the size holds, with every one of them changed at
rank 32, against copying that file; CPU seconds of whole processes beyond an empty one of theirs, each the
least of several runs in turns.
Extraction: one layer of each of SDXL's shapes times its count, against the singular value decomposition that
other extractors make of it. Memory is anonymous memory beyond an empty process, its largest sample.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from merge_sdxl import Cost, make_lora, run
from sdxl_shapes import sdxl_layers, shape_counts

from lib_loramerge.delta.krylov import leading
from lib_loramerge.delta.storing import round_cut

COPY = "import shutil, sys, os; shutil.copyfile(*sys.argv[1:]); f = os.open(sys.argv[2], 0); os.fsync(f)"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", choices=("bake", "extract"), default=None)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be used")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only != "extract":
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            baking(Path(name), options.gigabytes, options.repeat)
    if options.only != "bake":
        extraction(options.rank)


def baking(folder: Path, gigabytes: float, repeat: int) -> None:
    base, out = folder / "base.safetensors", folder / "out.safetensors"
    layers = some_layers(gigabytes)
    make_checkpoint(base, layers)
    lora = make_lora(folder / "lora.safetensors", 32, 0, layers)
    program = [sys.executable, "-m", "lib_loramerge", "bake", str(base), str(lora)]
    bake = [*program, "-o", str(out), "--overwrite"]
    commands = {
        "empty": [sys.executable, "-c", "pass"],
        "copy": [sys.executable, "-c", COPY, str(base), str(out)],
        "dry run": [*bake, "--dry-run"],
        "report": [*bake, "--no-hash"],
        "report and hashes": bake,
    }
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for _ in range(repeat):
        for name, command in commands.items():
            costs[name].append(run(command))
    cpu = {name: min(cost.cpu for cost in row) for name, row in costs.items()}
    memory = {name: max(cost.memory for cost in row) for name, row in costs.items()}
    copied = cpu["copy"] - cpu["empty"]
    print(f"{base.stat().st_size / 1e9:.2f} GB, {len(layers)} layers, copied in {copied:.2f} CPU-s")
    for name in ("report", "report and hashes"):
        seconds = cpu[name] - cpu["dry run"]
        print(
            f"baked with {name}: {seconds:.2f} CPU-s, {seconds / copied:.2f} x the copy; "
            f"{(memory[name] - memory['dry run']) / 2**20:,.0f} MiB more than a dry run"
        )


def some_layers(gigabytes: float) -> dict[str, tuple[int, int]]:
    """Layers of SDXL from all over it whose float16 weights have about that size."""
    layers = sdxl_layers()
    whole = sum(2e-9 * out * width for out, width in layers.values())
    step = max(1, round(whole / gigabytes))
    return dict(list(layers.items())[::step])


def make_checkpoint(path: Path, layers: Mapping[str, tuple[int, int]]) -> None:
    """The layers under their names in a checkpoint."""
    header, place = {}, 0
    for name, (out, width) in layers.items():
        end = place + 2 * out * width
        header[_key(name)] = {"dtype": "F16", "shape": [out, width], "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    chunk = (torch.randn(1 << 22) * 0.03).half().numpy().tobytes()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, place, len(chunk)):
            file.write(chunk[: place - start])


def _key(name: str) -> str:
    """Name in a checkpoint of a layer in kohya's spelling; the second text encoder's is Hugging Face's."""
    from lib_loramerge.models import checkpoint_keys

    places = checkpoint_keys("sdxl", name)
    whole = [source[0].key for source in places if source[0].take is None]
    return whole[0] if whole else f"text_encoder_2.{name}.weight"


def extraction(rank: int) -> None:
    ours = theirs = 0.0
    for shape, count in sorted(shape_counts().items()):
        side = torch.arange(1, min(shape) + 1, dtype=torch.float32)
        matrix = torch.randn(shape[0], len(side)) @ (torch.randn(len(side), shape[1]) / side[:, None])
        start = time.process_time()
        spectrum = leading(matrix, rank, "layer")
        round_cut(spectrum, min(rank, spectrum.rank), torch.float16)
        middle = time.process_time()
        torch.linalg.svd(matrix)
        ours += count * (middle - start)
        theirs += count * (time.process_time() - middle)
    print(f"extracted at rank {rank}: {ours:.0f} CPU-s, singular value decompositions {theirs:.0f} CPU-s,")
    print(f"{theirs / ours:.1f} x less")


if __name__ == "__main__":
    main()
