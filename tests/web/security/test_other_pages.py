"""Another web page in the user's browser tries all of it: to read, to merge, to replace, to write presets."""

from __future__ import annotations

import hashlib
import http.server
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio
import pytest
from playwright.sync_api import Browser

from lib_loramerge import demo
from lib_loramerge.webui.host import StandaloneHost
from lib_loramerge.webui.standalone import Page
from tests.helpers.browser import Tab
from tests.helpers.fixtures import SD1_LAYERS, make_lora
from tests.helpers.hosting import FakeHost
from tests.web.security.conftest import ELSEWHERE

RECIPE = '{"inputs": [{"name": "style"}, {"name": "subject"}]}'
MERGE = f'{{"name": "stolen", "recipe": {RECIPE}}}'
REPLACE = f'{{"name": "merged", "overwrite": true, "recipe": {RECIPE}}}'
EVENT = '{"data": [], "fn_index": 0, "session_hash": "x", "trigger_id": 1}'
FILE = '{"data": [{"path": "/etc/passwd", "url": "%s", "meta": {"_type": "gradio.FileData"}}], "fn_index": 0}'
READ = [
    "/", "/config", "/loramerge/v1/loras", "/loramerge/v1/jobs", "/loramerge/file/merged.safetensors",
    "/file=/etc/passwd", "/gradio_api/file=/etc/passwd", "/file/etc/passwd", "/proxy=http://127.0.0.1:1/",
    "/gradio_api/proxy=http://127.0.0.1:1/", "/queue/data?session_hash=x",
    "/gradio_api/queue/data?session_hash=x", "/openapi.json", "/theme.css",
]  # fmt: skip
WRITTEN = [
    ("/loramerge/v1/merge", MERGE),
    ("/loramerge/v1/merge", REPLACE),
    ("/loramerge/v1/plan", f'{{"recipe": {RECIPE}}}'),
    *((f"{prefix}{path}", EVENT) for prefix in ("", "/gradio_api") for path in (
        "/run/predict", "/api/predict", "/queue/join", "/reset", "/cancel", "/call/merge", "/upload",
    )),
]  # fmt: skip

# What a page can do without asking the server first: no preflight, whatever it answers.
ATTACK = """async ([base, read, written]) => {
    const got = [];
    const note = (what, answer) => { if (answer.type !== 'opaque' && answer.ok) got.push(what); };
    const attempt = async (what, options) => {
        try { note(what, await fetch(base + what, {credentials: 'include', ...options})); } catch (error) {}
    };
    for (const path of read)
        for (const mode of ['cors', 'no-cors']) await attempt(path, {mode});
    for (const [path, body] of written) {
        const bodies = [body, new Blob([body], {type: ''}), new Blob([body], {type: 'text/plain'}),
            new URLSearchParams({a: body})];
        for (const body of bodies)
            for (const mode of ['cors', 'no-cors']) await attempt(path, {method: 'POST', mode, body});
        await attempt(path, {method: 'POST', body, headers: {'Content-Type': 'application/json'}});
        navigator.sendBeacon(base + path, new Blob([body], {type: 'text/plain'}));
    }
    await attempt('/loramerge/v1/jobs/1', {method: 'DELETE'});
    for (const path of written) {
        const form = document.createElement('form');
        Object.assign(form, {method: 'POST', enctype: 'text/plain', action: base + path[0], target: 'frame'});
        form.append(Object.assign(document.createElement('input'), {name: path[1].slice(0, -1) + ',"x":"',
            value: '"}'}));
        document.body.append(form);
        form.submit();
    }
    for (const kind of ['img', 'script', 'iframe']) for (const path of ['/', '/config', '/theme.css']) {
        const element = document.createElement(kind);
        const loaded = new Promise(done => {
            element.onload = () => done(true); element.onerror = () => done(false);
            setTimeout(() => done(false), 3000); });
        element.src = base + path;
        document.body.append(element);
        if (await loaded && kind !== 'iframe') got.push(kind + path);
    }
    await new Promise(done => { const socket = new WebSocket(base.replace('http', 'ws') + '/queue/join');
        socket.onopen = () => { got.push('websocket'); done(); };
        socket.onerror = socket.onclose = done; });
    return got;
}"""
HTML = '<!doctype html><title>Nice pictures</title><iframe name="frame"></iframe>'


class _Elsewhere(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(HTML.encode())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[int]:
    """The port of another web server of this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    loras = tmp_path / "loras"
    demo.make_samples(loras)
    make_lora(loras / "merged.safetensors", SD1_LAYERS)
    presets = tmp_path / "preset.txt"
    presets.write_text("MINE:1,0,0,0,1,1,1,1,1,1,1,1,1,1,1,1,1\n", encoding="utf-8")
    served = Page(loras, host=StandaloneHost([loras], preset_path=presets))
    try:
        yield served
    finally:
        served.close()


@pytest.mark.parametrize("start", ["other port", "other name", "other name and port", "rebound"])
def test_another_page_gets_nothing_past_the_door_of_the_page_alone(
    victim: Browser, page: Page, elsewhere: int, start: str, tmp_path: Path
) -> None:
    context = victim.new_context()
    try:
        # The user has the page open, so that the browser has a cookie for it.
        opened = context.new_page()
        opened.goto(page.entrance)
        opened.wait_for_selector("#loramerge_merge")
        assert "token" not in opened.url
        opened.close()
        before = contents(tmp_path)
        passed: list[str] = []
        inner, own = page.guard.app, f"127.0.0.1:{page.port}"

        async def recording(scope: Any, receive: Any, send: Any) -> None:
            sent = {name.decode(): value.decode() for name, value in scope.get("headers", ())}
            # The user's own window may still have been asking when it was closed. No page can forge these.
            if (sent.get("host"), sent.get("sec-fetch-site")) != (own, "same-origin"):
                passed.append(scope.get("path", scope["type"]))
            await inner(scope, receive, send)

        page.guard.app = recording
        base = page.address.rstrip("/")
        origin = {
            "other port": f"http://127.0.0.1:{elsewhere}",
            "other name": f"http://localhost:{elsewhere}",
            "other name and port": f"http://{ELSEWHERE}:{elsewhere}",
            "rebound": f"http://{ELSEWHERE}:{page.port}",
        }[start]
        attacker = context.new_page()
        if start == "rebound":
            # The page came from another machine, before its name was made to lead here.
            context.route(f"{origin}/start", lambda route: route.fulfill(body=HTML, content_type="text/html"))
            base = origin
        attacker.goto(f"{origin}/start")
        got = attacker.evaluate(ATTACK, [base, READ, [*WRITTEN, ("/run/predict", FILE % origin)]])
        attacker.wait_for_timeout(500)  # Forms and beacons are on their way.
        assert got == []
        assert passed == []
        assert page.jobs.list() == []
        assert contents(tmp_path) == before
    finally:
        context.close()


def test_a_link_to_the_page_shows_where_its_address_is_and_no_frame_shows_it(
    victim: Browser, page: Page, elsewhere: int
) -> None:
    context = victim.new_context()
    try:
        tab = context.new_page()
        tab.goto(f"http://localhost:{elsewhere}/")
        tab.evaluate("place => { location.href = place; }", page.address)
        tab.wait_for_selector("text=Open this page by the address that the terminal shows")
        # From a chat in the browser the whole address opens the page, though the browser sends no new cookie
        # along a redirection.
        tab.goto(f"http://{ELSEWHERE}:{elsewhere}/")
        tab.evaluate("place => { location.href = place; }", page.entrance)
        tab.wait_for_selector("#loramerge_merge")
        assert "token" not in tab.url
        assert tab.context.cookies()[0]["httpOnly"]
        assert tab.context.cookies()[0]["sameSite"] == "Strict"
    finally:
        context.close()


def test_the_page_itself_merges_and_asks_no_other_server(victim: Browser, page: Page) -> None:
    with Tab(victim, page.entrance, title=None) as tab:
        asked: list[str] = []
        tab.page.on("request", lambda request: asked.append(request.url))
        tab.row(0, "style")
        tab.row(1, "subject")
        assert "Done" in tab.merge("both")
        assert tab.errors == []
        assert [url for url in asked if not url.startswith((page.address, "data:", "blob:"))] == []
    assert (page.host.write_dir() / "both.safetensors").is_file()


@pytest.fixture(scope="module")
def webui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHost]:
    data = tmp_path_factory.mktemp("webui")
    demo.make_samples(data / "models" / "Lora")
    make_lora(data / "models" / "Lora" / "merged.safetensors", SD1_LAYERS)
    with FakeHost(data, "--api") as host:
        yield host


@pytest.mark.parametrize("start", ["other port", "other name and port", "rebound"])
def test_another_page_gets_nothing_from_rest_in_a_webui(
    victim: Browser, webui: FakeHost, elsewhere: int, start: str
) -> None:
    port = webui.url.rsplit(":", 1)[1]
    origin = {
        "other port": f"http://localhost:{elsewhere}",
        "other name and port": f"http://{ELSEWHERE}:{elsewhere}",
        "rebound": f"http://{ELSEWHERE}:{port}",
    }[start]
    before = contents(webui.lora_dir)
    context = victim.new_context()
    try:
        base = webui.url
        if start == "rebound":
            context.route(f"{origin}/start", lambda route: route.fulfill(body=HTML, content_type="text/html"))
            base = origin
        attacker = context.new_page()
        attacker.goto(f"{origin}/start")
        ours = [path for path in READ if path.startswith("/loramerge")]
        written = [pair for pair in WRITTEN if pair[0].startswith("/loramerge")]
        got = attacker.evaluate(ATTACK, [base, ours, written])
        # What is Gradio's is the host's: a style sheet or a frame of it may load.
        assert [what for what in got if "/loramerge" in what] == []
        assert webui.get("/loramerge/v1/jobs") == {"jobs": []}
        assert contents(webui.lora_dir) == before
    finally:
        context.close()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example:7860"}, 403),
        ({"Host": "localhost:7860"}, 200),
        ({"Host": "[::1]:7860"}, 200),
        ({"Host": "127.0.0.1@evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:9"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_rest_in_a_webui_answers_to_its_own_names_and_pages_alone(
    webui: FakeHost, headers: dict[str, str], status: int
) -> None:
    assert webui.request("GET", "/loramerge/v1/methods", headers=headers)[0] == status
    nowhere = webui.request("GET", "/loramerge/v1/nothing", headers=headers)[0]
    assert nowhere == (404 if status == 200 else 403)


def test_rest_in_a_webui_takes_no_json_that_is_not_called_so(webui: FakeHost) -> None:
    for kind in ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        request = urllib.request.Request(
            webui.url + "/loramerge/v1/merge", data=MERGE.encode(), headers={"Content-Type": kind}
        )
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(request)


@pytest.mark.skipif(not gradio.__version__.startswith("3."), reason="says what Gradio 3 lacks")
def test_the_page_alone_says_that_it_needs_a_newer_gradio(capsys: pytest.CaptureFixture[str]) -> None:
    from lib_loramerge import cli

    assert cli.main(["ui", "--demo", "--no-browser"]) == 1
    assert "needs Gradio 4.40 or newer" in capsys.readouterr().err
