"""What the tab says, as HTML. Every text that comes from files or people is escaped here.

Words of ours go through :func:`say`, so that a test finds them all in the
translations; they stand in elements of their own, because the WebUI
translates whole texts of elements, not parts of sentences.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from ..errors import Sentence, fill

if TYPE_CHECKING:
    from ..merge import MergePlan, Source
    from ..report import InputReport, MergeReport, Smaller, WorstLayer

MANY_RANKS = 4
# Names of the safetensors format, as everybody else calls them.
DTYPES = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8",
    "F8_E5M2": "float8",
}
ERROR_MEANS = (
    "The error is the distance of the file from the exact result, as a share of that result's strength: "
    "0 % is exact, and 100 % is as far off as an empty file."
)


# Words that the host's page has in another sense, by which they would be translated there too: Gradio writes
# "Error" over what failed.
MEANT = {"Error": "Error of the numbers"}


def say(text: str) -> str:
    """One of our own words or sentences, ready for HTML."""
    meant = said(MEANT[text]) if text in MEANT else ""
    return f"<span{meant}>{html.escape(text)}</span>"


def foreign(value: object) -> str:
    """Text that is not ours: names, paths, metadata, messages that quote them."""
    return html.escape(str(value))


# The library's sentences name options of the command line; the page has a control for each.
CONTROL_OF_FLAG: Mapping[str, str] = {
    "base": "Base checkpoint",
    "skip-unsupported": "Leave out what cannot be merged",
    "allow-changed-sources": "pick the LoRA in its row again",
    "overwrite": "Overwrite",
    "mode": "Mode",
    "rank": "Rank",
    "conv-rank": "Rank of convolutions",
    "retain": "Keep a share",
    "size": "Fit a size",
    "seed": "Seed",
    "dtype": "Precision",
    "device": "Device",
    "dialect": "Names in the file",
    "lora-dir": "LoRA folder",
    "rounding": "Rounding",
    "drop-ema": "Leave out EMA weights",
    "max-rank": "Largest rank",
}


@cache
def _flag() -> re.Pattern[str]:
    """An option with its value; compiled when first used, for a quick start of the WebUI."""
    names = "|".join(sorted(CONTROL_OF_FLAG, key=len, reverse=True))
    # A word in capitals stands for a value in general and means nothing on the page.
    return re.compile(
        rf"(?<![\w-])(`?)--({names})(?![\w-])"
        r"(?: [A-Z]{2,}\b| (?P<value>\{\w+\}|(?:\d[\d.]*\d|\d|full|same|auto|kohya|diffusers)\b))?\1"
    )


def sentence(text: str) -> str:
    """A sentence of the library for the page: escaped, with controls in place of the options it names."""

    def control(match: re.Match[str]) -> str:
        value = match["value"]
        return f"<b>{say(CONTROL_OF_FLAG[match[2]])}</b>" + (f": {value}" if value else "")

    text = Sentence(text)
    parts = [sentence(part) if isinstance(part, Sentence) else foreign(part) for part in text.parts]
    return fill(_flag().sub(control, foreign(text.key)), text.key, parts)


def said(text: str) -> str:
    """The attribute from which the page's script makes a sentence in another language."""
    return f' data-said="{foreign(json.dumps(Sentence(text).to_json(), ensure_ascii=False))}"'


def size_text(count: float) -> str:
    """Bytes as people read them; 1 MB is 1,000,000 bytes."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    if count >= 1e6:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e3:.1f} kB"


def ranks_text(ranks: Mapping[int, int]) -> str:
    """The ranks of a file in a few characters: ``32``, ``8, 16`` or ``4-64``."""
    known = sorted(int(rank) for rank in ranks)
    if not known:
        return "–"
    if len(known) <= MANY_RANKS:
        return ", ".join(map(str, known))
    return f"{known[0]}–{known[-1]}"


def time_text(seconds: float) -> str:
    """A duration in the largest unit that fits."""
    if seconds < 1:
        return f"{seconds:.2g} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def button_words(selector: str, text: str) -> str:
    """Beside a button, whose text Gradio keeps to itself: what that text is made of."""
    return f'<span hidden data-button="{selector}"{said(text)}>{foreign(text)}</span>'


def _box(kind: str, text: str, attributes: str = "") -> str:
    return f'<div class="lm-{kind}"{attributes}{said(text)}>{sentence(text)}</div>'


def error_box(text: str) -> str:
    """An error beside what caused it; nothing for an empty text."""
    return _box("error", text, ' role="alert"') if text else ""


def warning_box(texts: Iterable[str]) -> str:
    """Sentences to read before going on."""
    return "".join(_box("warning", text) for text in texts)


def note_box(texts: Iterable[str]) -> str:
    """Sentences that need no action."""
    return "".join(_box("note", text) for text in texts)


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Label and value pairs; both are HTML already."""
    return (
        '<dl class="lm-table">'
        + "".join(f"<dt>{key}</dt> <dd>{value}</dd> " for key, value in rows)
        + "</dl>"
    )


def dots(parts: Sequence[str]) -> str:
    return '<i class="lm-dot">·</i>'.join(part for part in parts if part)


def row_facts(source: Source, fits: bool = True, picture: str = "") -> str:
    """What one file is, below its row.

    Args:
        fits: Whether its base model is that of the first row.
        picture: Address of a small picture of it.
    """
    base = " / ".join(source.fitting) or source.architecture.label
    parts = [
        f'<b class="lm-base{"" if fits else " lm-other"}">{foreign(base)}</b>',
        foreign(", ".join(source.kinds)),
        f"{say('rank')} {foreign(ranks_text(source.ranks))}" if source.ranks else "",
        f"{len(source.layers)} {say('layer' if len(source.layers) == 1 else 'layers')}",
        foreign(", ".join(sorted(DTYPES.get(name, name) for name in source.weight_dtypes))),
        foreign(source.dialect),
    ]
    # The name stands above: the picture says nothing more to who cannot see it.
    image = f'<img class="lm-thumb" alt="" src="{foreign(picture)}">' if picture else ""
    return f'<div class="lm-row-facts">{image}<span>{dots(parts)}</span></div>'


def plan_facts(
    plan: MergePlan,
    warnings: Sequence[str],
    notes: Sequence[str] = (),
    expected: float = 0.0,
    less: Smaller | None = None,
) -> str:
    """What will come out, before anything is computed.

    Args:
        notes: Sentences to know that are no warnings.
        expected: Seconds that the merge takes; 0 where that is not worth a word.
        less: A smaller file: its ``rank`` and, where it is known, what it costs and loses.
    """
    upper = "" if plan.ranks_known else say("at most") + " "
    rows = [
        (say("Base model"), foreign(plan.architecture.label)),
        (say("LoRAs"), str(len(plan.sources))),
        (say("Layers"), _layers(plan.layer_count, len(plan.left_out))),
        (say("Rank"), upper + foreign(ranks_text(plan.rank_histogram))),
        (say("File size"), upper + f"<b>{size_text(plan.predicted_bytes)}</b>"),
        (say("Precision"), foreign(plan.dtype)),
    ]
    if expected:
        rows.append((say("Time"), f"{say('about')} {time_text(expected)}"))
    offered = ""
    if less is not None and "error" in less:
        rows.append((say("A smaller file"), _smaller(less)))
    elif less is not None:
        offered = f'<div class="lm-buttons">{offer(say("Use this rank"), rank=less["rank"])}</div>'
    said = warning_box((*plan.warnings, *plan.skipped, *warnings))
    return table(rows) + note_box(notes) + offered + said


def _layers(count: int, left_out: int) -> str:
    extra = f" ({left_out} {say('left out, their weight is 0')})" if left_out else ""
    return f"{count}{extra}"


def report_table(report: MergeReport) -> str:
    """The numbers of a finished merge."""
    from ..report import lossy  # Not at the WebUI's start, see extension.py.

    rows = [
        (say("File size"), f"{size_text(report.size_bytes)}, {foreign(report.dtype)}"),
        (say("Base model"), foreign(report.base_model)),
        (say("Layers"), _layers(report.layers, report.layers_left_out)),
        (say("Rank"), foreign(ranks_text(report.ranks))),
        (say("Error"), f'<b class="lm-error-value">{_error(report)}</b>'),
        (say("Kept of each LoRA"), _shares(report.inputs)),
        *([] if report.smaller is None else [(say("A smaller file"), _smaller(report.smaller))]),
        (say("Time"), time_text(report.seconds.get("total", 0.0))),
        (say("Hash"), f"<code>{foreign(report.sshs_model_hash[:12])}</code>"),
    ]
    more = (
        details(say("Worst layers"), _worst(report.worst_layers, report.dtype)) if report.worst_layers else ""
    )
    more += details(say("What went in"), "".join(_input(entry) for entry in report.inputs))
    if report.skipped:
        more += details(say("Left out"), note_box(report.skipped))
    if lossy(report.error, report.dtype):
        more = note_box([ERROR_MEANS]) + more
    return table(rows) + more


def _error(report: MergeReport) -> str:
    """The error of the file; that of rounding alone only where no LoRA was cut off either."""
    from ..report import EXACT_SUM, WHOLE, percent  # Not at the WebUI's start, see extension.py.

    cut = report.error_against == EXACT_SUM and any(entry.kept < WHOLE for entry in report.inputs)
    if cut and math.isfinite(report.error):
        return foreign(percent(report.error))
    return error_value(report.error, report.dtype)


def _shares(inputs: Sequence[InputReport]) -> str:
    """What of each LoRA is in the file."""
    from ..report import percent  # Not at the WebUI's start, see extension.py.

    parts = []
    for entry in inputs:
        worst = entry.worst_block
        where = f" ({foreign(worst['block'])} {percent(max(0.0, worst['kept']))})" if worst else ""
        parts.append(f"{foreign(entry.name)} {percent(max(0.0, entry.kept))}{where}")
    return dots(parts)


def _smaller(smaller: Smaller) -> str:
    """What a file of the inputs' rank would cost and lose."""
    from ..report import percent  # Not at the WebUI's start, see extension.py.

    parts = [f"{say('rank')} {smaller['rank']}", size_text(smaller["size_bytes"])]
    if "error" in smaller:
        parts.append(f"{say('Error')} {say('about')} {percent(smaller['error'])}")
    if "kept" in smaller:
        kept = percent(max(0.0, smaller["kept"]))
        parts.append(f"{say('least kept of')} {foreign(smaller['weakest'])}: {kept}")
    return dots([*parts, offer(say("Use this rank"), rank=smaller["rank"])])


def offer(text: str, **wanted: float | str) -> str:
    """A button that puts a rank, a size in MB or the strength of the sum into the form.

    Args:
        text: What it says, HTML already.
    """
    data = foreign(json.dumps(wanted))
    return f'<button type="button" class="lm-button lm-use" data-use="{data}">{text}</button>'


def details(title: str, body: str) -> str:
    """A part that is folded away; both are HTML already."""
    return f'<details class="lm-details"><summary>{title}</summary>{body}</details>'


def error_value(error: float, dtype: str) -> str:
    """An error as HTML; numbers would only puzzle where it comes from storing ``dtype``."""
    from ..report import lossy, percent  # Not at the WebUI's start, see extension.py.

    if not math.isfinite(error):
        return "–"
    return foreign(percent(error)) if lossy(error, dtype) else say("none but rounding")


def _worst(layers: Sequence[WorstLayer], dtype: str) -> str:
    rows = "".join(
        f"<tr><td>{error_value(entry['error'], dtype)}</td><td>{foreign(entry['rank'] or '–')}</td>"
        f"<td><code>{foreign(entry['layer'])}</code></td></tr>"
        for entry in layers
    )
    head = f"<tr><th>{say('Error')}</th><th>{say('Rank')}</th><th>{say('Layer')}</th></tr>"
    return f'<table class="lm-layers">{head}{rows}</table>'


def _input(entry: InputReport) -> str:
    blocks = entry.blocks
    lines = [
        f"<b>{foreign(entry.name)}</b>",
        dots(
            [
                f"{say('text encoder')} {entry.te:g}",
                f"{say('denoiser')} {entry.unet:g}",
                f"{entry.layers} {say('layers')}",
                foreign(entry.dialect),
            ]
        ),
    ]
    if len(set(blocks.values())) > 1:
        cells = "".join(
            f"<span><i>{foreign(block)}</i> {weight:g}</span>" for block, weight in blocks.items()
        )
        lines.append(f'<div class="lm-blocks">{cells}</div>')
    return f'<div class="lm-input">{"<br>".join(lines)}</div>'


def data_place(name: str, data: object) -> str:
    """Data for the page's script: the labels of the lists of LoRAs, or their pictures."""
    return f'<div data-{name}="{foreign(json.dumps(data, ensure_ascii=False))}" hidden></div>'


def page_words(hints: Mapping[str, str], prompts: Iterable[str]) -> str:
    """What the page's script needs to know: a hint for each element, and where the prompts are."""
    data = foreign(json.dumps({"hints": dict(hints), "prompts": list(prompts)}, ensure_ascii=False))
    return f'<div id="loramerge_words" data-words="{data}" hidden></div>'
