"""What baking and extracting cost, as ratios of one run.

    python tests/benchmarks/checkpoints.py [--gigabytes 3.4] [--rank 64]

Baking: a float16 file of SDXL's linear layers, again and again until it has the size, with every one of the
first 986 changed, against copying that file; CPU seconds of whole processes beyond an empty one of theirs.
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from merge_sdxl import make_lora, run
from sdxl_shapes import sdxl_layers, shape_counts

from lib_loramerge.delta.krylov import leading
from lib_loramerge.delta.storing import round_cut

COPY = "import shutil, sys, os; shutil.copyfile(*sys.argv[1:]); f = os.open(sys.argv[2], 0); os.fsync(f)"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=3.4)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be used")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        baking(Path(name), options.gigabytes)
    extraction(options.rank)


def baking(folder: Path, gigabytes: float) -> None:
    base, out = folder / "base.safetensors", folder / "out.safetensors"
    make_checkpoint(base, gigabytes)
    lora = make_lora(folder / "lora.safetensors", 32, 0)
    bake = [
        sys.executable,
        "-m",
        "lib_loramerge",
        "bake",
        str(base),
        str(lora),
        "-o",
        str(out),
        "--overwrite",
    ]
    empty = run([sys.executable, "-c", "pass"])
    copied = run([sys.executable, "-c", COPY, str(base), str(out)])
    idle = run([*bake, "--dry-run"])
    rows = [("report", run([*bake, "--no-hash"])), ("report and hashes", run(bake))]
    print(f"{base.stat().st_size / 1e9:.2f} GB copied in {copied.cpu - empty.cpu:.2f} CPU-s")
    for what, cost in rows:
        seconds = cost.cpu - idle.cpu
        print(
            f"baked with {what}: {seconds:.2f} CPU-s, {seconds / (copied.cpu - empty.cpu):.2f} x the copy; "
            f"{(cost.memory - idle.memory) / 2**20:,.0f} MiB more than a dry run"
        )


def make_checkpoint(path: Path, gigabytes: float) -> None:
    """SDXL's linear layers under their names in a checkpoint, and copies of them that nothing changes."""
    shapes = {_key(name): shape for name, shape in sdxl_layers().items()}
    numbers = sum(out * width for out, width in shapes.values())
    copies = max(0, round(gigabytes * 1e9 / 2 / numbers) - 1)
    for copy in range(copies):
        shapes |= {f"copy.{copy}.{i}.weight": shape for i, shape in enumerate(sdxl_layers().values())}
    header, place = {}, 0
    for key, (out, width) in shapes.items():
        header[key] = {
            "dtype": "F16",
            "shape": [out, width],
            "data_offsets": [place, place + 2 * out * width],
        }
        place += 2 * out * width
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
