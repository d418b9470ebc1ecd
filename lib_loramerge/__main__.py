"""``python -m lib_loramerge`` is the ``loramerge`` command."""

from __future__ import annotations

from .cli import run_and_exit

if __name__ == "__main__":
    run_and_exit()
