"""The extension as a WebUI loads it: loaded, reloaded, and what it leaves in the process."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time

from tests.helpers.fixtures import SD1_LAYERS, make_lora
from tests.helpers.hosting import ROOT, FakeHost

SMALL = dict(list(SD1_LAYERS.items())[1:4])
API = "/loramerge/v1"
RECIPE = {"inputs": [{"name": "a"}, {"name": "b", "te": 0.5, "unet": 0.5}], "mode": "concat"}
NOISE = re.compile(r"READY |SCRIPTS |Running on |Closing server|^$|IMPORTANT: You are using gradio|^-+$")


def fill(data):
    for seed, name in enumerate(("a", "b")):
        make_lora(data / "models" / "Lora" / f"{name}.safetensors", SMALL, seed=seed)


def components(host):
    return {c["props"].get("elem_id") for c in host.get("/config")["components"]}


def test_the_tab_the_settings_and_rest_are_there_and_the_log_is_clean(tmp_path):
    fill(tmp_path)
    with FakeHost(tmp_path, "--api") as host:
        ids = components(host)
        assert "tab_loramerge" in ids
        assert len([ident for ident in ids if ident and ident.startswith("loramerge_")]) > 20
        assert {"setting_loramerge_mode", "setting_loramerge_queue_lock"} <= ids
        assert host.request("GET", f"{API}/loras")[0] == 200
        assert host.post("/fake/status")["errors"] == []
    assert [line for line in host.log if not NOISE.search(line)] == []


def test_a_reload_of_the_ui_leaves_no_thread_and_keeps_what_was_tried(tmp_path):
    fill(tmp_path)
    with FakeHost(tmp_path, "--api") as host:
        trial = host.wait_for_job(host.post(f"{API}/merge", {"recipe": RECIPE, "trial": True})["id"])
        before = host.picture(f"<lora:{trial['prompt_name']}:1>")
        host.restart()
        status = host.post("/fake/status")
        assert status["errors"] == []
        assert host.picture(f"<lora:{trial['prompt_name']}:1>") == before
        host.post("/sdapi/v1/refresh-loras")
        assert host.picture(f"<lora:{trial['prompt_name']}:1>") == before
        assert "tab_loramerge" in components(host)
        assert host.get(f"{API}/jobs")["jobs"][0]["id"] == trial["id"], "finished jobs can still be read"
        again = host.wait_for_job(host.post(f"{API}/merge", {"recipe": RECIPE, "name": "after"})["id"])
        assert again["state"] == "done", again["error"]
        ours = [name for name in host.post("/fake/status")["threads"] if name.startswith("loramerge")]
        assert ours == []


def test_an_updated_extension_is_loaded_anew_with_the_ui(tmp_path):
    """The host keeps imported packages for as long as it runs; our script must find the code it came with."""
    copy = tmp_path / "extension"
    shutil.copytree(
        ROOT / "lib_loramerge", copy / "lib_loramerge", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(ROOT / "scripts", copy / "scripts")
    shutil.copy(ROOT / "preset.txt", copy)
    data = tmp_path / "data"
    fill(data)
    with FakeHost(data, "--api", extension=copy) as host:
        assert host.get(f"{API}/methods")["version"] != "9.9.9"
        init = copy / "lib_loramerge" / "__init__.py"
        text = init.read_text(encoding="utf-8")
        init.write_text(re.sub('__version__ = "[^"]+"', '__version__ = "9.9.9"', text), encoding="utf-8")
        os.utime(init, (time.time() + 5, time.time() + 5))
        host.restart()
        assert host.get(f"{API}/methods")["version"] == "9.9.9"
        assert host.post("/fake/status")["errors"] == []


def test_an_update_waits_for_what_is_still_being_imported():
    """A reload of the UI right after the start must not leave old code in memory beside the new."""
    left = in_a_process(
        "import json, sys, threading, types\n"
        "from lib_loramerge.webui import extension\n"
        "begun, go = threading.Event(), threading.Event()\n"
        "def slow():\n"
        "  begun.set(); go.wait(60)\n"
        "  import lib_loramerge.analysis\n"
        "extension.warm_up = slow\n"
        "def nothing(): pass\n"
        "trials = types.SimpleNamespace(register_all=nothing, remove_all=nothing)\n"
        "host = types.SimpleNamespace(close=nothing)\n"
        "jobs = types.SimpleNamespace(close=nothing, trials=trials)\n"
        "extension._services = host, jobs\n"
        "modules = sys.modules['modules'] = types.ModuleType('modules')\n"
        "modules.shared = types.SimpleNamespace(cmd_opts=types.SimpleNamespace())\n"
        "extension.add_routes(None, None)\n"
        "begun.wait(60)\n"
        "extension._LOADED = 0.0\n"
        "threading.Timer(0.3, go.set).start()\n"
        "extension.let_go()\n"
        "extension._warming.join(60)\n"
        "print(json.dumps([name for name in sys.modules if name.startswith('lib_loramerge')]))"
    )
    assert left == []


def test_what_was_tried_is_gone_when_the_webui_ends(tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    data = tmp_path / "data"
    fill(data)
    with FakeHost(data, "--api") as host:
        host.wait_for_job(host.post(f"{API}/merge", {"recipe": RECIPE, "trial": True})["id"])
        assert len(list(temporary.glob("loramerge-trial-*/*.safetensors"))) == 1
    assert list(temporary.glob("loramerge-trial-*")) == []


def test_the_tab_is_built_under_every_flag_that_restricts_it(tmp_path):
    fill(tmp_path)
    with FakeHost(
        tmp_path, "--subpath", "ui", "--hide-ui-dir-config", "--freeze-settings", "--listen"
    ) as host:
        assert "tab_loramerge" in components(host)
        assert host.post("/fake/status")["errors"] == []


def test_it_loads_in_a_webui_without_any_lora_and_without_the_folder(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    lora_dir = tmp_path / "not made yet"
    with FakeHost(data, "--api", lora_dir=lora_dir) as host:
        assert "tab_loramerge" in components(host)
        assert host.get(f"{API}/loras") == {"loras": []}
        assert host.post("/fake/status")["errors"] == []


def in_a_process(code):
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


# What no page needs before something is pressed.
LATER = {
    "merge",
    "analysis",
    "adapters",
    "models",
    "cli",
    "demo",
    "dialects",
    "files",
    "metadata",
    "ranks",
    "report",
    "webui.analyse",
    "webui.api",
    "webui.facts",
    "webui.plots",
    "webui.render_analysis",
    "webui.standalone",
}


def ours_of(names):
    """Our modules among the imported ones, each as the part of the design that it belongs to."""
    ours = {name.removeprefix("lib_loramerge.") for name in names if name.startswith("lib_loramerge.")}
    return {".".join(name.split(".")[: 2 if name.startswith("webui.") else 1]) for name in ours}


def test_loading_imports_nothing_that_only_a_merge_needs():
    """Our part of the WebUI's start: what reads and merges files comes later."""
    names = in_a_process(
        "import json, sys, gradio, torch, safetensors.torch\n"
        "before = set(sys.modules)\n"
        "import lib_loramerge.webui.extension\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    assert "lib_loramerge.webui.extension" in names
    assert sorted(ours_of(names) & LATER) == []
    foreign = {name.split(".")[0] for name in names} - {"lib_loramerge"} - set(sys.stdlib_module_names)
    assert foreign == set(), "a WebUI has imported all others before us"


def test_building_the_tab_imports_nothing_that_only_a_merge_needs_either():
    names = in_a_process(
        "import json, sys\n"
        "import lib_loramerge.webui.extension\n"
        "assert 'lib_loramerge.webui.tab' not in sys.modules, 'a WebUI without pages needs no tab'\n"
        "from lib_loramerge.webui.host import StandaloneHost\n"
        "from lib_loramerge.webui.jobs import JobQueue\n"
        "from lib_loramerge.webui.tab import build_tab\n"
        "host = StandaloneHost(['tests/data'])\n"
        "build_tab(host, JobQueue(host))\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    assert "lib_loramerge.webui.tab" in names
    assert sorted(ours_of(names) & LATER) == []


def test_loading_leaves_torch_warnings_and_signals_alone():
    same = in_a_process(
        "import json, signal, sys, threading, warnings, gradio, torch\n"
        "def state(): return [torch.get_num_threads(), str(torch.get_default_dtype()),\n"
        "  torch.is_grad_enabled(), torch.get_float32_matmul_precision(), len(warnings.filters),\n"
        "  str(signal.getsignal(signal.SIGINT)), str(signal.getsignal(signal.SIGTERM)),\n"
        "  threading.active_count(), str(torch.load), sys.path]\n"
        "before = state()\n"
        "import lib_loramerge.webui.extension, lib_loramerge.merge.run\n"
        "print(json.dumps([before, state()]))"
    )
    assert same[0] == same[1]
