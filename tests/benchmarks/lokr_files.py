"""Time and memory of merging a whole-matrix LoKr of a large base model with a LoRA, as whole files.

    python tests/benchmarks/lokr_files.py [--model flux1|klein9b|zimage] [--rule "--rank 32"] [--layers N]
        [--command merge|advise|compare] [--both]

Every layer of the blocks is in both files: the LoKr with factor 8 and both factors whole, in bfloat16, the
LoRA with rank 32, or with ``--both`` another such LoKr. The command runs in a process of its own; peak memory
is that process's.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save_file

from lib_loramerge.models import ARCHITECTURES
from lib_loramerge.models.table import measure

ROOT = Path(__file__).resolve().parents[2]
MODELS = {"flux1": ("flux1", ""), "klein9b": ("flux2", "Klein 9B"), "zimage": ("zimage", "")}
FACTOR, RANK = 8, 32


def shapes(model: str) -> Iterator[tuple[str, int, int]]:
    """(name, rows, columns) of every linear layer of the blocks."""
    name, label = MODELS[model]
    record = ARCHITECTURES[name]
    size = next(size for size in record.sizes if size.label == label)
    assert record.names is not None
    for path, text in record.names.shapes.items():
        shape = measure(text, size.dims)
        if "{}" not in path or len(shape) != 2 or None in shape:
            continue
        count = record.names.counts[path.partition(".{}")[0]]
        for number in range(int(count) if count.isdigit() else size.dims[count]):
            yield f"diffusion_model.{path.format(number)}", int(shape[0] or 0), int(shape[1] or 0)


def whole_lokr(rows: int, columns: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Both factors of one layer, with a falling spectrum."""
    fall = torch.arange(1, columns // FACTOR + 1, dtype=torch.float32) ** -0.5
    small = torch.randn(FACTOR, FACTOR, generator=generator)
    large = 1e-3 * torch.randn(rows // FACTOR, columns // FACTOR, generator=generator) * fall
    return {"lokr_w1": small.bfloat16(), "lokr_w2": large.bfloat16()}


def write(model: str, folder: Path, most: int | None, both: bool) -> tuple[int, float]:
    """The two files; the number of layers and of the model's weights in them."""
    generator = torch.Generator().manual_seed(0)
    lokr, lora = {}, {}
    layers = list(shapes(model))[:most]
    for name, rows, columns in layers:
        lokr |= {f"{name}.{slot}": one for slot, one in whole_lokr(rows, columns, generator).items()}
        if both:
            lora |= {f"{name}.{slot}": one for slot, one in whole_lokr(rows, columns, generator).items()}
            continue
        up, down = (
            torch.randn(rows, RANK, generator=generator),
            torch.randn(RANK, columns, generator=generator),
        )
        lora[f"{name}.lora_B.weight"] = (1e-3 * up).bfloat16()
        lora[f"{name}.lora_A.weight"] = (1e-2 * down).bfloat16()
    save_file(lokr, folder / "lokr.safetensors")
    save_file(lora, folder / "lora.safetensors")
    return len(layers), sum(rows * columns for _, rows, columns in layers)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="klein9b")
    parser.add_argument("--rule", default="--rank 32", help="the rank rule, as for `loramerge merge`")
    parser.add_argument("--command", choices=("merge", "advise", "compare"), default="merge")
    parser.add_argument("--both", action="store_true", help="two LoKr")
    parser.add_argument("--layers", type=int, help="only the first of them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count, weights = write(options.model, folder, options.layers, options.both)
        sizes = [f"{path.stat().st_size / 1e6:,.0f} MB" for path in sorted(folder.glob("*.safetensors"))]
        print(f"{options.model}: {count} layers, {weights / 1e9:.2f} billion weights; {', '.join(sizes)}")
        command = [sys.executable, "-m", "lib_loramerge", options.command]
        command += [str(folder / "lokr.safetensors"), str(folder / "lora.safetensors")]
        if options.command == "merge":
            command += ["-o", str(folder / "out.safetensors"), *options.rule.split()]
        start = time.perf_counter()
        subprocess.run(
            command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL
        )
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"{options.command} {options.rule}: {time.perf_counter() - start:,.0f} s, "
            f"{used.ru_utime + used.ru_stime:,.0f} CPU s, peak {used.ru_maxrss * 1024 / 2**30:.2f} GiB"
        )


if __name__ == "__main__":
    main()
