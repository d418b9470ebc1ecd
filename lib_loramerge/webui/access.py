"""Who may come in: which requests are answered, by the page alone and by REST inside a WebUI.

A server on one's own machine is within reach of every web page that its owner happens to visit: the
browser sends what the page asks for, and a name of the page's own may lead to 127.0.0.1 (DNS rebinding).
Browsers tell where a request comes from, in ``Host``, ``Origin`` and ``Sec-Fetch-Site``; that is
checked here, and no page can forge it.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import os
from collections.abc import Callable, Collection, Iterable, Mapping

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
ALLOWED_HOSTS = "LORAMERGE_ALLOW_HOST"
"""Environment variable: more names of this server, ``NAME`` or ``NAME:PORT``, separated by commas."""


class Refusal(Exception):
    """A request that is answered with an error of this status."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


class Names:
    """The names under which a server may be asked.

    Args:
        names: Host names and addresses, each for any port or as ``NAME:PORT`` for one.
        addresses: Whether any IP address will do. No page can rebind one, as it is no name.
    """

    def __init__(self, names: Iterable[str], addresses: bool = False) -> None:
        self._known = {name.strip().lower() for name in names if name.strip()}
        self._addresses = addresses

    def __contains__(self, host: str) -> bool:
        name, port = split_host(host)
        if not name:
            return False
        if self._addresses and _is_address(name):
            return True
        shown = f"[{name}]" if ":" in name else name
        return not self._known.isdisjoint({name, shown, f"{shown}:{port}"})


def allowed_hosts() -> list[str]:
    """What the owner adds to the names of this server."""
    return os.environ.get(ALLOWED_HOSTS, "").split(",")


def split_host(host: str) -> tuple[str, int]:
    """Name and port of a ``Host`` header, port 80 when it has none; an empty name for nonsense."""
    host = host.strip().lower()
    name, rest = host, ""
    if host.startswith("["):
        name, bracket, rest = host[1:].partition("]")
        if not bracket or ":" not in name or (rest and not rest.startswith(":")):
            return "", 0
        rest = rest[1:]
    elif ":" in host:
        name, _, rest = host.partition(":")
    if rest and not (rest.isascii() and rest.isdigit() and len(rest) <= 5):
        return "", 0
    return name, int(rest) if rest else 80


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def check_origin(
    hosts: Collection[str],
    origin: str | None,
    site: str | None,
    names: Names | None,
    welcome: Callable[[str], bool] = lambda origin: False,
    *,
    opens: bool = False,
) -> None:
    """Refuses what another web page asks for.

    Args:
        hosts: All ``Host`` headers of the request.
        origin: Its ``Origin`` header.
        site: Its ``Sec-Fetch-Site`` header.
        names: The names of this server; None where they cannot be known.
        welcome: Whether the owner lets the pages of another origin in.
        opens: Whether the request only opens a page in a window, which other pages may link to.

    Raises:
        Refusal: 403 with the reason.
    """
    host = next(iter(hosts), "") if len(hosts) == 1 else ""
    if names is not None and host not in names:
        raise Refusal(
            403,
            f"This page is not called {host[:80]!a}. If that is a name of this machine, allow it with "
            f"--allow-host or the environment variable {ALLOWED_HOSTS}.",
        )
    if origin is not None:
        scheme, _, place = origin.partition("://")
        own = scheme in ("http", "https") and split_host(place) == split_host(host) and bool(place)
        if not own and not welcome(origin):
            raise Refusal(403, f"Requests from pages of {origin[:80]!a} are not answered.")
    elif site in ("cross-site", "same-site") and not opens:
        raise Refusal(403, "Requests from other pages are not answered.")


def parse_users(api_auth: str) -> tuple[tuple[bytes, bytes], ...]:
    """(user, password) pairs of ``--api-auth``; only the first colon of each separates."""
    pairs = (entry.strip().partition(":") for entry in api_auth.split(","))
    return tuple((user.encode(), password.encode()) for user, colon, password in pairs if user and colon)


def check_credentials(users: tuple[tuple[bytes, bytes], ...] | None, authorization: str | None) -> None:
    """Lets a request in, or raises; the time it takes does not tell which part was wrong.

    Args:
        users: None when the host asks nobody for a password.
    """
    if users is None:
        return
    user, password = _basic(authorization)
    welcome = False
    for known_user, known_password in users:
        right_user = hmac.compare_digest(user, known_user)
        right_password = hmac.compare_digest(password, known_password)
        welcome |= right_user & right_password
    if not welcome:
        raise Refusal(401, "Incorrect username or password.", {"WWW-Authenticate": "Basic"})


def _basic(authorization: str | None) -> tuple[bytes, bytes]:
    """User and password of an ``Authorization: Basic`` header; empty ones for anything else."""
    scheme, _, encoded = (authorization or "").partition(" ")
    if scheme.lower() != "basic":
        return b"", b""
    try:
        user, _, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
    except (binascii.Error, ValueError):
        return b"", b""
    return user, password


def same_secret(given: str | None, known: str) -> bool:
    """Compares in a time that tells nothing."""
    return hmac.compare_digest((given or "").encode("utf-8", "replace"), known.encode())
