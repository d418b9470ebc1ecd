"""Figures of what ``inspect``, ``compare``, ``advise`` and ``sweep`` found.

Figures are made without pyplot, so nothing of matplotlib's global state in the
host is touched and nothing has to be closed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from ..analysis import CompareReport, InspectReport
from ..analysis.compare import OPPOSED, PairReport, most_opposed_first
from ..analysis.curves import RankCurves
from ..errors import OutputError, RecipeError
from . import fonts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..sweep.running import TableRow

# Told apart by people who see colours differently (Okabe and Ito).
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_RESULT = "#9F5FC9"  # Of what a mode makes of the LoRAs.
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


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        path.write_bytes(png(figure))
    except OSError as error:
        raise OutputError("The picture {path} cannot be written: {reason}.", path, error.strerror) from error


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    fonts.use(figure)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def inspect_figure(reports: Sequence[InspectReport], theme: str = "light") -> Figure:
    """Norm and effective rank by block of each file, and the share of the norm that each rank keeps."""
    figure, (left, middle, right) = _figure(1, 3, theme, size=(16, 4.2))
    blocks = sorted({block for report in reports for block in report.norm_by_block}, key=_block_order)
    names = [_short(Path(report.file).stem) for report in reports]
    _bars(left, blocks, [(name, report.norm_by_block) for name, report in zip(names, reports)])
    for index, (label, report) in enumerate(zip(names, reports)):
        colour = _COLOURS[index % len(_COLOURS)]
        right.plot(*_curve(report.kept_at_rank), marker="o", color=colour, label=label)
    left.set_ylabel("norm of the delta weights")
    ranked = [(name, report.effective_rank_by_block) for name, report in zip(names, reports)]
    _bars(middle, [block for block in blocks if any(block in own for _, own in ranked)], ranked)
    middle.set_ylabel("effective rank, mean of the layers")
    _rank_axis(right, sorted({int(rank) for report in reports for rank in report.kept_at_rank}))
    right.set_xlabel("rank")
    right.set_ylabel("share of the norm kept")
    right.set_ylim(0, 1.04)
    # The curves leave the lower right corner free; bars leave none.
    _legend(right, theme, "lower right")
    return figure


def compare_figure(
    report: CompareReport, theme: str = "light", result: tuple[str, Mapping[str, float]] | None = None
) -> Figure:
    """How strong each LoRA and their sum is by block, and where they agree (blue) and fight (red).

    The latter is the cosine by block and kind of layer, a map for each pair. All maps have one scale. Of many
    pairs those are drawn that fight most.

    Args:
        result: What a mode that gives no sum makes of them: its name, and the norm of that in each block.
    """
    if not report.pairs:
        raise RecipeError("Comparing needs at least two LoRAs.")
    left_out = len(report.pairs) - _PAIRS_SHOWN
    pairs = list(report.pairs) if left_out <= 0 else most_opposed_first(report.pairs)[:_PAIRS_SHOWN]
    figure, (bars, *axes) = _figure(1 + len(pairs), 1, theme, size=(12, 0.6 + 2.7 * (1 + len(pairs))))
    _norms(bars, report, theme, result)
    maps = [_cosines(pair) for pair in pairs]
    limit = max([0.1, *(abs(cosine) for cells in maps for cosine in cells.values())])
    for axis, pair, cells in zip(axes, pairs, maps):
        _interference(figure, axis, pair, cells, limit, theme)
    if left_out > 0:
        text = f"not drawn: {left_out} pairs that pull less against each other"
        figure.supxlabel(text, color=THEMES[theme].text, fontsize=9)
    return figure


def advise_figure(report: RankCurves, theme: str = "light") -> Figure:
    """The spectrum, error against rank and against file size with the chosen point, and what blocks keep.

    Above them, for several LoRAs, what is kept of each.
    """
    if not report.uniform:
        raise RecipeError("There is nothing to draw: no layer has a rank.")
    shared = bool(report.shared)
    figure, axes = _figure(2 + shared, 2, theme, size=(13, 8.4 + 4.2 * shared))
    if shared:
        _shares(axes[0], axes[1], report, theme)
    spectrum, by_rank, by_size, by_block = axes[-4:]
    _spectrum(spectrum, report)
    ranks = [point.rank for point in report.uniform]
    errors = [point.error for point in report.uniform]
    by_rank.plot(ranks, errors, marker="o", color=_COLOURS[0])
    _rank_axis(by_rank, ranks)
    by_rank.set_xlabel("rank of all layers")
    sizes = [point.size_bytes / 1e6 for point in report.uniform]
    by_size.plot(sizes, errors, marker="o", color=_COLOURS[0], label="one rank for all")
    allotted = [(point.size_bytes / 1e6, point.error) for point in report.allotted]
    by_size.plot(*zip(*allotted), color=_COLOURS[5], label="ranks allotted")
    by_size.set_xlabel("file size, MB")
    for axis in (by_rank, by_size):
        axis.set_ylabel("error")
        axis.set_ylim(bottom=0)
    _mark_chosen(by_rank, by_size, report)
    _legend(by_size, theme)
    _kept_map(figure, by_block, report, theme)
    return figure


def _shares(by_rank: Axes, by_size: Axes, report: RankCurves, theme: str) -> None:
    """What is kept of each LoRA, against the rank of all layers and against the file size."""
    for index, name in enumerate(report.shared):
        colour, line = _COLOURS[index % len(_COLOURS)], "-" if index < len(_COLOURS) else "--"
        shares = [point.kept_of[name] for point in report.uniform]
        label = _short(Path(name).stem)
        by_rank.plot(
            [point.rank for point in report.uniform], shares, line, marker="o", label=label, color=colour
        )
        sizes = [point.size_bytes / 1e6 for point in report.allotted]
        kept = [point.kept_of[name] for point in report.allotted]
        by_size.plot(sizes, kept, line, label=label, color=colour)
    _rank_axis(by_rank, [point.rank for point in report.uniform])
    by_rank.set_xlabel("rank of all layers")
    by_size.set_xlabel("file size, MB, ranks allotted")
    for axis in (by_rank, by_size):
        axis.set_ylabel("share kept of each LoRA")
        axis.set_ylim(top=1.04)
    _legend(by_rank, theme, "lower right")


def sweep_figure(rows: Sequence[TableRow], theme: str = "light") -> Figure:
    """Error, share kept of each LoRA, and size of the files of a sweep, in their order.

    Args:
        rows: As ``sweep.json`` lists them; what is not known of a file is a gap.
    """
    names = [", ".join(str(value) for value in row["values"].values()) for row in rows]
    figure, (error, kept, size) = _figure(1, 3, theme, size=(13, 4.6))
    places = range(len(rows))
    error.plot(places, [_known(row["error"]) for row in rows], marker="o", color=_COLOURS[0])
    error.set_ylabel("error")
    loras = list(dict.fromkeys(name for row in rows for name in row["kept"] or {}))
    for index, name in enumerate(loras):
        shares = [_known((row["kept"] or {}).get(name)) for row in rows]
        colour = _COLOURS[index % len(_COLOURS)]
        kept.plot(places, shares, marker="o", color=colour, label=_short(Path(name).stem))
    kept.set_ylabel("share kept")
    if loras:
        _legend(kept, theme)
    size.bar(places, [_known(row["size_bytes"]) / 1e6 for row in rows], color=_COLOURS[2])
    size.set_ylabel("file size, MB")
    for axis in (error, kept, size):
        axis.set_xticks(places, [_short(name) for name in names], rotation=90)
        axis.set_xlabel(", ".join(_short(label) for label in rows[0]["values"]))
    for axis in (error, size):
        axis.set_ylim(bottom=0)
    return figure


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _spectrum(axis: Axes, report: RankCurves) -> None:
    """How fast the components of the layers fall off, as far as they are no rounding noise."""
    values = list(report.spectrum)
    axis.plot(range(1, len(values) + 1), values, color=_COLOURS[2], marker="." if len(values) <= 64 else "")
    _rank_axis(axis, [point.rank for point in report.uniform])
    axis.set_xlabel("component of each layer, strongest first")
    axis.set_ylabel("share of the norm")
    positive = [value for value in values if value > 0]
    if positive:
        _percent_axis(axis, max(min(positive), max(positive) * 1e-6), max(positive))


def _percent_axis(axis: Axes, least: float, most: float) -> None:
    """Logarithmic, with ticks at 1, 2 and 5 of each power of ten; at the powers alone of many."""
    powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    steps = (1, 2, 5) if len(powers) <= 3 else (1,)
    ticks = [step * 10.0**power for power in powers for step in steps]
    axis.set_yscale("log")
    axis.set_yticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(least / 1.5, most * 1.5)


def _mark_chosen(by_rank: Axes, by_size: Axes, report: RankCurves) -> None:
    """A diamond where the recipe stands on the curves."""

    def mark(axis: Axes, x: float, y: float) -> None:
        axis.plot([x], [y], "D", label="chosen", color=_COLOURS[3], markersize=10, zorder=3, clip_on=False)

    for point in report.uniform:
        if point.rank == report.chosen_rank:
            mark(by_rank, point.rank, point.error)
            mark(by_size, point.size_bytes / 1e6, point.error)
    for sized in report.allotted:
        if sized.size_bytes == report.chosen_bytes:
            mark(by_size, sized.size_bytes / 1e6, sized.error)


def _norms(
    axis: Axes, report: CompareReport, theme: str, result: tuple[str, Mapping[str, float]] | None
) -> None:
    """Bars of every LoRA at its strength, of their sum (less where they fight), and of the result."""
    blocks = sorted(report.sum_norms, key=_block_order)
    shown = [(_short(name), norms) for name, norms in zip(report.names, report.norms)]
    together = [("their sum", report.sum_norms)]
    if result is not None:
        together.append((f"mode {result[0]}", result[1]))
    _bars(axis, blocks, [*shown, *together], last=(THEMES[theme].text, _RESULT)[: len(together)])
    axis.set_ylabel("norm at these strengths")
    _legend(axis, theme, "center left", (1.005, 0.5))  # above the scales of the maps


def _bars(
    axis: Axes,
    blocks: Sequence[str],
    rows: Sequence[tuple[str, Mapping[str, float]]],
    last: Sequence[str] = (),
) -> None:
    """A group of bars for each block, one of each row; ``last`` are colours for the last rows."""
    width = 0.8 / max(1, len(rows))
    usual = [_COLOURS[index % len(_COLOURS)] for index in range(len(rows) - len(last))]
    for index, ((label, norms), colour) in enumerate(zip(rows, [*usual, *last])):
        places = [place + (index - (len(rows) - 1) / 2) * width for place in range(len(blocks))]
        axis.bar(places, [norms.get(block, 0.0) for block in blocks], width, color=colour, label=label)
    _block_axis(axis, blocks)


def _cosines(pair: PairReport) -> dict[tuple[str, str], float]:
    """Kind of layer and block to the cosine of the layers there, weighted by what both put in."""
    sums: dict[tuple[str, str], tuple[float, float]] = {}
    for layer, relation in pair.layers.items():
        key = (layer_kind(layer), _block_of(layer, pair))
        product, size = sums.get(key, (0.0, 0.0))
        weight = relation.norms[0] * relation.norms[1]
        sums[key] = (product + relation.cosine * weight, size + weight)
    return {key: product / size for key, (product, size) in sums.items() if size}


def _interference(
    figure: Figure,
    axis: Axes,
    pair: PairReport,
    cells: Mapping[tuple[str, str], float],
    limit: float,
    theme: str,
) -> None:
    blocks = sorted(pair.blocks, key=_block_order)
    kinds = [name for name, _ in _KINDS] + ["other"]
    shown = [kind for kind in kinds if any((kind, block) in cells for block in blocks)]
    grid = [[cells.get((kind, block), float("nan")) for block in blocks] for kind in shown]
    image = axis.imshow(grid or [[0.0]], cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    axis.set_yticks(range(len(shown)), shown)
    axis.set_xticks(range(len(blocks)), blocks, rotation=90)
    title = f"{_short(pair.names[0])}  and  {_short(pair.names[1])}"
    if not pair.conflict and min(cells.values(), default=0.0) > OPPOSED:
        title += ":  no conflict in any block"
    axis.set_title(title, color=THEMES[theme].text, fontsize=10)
    axis.grid(False)
    bar = figure.colorbar(image, ax=axis, pad=0.01)
    bar.set_label("cosine", color=THEMES[theme].text)
    bar.ax.tick_params(colors=THEMES[theme].text)


def _kept_map(figure: Figure, axis: Axes, report: RankCurves, theme: str) -> None:
    blocks = sorted(report.kept_by_block, key=_block_order)
    grid = [report.kept_by_block[block] for block in blocks]
    image = axis.imshow(grid or [[0.0]], cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axis.set_yticks(range(len(blocks)), blocks, fontsize=7)
    ranks = [str(point.rank) for point in report.uniform]
    axis.set_xticks(range(len(ranks)), ranks, fontsize=7, rotation=90)
    axis.set_xlabel("rank of all layers")
    axis.grid(False)
    bar = figure.colorbar(image, ax=axis, pad=0.01)
    bar.set_label("share of the norm kept", color=THEMES[theme].text)
    bar.ax.tick_params(colors=THEMES[theme].text)


def layer_kind(layer: str) -> str:
    """What a layer does, by its name: ``"self attention"``, ``"feed forward"`` ..."""
    return next((name for name, pattern in _KINDS if pattern.search(layer)), "other")


def _block_of(layer: str, pair: PairReport) -> str:
    block = pair.layer_blocks.get(layer, "other")
    return block if block in pair.blocks else "other"


def _block_order(block: str) -> tuple[int, str]:
    first = ("BASE", "CLIP", "T5", "IN", "M", "D", "B", "S", "OUT", "other")
    letters = re.sub(r"\d", "", block)
    return (first.index(letters) if letters in first else len(first), block)


def _curve(kept: Mapping[int, float]) -> tuple[list[int], list[float]]:
    pairs = sorted(kept.items())
    return [rank for rank, _ in pairs], [share for _, share in pairs]


def _figure(rows: int, columns: int, theme: str, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RecipeError("Pictures need matplotlib: pip install matplotlib.") from error
    colours = THEMES[theme]
    figure = Figure(figsize=size, facecolor=colours.background, layout="constrained")
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_facecolor(colours.background)
        axis.tick_params(colors=colours.text)
        axis.xaxis.label.set_color(colours.text)
        axis.yaxis.label.set_color(colours.text)
        axis.grid(True, color=colours.grid, linewidth=0.5)
        axis.set_axisbelow(True)
        for spine in axis.spines.values():
            spine.set_color(colours.grid)
    return figure, axes


def _rank_axis(axis: Axes, ranks: Sequence[int]) -> None:
    """Ranks double from tick to tick, and are written as numbers."""
    axis.set_xscale("log", base=2)
    shown = [rank for rank in ranks if rank & (rank - 1) == 0 or rank == max(ranks)]
    axis.set_xticks(shown, [str(rank) for rank in shown])
    axis.minorticks_off()


def _block_axis(axis: Axes, blocks: Sequence[str]) -> None:
    axis.set_xticks(range(len(blocks)), blocks, rotation=90)


def _legend(axis: Axes, theme: str, place: str = "best", anchor: tuple[float, float] | None = None) -> None:
    colours = THEMES[theme]
    axis.legend(
        loc=place,
        bbox_to_anchor=anchor,
        facecolor=colours.background,
        edgecolor=colours.grid,
        labelcolor=colours.text,
        fontsize=8,
    )


def _short(name: str) -> str:
    # A dollar sign would start a formula.
    text = name.replace("$", r"\$")
    return text if len(text) <= _LABEL_LENGTH else f"{text[: _LABEL_LENGTH - 1]}…"
