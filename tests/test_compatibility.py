"""The page of what each program reads is what the facts and our names say now."""

from __future__ import annotations

from tests.helpers.compatibility import TARGET, text


def test_the_page_is_current():
    """``python -m tests.helpers.compatibility`` writes it anew."""
    assert TARGET.read_text(encoding="utf-8") == text()


def test_what_is_written_by_default_is_read_whole_by_comfyui():
    lines = [
        line.split(" | ") for line in text().splitlines() if "| `auto` |" in line and "LoRA, LoHa" in line
    ]
    assert len(lines) > 12
    assert [line[0] for line in lines if line[8].strip() != "all"] == []
