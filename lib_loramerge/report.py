"""What a merge did, what it cost, and how exact the written file is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict

WORST_LAYERS = 5
EXACT_SUM = "the exact sum"
# Share of a LoRA in the file below which the report warns, and above which nothing was cut off.
WELL_KEPT, WHOLE = 0.95, 0.999
# Relative error of one number that is rounded to a dtype; a product of rounded factors has about 0.6 of it.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class LayerResult:
    """One layer of the result.

    Attributes:
        layer: Canonical layer name.
        rank: Rank as written; 0 when the layer cancelled out and is absent,
            None when it is written whole (``diff``, norms).
        error_sq: Squared Frobenius norm of (written - exact).
        exact_sq: Squared Frobenius norm of the exact result.
        from_sum_sq: Squared distance of what is written from the plain weighted sum; counted for
            methods that mean something else than the sum.
        sum_sq: Squared norm of that sum.
        doubt: Largest norm of the part of the exact result that float64 loses, where inputs cancel to their
            last digits; 0 where that is negligible.
    """

    layer: str
    rank: int | None
    error_sq: float
    exact_sq: float
    from_sum_sq: float = 0.0
    sum_sq: float = 0.0
    doubt: float = 0.0

    @property
    def error(self) -> float:
        """Relative Frobenius error, at most; 0 for an absent layer of norm 0."""
        return error_range([self])[1]

    def squares(self, sign: int) -> tuple[float, float]:
        """``error_sq`` and ``exact_sq`` as far off as they may be.

        Args:
            sign: 1 for the largest error, -1 for the least.
        """
        if not self.doubt:
            return self.error_sq, self.exact_sq
        error = max(0.0, self.error_sq**0.5 + sign * self.doubt)
        exact = max(0.0, self.exact_sq**0.5 - sign * self.doubt)
        if self.rank == 0:
            exact = error  # all is lost, however much it is
        return error * error, exact * exact


def error_range(results: Sequence[LayerResult]) -> tuple[float, float]:
    """The least and the largest relative error that layers may have together; mostly the same."""
    least, most = ([result.squares(sign) for result in results] for sign in (-1, 1))
    low, high = (relative(sum(own for own, _ in all_), sum(own for _, own in all_)) for all_ in (least, most))
    return low, high


def relative(error_sq: float, exact_sq: float) -> float:
    """``sqrt(error_sq / exact_sq)``, where 0 / 0 is 0."""
    if error_sq <= 0:
        return 0.0
    return (error_sq / exact_sq) ** 0.5 if exact_sq > 0 else float("inf")


class WorstLayer(TypedDict):
    """A layer with a large relative error; ``rank`` is None where it is written whole."""

    layer: str
    error: float
    rank: int | None


class WorstBlock(TypedDict):
    """The block of which least is kept of a LoRA, and the share kept."""

    block: str
    kept: float


class RankAndSize(TypedDict):
    """A file of another rank."""

    rank: int
    size_bytes: int


class Smaller(RankAndSize, total=False):
    """A smaller file and, where it is known, its error, and what is ``kept`` of the ``weakest`` LoRA."""

    error: float
    kept: float
    weakest: str


@dataclass(frozen=True)
class InputReport:
    """What one input was, and with which strengths it went in.

    Attributes:
        blocks: Block id to the number that most of its layers were multiplied by, strength included. Text
            encoders with strengths of their own have an entry each, ``"BASE te2"``.
        kept: Share of the input that is in the file: ``1 - <rest, w d> / |w d|^2`` over all weights that it
            changes, with ``w d`` its delta at its strength and the rest what the file lacks of the plain sum
            of all inputs. 1 where nothing was cut off; modes that mean something else than the sum give less,
            or more.
        kept_in: The same by part of the model: ``"unet"``, ``"te"``, ``"te1"`` ...
        worst_block: The ``block`` of which least is kept, and what is ``kept`` of it; None where all is.
    """

    name: str
    path: str
    sshs_model_hash: str | None
    te: float
    unet: float
    layers: int
    dialect: str
    kinds: Mapping[str, int]
    ranks: Mapping[int, int]
    blocks: Mapping[str, float]
    kept: float = 1.0
    kept_in: Mapping[str, float] = field(default_factory=dict)
    worst_block: WorstBlock | None = None


@dataclass(frozen=True)
class MergeReport:
    """The outcome of one merge.

    Attributes:
        output: Path of the file written.
        layers: Number of layers in the file.
        layers_left_out: Layers whose weights were all 0, that cancelled out, or for which a file of limited
            size had no room.
        ranks: Rank to number of layers with it.
        whole_layers: Layers written whole (``diff``, norms), which have no rank.
        error: Relative Frobenius error of the written file against ``error_against``.
        kept: Share of the exact result's Frobenius norm that the file holds. Rounding aside
            ``kept^2 + error^2 = 1``, so an error of 19 % is a share of 98.2 %.
        from_sum: Relative distance of the file from the plain weighted sum, for methods that mean
            something else; None where ``error`` says it already.
        seconds: Phase to wall seconds; ``total`` is the whole.
        peak_memory_bytes: Largest resident size of the process, mapped input
            pages included; None where the system does not report it.
        error_at_most: ``error`` is an upper bound: inputs cancel to the last digits of float64.
        smaller: What a file of the largest input's rank would be, where this one keeps clearly more:
            ``rank``, ``size_bytes`` and, where it is known, ``error``, and the share ``kept`` of the LoRA of
            which least is left, ``weakest``.
    """

    output: str
    size_bytes: int
    base_model: str
    mode: str
    params: Mapping[str, Any]
    dtype: str
    device: str
    dialect: str
    seed: int
    layers: int
    layers_left_out: int
    ranks: Mapping[int, int]
    whole_layers: int
    error: float
    error_against: str
    kept: float
    from_sum: float | None
    worst_layers: Sequence[WorstLayer]
    inputs: Sequence[InputReport]
    warnings: Sequence[str]
    skipped: Sequence[str]
    sshs_model_hash: str
    seconds: Mapping[str, float]
    peak_memory_bytes: int | None = None
    by_block: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    smaller: Smaller | None = None
    error_at_most: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types only, without infinities or NaN. ``error_at_most`` appears only when true."""
        return {
            key: value
            for key, value in _finite(asdict(self)).items()
            if key != "error_at_most" or self.error_at_most
        }

    def to_text(self) -> str:
        """The report as a table for a terminal."""
        rows = [
            ("Written", self.output),
            ("Size", f"{self.size_bytes / 1e6:,.2f} MB, {self.dtype}{smaller_text(self.smaller)}"),
            ("Base model", self.base_model),
            ("Mode", " ".join([self.mode, *(f"{k}={v}" for k, v in self.params.items())])),
            ("Layers", _layers_text(self)),
            ("Ranks", histogram_text(self.ranks) or "none"),
            ("Error", self._error_text()),
            *([] if self.from_sum is None else [("", f"{percent(self.from_sum)} away from the plain sum")]),
            *self._worst_rows(),
            ("Inputs", ""),
            *(("", line) for entry in self.inputs for line in _input_lines(entry)),
            ("Hash", self.sshs_model_hash),
            ("Time", ", ".join(f"{name} {value:.2f} s" for name, value in self.seconds.items())),
        ]
        if self.peak_memory_bytes:
            rows.append(("Peak memory", f"{self.peak_memory_bytes / 1e6:,.0f} MB"))
        rows += [("Skipped", text) for text in self.skipped]
        rows += [("Warning", text) for text in self.warnings]
        return "\n".join(f"{label:<13}{text}".rstrip() for label, text in rows)

    def _error_text(self) -> str:
        """The error with what it is the error of; one of rounding alone is said to be that."""
        if self.rounding_alone:
            return f"none but the rounding to {self.dtype} ({percent(self.error)} of {self.error_against})"
        most = "at most " if self.error_at_most else ""
        return f"{most}{percent(self.error)} of {self.error_against}: the norm of what the file lacks of it"

    @property
    def rounding_alone(self) -> bool:
        """Whether the file holds the exact sum, of every LoRA, but for the rounding of its numbers."""
        return not lossy(self.error, self.dtype) and not self.cuts_off(WHOLE)

    def cuts_off(self, share: float = WELL_KEPT) -> bool:
        """Whether less than this share of some LoRA is in the file, in modes that mean the sum."""
        return self.error_against == EXACT_SUM and any(entry.kept < share for entry in self.inputs)

    def _worst_rows(self) -> list[tuple[str, str]]:
        if self.rounding_alone:
            return []
        rows = [("", f"{percent(row['error'])}  {row['layer']}") for row in self.worst_layers]
        return [("Worst layers", ""), *rows]


def _finite(value: Any) -> Any:
    """JSON has no infinity: an error relative to nothing is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def worst(results: Sequence[LayerResult], count: int = WORST_LAYERS) -> list[WorstLayer]:
    """The layers with the largest relative error, worst first."""
    ordered = sorted((r for r in results if r.exact_sq > 0), key=lambda r: (-r.error, r.layer))
    return [{"layer": r.layer, "error": r.error, "rank": r.rank} for r in ordered[:count]]


def percent(value: float) -> str:
    """A fraction as a percentage with as many digits as mean something."""
    if value == 0:
        return "0 %"
    if value >= 0.9995:
        return f"{value * 100:.4g} %"
    return f"{value * 100:.3g} %"


def lossy(error: float | None, dtype: str) -> bool:
    """Whether an error is more than what storing numbers of ``dtype`` makes by itself."""
    return error is None or error > ROUNDING.get(dtype, 0.0)


def _parts_text(entry: InputReport) -> str:
    """Where a LoRA that was cut off lost most, in brackets."""
    if entry.kept >= WHOLE or entry.worst_block is None:
        return ""
    names = {"unet": "denoiser", "te": "text encoder"}
    parts = [(names.get(part, part), kept) for part, kept in entry.kept_in.items()]
    parts = [*(parts if len(parts) > 1 else []), (entry.worst_block["block"], entry.worst_block["kept"])]
    return f" ({', '.join(f'{name} {percent(max(0.0, kept))}' for name, kept in parts)})"


def smaller_text(smaller: Smaller | None) -> str:
    """What a smaller file would be, to go on with after this one's size."""
    if smaller is None:
        return ""
    text = f"; at rank {smaller['rank']}: {smaller['size_bytes'] / 1e6:,.2f} MB"
    if "error" not in smaller:
        return f"{text} (`loramerge advise` shows its error)"
    text += f", error about {percent(smaller['error'])}"
    if "kept" in smaller:
        text += f", weakest LoRA keeps {percent(max(0.0, smaller['kept']))} ({smaller['weakest']})"
    return text


def histogram_text(ranks: Mapping[int, int], limit: int = 8) -> str:
    """``{8: 3, 4: 1}`` as ``"8 (3 layers), 4 (1 layer)"``, largest rank first."""
    ordered = sorted(ranks.items(), reverse=True)
    if len(ordered) > limit:
        total = sum(count for _, count in ordered)
        mean = sum(rank * count for rank, count in ordered) / total
        return f"{ordered[-1][0]} to {ordered[0][0]}, {mean:.1f} on average over {total} layers"
    return ", ".join(f"{rank} ({count_text(count, 'layer')})" for rank, count in ordered)


def count_text(count: int, one: str, many: str = "") -> str:
    """``"1 layer"``, ``"2 layers"``; ``many`` where an s does not do. A page takes ``counted``."""
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def _layers_text(report: MergeReport) -> str:
    text = f"{report.layers} written"
    if report.whole_layers:
        text += f", {report.whole_layers} of them whole"
    if report.layers_left_out:
        text += f"; {report.layers_left_out} left out (weight 0, cancelled, or no room for them)"
    return text


def _input_lines(entry: InputReport) -> list[str]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in entry.kinds.items())
    lines = [
        f"{entry.name}: text encoder {entry.te:g}, denoiser {entry.unet:g}; "
        f"{count_text(entry.layers, 'layer')} ({kinds}), rank {histogram_text(entry.ranks) or 'none'}; "
        f"{percent(max(0.0, entry.kept))} of it in the file{_parts_text(entry)}"
    ]
    if len(set(entry.blocks.values())) > 1:
        lines.append("  " + " ".join(f"{block}={weight:g}" for block, weight in entry.blocks.items()))
    return lines
