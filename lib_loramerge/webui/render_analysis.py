"""What an analysis found, as HTML: verdicts, tables, pictures. Escaped and worded as in :mod:`.render`."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..analysis.curves import weakest
from ..errors import LoraMergeError, Sentence
from ..merge.loudness import PARTS
from ..report import WELL_KEPT, percent
from .analyse import MAX_COMPARED
from .render import (
    ERROR_MEANS,
    error_box,
    foreign,
    note_box,
    offer,
    said,
    say,
    sentence,
    size_text,
    time_text,
)

if TYPE_CHECKING:
    from ..analysis import AdviceReport, CompareReport, InspectReport
    from ..analysis.compare import PairReport
    from ..analysis.curves import RankCurves
    from ..merge import MergePlan
    from .analyse import Look

KEPT_MEANS = (
    "Kept of a LoRA is how much of it, at its strength, is in the file: 100 % is all, 0 % as if it had not "
    "been merged. A weak LoRA beside a strong one can be lost although the error of the sum is small."
)
PAIRS_OPEN = 4
MOST_COLUMNS = 5  # LoRAs with a column of their own.
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
    "inspect": "Charts: norm and effective rank of each file by block, and the share of the norm that each "
    "rank keeps.",
    "compare": "Bars: how strong each LoRA, their sum and the result of the mode are, by block. "
    "Map: where two LoRAs agree (blue) and where they pull against each other (red), "
    "by block and kind of layer.",
    "advise": "Charts: what is kept of each LoRA against rank and file size, how fast the components fall "
    "off, error against rank and file size, and what each block keeps.",
    "ranks": "Charts: how fast the components fall off, error against rank and file size, and what each "
    "block keeps.",
}


def look_state(look: Look, stamp: str) -> str:
    """How far a look is. The attributes tell the page's script whether to ask again."""
    state = "idle" if look.finished else "active"
    attributes = f'data-look="{foreign(look.id)}" data-state="{state}" data-stamp="{foreign(stamp)}"'
    return f'<div class="lm-look" {attributes}>{_state(look)}</div>'


def _state(look: Look) -> str:
    if look.state == "done":
        return analysed(look.id)
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


def analysed(look_id: str) -> str:
    """That an analysis is done, and a button that scrolls to it."""
    button = (
        f'<button type="button" class="lm-button lm-show-look" data-look="{foreign(look_id)}">'
        f"{say('Show it')}</button>"
    )
    return f'<div class="lm-look-line"><span class="lm-quiet">{say("Analysed.")}</span>{button}</div>'


def error_text(look: Look) -> str:
    """The sentence for what went wrong."""
    if isinstance(look.error, LoraMergeError):
        return str(look.error)
    return Sentence(
        "Unexpected error ({kind}). The console of the host tells more.", type(look.error).__name__
    )


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
                    Sentence(
                        "No font of this machine has the letters {letters}, so the charts show boxes in "
                        "their place. Install a font that has them, such as Noto Sans CJK.",
                        found.unreadable,
                    )
                ]
            )
        )
    if len(look.question.plan.sources) > MAX_COMPARED:
        text = say("More than 12 LoRAs are not compared here; the command line does that.")
        parts.append(f'<div class="lm-note">{text}</div>')
    if found.compare is not None:
        body = _verdicts(found.compare)
        parts.append(part(say("How they get on"), body, "compare", found.pictures))
    if found.advise is not None and found.advise.shared:
        parts.append(part(say("Which rank is needed"), targets(found.advise) + _true_rank(found.advise)))
        body = note_box([KEPT_MEANS]) + ranks(found.advise)
        parts.append(part(say("What a rank keeps of each LoRA"), body, "advise", found.pictures))
    elif found.advise is not None:
        body = targets(found.advise) + _true_rank(found.advise) + ranks(found.advise)
        parts.append(part(say("Which rank is needed"), body, "advise", found.pictures))
    if found.inspect:
        parts.append(part(say("What is in each file"), _files(found.inspect), "inspect", found.pictures))
    return page(look.id, parts)


def page(look_id: str, parts: Sequence[str]) -> str:
    """What was found, as HTML, in a frame by which the page's script finds it."""
    return f'<div class="lm-result lm-analysis" data-look="{foreign(look_id)}">{"".join(parts)}</div>'


def head(subject: str) -> str:
    """The title of an analysis, above what was looked at; HTML already."""
    return f'<div class="lm-job-head"><b>{say("Analysis")}</b></div><div class="lm-quiet">{subject}</div>'


def _head(plan: MergePlan) -> str:
    inputs = " + ".join(
        f"{foreign(source.input.name)} <i>×{source.input.unet:g}</i>" for source in plan.sources
    )
    return head(f"{inputs} · {say(plan.method.label)}")


def part(title: str, body: str, kind: str = "", pictures: Mapping[str, bytes] | None = None) -> str:
    pictures = pictures or {}
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
    return shown + _together(report)


def _together(report: CompareReport) -> str:
    """How strong the sum is beside its strongest LoRA, and the strengths at which it is no stronger."""
    if len(report.names) < 2 or not report.louder_in:
        return ""
    shown = [f"<i>{say(PARTS[part])}</i> {ratio:.2f} ×" for part, ratio in report.louder_in.items()]
    if report.loudest is not None:
        shown.append(f"<i>{say('most in')} {foreign(report.loudest[0])}</i> {report.loudest[1]:.2f} ×")
    cells = "".join(f"<span>{cell}</span>" for cell in shown)
    offered = ""
    if report.quieter:
        rows = [[row["name"], row["te"], row["unet"]] for row in report.quieter]
        numbers = ", ".join(
            f"{foreign(name)} {unet:g}" + (f" ({say('text encoder')} {te:g})" if te != unet else "")
            for name, te, unet in rows
        )
        button = offer(say("Lower all strengths to that"), normalize="strongest")
        offered = f'<div class="lm-buttons">{button}<span class="lm-quiet">{numbers}</span></div>'
    title = say("The sum beside its strongest LoRA")
    return f'<div class="lm-pair"><b>{title}</b><div class="lm-blocks">{cells}</div>{offered}</div>'


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
        f'<div class="lm-pair"><b>{names}</b>'
        f'<div class="lm-verdict"{said(pair.verdict)}>{sentence(pair.verdict)}</div>{peace}'
        f'<div class="lm-blocks">{cells}</div></div>'
    )


def targets(report: RankCurves) -> str:
    """The smallest rank and file for some errors, each a click away."""
    rows = "".join(
        f"<tr><td>{foreign(percent(float(target)))}</td><td><b>{rank}</b></td>"
        f"<td>{size_text(report.smallest_size[target])}</td>"
        f"<td>{offer(say('Use this rank'), rank=rank)} "
        f"{offer(say('Use this size'), size=_megabytes(report.smallest_size[target]))}</td></tr>"
        for target, rank in report.smallest_rank.items()
    )
    heads = (say("Error at most"), say("Rank of all layers"), say("File, ranks allotted"), "")
    found = f'<div class="lm-tables">{numbers_table(heads, rows, "targets")}</div>' if rows else ""
    return f"{found}{note_box([ERROR_MEANS])}"


def _true_rank(report: AdviceReport) -> str:
    return (
        f'<div class="lm-quiet">{say("True rank, at most")} {report.numerical_rank} · '
        f"{say('on average')} {report.mean_rank:.1f}</div>"
    )


def _megabytes(count: int) -> float:
    """In MB, rounded up to a kilobyte."""
    return math.ceil(count / 1000) / 1000


def ranks(report: RankCurves) -> str:
    """What every rank costs, loses, and keeps of each LoRA."""
    names = report.shared
    each = 0 < len(names) <= MOST_COLUMNS
    body = ""
    for point in report.uniform:
        cells = [str(point.rank), size_text(point.size_bytes), _error(point.error)]
        least = weakest(point.kept_of)
        if each:
            cells += [_share(point.kept_of[name]) for name in names]
        elif names and least is not None:
            cells.append(f"{_share(least[1])} {foreign(_short(least[0]))}")
        chosen = point.rank == report.chosen_rank
        cells.append(say("chosen") if chosen else offer(say("Use"), rank=point.rank))
        body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    kept = [foreign(_short(name)) for name in names] if each else [say("Least kept")] if names else []
    heads = (say("Rank"), say("File size"), say("Error"), *kept, "")
    return f'<div class="lm-tables">{numbers_table(heads, body, "ranks")}</div>'


def _short(name: str) -> str:
    return Path(name).stem


def _share(share: float) -> str:
    """A share kept, marked where the LoRA is cut off."""
    text = foreign(percent(max(0.0, share)))
    return f'<b class="lm-lost">{text}</b>' if share < WELL_KEPT else text


def _error(error: float) -> str:
    """An error before anything is stored; what is left of float64's own is none."""
    return say("none") if error < NO_ERROR else foreign(percent(error))


def numbers_table(heads: Sequence[str], rows: str, name: str) -> str:
    head = "".join(f"<th>{text}</th>" for text in heads)
    return f'<table class="lm-layers lm-numbers" data-table="{name}"><tr>{head}</tr>{rows}</table>'


def _files(reports: Sequence[InspectReport]) -> str:
    rows = "".join(_file(report) for report in reports)
    # For the sliders of the presets, which show how strong each block is.
    norms = {Path(report.file).stem: dict(report.norm_by_block) for report in reports}
    heads = (say("File"), say("Norm"), say("True rank"), say("Effective rank"), say("File size"))
    table = numbers_table(heads, rows, "files")
    return f'<div class="lm-tables" data-norms="{foreign(json.dumps(norms))}">{table}</div>'


def _file(report: InspectReport) -> str:
    return (
        f"<tr><td>{foreign(Path(report.file).stem)}</td><td>{report.norm:.3g}</td>"
        f"<td>{report.numerical_rank['largest']:.0f}</td><td>{_effective(report)}</td><td>{size_text(report.size_bytes)}</td></tr>"
    )


def _effective(report: InspectReport) -> str:
    """The range over the blocks."""
    found = sorted(report.effective_rank_by_block.values())
    if not found:
        return "–"
    low, high = (f"{value:.1f}" for value in (found[0], found[-1]))
    return low if low == high else f"{low}–{high}"
