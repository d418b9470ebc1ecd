"""The door of the page alone, request by request: names, origins, secrets, routes."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lib_loramerge.errors import LoraMergeError
from lib_loramerge.webui import standalone
from lib_loramerge.webui.access import Names, split_host
from lib_loramerge.webui.host import StandaloneHost
from lib_loramerge.webui.standalone import Page

PASSWORD = "correct horse"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("loras")
    served = Page(folder, allow_hosts=["merge.lan"])
    yield served
    served.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("loras")
    served = Page(folder, host=StandaloneHost([folder], shared=True), password=PASSWORD)
    yield served
    served.close()


def ask(
    page: Page, path: str, method: str = "GET", body: str | None = None, **headers: str | None
) -> tuple[int, dict[str, str], bytes]:
    """One request with exactly these headers; the token is sent unless ``Authorization`` is given."""
    sent: dict[str, str | None] = {"Host": f"127.0.0.1:{page.port}", "Authorization": f"Bearer {page.token}"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=60)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in sent.items():
            if value is not None:
                connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body.encode())))
        connection.endheaders(body.encode() if body is not None else None)
        answer = connection.getresponse()
        return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:{port}", 200),
        ("localhost:{port}", 200),
        ("LOCALHOST:{port}", 200),
        ("[::1]:{port}", 200),
        ("merge.lan", 200),
        ("merge.lan:99", 200),
        ("127.0.0.1", 403),
        ("127.0.0.1:1", 403),
        ("localhost", 403),
        ("evil.example:{port}", 403),
        ("localhost.evil.example:{port}", 403),
        ("127.0.0.1:{port}@evil.example", 403),
        ("evil.example#127.0.0.1:{port}", 403),
        ("[::1", 403),
        ("192.168.1.5:{port}", 403),
        (" ", 403),
    ],
)
def test_the_page_answers_to_its_own_names_alone(page: Page, host: str, status: int) -> None:
    assert ask(page, "/loramerge/v1/methods", Host=host.format(port=page.port))[0] == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Origin": "http://localhost:{port}"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({"Sec_Fetch_Site": "none"}, 200),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
    ],
)
def test_the_page_answers_its_own_pages_alone(page: Page, headers: dict[str, str], status: int) -> None:
    sent = {name: value.format(port=page.port) for name, value in headers.items()}
    assert ask(page, "/loramerge/v1/methods", **sent)[0] == status


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer wrong", "Basic dTpw", "Bearer \xff", "wrong"]
)
def test_nothing_but_the_plain_page_is_answered_without_the_secret(page: Page, authorization: str) -> None:
    for path in ("/loramerge/v1/loras", "/config", "/theme.css", "/docs", "/queue/data", "/loramerge/file/a"):
        status, headers, content = ask(page, path, Authorization=authorization)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert "terminal" in json.loads(content)["error"]
    status, _, content = ask(page, "/", Authorization=authorization)
    assert status == 401
    assert b"gradio" not in content
    assert ask(page, "/?token=wrong", Authorization=authorization)[0] == 401
    _, _, content = ask(page, "/", Authorization=authorization, Accept_Language="ja,en;q=0.5")
    assert "ターミナル" in content.decode()


def test_the_address_of_the_terminal_is_exchanged_for_a_cookie(page: Page) -> None:
    status, headers, _ = ask(page, f"/?lang=ja_JP&token={page.token}", Authorization=None)
    assert (status, headers["location"]) == (303, "/?lang=ja_JP")
    cookie, *rules = headers["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} == set(rules)
    assert page.token not in cookie
    strange = f'a={{"b": 1}}; {cookie}; c'
    assert ask(page, "/loramerge/v1/loras", Authorization=None, Cookie=strange)[0] == 200
    assert ask(page, "/loramerge/v1/loras", Authorization=None, Cookie=cookie + "x")[0] == 401


@pytest.mark.parametrize("prefix", ["", "/gradio_api"])
def test_no_route_of_gradio_reads_or_takes_a_file(page: Page, prefix: str) -> None:
    for path in (
        "/file=/etc/passwd", "/file=http://127.0.0.1:1/x", "/file/etc/passwd", "/proxy=http://127.0.0.1:1/",
        "/stream/a/b/1/playlist.m3u8", "/upload_progress", "/monitoring", "/static/../../etc/passwd",
        "/custom_component/1/client/component/x.js", "/user", "/token", "/login", "/dev/reload", "/vibe-code",
        "//file=/etc/passwd", "/%66ile=/etc/passwd",
    ):  # fmt: skip
        for method in ("GET", "HEAD"):
            assert ask(page, prefix + path, method)[0] == 404, path
    for path in ("/upload", "/component_server", "/process_recording", "/stream/x", "/vibe-edit", "/login"):
        assert ask(page, prefix + path, "POST", "{}", Content_Type="application/json")[0] == 404, path


def test_what_is_written_is_json_and_says_so(page: Page) -> None:
    for path in ("/run/predict", "/queue/join", "/api/predict", "/loramerge/v1/merge", "/loramerge/enter"):
        for kind in (
            None,
            "",
            "text/plain",
            "multipart/form-data; boundary=x",
            "text/html; application/json",
        ):
            assert ask(page, path, "POST", "{}", Content_Type=kind)[0] == 415, (path, kind)
    assert ask(page, "/loramerge/v1/merge", "POST", "{}", Content_Type="application/json")[0] == 400


def test_no_answer_may_be_read_or_framed_by_other_pages(page: Page) -> None:
    for path in ("/", "/config", "/loramerge/v1/loras", "/nothing"):
        _, headers, _ = ask(page, path)
        assert not [name for name in headers if name.startswith("access-control-")]
        assert headers["x-frame-options"] == "DENY"
        assert headers["content-security-policy"] == "frame-ancestors 'none'"
        assert headers["cross-origin-resource-policy"] == "same-origin"
    assert ask(page, "/loramerge/v1/loras", "OPTIONS")[0] == 404


def test_others_come_in_by_the_password_alone(shared: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib_loramerge.webui.guard.WRONG_SECONDS", 0)

    def enter(body: Any, **headers: str) -> tuple[int, dict[str, str], bytes]:
        more = {"Authorization": None, "Content_Type": "application/json", **headers}
        return ask(shared, "/loramerge/enter", "POST", json.dumps(body), **more)

    assert b'type="password"' in ask(shared, "/", Authorization=None)[2]
    for wrong in ({"password": "wrong"}, {"password": ""}, {"password": 1}):
        assert enter(wrong)[0] == 401
    for wrong in ({}, [], "x", None):
        assert enter(wrong)[0] == 400
    assert enter({"password": PASSWORD}, Origin="http://evil.example")[0] == 403
    status, headers, _ = enter({"password": PASSWORD})
    assert status == 200
    cookie = headers["set-cookie"].split(";")[0]
    assert ask(shared, "/loramerge/v1/loras", Authorization=None, Cookie=cookie)[0] == 200
    # By any address of this machine, which no page can make its own, but not by any name.
    assert ask(shared, "/loramerge/v1/loras", Host="192.168.1.5:9")[0] == 200
    assert ask(shared, "/loramerge/v1/loras", Host="evil.example:9")[0] == 403
    assert shared.host.restricted()


def test_without_a_password_there_is_no_door_for_others(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.dumps({"password": ""})
    assert ask(page, "/loramerge/enter", "POST", body, Content_Type="application/json")[0] == 404
    assert page._socket.getsockname()[0] == "127.0.0.1"
    monkeypatch.setattr(standalone.compat, "MAJOR", 4)
    monkeypatch.setattr("sys.stdin", None)
    for password in ("", "short"):
        monkeypatch.setenv("LORAMERGE_PASSWORD", password)
        with pytest.raises(LoraMergeError, match="needs a password of 8 characters"):
            standalone.serve(tmp_path, open_browser=False, listen=True)
    monkeypatch.setenv("LORAMERGE_TOKEN", "a b")
    with pytest.raises(LoraMergeError, match="LORAMERGE_TOKEN must have"):
        Page(tmp_path)


def test_a_checkpoint_outside_the_given_folders_is_not_read(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("loras", "models", "elsewhere")]
    for folder in folders:
        folder.mkdir()
        (folder / "base.safetensors").write_bytes(b"x")
    (folders[1] / "linked.safetensors").symlink_to(folders[2] / "base.safetensors")
    host = StandaloneHost(folders[:1], folders[1:2])
    assert host.base_path("base.safetensors") == folders[1] / "base.safetensors"
    assert host.base_path(str(folders[1] / "base.safetensors")) == folders[1] / "base.safetensors"
    outside = folders[2] / "base.safetensors"
    around = folders[1] / ".." / "elsewhere" / "base.safetensors"
    for text in (str(outside), str(around), "linked.safetensors"):
        with pytest.raises(LoraMergeError, match="--base-dir"):
            host.base_path(text)
    host.close()


@pytest.mark.parametrize(
    ("host", "parts"),
    [
        ("a", ("a", 80)), ("A:1", ("a", 1)), ("[::1]", ("::1", 80)), ("[::1]:8", ("::1", 8)), ("", ("", 80)),
        ("a:b", ("", 0)), ("[a]:1", ("", 0)), ("[::1]1", ("", 0)), ("a:123456", ("", 0)), ("a:1:2", ("", 0)),
    ],
)  # fmt: skip
def test_host_headers_are_taken_apart(host: str, parts: tuple[str, int]) -> None:
    assert split_host(host) == parts


def test_names_hold_for_one_port_or_for_all() -> None:
    names = Names(["a:1", "b", "", " C "])
    assert [host in names for host in ("a:1", "a:2", "a", "b", "b:7", "c:3", "", ":1", "1.2.3.4")] == [
        True, False, False, True, True, True, False, False, False,
    ]  # fmt: skip
    assert "1.2.3.4:5" in Names([], addresses=True)
    assert "[fe80::1]:5" in Names([], addresses=True)
