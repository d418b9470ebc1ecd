"""REST's routes: what each is called, takes and gives, and what it does.

Names mean files inside the LoRA folder and nothing else: no path, no link that leads out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from .. import __version__
from ..errors import Cancelled
from ..methods import METHODS
from ..recipe import DTYPES
from . import analyse, checkpoint_api, schema, sweep_jobs
from .access import Refusal
from .errand import Errand
from .fields import Fields, refuse_path
from .host import Host
from .jobs import Job, JobQueue
from .merge_jobs import MergeRequest
from .schema import Schema
from .sidecar import UserMetadata

LOOK_SECONDS = 300.0
INSPECT_SECONDS = 60.0

_TEXTS = ("activation_text", "negative_text", "notes", "description")
_RECIPE = schema.object_of({"recipe": schema.recipe_schema()}, ("recipe",))
_NAME = schema.object_of({"name": schema.text("LoRA name")}, ("name",))
_JOB = schema.job_schema()
_JOBS = schema.object_of({"jobs": {"type": "array", "items": _JOB}})

Answer = Callable[["Service", Fields], object]


@dataclass(frozen=True)
class Route:
    """One route.

    Attributes:
        path: Below the prefix of the version; ``{job_id}`` becomes a field.
        body: What it takes, whose properties are the only fields.
        result: What it gives.
        slow: It looks at tensors, so it waits its turn among its like.
    """

    method: str
    path: str
    summary: str
    body: Schema | None
    result: Schema | None
    status: int
    slow: bool
    answer: Answer

    @property
    def name(self) -> str:
        return self.answer.__name__

    @property
    def fields(self) -> tuple[str, ...]:
        return ("job_id",) if self.body is None else tuple(self.body["properties"])


ROUTES: list[Route] = []


def route(
    method: str,
    path: str,
    summary: str,
    body: Schema | None = None,
    result: Schema | None = None,
    status: int = 200,
    *,
    slow: bool = False,
) -> Callable[[Answer], Answer]:
    """Adds a method of :class:`Service` to the routes, in the order of ``/docs``."""

    def add(answer: Answer) -> Answer:
        ROUTES.append(Route(method, path, summary, body, result, status, slow, answer))
        return answer

    return add


class Service:
    """What each route does, as plain functions from JSON to JSON."""

    def __init__(self, host: Host, jobs: JobQueue) -> None:
        self.host = host
        self.jobs = jobs

    @route("GET", "/loras", "All LoRAs of the LoRA folder")
    def loras(self, _: Fields) -> object:
        fields = ("name", "alias", "subfolder", "base", "rank")
        return {"loras": [{field: getattr(entry, field) for field in fields} for entry in self.host.loras()]}

    @route("GET", "/methods", "Merge methods and their parameters")
    def methods(self, _: Fields) -> object:
        return {
            "version": __version__,
            "methods": [method.to_json() for method in METHODS.values()],
            "dtypes": list(DTYPES),
        }

    @route("GET", "/presets", "Block-weight presets")
    def presets(self, _: Fields) -> object:
        presets = self.host.presets()
        return {"weights": dict(presets.weights), "elements": dict(presets.elements)}

    @route("POST", "/plan", "What a merge would do, without doing it", _RECIPE)
    def plan(self, fields: Fields) -> object:
        content = self.host.plan(fields.recipe(), strict=True).to_json()
        for entry in content["inputs"]:
            entry.pop("path", None)
        return content

    @route("POST", "/merge", "Queues a merge", schema.merge_schema(), _JOB, 202)
    def merge(self, fields: Fields) -> object:
        trial = fields.flag("trial")
        name = fields.text("name") if trial else fields.name("name")
        subfolder, preview = fields.text("subfolder"), fields.text("preview")
        for value in (name, subfolder, preview):
            refuse_path(value)
        data = UserMetadata(
            preferred_weight=fields.number("preferred_weight"),
            **{field: fields.text(field) for field in _TEXTS},
        )
        return self._queue(
            MergeRequest(
                recipe=fields.recipe(),
                name=name,
                subfolder=subfolder,
                overwrite=fields.flag("overwrite"),
                trial=trial,
                user_metadata=None if data.empty else data,
                preview=preview,
                strict=True,
            )
        )

    @route("POST", "/sweep", "Queues a sweep", schema.sweep_schema(), _JOB, 202)
    def sweep(self, fields: Fields) -> object:
        request = sweep_jobs.sweep_request(fields)
        for value in (request.subfolder, *(given.name for given in request.points[0].recipe.inputs)):
            refuse_path(value)
        return self._queue(request)

    @route("GET", "/checkpoints", "Checkpoints as the host lists them")
    def checkpoints(self, _: Fields) -> object:
        return {"checkpoints": self.host.checkpoints(), "current": self.host.current_checkpoint()}

    @route("POST", "/bake", "Queues a bake", schema.bake_schema(), _JOB, 202)
    def bake(self, fields: Fields) -> object:
        self.host.check_open()
        return self._queue(checkpoint_api.bake_request(fields))

    @route("POST", "/extract", "Queues an extraction", schema.extract_schema(), _JOB, 202)
    def extract(self, fields: Fields) -> object:
        self.host.check_open()
        return self._queue(checkpoint_api.extract_request(fields))

    def _queue(self, request: Errand) -> object:
        return self._shown(self.jobs.submit(request, by_rest=True))

    @route("POST", "/inspect", "What a LoRA file is", _NAME, slow=True)
    def inspect(self, fields: Fields) -> object:
        from ..analysis import inspect as inspect_lora  # Not at the WebUI's start, see extension.py.

        name = fields.text("name")
        refuse_path(name)
        ends = time.monotonic() + INSPECT_SECONDS
        try:
            path = self.host.find(name, strict=True)
            content = inspect_lora(path, cancel=lambda: time.monotonic() > ends).to_json()
        except Cancelled as error:
            raise Refusal(
                503, f"No answer within {INSPECT_SECONDS:.0f} seconds; the file is large."
            ) from error
        content.pop("path", None)
        return content

    @route("POST", "/compare", "Where LoRAs agree, overlap and fight", _RECIPE, slow=True)
    def compare(self, fields: Fields) -> object:
        found = self._look(fields, "compare").compare
        assert found is not None
        return found.to_json()

    @route("POST", "/advise", "Error and file size at every rank", _RECIPE, slow=True)
    def advise(self, fields: Fields) -> object:
        found = self._look(fields, "advise").advise
        assert found is not None
        return found.to_json()

    @route("POST", "/plot", "A picture as PNG", schema.plot_schema(), schema.PNG, slow=True)
    def plot(self, fields: Fields) -> bytes:
        kind, theme = fields.choice("kind", analyse.KINDS), fields.choice("theme", analyse.THEMES)
        return self._look(fields, kind, theme).pictures[kind]

    def _look(self, fields: Fields, kind: str, theme: str | None = None) -> analyse.Findings:
        """What was found, once it is; the calling thread waits."""
        plan = self.host.plan(fields.recipe(), strict=True)
        looks = self.jobs.looks
        look = looks.ask(analyse.Question(plan, (kind,), theme, LOOK_SECONDS))
        if not looks.wait(look, LOOK_SECONDS):
            looks.cancel(look.id)
            raise Refusal(
                503, f"No answer within {LOOK_SECONDS:.0f} seconds. Try again when less is going on."
            )
        if look.findings is None:
            raise look.error or Refusal(503, "The analysis was cancelled: the host is ending.")
        return look.findings

    @route("GET", "/jobs", "All merges, oldest first", result=_JOBS)
    def list_jobs(self, _: Fields) -> object:
        return {"jobs": [self._shown(job) for job in self.jobs.list()]}

    @route("GET", "/jobs/{job_id}", "State, progress and report of a merge", result=_JOB)
    def get_job(self, fields: Fields) -> object:
        return self._known(fields, self.jobs.get)

    @route("DELETE", "/jobs/{job_id}", "Cancels a merge", result=_JOB)
    def cancel_job(self, fields: Fields) -> object:
        return self._known(fields, self.jobs.cancel)

    def _known(self, fields: Fields, find: Callable[[str], Job | None]) -> object:
        job_id = fields.text("job_id")
        job = find(job_id)
        if job is None:
            raise Refusal(404, f"There is no job {job_id[:40]!r}; finished jobs are forgotten after a while.")
        return self._shown(job)

    def _shown(self, job: Job) -> object:
        return job.to_json(self.host.write_dir())
