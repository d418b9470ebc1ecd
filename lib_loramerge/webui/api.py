"""REST: ``/loramerge/v1/...``, the same merges as in the tab.

Answers are JSON; every error is ``{"error": "..."}``. The routes themselves are in :mod:`.routes`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import TypeAlias

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBasic
from starlette.concurrency import run_in_threadpool

from ..errors import (
    FileError,
    IncompatibleError,
    LoraMergeError,
    OutputError,
    RecipeError,
    UnknownKeyError,
    UnsupportedError,
)
from ..recipe import SETTINGS
from . import schema
from .access import Names, Refusal, check_credentials, check_origin, parse_users
from .fields import Fields, read_json
from .host import ClosedError, ConflictError, Host, UnknownNameError, without
from .jobs import JobQueue
from .routes import ROUTES, Route, Service

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

PREFIX = "/loramerge/v1"
# Reading headers takes the interpreter; the host's own requests go on beside this many of ours.
MAX_AT_ONCE = 4
# Requests that look at tensors wait for one another.
MAX_LOOKS = 4

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
    gate = _Gate(Service(host, jobs), api_auth, names, welcome)
    dependencies = [Depends(_BasicInDocs(auto_error=False))] if api_auth else []
    for route in ROUTES:
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


class _Gate:
    """Lets a request in, reads its body, and turns what goes wrong into ``{"error": ...}``."""

    def __init__(
        self, service: Service, api_auth: str | None, names: Names | None, welcome: Callable[[str], bool]
    ) -> None:
        self._service, self._host = service, service.host
        self._users = None if api_auth is None or not api_auth.strip() else parse_users(api_auth)
        self._names, self._welcome = names, welcome
        self._places = asyncio.Semaphore(MAX_AT_ONCE)
        # Their own, so that a long look holds up no short answer.
        self._slow_places = asyncio.Semaphore(MAX_LOOKS)

    def endpoint(self, route: Route) -> Callable[..., Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            return await self._answer(route, request, {})

        return endpoint

    def job_endpoint(self, route: Route) -> Callable[..., Awaitable[Response]]:
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

    async def _answer(self, route: Route, request: Request, given: Mapping[str, object]) -> Response:
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
            return _error(status, _in_public(str(error), self._host.folder_words()))
        except Exception as error:  # A bug of ours: the caller gets JSON, the console the traceback.
            self._host.log(f"{route.method} {route.path} failed unexpectedly", error)
            return _error(
                500, f"Unexpected error ({type(error).__name__}). The console of the host tells more."
            )

    def _result(self, route: Route, content: Mapping[str, object]) -> bytes | Json:
        result = route.answer(self._service, Fields(content, route.fields))
        return result if isinstance(result, bytes) else _public(plain(result), self._host.folder_words())


def _in_public(text: str, folder_words: Sequence[tuple[str, str]]) -> str:
    """A sentence without the folders of this machine and in the words of a recipe."""
    return _FLAG.sub(_in_a_recipe, without(folder_words, text))


def _public(value: Json, folder_words: Sequence[tuple[str, str]]) -> Json:
    if isinstance(value, str):
        return _in_public(value, folder_words)
    if isinstance(value, dict):
        return {key: _public(item, folder_words) for key, item in value.items()}
    return [_public(item, folder_words) for item in value] if isinstance(value, list) else value


# Answers


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=status, headers=dict(headers) if headers else None)


def _refused(refusal: Refusal) -> JSONResponse:
    return _error(refusal.status, str(refusal), refusal.headers)


def plain(value: object) -> Json:
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


def _request_body(route: Route) -> dict[str, object] | None:
    if route.body is None:
        return None
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": route.body}}}}


def _responses(route: Route) -> dict[int | str, dict[str, object]]:
    errors = {
        400: "Bad request",
        401: "Wrong password",
        403: "Not from this page or machine, or not open to others",
        404: "No such name or job",
        409: "Name taken, queue full, or disk too full",
    }
    errors |= {413: "Body too large", 415: "No JSON", 422: "Cannot be merged"}
    described: dict[int | str, dict[str, object]] = {
        status: {"description": text, "content": {"application/json": {"schema": schema.error_schema()}}}
        for status, text in errors.items()
    }
    if route.slow:
        described[503] = {**described[422], "description": "Took too long"}
    if route.result is not None:
        kind = "image/png" if route.result is schema.PNG else "application/json"
        described[route.status] = {"description": "Done", "content": {kind: {"schema": route.result}}}
    return described
