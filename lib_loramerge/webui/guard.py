"""What stands before the page alone: every request, Gradio's own routes too, passes here first.

The page and the terminal it was started from share a token. Who opens the address that is printed there
gets a cookie for it; scripts send it as ``Authorization: Bearer TOKEN``. Nobody else is answered, whatever
is asked for: not other web pages, not other users of the machine.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import parse_qsl, urlencode

from .access import Names, Refusal, check_origin, same_secret
from .enter import enter_page

Message = MutableMapping[str, Any]  # As in ASGI; the scope of a request, too.
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

ENTER = "/loramerge/enter"
MAX_PASSWORD_BYTES = 4096
WRONG_SECONDS = 1.0

# Of Gradio's routes those that a page without files needs, by the first part of their path. All others are
# closed, whatever a version of Gradio adds: files of the disk, uploads, addresses that it would fetch.
READ = frozenset({
    "config", "theme.css", "assets", "static", "favicon.ico", "manifest.json", "pwa_icon", "robots.txt",
    "info", "app_id", "login_check", "startup-events", "queue", "heartbeat", "call", "loramerge", "docs",
    "openapi.json",
})  # fmt: skip
WRITTEN = frozenset({"queue", "run", "api", "call", "reset", "cancel", "loramerge"})
WRITES = frozenset({"POST", "PUT", "PATCH"})

# No page may show ours in a frame, and no address of ours goes to another server.
PROTECTION = (
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class Guard:
    """An ASGI application that lets through what may come in.

    Args:
        app: What it protects.
        names: The names of this server.
        port: It listens on; cookies do not differ by port, so it is in their name.
        token: The secret of the terminal.
        password: What others type to come in; None where nobody else is let in.
    """

    def __init__(self, app: App, names: Names, port: int, token: str, password: str | None = None) -> None:
        self.app, self._names = app, names
        self._token, self._password = token, password
        self._cookie, self._session = f"loramerge_{port}", secrets.token_urlsafe(32)
        self._trying = asyncio.Lock()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # The page needs no websocket.
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = _Headers(scope)
        try:
            opens = self._check(scope, headers)
            answer = await self._enter(scope, headers, receive)
            if answer is None and not self._is_known(headers):
                answer = self._stranger(headers, opens)
        except Refusal as refusal:
            answer = _json(refusal.status, {"error": str(refusal)}, refusal.headers)
        if answer is None:
            await self.app(scope, receive, _protected(send))
        else:
            await _send(send, *answer)

    def _check(self, scope: Message, headers: _Headers) -> bool:
        """Refuses what no page of ours asks for; whether the page itself is opened."""
        method, path = scope["method"], scope["path"]
        site, mode = headers.one("sec-fetch-site"), headers.one("sec-fetch-mode")
        alone = headers.one("sec-fetch-dest") in (None, "document")
        opens = method == "GET" and path == "/" and mode in (None, "navigate") and alone
        check_origin(headers.all("host"), headers.one("origin"), site, self._names, opens=opens)
        if not self._is_route(method, path):
            raise Refusal(404, "There is nothing here.")
        kind = (headers.one("content-type") or "").partition(";")[0].strip().lower()
        if method in WRITES and kind != "application/json":
            raise Refusal(415, "Send JSON, with the header Content-Type: application/json.")
        return opens

    @staticmethod
    def _is_route(method: str, path: str) -> bool:
        parts = path.removeprefix("/gradio_api").lstrip("/").split("/")
        if ".." in parts or "\\" in path:
            return False
        if method in WRITES:
            return parts[0] in WRITTEN
        if method == "DELETE":
            return parts[0] == "loramerge"
        return method in ("GET", "HEAD") and (path == "/" or parts[0] in READ)

    async def _enter(self, scope: Message, headers: _Headers, receive: Receive) -> Answer | None:
        """The cookie for who brings the token in the address, or the password; None for anything else."""
        if scope["path"] == ENTER and scope["method"] == "POST":
            await self._check_password(await _body(receive))
            return 200, (*self._set_cookie(), _JSON), b"{}"
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        tokens = [value for name, value in query if name == "token"]
        if scope["path"] != "/" or not tokens or not same_secret(tokens[0], self._token):
            return None
        rest = urlencode([(name, value) for name, value in query if name != "token"])
        place = "/" + ("?" + rest if rest else "")
        if headers.one("sec-fetch-site") in ("cross-site", "same-site"):
            # A browser would not send the new cookie along a redirection that another page has begun.
            return enter_page(headers.one("accept-language"), 200, go_to=place, more=self._set_cookie())
        return 303, (*self._set_cookie(), (b"location", place.encode())), b""

    async def _check_password(self, body: bytes) -> None:
        if self._password is None:
            raise Refusal(404, "There is nothing here.")
        try:
            given = json.loads(body)["password"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Refusal(400, 'Send {"password": ...}.') from error
        async with self._trying:  # One after the other, so that guessing takes its time.
            if not isinstance(given, str) or not same_secret(given, self._password):
                await asyncio.sleep(WRONG_SECONDS)
                raise Refusal(401, "The password is wrong.", {"WWW-Authenticate": "Bearer"})

    def _set_cookie(self) -> tuple[tuple[bytes, bytes], ...]:
        text = f"{self._cookie}={self._session}; Path=/; HttpOnly; SameSite=Strict"
        return ((b"set-cookie", text.encode()),)

    def _is_known(self, headers: _Headers) -> bool:
        scheme, _, token = (headers.one("authorization") or "").partition(" ")
        if scheme.lower() == "bearer" and same_secret(token.strip(), self._token):
            return True
        # By hand: the library's parser gives up at what other servers of this machine store.
        cookies = (part.strip().partition("=") for text in headers.all("cookie") for part in text.split(";"))
        return any(name == self._cookie and same_secret(value, self._session) for name, _, value in cookies)

    def _stranger(self, headers: _Headers, opens: bool) -> Answer:
        if opens:
            return enter_page(headers.one("accept-language"), 401, ask=self._password is not None)
        raise Refusal(
            401,
            "Open the address that the terminal shows, with its token, or send the token as "
            "Authorization: Bearer TOKEN.",
            {"WWW-Authenticate": "Bearer"},
        )


class _Headers:
    def __init__(self, scope: Message) -> None:
        self._pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]

    def all(self, name: str) -> list[str]:
        return [value for known, value in self._pairs if known.lower() == name]

    def one(self, name: str) -> str | None:
        """The first value of a header."""
        return next(iter(self.all(name)), None)


Pairs = tuple[tuple[bytes, bytes], ...]
Answer = tuple[int, Pairs, bytes]
_JSON = (b"content-type", b"application/json")


def _json(status: int, content: object, headers: Mapping[str, str] | None = None) -> Answer:
    more = tuple((name.encode(), value.encode()) for name, value in (headers or {}).items())
    return status, (_JSON, *more), json.dumps(content).encode()


async def _send(send: Send, status: int, headers: Pairs, body: bytes) -> None:
    pairs = [*headers, *PROTECTION, (b"cache-control", b"no-store"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


async def _body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += bytes(message.get("body", b""))
        if len(body) > MAX_PASSWORD_BYTES:
            raise Refusal(413, "The body is too large.")
        if message["type"] != "http.request" or not message.get("more_body"):
            return body


def _protected(send: Send) -> Send:
    """Adds our headers to an answer, and takes out those that let other pages read it."""
    ours = {name for name, _ in PROTECTION}

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [
                (name, value)
                for name, value in message.get("headers", ())
                if not name.lower().startswith(b"access-control-") and name.lower() not in ours
            ]
            message = {**message, "headers": [*kept, *PROTECTION]}
        await send(message)

    return sending
