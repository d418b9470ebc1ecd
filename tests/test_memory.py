"""Memory that is kept for later and given back."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from lib_loramerge.merge.memory import return_free_memory

_KEPT = """
from pathlib import Path
from lib_loramerge.merge.memory import return_free_memory

def held():
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) // 1024

start = held()
large = bytearray(16 << 20)
del large  # From now on blocks up to that size are kept.
blocks = [bytearray(1 << 20) for _ in range(101)]
del blocks[:100]  # The last one stands above them.
before = held()
return_free_memory()
print(before - start, held() - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_free_memory_goes_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", _KEPT], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 80
    assert after < 20


@pytest.mark.parametrize("error", [TypeError, OSError, AttributeError])
def test_a_system_that_cannot_be_asked_keeps_it(monkeypatch, error):
    asked = []

    def library(name):
        asked.append(name)
        raise error

    monkeypatch.setattr(ctypes, "CDLL", library)
    return_free_memory()
    assert asked == [None]
