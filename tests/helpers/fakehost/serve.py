"""Starts the fake WebUI as the real ones start: see README.md here."""

from __future__ import annotations

import os
import queue
import shutil
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"

HERE = Path(__file__).resolve().parent
# The script's own folder is on sys.path by Python's doing; a WebUI has its root there.
sys.path[:] = [str(HERE), *(entry for entry in sys.path if Path(entry or ".").resolve() != HERE)]

commands: queue.Queue[str] = queue.Queue()


def main() -> None:
    import gradio
    import torch  # noqa: F401 - a WebUI has it imported long before its extensions
    from modules import gradio_repairs
    from modules.shared_cmd_options import cmd_opts

    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gradio.__version__.startswith("3."):
        gradio_repairs.repair_gradio_3()
    elif cmd_opts.forge:
        gradio_repairs.repair_gradio_4()
    if cmd_opts.forge:
        sys.modules["modules_forge"] = type(sys)("modules_forge")
        _wrap_loaders()
    if cmd_opts.sdnext:
        from modules import scripts_manager as scripts
        from modules import sd_checkpoint as models
        from modules.lora import lora_load

        lora_load.list_available_networks()
    else:
        from modules import scripts
        from modules import sd_models as models
    from modules.scripts import load_seconds

    models.list_models()
    while True:
        scripts.load_scripts()
        print(f"SCRIPTS {load_seconds}", flush=True)
        command = serve_api() if cmd_opts.nowebui else serve_page()
        from modules import script_callbacks

        if command != "restart":
            return
        script_callbacks.call("script_unloaded")


def serve_page() -> str:
    from modules import script_callbacks, shared, ui, ui_gradio_extensions
    from modules.shared_cmd_options import cmd_opts

    ui_gradio_extensions.reload_javascript()
    script_callbacks.call("before_ui")
    shared.demo = ui.create_ui()
    auth = (
        [tuple(pair.split(":", 1)) for pair in cmd_opts.gradio_auth.split(",")]
        if cmd_opts.gradio_auth
        else None
    )
    app, url, _ = shared.demo.launch(
        server_name="127.0.0.1",
        server_port=cmd_opts.port or free_port(),
        auth=auth,
        prevent_thread_lock=True,
        quiet=True,
        allowed_paths=[*cmd_opts.gradio_allowed_path, str(HERE)],
        app_kwargs={"docs_url": "/docs", "redoc_url": "/redoc"},
        root_path=f"/{cmd_opts.subpath}" if cmd_opts.subpath else "",
    )
    app.user_middleware = [entry for entry in app.user_middleware if entry.cls.__name__ != "CORSMiddleware"]
    set_up_middleware(app)
    add_controls(app)
    if cmd_opts.sdnext:
        from modules import lora_routes
        from modules.lora import lora_load

        lora_routes.add_to(app, lora_load)
    script_callbacks.call("app_started", shared.demo, app)
    print(f"READY {url.rstrip('/')}", flush=True)
    command = commands.get()
    shared.demo.close()
    time.sleep(0.2)
    return command


def serve_api() -> str:
    """``--nowebui``: no page, no tabs, and ``demo`` is None."""
    import uvicorn
    from fastapi import FastAPI
    from modules import script_callbacks
    from modules.shared_cmd_options import cmd_opts

    app = FastAPI()
    set_up_middleware(app)
    add_controls(app)
    script_callbacks.call("before_ui")
    script_callbacks.call("app_started", None, app)
    port = cmd_opts.port or free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.02)
    print(f"READY http://127.0.0.1:{port}", flush=True)
    command = commands.get()
    server.should_exit = True
    thread.join(5)
    return command


def set_up_middleware(app) -> None:
    from starlette.middleware.gzip import GZipMiddleware

    app.middleware_stack = None
    app.add_middleware(GZipMiddleware, minimum_size=1000)
    app.build_middleware_stack()


def add_controls(app) -> None:
    """For tests: what a person would do with the WebUI itself."""
    from fastapi import Body
    from modules import call_queue, errors

    @app.post("/fake/plot")
    def plot(body: dict = Body(...)):  # noqa: B008 - as FastAPI wants it
        """X/Y/Z plot: a prompt, and the label and values of its axes."""
        from modules import processing, scripts

        runner = scripts.scripts_txt2img
        grid = next(script for script in runner.selectable_scripts if script.title() == "X/Y/Z plot")
        labels = [option.label for option in grid.current_axis_options]
        values = [0, "", []] * 3 + [True]
        for index, (label, text) in enumerate(body["axes"]):
            values[3 * index : 3 * index + 2] = labels.index(label), text
        args = [None] * len(runner.inputs)
        args[0] = runner.selectable_scripts.index(grid) + 1
        args[grid.args_from : grid.args_to] = values
        p = processing.StableDiffusionProcessingTxt2Img(body["prompt"], runner, args)
        with call_queue.queue_lock:
            try:
                return {"cells": runner.run(p, *args).cells}
            finally:
                p.close()

    @app.post("/fake/{command}")
    def control(command: str, seconds: float = 1.0, batches: int = 1):
        if command in ("stop", "restart"):
            commands.put(command)
        elif command == "hold":  # Merges stop after some batches until they are let go.
            _hold_merges(batches)
        elif command == "let-go":
            let_go.set()
        elif command == "generate":  # A picture in the making holds the queue lock.
            threading.Thread(target=_hold, args=(call_queue.queue_lock, seconds), daemon=True).start()
        return {"errors": errors.records, "threads": sorted(thread.name for thread in threading.enumerate())}


def _hold(lock, seconds: float) -> None:
    with lock:
        time.sleep(min(seconds, 30))


let_go = threading.Event()
let_go.set()
held_after = [0]


def _hold_merges(batches: int) -> None:
    from lib_loramerge.merge.layer import Merger

    let_go.clear()
    held_after[0] = batches
    if hasattr(Merger.merge_together, "original"):
        return
    original = Merger.merge_together

    def merge(self, *args):
        if not let_go.is_set():
            held_after[0] -= 1
            if held_after[0] < 0:
                let_go.wait(300)
        return original(self, *args)

    merge.original = original
    Merger.merge_together = merge


def _wrap_loaders() -> None:
    """Forge renames a file that these two functions fail on."""
    import safetensors.torch
    import torch

    def wrapped(original):
        def load(*args, **kwargs):
            try:
                return original(*args, **kwargs)
            except Exception as error:
                for value in (*args, *kwargs.values()):
                    if isinstance(value, str) and os.path.exists(value):
                        shutil.move(value, value + ".corrupted")
                raise ValueError(str(error)) from error

        return load

    safetensors.torch.load_file = wrapped(safetensors.torch.load_file)
    torch.load = wrapped(torch.load)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end_with_parent() -> None:
    """A test that dies must not leave a server behind."""
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
