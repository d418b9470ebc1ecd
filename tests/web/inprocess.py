"""The fake WebUI's modules inside the test's own process, for tests that need no page."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

FAKE = Path(__file__).resolve().parent / "fakehost"
HOST_MODULES = ("modules", "networks", "network", "modules_forge")


@contextmanager
def fake_modules(data_dir: Path, *flags: str, forge: bool = False) -> Iterator[SimpleNamespace]:
    """``modules``, ``networks`` and ``network`` as a host has them in sys.modules, gone again afterwards."""
    argv, path = list(sys.argv), list(sys.path)
    (data_dir / "models" / "Lora").mkdir(parents=True, exist_ok=True)
    sys.argv[1:] = ["--data-dir", str(data_dir), *(["--forge"] if forge else []), *flags]
    sys.path[:0] = [str(FAKE / "extensions-builtin" / "Lora"), str(FAKE)]
    try:
        names = ("shared", "sd_models", "call_queue", "errors", "paths", "script_callbacks")
        loaded = {name: importlib.import_module(f"modules.{name}") for name in names}
        loaded["sd_models"].list_models()
        if forge:
            sys.modules["modules_forge"] = type(sys)("modules_forge")
        sys.path[:] = path
        sys.path.insert(0, str(FAKE / "extensions-builtin" / "Lora"))
        networks = importlib.import_module("networks")
        sys.path[:] = path
        yield SimpleNamespace(networks=networks, network=sys.modules["network"], **loaded)
    finally:
        sys.argv[:], sys.path[:] = argv, path
        for name in list(sys.modules):
            if name.split(".")[0] in HOST_MODULES:
                del sys.modules[name]
