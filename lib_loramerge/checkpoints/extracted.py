"""What an extraction found and lost: its report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import models
from ..errors import Sentence
from ..report import count_text, histogram_text, percent, relative
from .advising import ExtractAdvice
from .differing import Found, Pair
from .predicting import predicts_v
from .reading import vaes_differ

_FAR = 0.3  # Median size of the difference, over that of the weights, from which on the base is doubted.
_LOSSY = 0.8  # Error from which on a LoRA is hardly worth writing.


@dataclass(frozen=True)
class ExtractReport:
    """The outcome of an extraction; of a dry run what it would be.

    Attributes:
        error: Distance of the LoRA from the difference of all matrices of the parts asked for, over its norm.
        by_part: The same by part of the model.
        noise: Share of the squared difference that is rounding of the two files.
        noise_by_part: The same by part of the model.
        change: Norm of the difference over that of the base's weights.
        cosine: Between the weights of the two, where they look unrelated.
        advice: Of a dry run: what other ranks would cost and lose.
    """

    output: str | None
    size_bytes: int | None
    tuned: str
    base: str
    base_model: str
    layers: int
    layers_equal: int
    ranks: Mapping[int, int]
    capped: int
    error: float
    by_part: Mapping[str, float]
    noise: float
    noise_by_part: Mapping[str, float]
    change: float
    worst: Sequence[Mapping[str, Any]]
    warnings: Sequence[str]
    skipped: Sequence[str]
    seconds: float
    cosine: float | None = None
    advice: ExtractAdvice | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return asdict(self)

    def to_text(self) -> str:
        """The report as a table for a terminal."""
        rows = [
            ("Written", self.output or "nothing"),
            *([("Size", f"{self.size_bytes / 1e6:,.2f} MB")] if self.size_bytes else []),
            ("Difference", f"{self.tuned} minus {self.base}, {self.base_model}"),
            ("", f"{percent(self.change)} of the weights; {percent(self.noise)} of it is rounding"),
            ("Layers", f"{self.layers} written; {self.layers_equal} are equal in both or differ by rounding"),
            ("Ranks", histogram_text(self.ranks) or "none"),
            ("Error", f"{percent(self.error)} of the difference of all matrices"),
            *(
                ("", f"{percent(error)}  {part}, of whose change {percent(noise)} is rounding")
                for (part, error), noise in zip(self.by_part.items(), self.noise_by_part.values())
            ),
            ("Worst layers", ""),
            *(("", f"{percent(row['error'])}  {row['layer']}") for row in self.worst),
        ]
        if self.capped:
            rows.append(
                ("Limited", f"{count_text(self.capped, 'layer')} reached the largest rank (--max-rank)")
            )
        rows += [("Skipped", text) for text in self.skipped]
        rows += [("Warning", text) for text in self.warnings]
        lines = [f"{label:<13}{text}".rstrip() for label, text in rows]
        return "\n".join([*lines, *(self.advice.to_rows() if self.advice is not None else [])])


def report_of(
    pair: Pair,
    output: Path | None,
    size: int | None,
    found: Sequence[Found],
    start: float,
    advice: ExtractAdvice | None = None,
) -> ExtractReport:
    matrices = [layer for layer in found if len(pair.base.shape(pair.identity, layer.name)) > 1]
    exact = sum(layer.exact for layer in matrices)
    weights = sum(layer.size for layer in matrices)
    by_part: dict[str, list[Found]] = {}
    for layer in sorted(matrices, key=lambda layer: models.component(layer.name)):
        by_part.setdefault(models.component(layer.name), []).append(layer)
    error = error_of(matrices)
    moved = sorted((layer.exact / layer.size) ** 0.5 for layer in matrices if layer.size > 0)
    warnings = list(pair.notes)
    cosine = None
    # What is lost of the rounding is no loss, and no higher rank is needed for it.
    lost = sum(max(0.0, layer.lost - layer.noise) for layer in matrices)
    if relative(lost, exact) > _LOSSY:
        warnings.append(
            Sentence(
                "{share} of the difference is not in the LoRA: it is spread over more directions than the "
                "ranks hold. Allow a higher rank, or add the difference itself to a checkpoint (loramerge "
                "bake --add, on the command line).",
                percent(error),
            )
        )
    if moved and moved[len(moved) // 2] > _FAR:
        tuned = sum(layer.tuned for layer in matrices)
        cosine = (
            sum(layer.inner for layer in matrices) / (tuned * weights) ** 0.5 if tuned * weights > 0 else 0.0
        )
        warnings.append(
            Sentence(
                "These two may not be base and fine-tune of one another: the cosine of their weights is "
                "{cosine}. Choose the base that it was trained from.",
                f"{cosine:.3f}",
            )
        )
    if predicts_v(pair.tuned) != predicts_v(pair.base):
        warnings.append("One predicts v, the other noise: the LoRA will carry the change of objective.")
    if vaes_differ(pair.tuned, pair.base):
        warnings.append("The VAEs differ; choose that VAE in the WebUI to get the same colours.")
    worst = sorted((x for x in matrices if x.exact > 0), key=lambda x: (-x.lost / x.exact, x.name))[:5]
    return ExtractReport(
        output=None if output is None else str(output),
        size_bytes=size,
        tuned=pair.tuned.path.name,
        base=pair.base.path.name,
        base_model=pair.base.architecture.label,
        layers=sum(layer.trained and layer.lost < layer.exact for layer in matrices),
        layers_equal=sum(not layer.trained for layer in matrices),
        ranks=dict(sorted(Counter(x.rank for x in matrices if x.rank).items(), reverse=True)),
        capped=sum(layer.capped for layer in matrices),
        error=error,
        by_part={part: error_of(layers) for part, layers in by_part.items()},
        noise=_noise_of(matrices),
        noise_by_part={part: _noise_of(layers) for part, layers in by_part.items()},
        change=(exact / weights) ** 0.5 if weights > 0 else 0.0,
        worst=[{"layer": x.name, "error": relative(x.lost, x.exact)} for x in worst],
        warnings=warnings,
        skipped=[],
        seconds=round(time.perf_counter() - start, 3),
        cosine=cosine,
        advice=advice,
    )


def _noise_of(found: Sequence[Found]) -> float:
    exact = sum(layer.exact for layer in found)
    return min(1.0, sum(layer.noise for layer in found if layer.exact > 0) / exact) if exact > 0 else 0.0


def error_of(found: Sequence[Found]) -> float:
    return relative(sum(layer.lost for layer in found), sum(layer.exact for layer in found))
