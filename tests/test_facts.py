"""The pages of facts are those that the code's tables give."""

from __future__ import annotations

import pytest

from tests.helpers.facts import DOCS, PAGES


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_what_the_tables_give(page):
    assert (DOCS / page).read_text(encoding="utf-8") == PAGES[page](), "run: python -m tests.helpers.facts"
