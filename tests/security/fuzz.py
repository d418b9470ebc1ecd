"""Damaged and spliced adapter files, one after another, for as long as one likes.

``python tests/security/fuzz.py --seconds 3600 [--seed N]``: ends with status 1 at the first file that gives
anything but a tensor or a sentence, takes more than ten seconds, or by which the process grows by
more than 500 MB. That file is kept.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save

from lib_loramerge.errors import LoraMergeError
from lib_loramerge.files import open_file

LIMIT_MB, LIMIT_SECONDS = 500, 10.0
TENSORS = {
    "a.lora_up.weight": torch.randn(8, 2),
    "a.lora_down.weight": torch.randn(2, 8).T,
    "a.alpha": torch.ones(()),
}
TOKENS = [
    b"\xff" * 8, bytes(8), b"[" * 50, b"{" * 50, b"]", b"}", b"(", b"t", b"R", b"Q", b"b", b"\x85", b"2",
    b"0", b"h\0", b"r\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 8, b"1e999", b"-1", b"9" * 30, b'"', b"\\ud800",
    b"null", b"\x8a\xff" + b"\x7f" * 255, b"cos\nsystem\n", b"ctorch\nFloatStorage\n", b"\xc3\x28",
]  # fmt: skip


def seeds() -> list[tuple[str, bytes]]:
    found = [(".safetensors", save({key: value.contiguous() for key, value in TENSORS.items()}, {"x": "é"}))]
    for old in (False, True):
        buffer = io.BytesIO()
        torch.save({"state_dict": TENSORS, "epoch": 1}, buffer, _use_new_zipfile_serialization=not old)
        found.append((".pt", buffer.getvalue()))
    return found


def changed(content: bytes, chance: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        # Headers and pickles stand at the start.
        place = chance.randrange(min(len(data), chance.choice((64, 1024, 1 << 20))) or 1)
        kind = chance.randrange(4)
        if kind == 0 and data:
            data[min(place, len(data) - 1)] = chance.randrange(256)
        elif kind == 1:
            data[place:place] = chance.choice(TOKENS)
        elif kind == 2:
            token = chance.choice(TOKENS)
            data[place : place + len(token)] = token
        else:
            del data[place : place + chance.choice((1, 4, 100))]
    return bytes(data)


def grown_mb() -> float:
    if sys.platform != "linux":
        return 0.0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz(seconds: float, seed: int, folder: Path) -> tuple[int, str]:
    """How many files were tried, and what went wrong with the last one; nothing when empty."""
    chance, started, tried = random.Random(seed), time.monotonic(), 0
    files, start_mb = seeds(), grown_mb()
    while time.monotonic() - started < seconds:
        suffix, content = chance.choice(files)
        path = folder / f"fuzzed{suffix}"
        path.write_bytes(changed(content, chance))
        tried, begun = tried + 1, time.process_time()
        try:
            with open_file(path) as file:
                for key in file.tensors:
                    file.read(key)
        except LoraMergeError as error:
            if len(str(error)) > 1_000 + len(str(path)):
                return tried, f"{path}: an endless sentence"
        except Exception as error:
            return tried, f"{path}: {type(error).__name__}: {error}"
        if time.process_time() - begun > LIMIT_SECONDS:
            return tried, f"{path}: took {time.process_time() - begun:.0f} s"
        if grown_mb() - start_mb > LIMIT_MB:
            return tried, f"{path}: grew by {grown_mb() - start_mb:.0f} MB"
    return tried, ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    tried, wrong = fuzz(options.seconds, options.seed, Path(tempfile.mkdtemp(prefix="loramerge-fuzz-")))
    print(f"{tried:,} files, seed {options.seed}: {wrong or 'nothing but tensors and sentences'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
