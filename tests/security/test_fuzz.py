"""A short run of the fuzzer; ``python tests/security/fuzz.py --seconds 3600`` makes a long one."""

from __future__ import annotations

import pytest

from tests.security.fuzz import fuzz


@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_files_give_tensors_or_sentences_and_nothing_else(tmp_path, seed):
    tried, wrong = fuzz(10, seed, tmp_path)
    assert wrong == ""
    assert tried > 10
