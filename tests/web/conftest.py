"""One browser for all browser tests of a run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.web.browser import launched


@pytest.fixture(scope="session")
def chromium() -> Iterator[object]:
    """A headless Chromium; every test opens a context, a window with a storage of its own."""
    with launched() as browser:
        yield browser
