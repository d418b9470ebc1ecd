"""The browser of the tests of what other web pages can do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.helpers.browser import CHROMIUM, FLAGS, PATIENCE

ELSEWHERE = "evil.example"


@pytest.fixture(scope="session")
def victim(chromium: Browser) -> Iterator[Browser]:
    """A Chromium in which a name of somebody else's leads to this machine, as after DNS rebinding."""
    rules = f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1, MAP localhost 127.0.0.1, EXCLUDE 127.0.0.1"
    flags = [flag for flag in FLAGS if not flag.startswith("--host-resolver-rules")]
    # Where a browser keeps pages of the net from this machine by itself, ours is to be tried without it.
    off = "--disable-features=LocalNetworkAccessChecks,BlockInsecurePrivateNetworkRequests"
    browser = chromium.browser_type.launch(
        executable_path=CHROMIUM, args=[*flags, rules, off], timeout=PATIENCE
    )
    try:
        yield browser
    finally:
        browser.close()
