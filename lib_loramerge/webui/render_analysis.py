"""What an analysis found, as HTML: verdicts, tables, pictures. Escaped and worded as in :mod:`.render`."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoraMergeError
from ..report import percent
from .analyse import MAX_COMPARED
from .render import ERROR_MEANS, error_box, foreign, note_box, say, size_text, time_text

if TYPE_CHECKING:
    from ..analysis import AdviceReport, CompareReport, InspectReport
    from ..analysis.compare import PairReport
    from ..merge import MergePlan
    from .analyse import Look

PAIRS_OPEN = 4
NO_ERROR = 1e-6
SOON = 5.0  # Seconds; a shorter rest is not shown.
STAGES = {
    "inspect": "Measuring each file",
    "compare": "Comparing the LoRAs",
    "advise": "Looking for the rank that is needed",
    "draw": "Drawing",
}
# Kind of picture: what it shows, for people who cannot see it.
PICTURES = {
    "inspect": "Chart: norm of each file by block, and the share of the norm that each rank keeps.",
    "compare": "Bars: how strong each LoRA, their sum and the result of the mode are, by block. "
    "Map: where two LoRAs agree (blue) and where they pull against each other (red), "
    "by block and kind of layer.",
    "advise": "Charts: how fast the components fall off, error against rank, error against file size, "
    "and what each block keeps.",
}


def look_state(look: Look, stamp: str) -> str:
    """How far a look is. The attributes tell the page's script whether to ask again."""
    state = "idle" if look.finished else "active"
    attributes = f'data-look="{foreign(look.id)}" data-state="{state}" data-stamp="{foreign(stamp)}"'
    return f'<div class="lm-look" {attributes}>{_state(look)}</div>'


def _state(look: Look) -> str:
    if look.state == "done":
        button = f'<button type="button" class="lm-button lm-show-look">{say("Show it")}</button>'
        return f'<div class="lm-look-line"><span class="lm-quiet">{say("Analysed.")}</span>{button}</div>'
    if look.state == "failed":
        return error_box(error_text(look))
    if look.state == "cancelled":
        return f'<div class="lm-quiet">{say("The analysis was cancelled.")}</div>'
    text = STAGES.get(look.stage, "")
    words = say(text) if text else say("Waiting for its turn")
    if look.eta is not None and look.eta >= SOON:
        words += f" · {say('time left')} {time_text(look.eta)}"
    button = (
        f'<button type="button" class="lm-button lm-stop-look" data-look="{foreign(look.id)}">'
        f"{say('Cancel')}</button>"
    )
    share = max(0.0, min(1.0, look.fraction)) * 100
    return (
        f'<div class="lm-look-line"><span class="lm-quiet">{words}</span>{button}</div>'
        '<div class="lm-bar" role="progressbar" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{share:.0f}"><div style="width:{share:.1f}%"></div></div>'
    )


def error_text(look: Look) -> str:
    """The sentence for what went wrong."""
    if isinstance(look.error, LoraMergeError):
        return str(look.error)
    return f"Unexpected error ({type(look.error).__name__}). The console of the host tells more."


def look_page(look: Look) -> str:
    """Everything that was found, the verdict first."""
    found = look.findings
    if found is None:
        return ""
    parts = [_head(look.question.plan)]
    if found.unreadable:
        parts.append(
            note_box(
                [
                    f"No font of this machine has the letters {found.unreadable}, so the charts show "
                    "boxes in their place. Install a font that has them, such as Noto Sans CJK."
                ]
            )
        )
    if len(look.question.plan.sources) > MAX_COMPARED:
        text = say("More than 12 LoRAs are not compared here; the command line does that.")
        parts.append(f'<div class="lm-note">{text}</div>')
    if found.compare is not None:
        body = _verdicts(found.compare)
        parts.append(_part(say("How they get on"), body, "compare", found.pictures))
    if found.advise is not None:
        parts.append(_part(say("Which rank is needed"), _advice(found.advise), "advise", found.pictures))
    if found.inspect:
        parts.append(_part(say("What is in each file"), _files(found.inspect), "inspect", found.pictures))
    return f'<div class="lm-result lm-analysis" data-look="{foreign(look.id)}">{"".join(parts)}</div>'


def _head(plan: MergePlan) -> str:
    inputs = " + ".join(
        f"{foreign(source.input.name)} <i>×{source.input.unet:g}</i>" for source in plan.sources
    )
    return (
        f'<div class="lm-job-head"><b>{say("Analysis")}</b></div>'
        f'<div class="lm-quiet">{inputs} · {say(plan.method.label)}</div>'
    )


def _part(title: str, body: str, kind: str, pictures: Mapping[str, bytes]) -> str:
    return f'<section class="lm-part"><h4>{title}</h4>{body}{_picture(kind, pictures)}</section>'


def _picture(kind: str, pictures: Mapping[str, bytes]) -> str:
    content = pictures.get(kind)
    if content is None:
        return ""
    data = base64.b64encode(content).decode("ascii")
    button = (
        f'<button type="button" class="lm-button lm-save-picture" data-name="loramerge-{kind}.png">'
        f"{say('Save picture')}</button>"
    )
    return (
        f'<figure class="lm-figure"><img alt="{foreign(PICTURES[kind])}" data-kind="{kind}" '
        f'src="data:image/png;base64,{data}"><figcaption>{button}<span class="lm-quiet">'
        f"{say(PICTURES[kind])}</span></figcaption></figure>"
    )


def _verdicts(report: CompareReport) -> str:
    from ..analysis.compare import most_opposed_first  # Not at the WebUI's start, see extension.py.

    pairs = most_opposed_first(report.pairs) if len(report.pairs) > PAIRS_OPEN else report.pairs
    shown = "".join(_pair(pair) for pair in pairs[:PAIRS_OPEN])
    rest = "".join(_pair(pair) for pair in pairs[PAIRS_OPEN:])
    if rest:
        shown += f'<details class="lm-details"><summary>{say("More pairs")}</summary>{rest}</details>'
    return shown


def _pair(pair: PairReport) -> str:
    whole = pair.whole
    numbers = [
        (say("Cosine"), f"{whole.cosine:.3f}"),
        (say("Layers in common"), str(pair.shared)),
        (say("Opposite signs"), foreign(percent(whole.sign_conflict))),
        (say("Norms"), f"{whole.norms[0]:.3g} : {whole.norms[1]:.3g}"),
    ]
    if whole.inputs is not None and whole.outputs is not None:
        both = f"{percent(whole.inputs)} / {percent(whole.outputs)}"
        numbers.insert(1, (say("Shared input / output space"), foreign(both)))
    cells = "".join(f"<span><i>{key}</i> {value}</span>" for key, value in numbers)
    names = f"{foreign(pair.names[0])} <i>+</i> {foreign(pair.names[1])}"
    peace = "" if pair.conflict else f'<div class="lm-quiet">{say("No conflict in any block.")}</div>'
    return (
        f'<div class="lm-pair"><b>{names}</b><div class="lm-verdict">{foreign(pair.verdict)}</div>{peace}'
        f'<div class="lm-blocks">{cells}</div></div>'
    )


def _advice(report: AdviceReport) -> str:
    targets = "".join(
        f"<tr><td>{foreign(percent(float(target)))}</td><td><b>{rank}</b></td>"
        f"<td>{size_text(report.smallest_size[target])}</td></tr>"
        for target, rank in report.smallest_rank.items()
    )
    smallest = _table(
        (say("Error at most"), say("Rank of all layers"), say("File, ranks allotted")), targets, "targets"
    )
    points = "".join(
        f"<tr><td>{point.rank}</td><td>{size_text(point.size_bytes)}</td><td>{_error(point.error)}</td></tr>"
        for point in report.uniform
    )
    every = _table((say("Rank"), say("File size"), say("Error")), points, "ranks")
    true = (
        f'<div class="lm-quiet">{say("True rank, at most")} {report.numerical_rank} · '
        f"{say('on average')} {report.mean_rank:.1f}</div>"
    )
    return f'<div class="lm-tables">{smallest}{every}</div>{note_box([ERROR_MEANS])}{true}'


def _error(error: float) -> str:
    """An error before anything is stored; what is left of float64's own is none."""
    return say("none") if error < NO_ERROR else foreign(percent(error))


def _table(heads: Sequence[str], rows: str, name: str) -> str:
    head = "".join(f"<th>{text}</th>" for text in heads)
    return f'<table class="lm-layers lm-numbers" data-table="{name}"><tr>{head}</tr>{rows}</table>'


def _files(reports: Sequence[InspectReport]) -> str:
    rows = "".join(_file(report) for report in reports)
    heads = (say("File"), say("Norm"), say("True rank"), say("File size"))
    return _table(heads, rows, "files")


def _file(report: InspectReport) -> str:
    largest: Any = report.numerical_rank["largest"]
    return (
        f"<tr><td>{foreign(Path(report.file).stem)}</td><td>{report.norm:.3g}</td>"
        f"<td>{largest:.0f}</td><td>{size_text(report.size_bytes)}</td></tr>"
    )
