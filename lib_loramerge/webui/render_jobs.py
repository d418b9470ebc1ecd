"""HTML of jobs: what runs and waits, and how one ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .background import CANCELLED, DONE, FAILED, RUNNING, WAITING
from .render import dots, error_box, foreign, report_table, say, size_text, time_text, warning_box

if TYPE_CHECKING:
    from ..sweep.running import TableRow
    from .host import Host
    from .jobs import Job

STATES = {
    WAITING: "Waiting",
    RUNNING: "Merging",
    DONE: "Done",
    FAILED: "Not merged",
    CANCELLED: "Cancelled",
}
ANALYSIS = "analysis"  # The kind of job whose result is a page of its own.
PHASES = {
    "look": "Reading",
    "merge": "Merging",
    "write": "Writing",
    "hash": "Hashing",
    "extract": "Extracting",
}


def job_list(jobs: Sequence[Job], followed: Job | None, stamp: str, labels: str = "") -> str:
    """Running and waiting merges with their bars and buttons.

    The attributes of the outer element tell the page's script whether to ask
    again, for which job, and when the lists of LoRAs know more than before.
    """
    active = [job for job in jobs if not job.finished]
    state = "active" if active else "idle"
    body = "".join(_job(job) for job in active)
    follow = f' data-follow="{foreign(followed.id)}" data-created="{followed.created}"' if followed else ""
    marks = f'data-state="{state}" data-stamp="{foreign(stamp)}" data-labels="{labels}"'
    return f'<div class="lm-jobs" {marks}{follow}>{body}</div>'


def _job(job: Job) -> str:
    head = (
        f'<div class="lm-job-head"><b>{foreign(job.title)}</b>{_elsewhere(job)}<span class="lm-grow"></span>'
        f'<button type="button" class="lm-button lm-drop" data-job="{foreign(job.id)}">'
        f"{say('Cancel')}</button></div>"
    )
    box = f'<div class="lm-job" data-job="{foreign(job.id)}">'
    if job.state == WAITING:
        return f'{box}{head}<div class="lm-quiet">{say("Waiting for its turn")}</div></div>'
    share = max(0.0, min(1.0, job.fraction))
    parts = [say(_doing(job))]
    if job.progress and job.unit == "bytes":
        parts.append(f"{size_text(job.progress.done)} / {size_text(job.progress.total)}")
    elif job.progress and job.progress.total and job.request.kind == "sweep":
        parts.append(foreign(job.progress.layer))
    elif job.progress and job.progress.total and job.progress.phase != "write":
        parts.append(f"{job.progress.done} / {job.progress.total} {say('layers')}")
    if job.eta is not None:
        parts.append(f"{say('time left')} {time_text(job.eta)}")
    return (
        f"{box}{head}"
        '<div class="lm-bar" role="progressbar" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{share * 100:.0f}"><div style="width:{share * 100:.1f}%"></div></div>'
        f'<div class="lm-quiet">{dots(parts)}</div></div>'
    )


def _doing(job: Job) -> str:
    if job.progress is None:
        return "Starting"
    return "Analysing" if job.request.kind == ANALYSIS else PHASES.get(job.progress.phase, "Merging")


def analysis_page(job: Job, host: Host) -> str:
    """What an analysis found, where it is done."""
    # Not at the WebUI's start, see extension.py.
    from ..checkpoints import ExtractReport
    from . import render_checkpoints

    if not isinstance(job.report, ExtractReport):
        return ""
    return render_checkpoints.analysis(job.id, job.report, job.picture, job.notes, host)


def job_result(job: Job, host: Host) -> str:
    """How a merge ended: its report, its error, or that it was cancelled."""
    box = f'<div class="lm-result" data-job="{foreign(job.id)}">'
    if job.state == FAILED:
        return f"{box}{_title(job)}{error_box(host.shown(job.error))}{_buttons(job, None)}</div>"
    if job.state == CANCELLED:
        why = say("The WebUI reloaded its interface, which ends merges. Nothing was written.")
        text = f'<div class="lm-quiet">{why if job.closed else say("Cancelled. Nothing was written.")}</div>'
        return f"{box}{_title(job)}{text}{_buttons(job, None)}</div>"
    report = job.report
    if report is None:
        return ""
    if job.output is None:
        from .render_analysis import analysed  # Not at the WebUI's start, see extension.py.

        return f"{box}{_title(job)}{analysed(job.id)}</div>"
    where = _written(job.output, host)
    # Not at the WebUI's start, see extension.py.
    from ..report import MergeReport
    from .sweep_jobs import SweepReport

    if isinstance(report, SweepReport):
        return f'{box}{_title(job)}<div class="lm-written">{where}</div>{sweep_table(report.rows)}</div>'
    if not isinstance(report, MergeReport):
        from . import render_checkpoints  # The same.

        shown = render_checkpoints.result(report, job.notes, host, where, _buttons(job, host))
        return f"{box}{_title(job)}{shown}</div>"
    if job.request.trial:
        where = say("Not saved: it is gone when the WebUI ends. Press Merge and save to keep it.")
    parts = [
        _title(job),
        f'<div class="lm-written">{where}</div>',
        _buttons(job, host),
        warning_box(map(host.shown, (*report.warnings, *job.notes))),
        report_table(report),
    ]
    return f"{box}{''.join(parts)}</div>"


def sweep_table(rows: Sequence[TableRow]) -> str:
    """The files of a sweep: what each is called, its size, its error, and what it keeps of each LoRA."""
    from ..report import percent  # Not at the WebUI's start, see extension.py.

    loras = list(dict.fromkeys(name for row in rows for name in row["kept"] or ()))
    heads = [say("File"), say("File size"), say("Error"), *map(foreign, loras)]
    body = ""
    for row in rows:
        kept = row["kept"] or {}
        cells = [
            foreign(row["file"]),
            "" if row["size_bytes"] is None else size_text(row["size_bytes"]),
            *("" if value is None else percent(value) for value in (row["error"], *map(kept.get, loras))),
        ]
        body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    head = "".join(f"<th>{head}</th>" for head in heads)
    return f'<table class="lm-layers lm-numbers" data-table="sweep"><tr>{head}</tr>{body}</table>'


def _written(path: Path, host: Host) -> str:
    shown, link = foreign(host.shown_path(path)), host.file_link(path)
    if link:
        return f'{say("Written")} <a href="{foreign(link)}" target="_blank" download>{shown}</a>'
    return f"{say('Written')} <code>{shown}</code>"


def _title(job: Job) -> str:
    return (
        f'<div class="lm-job-head lm-{foreign(job.state)}"><b>{foreign(job.title)}</b>'
        f'<em class="lm-badge">{say(_state_word(job))}</em>'
        f"{_elsewhere(job)}</div>"
    )


def _state_word(job: Job) -> str:
    if job.closed:
        return "Ended"
    if job.state == FAILED and job.request.kind != "merge":
        return "Failed"
    return STATES.get(job.state, job.state)


def _elsewhere(job: Job) -> str:
    """Whose merge it is; the page's script shows it where the page did not begin it."""
    text = say("Begun by REST") if job.by_rest else say("Begun in another window")
    return f'<em class="lm-badge lm-elsewhere">{text}</em>'


def _buttons(job: Job, host: Host | None) -> str:
    parts = []
    if host is not None and job.prompt_name and host.prompts:
        tag = foreign(f"<lora:{job.prompt_name}:1>")
        parts.append(
            f'<button type="button" class="lm-button lm-send" data-tag="{tag}" '
            f'data-replaces="{foreign(json.dumps(job.in_place_of))}">'
            f"{say('Send to txt2img prompt')}</button>"
        )
    if job.exact_bytes:
        parts.append(
            f'<button type="button" class="lm-button lm-again" data-job="{foreign(job.id)}">'
            f"{say('Merge again keeping everything')} ({size_text(job.exact_bytes)})</button>"
        )
    if hasattr(job.request, "recipe"):
        parts.append(
            f'<button type="button" class="lm-button lm-refill" data-job="{foreign(job.id)}">'
            f"{say('Fill the form with its settings')}</button>"
        )
    return f'<div class="lm-buttons">{"".join(parts)}</div>'
