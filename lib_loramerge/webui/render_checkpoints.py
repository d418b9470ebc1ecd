"""What the tab says of bakes and extractions, as HTML; see :mod:`.render`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import Sentence, counted
from ..report import histogram_text, percent
from .render import DTYPES, details, foreign, note_box, offer, say, size_text, table, time_text, warning_box

if TYPE_CHECKING:
    from ..checkpoints import BakeReport, ExtractReport, Foreseen
    from ..checkpoints.advising import ExtractAdvice
    from .host import Host

SURVIVES_MEANS = (
    "What survives is the part of the LoRAs that is in the file after rounding. The noise of rounding "
    "is given beside it: the model's own numbers are rounded as coarsely."
)
NOT_LISTED = "To use it now, press the refresh button beside the WebUI's own list of checkpoints."
ROUNDED = {
    "auto": "to the nearest number",
    "nearest": "to the nearest number",
    "stochastic": "by chance, which keeps small changes",
}
Rows = list[tuple[str, str]]


def result(
    report: BakeReport | ExtractReport, notes: Sequence[str], host: Host, where: str, buttons: str
) -> str:
    """The outcome of a finished bake or extraction, below its title."""
    from ..checkpoints import BakeReport  # Not at the WebUI's start, see extension.py.

    baked = isinstance(report, BakeReport)
    parts = [f'<div class="lm-written">{where}</div>']
    if baked and host.is_webui:
        parts.append(note_box([NOT_LISTED]))
    parts += [
        buttons,
        warning_box(map(host.shown, (*report.warnings, *notes))),
        _baked(report) if isinstance(report, BakeReport) else _extracted(report),
    ]
    if report.skipped:
        parts.append(details(say("Left out"), note_box(map(host.shown, report.skipped))))
    return "".join(parts)


def _baked(report: BakeReport) -> str:
    rows: Rows = [
        (say("Checkpoint"), f"{foreign(report.base)}, {foreign(report.base_model)}"),
        (say("File size"), f"<b>{size_text(report.size_bytes)}</b>"),
        _changed(report),
    ]
    if report.survives is not None:
        rows += [
            (say("Survives"), f'<b class="lm-survives">{foreign(percent(report.survives))}</b>'),
            (say("Rounding"), f"{say(ROUNDED[report.rounding])}, {_of_weights(report.noise)}"),
            (say("Change"), _of_weights(report.change)),
            (say("Error"), f"{foreign(percent(report.error or 0))} {say('of the change')}"),
        ]
    rows.append((say("Untouched"), f"{size_text(report.untouched_bytes)} {say('byte for byte')}"))
    rows.append((say("Time"), time_text(report.seconds)))
    if report.sha256:
        rows.append((say("Hash"), f"<code>{foreign(report.sha256[:10])}</code>"))
    worst = [(percent(row["survives"]), percent(row["error"]), row["tensor"]) for row in report.worst]
    inputs = "".join(f'<div class="lm-input">{foreign(text)}</div>' for text in report.inputs)
    return (
        table(rows)
        + note_box([SURVIVES_MEANS])
        + _worst(("Survives", "Error", "Tensor"), worst)
        + details(say("What went in"), inputs)
    )


def _extracted(report: ExtractReport) -> str:
    rows: Rows = [
        (say("Difference"), _minus(report)),
        (say("Base model"), foreign(report.base_model)),
        (say("File size"), f"<b>{size_text(report.size_bytes or 0)}</b>"),
        (say("Layers"), f"{report.layers}, {report.layers_equal} {say('equal but for rounding')}"),
        (say("Rank"), foreign(histogram_text(report.ranks) or "–")),
        (say("Change"), _of_weights(report.change)),
        (say("Rounding noise"), f"{foreign(percent(report.noise))} {say('of the change')}"),
        (say("Error"), f'<b class="lm-error-value">{foreign(percent(report.error))}</b>'),
    ]
    rows += [("", _part_text(report, part)) for part in report.by_part]
    if report.capped:
        words = "layer reached the largest rank" if report.capped == 1 else "layers reached the largest rank"
        rows.append((say("Limited"), f"{report.capped} {say(words)}"))
    rows.append((say("Time"), time_text(report.seconds)))
    return table(rows) + _worst(
        ("Error", "Layer"), [(percent(row["error"]), row["layer"]) for row in report.worst]
    )


def _part_text(report: ExtractReport, part: str) -> str:
    """Error of a part, and how much of what changed in it is rounding."""
    error, noise = percent(report.by_part[part]), percent(report.noise_by_part[part])
    return (
        f"{foreign(error)} {foreign(part)} · {say('Rounding noise')} {foreign(noise)} {say('of the change')}"
    )


def analysis(look_id: str, report: ExtractReport, picture: bytes, notes: Sequence[str], host: Host) -> str:
    """Everything that a dry run of an extraction found."""
    from . import render_analysis as frame  # Not at the WebUI's start, see extension.py.

    parts = [
        frame.head(_minus(report)),
        warning_box(map(host.shown, (*report.warnings, *notes))),
        frame.part(say("What is in the difference"), _extracted(report)),
    ]
    advice = report.advice
    if advice is not None and advice.uniform:
        parts.append(frame.part(say("Which rank is needed"), _auto(advice) + frame.targets(advice)))
        title = say("What each rank would cost and lose")
        parts.append(frame.part(title, frame.ranks(advice), "ranks", {"ranks": picture} if picture else {}))
    if report.skipped:
        parts.append(details(say("Left out"), note_box(map(host.shown, report.skipped))))
    return frame.page(look_id, parts)


def _auto(advice: ExtractAdvice) -> str:
    """The ranks that stand out of the rounding, a click away."""
    from . import render_analysis as frame  # As above.

    found = advice.auto
    if found is None:
        return ""
    cells = (
        found.between("–"),
        f"<b>{found.median}</b>",
        str(found.layers),
        size_text(found.size_bytes),
        foreign(percent(found.error)),
        offer(say("Use these ranks"), auto=1),
    )
    heads = (
        say("Ranks above the rounding"),
        say("Median"),
        say("Layers"),
        say("File size"),
        say("Error"),
        "",
    )
    row = "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    notes = [
        Sentence(
            "An error of {error} is the rounding of the two files alone, which no LoRA needs to hold.",
            percent(advice.rounding),
        )
    ]
    if found.capped:
        notes.append(
            counted(
                found.capped,
                "{count} layer reaches rank {rank}, the largest that was looked at, and may need more.",
                "{count} layers reach rank {rank}, the largest that was looked at, and may need more.",
                advice.largest,
            )
        )
    return f'<div class="lm-tables">{frame.numbers_table(heads, row, "auto")}</div>{note_box(notes)}'


def bake_facts(report: BakeReport, free: int | None) -> str:
    """What a bake will write, before any work."""
    rows: Rows = [
        (say("Base model"), foreign(report.base_model)),
        (say("LoRAs"), str(len(report.inputs))),
        _changed(report),
        (say("File size"), f"<b>{size_text(report.size_bytes)}</b>"),
        *_free(free),
        (say("Rounding"), say(ROUNDED[report.rounding])),
    ]
    return table(rows) + warning_box((*report.warnings, *report.skipped))


def extract_facts(found: Foreseen, free: int | None) -> str:
    """What an extraction will read and write, before any work."""
    parts = ", ".join(f"{foreign(part)} {count}" for part, count in found.layers.items())
    rows: Rows = [
        (say("Difference"), _minus(found)),
        (say("Base model"), foreign(found.base_model)),
        (say("Layers"), parts),
        (say("Precision"), foreign(_dtypes(found.dtypes))),
        (say("File size"), f"{say('at most')} <b>{size_text(found.size_bytes)}</b>"),
        *_free(free),
        (say("To be read"), size_text(found.read_bytes)),
    ]
    return table(rows) + warning_box(found.skipped)


def _minus(report: ExtractReport | Foreseen) -> str:
    return f"{foreign(report.tuned)} − {foreign(report.base)}"


def _of_weights(share: float | None) -> str:
    return f"{foreign(percent(share or 0))} {say('of the weights')}"


def _free(free: int | None) -> Rows:
    return [] if free is None else [(say("Free disk space"), size_text(free))]


def _changed(report: BakeReport) -> tuple[str, str]:
    layers, tensors = (
        "layer" if report.layers == 1 else "layers",
        "tensor" if report.tensors == 1 else "tensors",
    )
    text = f"{report.layers} {say(layers)}, {report.tensors} {say(tensors)}"
    return say("Changed"), f"{text} ({foreign(_dtypes(report.dtypes))})"


def _dtypes(counts: Mapping[str, int]) -> str:
    return ", ".join(DTYPES.get(name, name) for name in counts)


def _worst(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = ""
    for row in rows:
        cells = "".join(f"<td>{foreign(cell)}</td>" for cell in row[:-1])
        body += f"<tr>{cells}<td><code>{foreign(row[-1])}</code></td></tr>"
    if not body:
        return ""
    head = "".join(f"<th>{say(name)}</th>" for name in heads)
    return details(say("Worst layers"), f'<table class="lm-layers"><tr>{head}</tr>{body}</table>')
