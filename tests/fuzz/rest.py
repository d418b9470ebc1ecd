"""Hostile requests to REST, one after another, for as long as one likes.

``python -m tests.fuzz.rest --url http://127.0.0.1:7865 --token T --seconds 3600 [--seed N]`` against a
running ``loramerge ui``: ends with status 1 at the first request whose answer is a 5xx (but a 503 that says
why), is no JSON with an ``error``, or takes more than thirty seconds. ``POST merge`` is sent as a trial, so
that nothing is written. With ``--write``, for folders that may be thrown away, merges, sweeps, bakes and
extractions are asked for, too: LoRAs ``a`` and ``b``, and checkpoints ``tuned`` and ``base``.
"""

from __future__ import annotations

import argparse
import copy
import http.client
import json
import random
import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

PREFIX = "/loramerge/v1"
LIMIT_SECONDS = 30.0
RECIPE = {
    "inputs": [
        {"name": "a", "te": 0.5, "unet": 0.5, "lbw": "OUTALL"},
        {"name": "b", "te": 0.7, "unet": 0.7, "dyn": 2},
    ],
    "mode": "svd", "rank": "full", "dtype": "float32", "params": {},
}  # fmt: skip
BODIES: dict[str, Any] = {
    "plan": {"recipe": RECIPE},
    "merge": {"recipe": RECIPE, "name": "fuzz", "trial": True, "preferred_weight": 1.0, "notes": "x"},
    "inspect": {"name": "a"},
    "compare": {"recipe": RECIPE},
    "advise": {"recipe": RECIPE},
    "plot": {"recipe": RECIPE, "kind": "spectrum", "theme": "light"},
}
WRITING: dict[str, Any] = {
    "merge": {"recipe": RECIPE, "name": "merged", "subfolder": "sub", "overwrite": True, "preview": "a"},
    "sweep": {"recipe": RECIPE, "name": "swept", "axes": {"rank": [1, 2], "mix": "0.2..0.8/3"}, "zip": False},
    "bake": {
        "recipe": RECIPE,
        "base": "base.safetensors",
        "name": "baked",
        "overwrite": True,
        "rounding": "auto",
        "dtype": "same",
        "drop_ema": False,
        "hash": True,
    },
    "extract": {
        "tuned": "tuned.safetensors",
        "base": "base.safetensors",
        "name": "extracted",
        "subfolder": "",
        "overwrite": True,
        "rank": 4,
        "conv_rank": 1,
        "parts": ["unet"],
        "vectors": "unet",
        "dtype": "float16",
        "skip_unsupported": False,
    },
}
VALUES: list[Any] = [
    None, True, False, 0, -1, 2**31, 2**63, 2**200, -(10**400), 1e308, -1e-308, 0.1, "", " ", "full", "same",
    "\0", "\ud800", "../a", "/etc/passwd", "C:\\a", "~", "a" * 5000, "é" * 200, "%s%n", "{0}", "nan",
    "Infinity", "1,2,3", ",".join(["1"] * 12), "0" * 400 + "1", [], {}, [[]], [None] * 100, {"": ""},
    {"version": 9}, [{"name": "a"}] * 70, "ties", "dare", "knots", "bfloat16", "cuda:9",
    "sdxl", "comfyui", "diffusers",
]  # fmt: skip
RAW = [
    b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe{\x00}\x00", b"NaN", b'{"recipe": NaN}',
    b"[" * 100_000, b'{"a":' * 50_000, b'{"name": "a", "name": "b"}', b'{"name": ' + b"9" * 10_000 + b"}",
    b"{}" * 1000, b'{"name": "' + b"a" * 1_100_000 + b'"}', b'{"name": "\\ud800\\udc00\\ud800"}',
    b'{"name": 1e999}',
]  # fmt: skip
HEADERS: list[dict[str, str]] = [
    {"Content-Type": "text/plain"}, {"Content-Type": ""},
    {"Content-Type": "application/json; charset=utf-16"}, {"Content-Encoding": "gzip"},
    {"Host": "evil.example"}, {"Origin": "http://evil.example"},
    {"Sec-Fetch-Site": "cross-site"}, {"Authorization": "Bearer x"}, {"Authorization": "Basic =="},
    {"X": "a" * 5000}, {"Accept": "image/png"},
]  # fmt: skip
PATHS = [
    "/jobs/%00",
    "/jobs/..%2f..%2f",
    "/jobs/" + "a" * 3000,
    "/jobs/%ff",
    "/merge/x",
    "//",
    "/plan?a=%ff",
    "/%2e%2e/",
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a body, the body's own included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in items:
        yield from places(inside, (*path, key))


def changed(body: Any, chance: random.Random) -> Any:
    """A body with some of its values, names or list lengths made hostile."""
    body = json.loads(json.dumps(body))
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        path = chance.choice(list(places(body)))
        if not path:
            continue
        holder = body
        for key in path[:-1]:
            holder = holder[key]
        kind = chance.randrange(6)
        if kind == 0 and isinstance(holder, dict):
            holder[chance.choice(["", "x", "rank", "retain", "size", "base", "seed", "device", "method"])] = (
                copy.deepcopy(chance.choice(VALUES))
            )
        elif kind == 1:
            del holder[path[-1]]
        elif kind == 2 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[path[-1]]))
        else:
            holder[path[-1]] = copy.deepcopy(chance.choice(VALUES))
    return body


def requests(chance: random.Random, write: bool = False) -> Iterator[tuple[str, str, bytes, dict[str, str]]]:
    """Method, path, body and headers, without end."""
    bodies = BODIES | WRITING if write else BODIES
    while True:
        name = chance.choice(list(bodies))
        method, path, headers = "POST", f"{PREFIX}/{name}", {"Content-Type": "application/json"}
        body = json.dumps(changed(bodies[name], chance)).encode()
        kind = chance.randrange(12)
        if kind == 0:
            body = chance.choice(RAW)
        elif kind == 1:
            headers = {**headers, **chance.choice(HEADERS)}
        elif kind == 2:
            place = chance.randrange(len(body))
            body = body[:place] + bytes([chance.randrange(256)]) + body[place + chance.randrange(3) :]
        elif kind == 3:
            method = chance.choice(["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
            path = PREFIX + chance.choice([*PATHS, *(f"/{other}" for other in bodies)])
        if name == "merge" and not write and b'"trial": true' not in body:
            continue  # Nothing is written by this.
        yield method, path, body, headers


def wrong(status: int, content: bytes, seconds: float) -> str:
    """What is wrong with an answer; nothing when empty."""
    if seconds > LIMIT_SECONDS:
        return f"took {seconds:.1f} seconds"
    if status >= 500 and status != 503:
        return f"answered {status}: {content[:300]!r}"
    if status >= 400 and content:
        try:
            told = json.loads(content)
        except ValueError:
            return f"answered {status} without JSON: {content[:300]!r}"
        if "error" not in told and "detail" not in told:
            return f"answered {status} without a sentence: {content[:300]!r}"
        if b"Traceback" in content or (b"line " in content and b".py" in content):
            return f"tells of its code: {content[:300]!r}"
    return ""


def fuzz(
    url: str, token: str, seconds: float, seed: int, most: int | None = None, write: bool = False
) -> tuple[int, str]:
    """How many requests were sent, and what was wrong with the last one; nothing when empty."""
    place, chance, sent = urlsplit(url), random.Random(seed), 0
    end = time.monotonic() + seconds
    for method, path, body, headers in requests(chance, write):
        if time.monotonic() > end or sent == most:
            break
        sent += 1
        secret = {"Authorization": f"Bearer {token}"} if token else {}
        start = time.monotonic()
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
        try:
            connection.request(method, path, body, {**secret, **headers})
            answer = connection.getresponse()
            problem = wrong(answer.status, answer.read(), time.monotonic() - start)
        except (OSError, http.client.HTTPException) as error:
            problem = f"gave no answer: {error!r}"
        finally:
            connection.close()
        if problem:
            return sent, f"{method} {path} {headers} {body[:400]!r}: {problem}"
    return sent, ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True)
    parser.add_argument("--token", default="", help="of the page alone; empty for a WebUI without a password")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="ask for what writes files, too")
    options = parser.parse_args()
    sent, problem = fuzz(options.url, options.token, options.seconds, options.seed, write=options.write)
    print(f"{sent} requests{': ' + problem if problem else ', nothing wrong'}")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
