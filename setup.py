"""Adds the files that a WebUI wants at the top of the extension to the installed package.

A WebUI reads `style.css`, `javascript/` and `localizations/` from the extension's root, and people edit
`preset.txt` there; an installed copy has no such root and finds the same files inside `lib_loramerge`.
Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SHARED_FILES = ("preset.txt", "style.css", "javascript", "localizations")


class BuildWithSharedFiles(build_py):
    """build_py, and then the shared files copied to where `lib_loramerge` looks for them when installed."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            return
        package = Path(self.build_lib) / "lib_loramerge"
        # A module that was renamed since the last build would otherwise stay.
        shutil.rmtree(package, ignore_errors=True)
        super().run()
        for name in SHARED_FILES:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, package / name, dirs_exist_ok=True)
            elif source.is_file():
                shutil.copy2(source, package / name)


setup(cmdclass={"build_py": BuildWithSharedFiles})
