"""One browser for all browser tests of a run, and one window for the tests of a file that need no other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.browser import Tab, launched


@pytest.fixture(scope="session")
def chromium() -> Iterator[object]:
    """A headless Chromium; every test opens a context, a window with a storage of its own."""
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def window(chromium: object, host: Any) -> Iterator[Tab]:
    """A window of the file's own ``host``."""
    with Tab(chromium, host.url) as opened:
        yield opened


@pytest.fixture
def tab(window: Tab) -> Iterator[Tab]:
    """The window with a fresh form."""
    window.reset()
    yield window
    assert window.errors == []
