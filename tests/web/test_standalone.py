"""The tab alone in a browser: the demo, and the link to what was merged."""

from __future__ import annotations

import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib_loramerge import demo
from lib_loramerge.errors import LoraMergeError
from lib_loramerge.webui import labels, standalone
from lib_loramerge.webui.host import StandaloneHost
from lib_loramerge.webui.standalone import Page
from tests.helpers.browser import Tab


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page that ``loramerge ui --demo`` serves."""
    folder = tmp_path_factory.mktemp("demo")
    demo.make_samples(folder)
    served = Page(folder, host=StandaloneHost([folder], first_inputs=standalone.demo_inputs()))
    try:
        yield served
    finally:
        served.close()


def request(page: Page, path: str, **headers: str) -> urllib.request.Request:
    """As a script sends it that knows the token."""
    allowed = {"Authorization": f"Bearer {page.token}"}
    return urllib.request.Request(page.address + path, headers={**allowed, **headers})


def status_of(page: Page, path: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(request(page, path, **headers)) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_demo_is_ready_to_be_merged_at_once_and_links_to_what_it_wrote(
    chromium: object, page: Page
) -> None:
    folder = page.host.write_dir()
    with Tab(chromium, page.entrance, title=None) as tab:
        tab.wait_for_facts("Stable Diffusion 1")
        assert [name.split(" ")[0] for name in tab.rows()] == ["style", "subject"]
        assert [tab.value(f"row{row}_{part}") for row in (0, 1) for part in ("strength", "te")] == [
            "0.8", "0.8", "0.5", "0.5",
        ]  # fmt: skip
        tab.expect_value("name", "style+subject")
        assert "Done" in tab.merge()
        link = tab.page.locator("#loramerge_result .lm-written a")
        link = link.get_attribute("href") or ""
        with urllib.request.urlopen(request(page, link)) as answer:
            assert answer.read() == (folder / "style+subject.safetensors").read_bytes()
            assert "attachment" in answer.headers["Content-Disposition"]
        # Emptied rows stay empty: the samples are a beginning, not a rule.
        tab.press("clear")
        tab.expect_value("row0_lora", "")
        assert tab.errors == []
    # Only what was merged here, and only to this page.
    assert status_of(page, link) == 200
    assert status_of(page, link, **{"Sec-Fetch-Site": "cross-site"}) == 403
    assert status_of(page, link, Authorization="") == 401
    for other in ("style.safetensors", "..%2fstyle%2bsubject.safetensors", "%2fetc%2fpasswd", ""):
        assert status_of(page, "loramerge/file/" + other) == 404


def test_the_demo_in_japanese_stays_alive_with_words_that_both_languages_share(
    chromium: object, page: Page
) -> None:
    with Tab(chromium, page.entrance, title=None, query="?lang=ja_JP") as tab:
        # "LoRAs" becomes "LoRA" here, which stays "LoRA".
        tab.expect_text("facts", re.compile(r"ベースモデル.*LoRA.*ファイルサイズ", re.DOTALL))
        tab.fill("row0_strength", 0.25)
        tab.expect_value("row0_te", "0.25")
        tab.fill("name", "japanese")
        assert "完了" in tab.merge()
        assert tab.errors == []


def test_lists_show_base_model_and_rank_as_soon_as_they_are_known(
    chromium: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo.make_samples(tmp_path)
    go, read = threading.Event(), labels.from_file

    def slow(path: Path) -> labels.Label:
        go.wait(240)
        return read(path)

    monkeypatch.setattr(labels, "from_file", slow)
    served = Page(tmp_path)
    try:
        with Tab(chromium, served.entrance, title=None) as tab:
            tab.page.wait_for_selector("#loramerge_jobs [data-labels=busy]", state="attached")
            go.set()
            # Nobody picks a file or refreshes the list.
            known = "#loramerge_jobs [data-labels]:not([data-labels=busy])"
            tab.page.wait_for_selector(known, state="attached")
            tab.choose("row0_lora", "style · SD 1 · rank 8")
            assert tab.errors == []
    finally:
        go.set()
        served.close()


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """The first port that a page looks at; free, and so are those after it."""
    with socket.socket() as probe:
        probe.bind((standalone.ADDRESS, 0))
        number = min(probe.getsockname()[1], 65_000)
    monkeypatch.setattr(standalone, "FIRST_PORT", number)
    return number


def test_a_port_is_free_again_as_soon_as_its_page_has_ended(port: int, tmp_path: Path) -> None:
    page = Page(tmp_path)
    with socket.create_connection((standalone.ADDRESS, page.port)) as client:
        # Who closes first keeps the port in the state TIME_WAIT for a minute.
        page.close()
        client.recv(1)
    again = Page(tmp_path, page.port)
    again.close()
    assert again.port == page.port


def test_the_second_of_two_pages_takes_the_next_port_and_says_so_when_it_may_not(
    port: int, tmp_path: Path
) -> None:
    first = Page(tmp_path)
    try:
        second = Page(tmp_path)
        try:
            assert first.port != second.port
            for page in (first, second):
                assert status_of(page, "loramerge/v1/methods") == 200
        finally:
            second.close()
        with pytest.raises(LoraMergeError, match=f"Port {first.port} is taken. Choose another one"):
            Page(tmp_path, first.port)
    finally:
        first.close()


def test_a_sample_of_the_demo_has_a_strength_of_its_own(tmp_path: Path) -> None:
    files = demo.make_samples(tmp_path)
    assert [path.stem for path in files] == list(demo.STRENGTHS)
    assert re.fullmatch(r"loramerge/file/made/a%20%26%20b\.safetensors", _link(tmp_path, "made/a & b"))
    assert _link(tmp_path, "../elsewhere/a") == ""


def _link(folder: Path, name: str) -> str:
    host = StandaloneHost([folder])
    host.serves_files = True
    host.close()
    path = (folder / f"{name}.safetensors").resolve()
    return host.file_link(path) or ""
