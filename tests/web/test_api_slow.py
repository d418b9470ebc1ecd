"""Requests over REST that take long: they hold up no short one, and each ends."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import uvicorn
from fastapi import FastAPI

from lib_loramerge import analysis
from lib_loramerge.errors import Cancelled
from lib_loramerge.webui import api, routes
from lib_loramerge.webui.host.standalone import StandaloneHost
from lib_loramerge.webui.jobs import JobQueue
from tests.helpers.fixtures import SD1_LAYERS, make_lora

PATIENCE = 60


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """REST alone, served by this process, so that a test can slow it down."""
    make_lora(tmp_path / "a.safetensors", dict(list(SD1_LAYERS.items())[1:4]))
    host = StandaloneHost([tmp_path])
    app = FastAPI()
    api.mount(app, host, JobQueue(host))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}{api.PREFIX}"
        server.should_exit = True
        thread.join(PATIENCE)


def inspect(url: str) -> tuple[int, dict]:
    answer = requests.post(f"{url}/inspect", json={"name": "a"}, timeout=PATIENCE)
    return answer.status_code, answer.json()


def test_slow_requests_leave_places_for_short_ones(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at_work, go_on = threading.Semaphore(0), threading.Event()
    whole = analysis.inspect

    def slow(*args, **kwargs):
        at_work.release()
        assert go_on.wait(PATIENCE)
        return whole(*args, **kwargs)

    monkeypatch.setattr(analysis, "inspect", slow)
    with ThreadPoolExecutor(2 * api.MAX_LOOKS) as pool:
        answers = [pool.submit(inspect, url) for _ in range(2 * api.MAX_LOOKS)]
        try:
            for _ in range(api.MAX_LOOKS):
                assert at_work.acquire(timeout=PATIENCE)
            # No more of them than places, and everything else is answered meanwhile.
            assert not at_work.acquire(timeout=0.2)
            loras = requests.get(f"{url}/loras", timeout=PATIENCE).json()["loras"]
            assert [entry["name"] for entry in loras] == ["a"]
        finally:
            go_on.set()
        assert [answer.result(PATIENCE)[0] for answer in answers] == [200] * len(answers)


def test_a_look_that_takes_too_long_ends_and_gives_its_place_back(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def endless(path, cancel):
        nonlocal asked
        asked += 1
        while not cancel():
            threading.Event().wait(0.001)
        raise Cancelled("Cancelled.")

    with monkeypatch.context() as patch:
        patch.setattr(analysis, "inspect", endless)
        patch.setattr(routes, "INSPECT_SECONDS", 0.05)
        for _ in range(api.MAX_LOOKS + 1):
            status, content = inspect(url)
            assert status == 503
            assert "the file is large" in content["error"]
    assert asked == api.MAX_LOOKS + 1
    assert inspect(url)[0] == 200
