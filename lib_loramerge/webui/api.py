"""REST: ``/loramerge/v1/...``, the same merges as in the tab.

Answers are JSON; every error is ``{"error": "..."}``. Names mean files inside the LoRA folder and nothing
else: no path, no link that leads out. Bodies are read here, not by a model class, so that every host's
FastAPI and pydantic answer alike.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, NoReturn

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBasic
from starlette.concurrency import run_in_threadpool

from .. import __version__
from ..errors import (
    Cancelled,
    FileError,
    IncompatibleError,
    LoraMergeError,
    OutputError,
    RecipeError,
    UnknownKeyError,
    UnsupportedError,
)
from ..methods import METHODS
from ..recipe import DTYPES, SETTINGS, MergeRecipe, from_json
from . import analyse, checkpoint_api, schema, sweep_jobs
from .access import Names, Refusal, check_credentials, check_origin, parse_users
from .host import ClosedError, ConflictError, Host, UnknownNameError, without
from .jobs import JobQueue
from .listing import readable
from .merge_jobs import MergeRequest
from .schema import MAX_DEPTH, MAX_INPUTS, MAX_TEXT
from .sidecar import UserMetadata

PREFIX = "/loramerge/v1"
MAX_BODY_BYTES = 1 << 20
MAX_DRAINED_BYTES = 64 << 20
# Reading headers takes the interpreter; the host's own requests go on beside this many of ours.
MAX_AT_ONCE = 4
# Requests that look at tensors wait for one another, and for this long at most.
MAX_LOOKS = 4
LOOK_SECONDS = 300.0
INSPECT_SECONDS = 60.0

_STATUS: tuple[tuple[type[LoraMergeError], int], ...] = (
    (ConflictError, 409),
    (ClosedError, 403),
    (UnknownNameError, 404),
    (RecipeError, 422),
    (OutputError, 400),
    (IncompatibleError, 422),
    (UnsupportedError, 422),
    (UnknownKeyError, 422),
    (FileError, 422),
    (LoraMergeError, 422),
)
# Text on the wire that can only be an attempt to leave the folder, on any system.
_PATH = re.compile(r"^(?:[/\\~]|[A-Za-z]:)|(?:^|[/\\])\.\.(?:[/\\]|$)|[\x00-\x1f]")
# The library's sentences name options of the command line; a request has fields instead.
_FLAG = re.compile(
    rf"(?<![\w-])--({'|'.join(entry.flag[2:] for entry in SETTINGS.values())}|"
    r"allow-changed-sources|overwrite|rounding|drop-ema|max-rank|zip)(?![\w-])(?: CHECKPOINT\b)?"
)


def _in_a_recipe(flag: re.Match[str]) -> str:
    if flag[1] == "allow-changed-sources":
        return "leave hash out of the recipe"
    known = (name for name, entry in SETTINGS.items() if entry.flag[2:] == flag[1])
    return next(known, flag[1].replace("-", "_"))


class _BasicInDocs(HTTPBasic):
    """Puts HTTP Basic into ``/docs``; who may come in is decided in :func:`check_credentials`."""

    async def __call__(self) -> None:  # type: ignore[override]
        # No parameter: some versions of FastAPI cannot resolve the annotations of such an object.
        return None


def mount(
    app: FastAPI,
    host: Host,
    jobs: JobQueue,
    api_auth: str | None = None,
    names: Names | None = None,
    welcome: Callable[[str], bool] = lambda origin: False,
) -> None:
    """Adds the routes to the host's application, once.

    Args:
        api_auth: The host's ``--api-auth``: ``user:password`` pairs separated by commas.
        names: The names of the server, where they are known: requests for others are refused.
        welcome: Whether the owner lets the pages of another origin in.
    """
    if any(getattr(route, "path", "").startswith(PREFIX) for route in app.routes):
        return
    service = Service(host, jobs)
    gate = _Gate(host, api_auth, names, welcome)
    dependencies = [Depends(_BasicInDocs(auto_error=False))] if api_auth else []
    for route in _routes(service):
        app.add_api_route(
            PREFIX + route.path,
            gate.job_endpoint(route) if "{job_id}" in route.path else gate.endpoint(route),
            methods=[route.method],
            name=f"loramerge_{route.name}",
            summary=route.summary,
            tags=["LoRA Merge"],
            dependencies=dependencies,
            status_code=route.status,
            openapi_extra=_request_body(route),
            responses=_responses(route),
            response_class=Response if route.result is schema.PNG else JSONResponse,
        )
    app.add_api_route(
        PREFIX + "/{rest:path}",
        gate.nothing_here,
        methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
        include_in_schema=False,
        dependencies=dependencies,
    )


class Service:
    """What each route does, as plain functions from JSON to JSON."""

    def __init__(self, host: Host, jobs: JobQueue) -> None:
        self.host = host
        self.jobs = jobs

    def loras(self, _: Mapping[str, Any]) -> Any:
        fields = ("name", "alias", "subfolder", "base", "rank")
        return {"loras": [{field: getattr(entry, field) for field in fields} for entry in self.host.loras()]}

    def methods(self, _: Mapping[str, Any]) -> Any:
        return {
            "version": __version__,
            "methods": [method.to_json() for method in METHODS.values()],
            "dtypes": list(DTYPES),
        }

    def presets(self, _: Mapping[str, Any]) -> Any:
        presets = self.host.presets()
        return {"weights": dict(presets.weights), "elements": dict(presets.elements)}

    def plan(self, body: Mapping[str, Any]) -> Any:
        fields = Fields(body, ("recipe",))
        plan = self.host.plan(self._recipe(fields), strict=True)
        content = plan.to_json()
        for entry in content["inputs"]:
            entry.pop("path", None)
        return content

    def merge(self, body: Mapping[str, Any]) -> Any:
        texts = ("activation_text", "negative_text", "notes", "description")
        fields = Fields(
            body, ("recipe", "name", "subfolder", "overwrite", "trial", "preferred_weight", "preview", *texts)
        )
        trial = fields.flag("trial")
        name = fields.text("name") if trial else fields.name("name")
        subfolder, preview = fields.text("subfolder"), fields.text("preview")
        for value in (name, subfolder, preview):
            _refuse_path(value)
        data = UserMetadata(
            preferred_weight=fields.number("preferred_weight"),
            **{field: fields.text(field) for field in texts},
        )
        request = MergeRequest(
            recipe=self._recipe(fields),
            name=name,
            subfolder=subfolder,
            overwrite=fields.flag("overwrite"),
            trial=trial,
            user_metadata=None if data.empty else data,
            preview=preview,
            strict=True,
        )
        return self._job_json(self.jobs.submit(request, by_rest=True))

    def sweep(self, body: Mapping[str, Any]) -> Any:
        request = sweep_jobs.sweep_request(Fields(body, sweep_jobs.FIELDS))
        for value in (request.subfolder, *(given.name for given in request.points[0].recipe.inputs)):
            _refuse_path(value)
        return self._job_json(self.jobs.submit(request, by_rest=True))

    def checkpoints(self, _: Mapping[str, Any]) -> Any:
        return {"checkpoints": self.host.checkpoints(), "current": self.host.current_checkpoint()}

    def bake(self, body: Mapping[str, Any]) -> Any:
        self.host.check_open()
        fields = Fields(body, checkpoint_api.BAKE)
        request = checkpoint_api.bake_request(fields, self._recipe(fields))
        return self._job_json(self.jobs.submit(request, by_rest=True))

    def extract(self, body: Mapping[str, Any]) -> Any:
        self.host.check_open()
        request = checkpoint_api.extract_request(Fields(body, checkpoint_api.EXTRACT))
        return self._job_json(self.jobs.submit(request, by_rest=True))

    def inspect(self, body: Mapping[str, Any]) -> Any:
        name = Fields(body, ("name",)).text("name")
        _refuse_path(name)
        from ..analysis import (
            inspect as inspect_lora,
        )  # Not at the WebUI's start, see extension.py.

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

    def compare(self, body: Mapping[str, Any]) -> Any:
        return self._look(self._recipe(Fields(body, ("recipe",))), "compare").compare.to_json()

    def advise(self, body: Mapping[str, Any]) -> Any:
        return self._look(self._recipe(Fields(body, ("recipe",))), "advise").advise.to_json()

    def plot(self, body: Mapping[str, Any]) -> bytes:
        fields = Fields(body, ("recipe", "kind", "theme"))
        kind, theme = fields.choice("kind", analyse.KINDS), fields.choice("theme", analyse.THEMES)
        return self._look(self._recipe(fields), kind, theme).pictures[kind]

    def _look(self, recipe: MergeRecipe, kind: str, theme: str | None = None) -> Any:
        """What was found, once it is; the calling thread waits."""
        plan = self.host.plan(recipe, strict=True)
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

    def list_jobs(self, _: Mapping[str, Any]) -> Any:
        return {"jobs": [self._job_json(job) for job in self.jobs.list()]}

    def get_job(self, body: Mapping[str, Any]) -> Any:
        return self._job_json(self._known(self.jobs.get(body["job_id"]), body))

    def cancel_job(self, body: Mapping[str, Any]) -> Any:
        return self._job_json(self._known(self.jobs.cancel(body["job_id"]), body))

    def _known(self, job: Any, body: Mapping[str, Any]) -> Any:
        if job is None:
            raise Refusal(
                404, f"There is no job {body['job_id'][:40]!r}; finished jobs are forgotten after a while."
            )
        return job

    def _job_json(self, job: Any) -> Any:
        return job.to_json(self.host.write_dir())

    def _recipe(self, fields: Fields) -> MergeRecipe:
        stored = fields.mapping("recipe")
        inputs = stored.get("inputs")
        if isinstance(inputs, list) and len(inputs) > MAX_INPUTS:
            raise Refusal(422, f"A recipe may have {MAX_INPUTS} inputs at most; this one has {len(inputs)}.")
        recipe = from_json(stored)
        for entry in recipe.inputs:
            _refuse_path(entry.name)
        return recipe


class _Route:
    """One line of the table of routes."""

    def __init__(
        self,
        method: str,
        path: str,
        answer: Callable[[Mapping[str, Any]], Any],
        summary: str,
        body: schema.Schema | None = None,
        result: schema.Schema | None = None,
        status: int = 200,
        *,
        slow: bool = False,
    ) -> None:
        self.method, self.path, self.answer, self.summary = method, path, answer, summary
        self.body, self.result, self.status = body, result, status
        self.name = answer.__name__
        self.slow = slow


def _routes(service: Service) -> tuple[_Route, ...]:
    recipe = schema.object_of({"recipe": schema.recipe_schema()}, ("recipe",))
    name = schema.object_of({"name": schema.text("LoRA name")}, ("name",))
    job = schema.job_schema()
    jobs = schema.object_of({"jobs": {"type": "array", "items": job}})
    return (
        _Route("GET", "/loras", service.loras, "All LoRAs of the LoRA folder"),
        _Route("GET", "/methods", service.methods, "Merge methods and their parameters"),
        _Route("GET", "/presets", service.presets, "Block-weight presets"),
        _Route("POST", "/plan", service.plan, "What a merge would do, without doing it", recipe),
        _Route("POST", "/merge", service.merge, "Queues a merge", schema.merge_schema(), job, 202),
        _Route("POST", "/sweep", service.sweep, "Queues a sweep", schema.sweep_schema(), job, 202),
        _Route("GET", "/checkpoints", service.checkpoints, "Checkpoints as the host lists them"),
        _Route("POST", "/bake", service.bake, "Queues a bake", schema.bake_schema(), job, 202),
        _Route(
            "POST", "/extract", service.extract, "Queues an extraction", schema.extract_schema(), job, 202
        ),
        _Route("POST", "/inspect", service.inspect, "What a LoRA file is", name, slow=True),
        _Route(
            "POST", "/compare", service.compare, "Where LoRAs agree, overlap and fight", recipe, slow=True
        ),
        _Route("POST", "/advise", service.advise, "Error and file size at every rank", recipe, slow=True),
        _Route(
            "POST", "/plot", service.plot, "A picture as PNG", schema.plot_schema(), schema.PNG, slow=True
        ),
        _Route("GET", "/jobs", service.list_jobs, "All merges, oldest first", None, jobs),
        _Route("GET", "/jobs/{job_id}", service.get_job, "State, progress and report of a merge", None, job),
        _Route("DELETE", "/jobs/{job_id}", service.cancel_job, "Cancels a merge", None, job),
    )


class _Gate:
    """Lets a request in, reads its body, and turns what goes wrong into ``{"error": ...}``."""

    def __init__(
        self, host: Host, api_auth: str | None, names: Names | None, welcome: Callable[[str], bool]
    ) -> None:
        self._host = host
        self._users = None if api_auth is None or not api_auth.strip() else parse_users(api_auth)
        self._names, self._welcome = names, welcome
        self._places = asyncio.Semaphore(MAX_AT_ONCE)
        # Their own, so that a long look holds up no short answer.
        self._slow_places = asyncio.Semaphore(MAX_LOOKS)

    def endpoint(self, route: _Route) -> Callable[..., Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            return await self._answer(route, request, {})

        return endpoint

    def job_endpoint(self, route: _Route) -> Callable[..., Awaitable[Response]]:
        async def endpoint(request: Request, job_id: str) -> Response:
            return await self._answer(route, request, {"job_id": job_id})

        return endpoint

    def _let_in(self, request: Request) -> None:
        headers = request.headers
        hosts, origin, site = headers.getlist("host"), headers.get("origin"), headers.get("sec-fetch-site")
        check_origin(hosts, origin, site, self._names, self._welcome)
        check_credentials(self._users, headers.get("authorization"))

    async def nothing_here(self, request: Request) -> JSONResponse:
        try:
            self._let_in(request)
        except Refusal as refusal:
            return _refused(refusal)
        return _error(404, f"There is no {request.method} here. See /docs for what there is below {PREFIX}.")

    async def _answer(self, route: _Route, request: Request, given: Mapping[str, Any]) -> Response:
        try:
            self._let_in(request)
            content = dict(given) if route.body is None else await read_json(request)
            async with self._slow_places if route.slow else self._places:
                result = await run_in_threadpool(self._result, route, content)
            if isinstance(result, bytes):
                return Response(result, media_type="image/png")
            return JSONResponse(result, status_code=route.status)
        except Refusal as refusal:
            return _refused(refusal)
        except LoraMergeError as error:
            status = next(code for kind, code in _STATUS if isinstance(error, kind))
            return _error(status, self._public(str(error)))
        except Exception as error:  # A bug of ours: the caller gets JSON, the console the traceback.
            self._host.log(f"{route.method} {route.path} failed unexpectedly", error)
            return _error(
                500, f"Unexpected error ({type(error).__name__}). The console of the host tells more."
            )

    def _result(self, route: _Route, content: Mapping[str, Any]) -> Any:
        result = route.answer(content)
        return result if isinstance(result, bytes) else self._public(plain(result))

    def _public(self, value: Any) -> Any:
        """``value`` without the folders of this machine and in the words of a recipe."""
        return _public(value, self._host.folder_words())


def _public(value: Any, folder_words: Sequence[tuple[str, str]]) -> Any:
    if isinstance(value, str):
        return _FLAG.sub(_in_a_recipe, without(folder_words, value))
    if isinstance(value, dict):
        return {key: _public(item, folder_words) for key, item in value.items()}
    return [_public(item, folder_words) for item in value] if isinstance(value, list) else value


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object of a request's body.

    Only ``application/json``: a form could be posted by any web page that the user happens to visit.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(400, "Send JSON, with the header Content-Type: application/json.")
    body = bytearray()
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received <= MAX_BODY_BYTES:
            body += chunk
        elif received > MAX_DRAINED_BYTES:
            break
        # The rest is read and thrown away: a client that still sends would not read our answer.
    if received > MAX_BODY_BYTES:
        raise Refusal(413, f"The body is larger than {MAX_BODY_BYTES >> 20} MiB.")
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refusal(400, f"The body is not JSON: {reason}.") from error
    if not isinstance(content, dict):
        raise Refusal(422, "The body must be a JSON object.")
    _check_limits(content, 0)
    return content


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _check_limits(value: object, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise Refusal(422, f"The JSON is nested deeper than {MAX_DEPTH} levels.")
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise Refusal(422, f"A text is longer than {MAX_TEXT} characters.")
        if readable(value) != value:
            raise Refusal(400, f"{value[:60]!a} is no text: it holds half a character.")
    elif isinstance(value, (dict, list)):
        if len(value) > MAX_INPUTS:
            what = "inputs" if isinstance(value, list) else "fields"
            raise Refusal(422, f"A list may have {MAX_INPUTS} {what} at most; one has {len(value)}.")
        for key in value if isinstance(value, dict) else ():
            _check_limits(key, depth)
        for item in value.values() if isinstance(value, dict) else value:
            _check_limits(item, depth + 1)


class Fields:
    """The fields of a JSON object, each of the type asked for, and no others."""

    def __init__(self, content: Mapping[str, Any], known: tuple[str, ...]) -> None:
        unknown = sorted(set(content) - set(known))
        if unknown:
            raise Refusal(422, f"Unknown field {unknown[0][:60]!r}; known are {', '.join(known)}.")
        self._content = content

    def text(self, name: str) -> str:
        return self._get(name, "", str, "text")

    def choice(self, name: str, known: tuple[str, ...]) -> str:
        """One of ``known``; the first when it is not given."""
        value = self._get(name, known[0], str, "text")
        if value not in known:
            raise Refusal(422, f"{name} must be one of {', '.join(known)}.")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        return self._get(name, default, bool, "true or false")

    def name(self, field: str) -> str:
        """The name of a file to be written, which may not be empty nor a path."""
        value = self.text(field)
        if not value.strip():
            raise Refusal(400, f"{field} is missing: what should the file be called?")
        _refuse_path(value)
        return value

    def given(self, name: str) -> bool:
        return self._content.get(name) is not None

    def whole(self, name: str) -> int:
        value = self._get(name, 0, int, "a whole number")
        if isinstance(value, bool) or abs(value) > 1e9:
            raise Refusal(422, f"{name} must be a whole number.")
        return int(value)

    def rank(self, name: str) -> int | str:
        return "auto" if self._content.get(name) == "auto" else self.whole(name)

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._get(name, [], list, "a list of texts")
        if not all(isinstance(item, str) for item in value):
            raise Refusal(422, f"{name} must be a list of texts.")
        return tuple(value)

    def refuse(self, reason: str) -> NoReturn:
        raise Refusal(422, reason)

    def number(self, name: str) -> float:
        value = self._get(name, 0.0, (int, float), "a number")
        if isinstance(value, bool) or abs(value) > 1e9:
            raise Refusal(422, f"{name} must be a number.")
        return float(value)

    def mapping(self, name: str) -> Mapping[str, Any]:
        return self._get(name, {}, dict, "an object")

    def _get(self, name: str, default: Any, kind: Any, words: str) -> Any:
        value = self._content.get(name, default)
        if not isinstance(value, kind):
            raise Refusal(422, f"{name} must be {words}.")
        return value


def _refuse_path(name: str) -> None:
    if _PATH.search(name):
        raise Refusal(
            400, f"{name[:80]!r} is not a name inside the LoRA folder; paths are not accepted here."
        )


# Answers


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=status, headers=dict(headers) if headers else None)


def _refused(refusal: Refusal) -> JSONResponse:
    return _error(refusal.status, str(refusal), refusal.headers)


def plain(value: Any) -> Any:
    """``value`` in JSON's own types; a number that JSON cannot say becomes null."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    return str(value)


def _request_body(route: _Route) -> dict[str, Any] | None:
    if route.body is None:
        return None
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": route.body}}}}


def _responses(route: _Route) -> dict[int | str, dict[str, Any]]:
    errors = {
        400: "Bad request",
        401: "Wrong password",
        403: "Not from this page or machine, or not open to others",
        404: "No such name or job",
        409: "Name taken, queue full, or disk too full",
    }
    errors |= {413: "Body too large", 415: "No JSON", 422: "Cannot be merged"}
    described: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "content": {"application/json": {"schema": schema.error_schema()}}}
        for status, text in errors.items()
    }
    if route.slow:
        described[503] = {**described[422], "description": "Took too long"}
    if route.result is not None:
        kind = "image/png" if route.result is schema.PNG else "application/json"
        described[route.status] = {"description": "Done", "content": {kind: {"schema": route.result}}}
    return described
