"""What a checkpoint is, told from its header."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import models
from ..dialects import is_adapters
from ..errors import LoraMergeError
from ..files import read_header
from ..report import count_text
from .outcome import stored_bake
from .predicting import predicts_v
from .reading import EMA, VAES, Checkpoint


@dataclass(frozen=True)
class CheckpointFacts:
    """What ``inspect`` says of a checkpoint.

    Attributes:
        parts: Part of the model to its number of layers.
        dtypes: dtype to number of matrices.
        channels: That its first convolution reads; None for a transformer.
        prediction: ``"v"`` where the file says so.
        baked: What was baked in, as told by the recipe that we keep; () where there is none.
    """

    path: str
    size_bytes: int
    base_model: str
    reason: str
    files: int
    parts: Mapping[str, int]
    dtypes: Mapping[str, int]
    channels: int | None
    vae: bool
    ema: bool
    prediction: str
    baked: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return {"kind": "checkpoint", **asdict(self)}

    def to_text(self) -> str:
        """As lines for a terminal."""
        has = [name for name, there in (("VAE", self.vae), ("EMA weights", self.ema)) if there]
        rows = [
            ("File", self.path),
            ("Size", f"{self.size_bytes / 1e6:,.2f} MB in {count_text(self.files, 'file')}"),
            ("Checkpoint", f"{self.base_model} ({self.reason})"),
            (
                "Parts",
                ", ".join(f"{part} ({count_text(count, 'layer')})" for part, count in self.parts.items()),
            ),
            ("Also holds", ", ".join(has) or "nothing"),
            (
                "Precision",
                ", ".join(
                    f"{dtype} ({count_text(count, 'matrix', 'matrices')})"
                    for dtype, count in self.dtypes.items()
                ),
            ),
        ]
        if self.channels not in (None, 4):
            rows.append(("Channels", f"{self.channels}: an inpainting or editing model"))
        if self.prediction:
            rows.append(("Predicts", self.prediction))
        rows += [("Baked in", text) for text in self.baked]
        return "\n".join(f"{label:<13}{text}" for label, text in rows)


def is_checkpoint(path: Path) -> bool:
    """Whether a file is one by its tensors' names; a folder, an index of shards and a GGUF file are one."""
    if path.is_dir() or path.name.endswith(".safetensors.index.json"):
        return True
    if path.suffix.lower() == ".gguf":
        return path.is_file()
    if path.suffix.lower() != ".safetensors":
        return False
    try:
        keys = read_header(path).tensors.keys()
    except LoraMergeError:
        return False
    if not keys or any(map(is_adapters, keys)):
        return False
    try:
        with Checkpoint(path):
            return True
    except LoraMergeError:
        # One that is refused says why, where it is used as one.
        return any(key.startswith(("model.diffusion_model.", "first_stage_model.")) for key in keys)


def look(path: Path) -> CheckpointFacts:
    """Headers alone are read.

    Raises:
        LoraMergeError: It is no checkpoint that is known here.
    """
    with Checkpoint(path) as checkpoint:
        keys = checkpoint.keys
        matrices = [places[0].key for places in checkpoint.layers.values()]
        counts = Counter(
            checkpoint.info(key).dtype for key in matrices if len(checkpoint.info(key).shape) > 1
        )
        first = checkpoint.where("lora_unet_input_blocks_0_0")
        return CheckpointFacts(
            path=str(path),
            size_bytes=sum(file.header.size for file in checkpoint.files),
            base_model=checkpoint.architecture.label,
            reason=checkpoint.reason,
            files=len(checkpoint.files),
            parts=dict(Counter(models.component(layer) for layer in checkpoint.layers)),
            dtypes=dict(counts.most_common()),
            channels=checkpoint.info(first[0].key).shape[1] if first else None,
            vae=any(key.startswith(VAES) for key in keys),
            ema=any(key.startswith(EMA) for key in keys),
            prediction="v" if predicts_v(checkpoint) else "",
            baked=_baked(checkpoint.files[0].header.metadata),
        )


def _baked(metadata: Mapping[str, str]) -> tuple[str, ...]:
    bake = stored_bake(metadata)
    inputs = bake.get("inputs")
    if not isinstance(inputs, list) or "base" not in bake:
        return ()
    return (*map(str, inputs), f"base: {bake['base']}")
