"""What can be said of an extraction from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import models
from .differing import ExtractSettings
from .extracting import opened_pair
from .fitting import foreseen_bytes
from .outcome import shortened


@dataclass(frozen=True)
class Foreseen:
    """What an extraction would read and write.

    Attributes:
        layers: Part of the model to its number of matrices.
        dtypes: dtype of the tuned checkpoint's matrices to their number.
        size_bytes: Of the LoRA at most; layers that are equal in both are not written.
        disk_bytes: Of that and of what waits beside its place until all is known, at most.
        read_bytes: Of the two checkpoints.
    """

    tuned: str
    base: str
    base_model: str
    layers: Mapping[str, int]
    dtypes: Mapping[str, int]
    size_bytes: int
    disk_bytes: int
    read_bytes: int
    skipped: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return asdict(self)


def foresee(tuned: Path, base: Path, settings: ExtractSettings, output: Path | None = None) -> Foreseen:
    """Check from headers that a LoRA can be extracted.

    Raises:
        LoraMergeError: Whatever stops it, before any work.
    """
    with opened_pair(tuned, base, settings) as pair:
        if output is not None:
            pair.refuse_inputs(output)
        names = pair.layers()
        dtypes = Counter(pair.tuned.info(pair.tuned.layers[name][0].key).dtype for name in names)
        size, room = foreseen_bytes(pair, names)
        return Foreseen(
            tuned=tuned.name,
            base=base.name,
            base_model=pair.base.architecture.label,
            layers=dict(Counter(models.component(name) for name in names)),
            dtypes=dict(dtypes.most_common()),
            size_bytes=size,
            disk_bytes=room,
            read_bytes=sum(file.header.size for side in (pair.tuned, pair.base) for file in side.files),
            skipped=shortened([*pair.notes, *pair.skipped]),
        )
