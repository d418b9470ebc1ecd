"""Lists of block weights that are the same for all models of a kind, and how blocks are written in a row.

Only the standard library is imported here: a WebUI's start checks presets by these, and needs no base model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_IN = tuple(f"IN{n:02}" for n in range(12))
_OUT = tuple(f"OUT{n:02}" for n in range(12))
# Text encoders, and what stands before and after the numbered blocks.
TEXT_ENCODERS, EDGES = frozenset({"BASE", "CLIP", "T5"}), frozenset({"IN", "OUT"})
SD_FULL = ("BASE", *_IN, "M00", *_OUT)


@dataclass(frozen=True)
class BlockList:
    """One list of block weights.

    Attributes:
        use: What it is for, in a few words.
        ids: The blocks that its entries belong to, in order.
        rest: Weight of the U-Net's blocks that it leaves out; blocks of other models keep 1.
    """

    use: str
    ids: tuple[str, ...]
    rest: float = 1.0


# Those of sd-webui-lora-block-weight. What 12, 17 and 20 leave out of the 26 blocks has weight 0.
UNET_LISTS = (
    BlockList("SDXL, attention layers", ("BASE", "IN04", "IN05", "IN07", "IN08", "M00", *_OUT[:6]), 0.0),
    BlockList(
        "SD1 and SD2, attention layers",
        ("BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *_OUT[3:]),
        0.0,
    ),
    BlockList("SDXL, all layers", ("BASE", *_IN[:9], "M00", *_OUT[:9]), 0.0),
    BlockList("SD1 and SD2, all layers", SD_FULL, 0.0),
)


def in_ranges(ids: Iterable[str]) -> str:
    """``BASE IN04 IN05 IN07`` -> ``BASE IN04-IN05 IN07``."""
    runs: list[list[str]] = []
    for block in ids:
        if runs and _follows(runs[-1][-1], block):
            runs[-1].append(block)
        else:
            runs.append([block])
    return " ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _follows(before: str, after: str) -> bool:
    word, number = before.rstrip("0123456789"), before[len(before.rstrip("0123456789")) :]
    return bool(number) and after == f"{word}{int(number) + 1:0{len(number)}}"
