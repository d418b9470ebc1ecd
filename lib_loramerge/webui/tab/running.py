"""Merging: the buttons that begin, repeat and drop a merge, and the page's questions about it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import LoraMergeError, RecipeError
from ...methods import METHODS
from ...recipe.rank_rules import RANK_RULES
from .. import baking as bakes
from .. import form, render_jobs
from ..compat import update
from ..form import Changes, Form
from ..merge_jobs import MergeRequest
from . import extracting
from .asking import Asking
from .wiring import FORM_NAMES, argument

if TYPE_CHECKING:
    from ..jobs import Job

SHOWN_FIRST = 60 * 60  # A finished merge is shown again after a reload for an hour.


class Running(Asking):
    """What begins merges and shows how they are."""

    def connect_jobs(self) -> None:
        outputs = self.job_places
        begun = self.begun_places
        self.on("merge", lambda values: self.start(values, trial=False), FORM_NAMES, begun)
        self.on("try", lambda values: self.start(values, trial=True), FORM_NAMES, begun)
        self.on(
            "again",
            self.again,
            ("argument", *FORM_NAMES),
            (*begun, "conv_rank", *self.shown_by_choice),
            js=f"(...v) => [...loramergeArgument('again'), ...v.slice(1, {len(FORM_NAMES) + 1})]",
        )
        self.on("poll", self.poll, ("argument",), outputs, message="argument", js=argument("poll"))
        self.on("drop", self.drop, ("argument",), outputs, message="argument", js=argument("drop"))

    def start(self, values: Form, *, trial: bool) -> Changes:
        from .. import facts  # Not at the WebUI's start, see extension.py.

        found = facts.gather(values, self.host, METHODS)
        reasons = found.reasons(trial)
        try:
            if not reasons:
                return self._begin(values, trial)
        except LoraMergeError as error:
            reasons = [str(error)]
        changes = self.refusal(reasons, "trial" if trial else "merge")
        return changes if found.overwrite else {**changes, "overwrite": False}

    def _begin(self, values: Form, trial: bool) -> Changes:
        recipe = form.read_form(values, self.host, METHODS).check()
        overwrite = form.may_overwrite(values, self.host.loras())
        name = str(values["name"] or "").strip()
        if bakes.is_bake(values):
            name = name or bakes.propose_name(values, recipe.inputs, self.host)
            job = self.jobs.submit(bakes.request_of(values, recipe, name, overwrite))
            return {**self.begun(job), "overwrite": False}
        preview = str(values["preview"] or "")
        request = MergeRequest(
            recipe,
            name=name,
            subfolder=str(values["subfolder"] or "").strip(),
            overwrite=overwrite,
            trial=trial,
            user_metadata=None if trial else form.user_metadata(values),
            preview="" if preview == form.NO_PREVIEW or trial else preview,
            changed_sources=True,
        )
        begun = self.merge(request)
        # The tick was for this merge alone.
        return begun if trial else {**begun, "overwrite": False}

    def merge(self, request: MergeRequest) -> Changes:
        """Begin a merge; without a name it gets a free one made of the inputs'."""
        if not request.name:
            request = replace(request, name=self.host.propose_name(request.recipe.inputs))
        return self.begun(self.jobs.submit(request))

    def again(self, values: Form) -> Changes:
        """A merge once more, keeping everything; the form says so where it is still that merge's."""
        job = self.jobs.get(str(values["argument"] or ""))
        if job is None:
            raise RecipeError("That merge is not remembered any more.")
        same = form.read_form(values, self.host, METHODS).recipe == getattr(job.request, "recipe", None)
        begun = self.jobs.again_exactly(job)
        changes = self.begun(begun)
        if same:
            full: Changes = {"rank_rule": RANK_RULES["full"], "conv_rank": ""}
            changes |= {"conv_rank": "", **self.chosen(values, full)}
        return changes

    def begun(self, job: Job) -> Changes:
        return {**self._state(job), "started": f"{job.id} {job.created}", "refused": ""}

    def poll(self, values: Form) -> Changes:
        # The analysis that the page shows is large: it is sent once.
        job_id, _, seen = str(values["argument"] or "").partition(" ")
        return {**self._state(self._followed(job_id), seen), "argument": update()}

    def drop(self, values: Form) -> Changes:
        job = self.jobs.cancel(str(values["argument"] or ""))
        if job is not None:
            deadline = time.monotonic() + 1.0
            while not job.finished and time.monotonic() < deadline:
                self.jobs.wait(self.jobs.version, 0.1)
        return {**self._state(job), "argument": update()}

    def _followed(self, job_id: str) -> Job | None:
        """The job that a page shows: its own, else the one at work, else the last one done."""
        job = self.jobs.get(job_id) or self.jobs.current()
        if job is None:
            recent = [job for job in self.jobs.list() if job.ended and time.time() - job.ended < SHOWN_FIRST]
            job = recent[-1] if recent else None
        return job

    def _state(self, job: Job | None, seen: str | None = None) -> Changes:
        """How all jobs are, and the end of this one; the last analysis where a page says which it has."""
        known = self.jobs.list()
        shown = render_jobs.job_list(known, job, f"{time.time()}", self.host.labels_state())
        changes: Changes = {"jobs": shown, extracting.JOBS: shown}
        if job is not None:
            extraction = job.request.kind in ("extract", render_jobs.ANALYSIS)
            place = extracting.RESULT if extraction else "result"
            changes[place] = render_jobs.job_result(job, self.host) if job.finished else ""
        found = next(filter(_is_shown, reversed(known)), None)
        if found is not None and seen not in (None, found.id):
            changes[extracting.ANALYSIS] = render_jobs.analysis_page(found, self.host)
        return changes


def _is_shown(job: Job) -> bool:
    """Whether it is an analysis that a page asked for, and done not long ago."""
    done = job.request.kind == render_jobs.ANALYSIS and job.report is not None and not job.by_rest
    return done and job.ended is not None and time.time() - job.ended < SHOWN_FIRST
