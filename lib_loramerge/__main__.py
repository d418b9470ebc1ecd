"""``python -m lib_loramerge`` is the ``loramerge`` command."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
