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
    """What a host has in sys.modules, gone again afterwards; with ``--sdnext`` as SD.Next has it."""
    argv, path = list(sys.argv), list(sys.path)
    (data_dir / "models" / "Lora").mkdir(parents=True, exist_ok=True)
    sys.argv[1:] = ["--data-dir", str(data_dir), *(["--forge"] if forge else []), *flags]
    sys.path[:0] = [str(FAKE / "extensions-builtin" / "Lora"), str(FAKE)]
    try:
        sdnext = "--sdnext" in flags
        names = ("shared", "call_queue", "errors", "paths", "script_callbacks", "processing")
        names += ("sd_checkpoint", "scripts_manager") if sdnext else ("sd_models",)
        loaded = {name: importlib.import_module(f"modules.{name}") for name in names}
        loaded["sd_checkpoint" if sdnext else "sd_models"].list_models()
        if forge:
            sys.modules["modules_forge"] = type(sys)("modules_forge")
        sys.path[:] = path
        sys.path.insert(0, str(FAKE / "extensions-builtin" / "Lora"))
        networks = importlib.import_module("modules.lora.lora_load" if sdnext else "networks")
        if sdnext:
            networks.list_available_networks()
        sys.path[:] = path
        network = sys.modules["modules.lora.network" if sdnext else "network"]
        yield SimpleNamespace(networks=networks, network=network, **loaded)
    finally:
        sys.argv[:], sys.path[:] = argv, path
        for name in list(sys.modules):
            if name.split(".")[0] in HOST_MODULES:
                del sys.modules[name]
