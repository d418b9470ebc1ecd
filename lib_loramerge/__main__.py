"""``python -m lib_loramerge`` is the ``loramerge`` command."""

from __future__ import annotations

import sys

from lib_loramerge.cli import main

if __name__ == "__main__":
    sys.exit(main())
