"""Figures of what ``inspect``, ``compare`` and ``advise`` found.

Figures are made without pyplot, so nothing of matplotlib's global state in the
host is touched and nothing has to be closed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from ..analysis import AdviceReport, CompareReport, InspectReport
from ..analysis.compare import PairReport
from ..errors import OutputError, RecipeError

# Told apart by people who see colours differently (Okabe and Ito).
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_KINDS = (
    ("self attention", re.compile(r"attn1_|img_attn|txt_attn|joint|self_attn")),
    ("cross attention", re.compile(r"attn2_|cross_attn")),
    ("feed forward", re.compile(r"ff_net|mlp|ffn|linear[12]|feed_forward|DenseReluDense")),
    ("convolution", re.compile(r"in_layers|out_layers|conv|skip_connection|_op$|emb_layers")),
    ("projection", re.compile(r"proj_in|proj_out")),
)
_PAIRS_SHOWN = 4
_LABEL_LENGTH = 28


@dataclass(frozen=True)
class Theme:
    """Colours of a page, so that figures sit in it."""

    background: str
    text: str
    grid: str


THEMES = {"light": Theme("#ffffff", "#1f2937", "#d1d5db"), "dark": Theme("#111827", "#e5e7eb", "#374151")}


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        path.write_bytes(png(figure))
    except OSError as error:
        raise OutputError(f"The picture {path} cannot be written: {error.strerror}.") from error


def png(figure: Any) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def inspect_figure(reports: Sequence[InspectReport], theme: str = "light") -> Any:
    """Norm by block of each file, and the share of the norm that each rank keeps."""
    figure, (left, right) = _figure(1, 2, theme, size=(12, 4.2))
    blocks = sorted({block for report in reports for block in report.norm_by_block}, key=_block_order)
    width = 0.8 / max(1, len(reports))
    for index, report in enumerate(reports):
        colour, label = _COLOURS[index % len(_COLOURS)], _short(Path(report.file).stem)
        places = [place + (index - (len(reports) - 1) / 2) * width for place in range(len(blocks))]
        left.bar(places, [report.norm_by_block.get(b, 0.0) for b in blocks], width, color=colour, label=label)
        right.plot(*_curve(report.kept_at_rank), marker="o", color=colour, label=label)
    _block_axis(left, blocks)
    left.set_ylabel("norm of the delta weights")
    _rank_axis(right, sorted({int(rank) for report in reports for rank in report.kept_at_rank}))
    right.set_xlabel("rank")
    right.set_ylabel("share of the norm kept")
    right.set_ylim(0, 1.04)
    # The curves leave the lower right corner free; bars leave none.
    _legend(right, theme, "lower right")
    return figure


def compare_figure(report: CompareReport, theme: str = "light") -> Any:
    """Where LoRAs agree (blue) and fight (red): cosine by block and kind of layer, a map for each pair."""
    pairs = report.pairs[:_PAIRS_SHOWN]
    if not pairs:
        raise RecipeError("Comparing needs at least two LoRAs.")
    figure, axes = _figure(len(pairs), 1, theme, size=(12, 0.6 + 2.7 * len(pairs)))
    for axis, pair in zip(axes if len(pairs) > 1 else [axes], pairs):
        _interference(figure, axis, pair, theme)
    return figure


def advise_figure(report: AdviceReport, theme: str = "light", chosen_rank: int | None = None) -> Any:
    """Error against rank and against file size, and what each block keeps."""
    figure, (by_rank, by_size, by_block) = _figure(1, 3, theme, size=(15, 4.2))
    ranks = [point.rank for point in report.uniform]
    errors = [point.error for point in report.uniform]
    by_rank.plot(ranks, errors, marker="o", color=_COLOURS[0])
    _rank_axis(by_rank, ranks)
    by_rank.set_ylim(bottom=0)
    by_size.set_ylim(bottom=0)
    by_rank.set_xlabel("rank of all layers")
    by_rank.set_ylabel("error")
    by_size.plot(
        [p.size_bytes / 1e6 for p in report.uniform],
        errors,
        marker="o",
        color=_COLOURS[0],
        label="one rank for all",
    )
    by_size.plot(
        [p.size_bytes / 1e6 for p in report.allotted],
        [p.error for p in report.allotted],
        color=_COLOURS[5],
        label="ranks allotted",
    )
    by_size.set_xlabel("file size, MB")
    by_size.set_ylabel("error")
    for point in report.uniform:
        if point.rank == chosen_rank:
            by_rank.plot([point.rank], [point.error], "D", color=_COLOURS[3], markersize=10)
            by_size.plot(
                [point.size_bytes / 1e6], [point.error], "D", color=_COLOURS[3], markersize=10, label="chosen"
            )
    _legend(by_size, theme)
    _kept_map(figure, by_block, report, theme)
    return figure


def _interference(figure: Any, axis: Any, pair: PairReport, theme: str) -> None:
    kinds = [name for name, _ in _KINDS] + ["other"]
    blocks = sorted(pair.blocks, key=_block_order)
    sums: dict[tuple[str, str], tuple[float, float]] = {}
    for layer, relation in pair.layers.items():
        key = (layer_kind(layer), _block_of(layer, pair, blocks))
        product, size = sums.get(key, (0.0, 0.0))
        weight = relation.norms[0] * relation.norms[1]
        sums[key] = (product + relation.cosine * weight, size + weight)
    grid = [
        [_ratio(sums.get((kind, block))) for block in blocks]
        for kind in kinds
        if any((kind, b) in sums for b in blocks)
    ]
    shown = [kind for kind in kinds if any((kind, block) in sums for block in blocks)]
    limit = max([0.1, *(abs(value) for row in grid for value in row if value == value)])
    image = axis.imshow(grid or [[0.0]], cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    axis.set_yticks(range(len(shown)), shown)
    axis.set_xticks(range(len(blocks)), blocks, rotation=90)
    axis.set_title(
        f"{_short(pair.names[0])}  and  {_short(pair.names[1])}", color=THEMES[theme].text, fontsize=10
    )
    axis.grid(False)
    bar = figure.colorbar(image, ax=axis, pad=0.01)
    bar.set_label("cosine", color=THEMES[theme].text)
    bar.ax.tick_params(colors=THEMES[theme].text)


def _kept_map(figure: Any, axis: Any, report: AdviceReport, theme: str) -> None:
    blocks = sorted(report.kept_by_block, key=_block_order)
    grid = [report.kept_by_block[block] for block in blocks]
    image = axis.imshow(grid or [[0.0]], cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axis.set_yticks(range(len(blocks)), blocks, fontsize=7)
    axis.set_xticks(
        range(len(report.uniform)), [point.rank for point in report.uniform], fontsize=7, rotation=90
    )
    axis.set_xlabel("rank of all layers")
    axis.grid(False)
    bar = figure.colorbar(image, ax=axis, pad=0.01)
    bar.set_label("share of the norm kept", color=THEMES[theme].text)
    bar.ax.tick_params(colors=THEMES[theme].text)


def layer_kind(layer: str) -> str:
    """What a layer does, by its name: ``"self attention"``, ``"feed forward"`` ..."""
    return next((name for name, pattern in _KINDS if pattern.search(layer)), "other")


def _block_of(layer: str, pair: PairReport, blocks: Sequence[str]) -> str:
    block = pair.layer_blocks.get(layer, "other")
    return block if block in blocks else "other"


def _block_order(block: str) -> tuple[int, str]:
    first = ("BASE", "CLIP", "T5", "IN", "M", "D", "B", "S", "OUT", "other")
    letters = re.sub(r"\d", "", block)
    return (first.index(letters) if letters in first else len(first), block)


def _ratio(entry: tuple[float, float] | None) -> float:
    return entry[0] / entry[1] if entry is not None and entry[1] else float("nan")


def _curve(kept: Any) -> tuple[list[int], list[float]]:
    pairs = sorted((int(rank), share) for rank, share in kept.items())
    return [rank for rank, _ in pairs], [share for _, share in pairs]


def _figure(rows: int, columns: int, theme: str, size: tuple[float, float]) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RecipeError("Pictures need matplotlib: pip install matplotlib.") from error
    colours = THEMES[theme]
    figure = Figure(figsize=size, facecolor=colours.background, layout="constrained")
    axes = figure.subplots(rows, columns)
    for axis in axes.flat if hasattr(axes, "flat") else [axes]:
        axis.set_facecolor(colours.background)
        axis.tick_params(colors=colours.text)
        axis.xaxis.label.set_color(colours.text)
        axis.yaxis.label.set_color(colours.text)
        axis.grid(True, color=colours.grid, linewidth=0.5)
        axis.set_axisbelow(True)
        for spine in axis.spines.values():
            spine.set_color(colours.grid)
    return figure, axes


def _rank_axis(axis: Any, ranks: Sequence[int]) -> None:
    """Ranks double from tick to tick, and are written as numbers."""
    axis.set_xscale("log", base=2)
    shown = [rank for rank in ranks if rank & (rank - 1) == 0 or rank == max(ranks)]
    axis.set_xticks(shown, [str(rank) for rank in shown])
    axis.minorticks_off()


def _block_axis(axis: Any, blocks: Sequence[str]) -> None:
    axis.set_xticks(range(len(blocks)), blocks, rotation=90)


def _legend(axis: Any, theme: str, place: str = "best") -> None:
    colours = THEMES[theme]
    axis.legend(
        loc=place, facecolor=colours.background, edgecolor=colours.grid, labelcolor=colours.text, fontsize=8
    )


def _short(name: str) -> str:
    # A dollar sign would start a formula.
    text = name.replace("$", r"\$")
    return text if len(text) <= _LABEL_LENGTH else f"{text[: _LABEL_LENGTH - 1]}…"
