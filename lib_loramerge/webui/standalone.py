"""``loramerge ui``: the tab alone in a browser, on this machine only, with REST beside it."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import webbrowser
from pathlib import Path
from typing import Any

# Gradio asks the net for its version and fonts unless told otherwise; this page is for this machine alone.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from fastapi import HTTPException, Request
from fastapi.responses import FileResponse

from .. import demo as samples
from ..errors import FileError, LoraMergeError
from ..recipe import LoraInput
from . import compat
from .host import Host, StandaloneHost
from .host.standalone import FILES
from .jobs import DONE, JobQueue
from .tab import fill_tab

ADDRESS = "127.0.0.1"
FIRST_PORT = 7865
PORTS = 100
TITLE = "LoRA Merge"


def shared_file(name: str) -> Path:
    """A file of the checkout's top, or its copy in an installed package."""
    package = Path(__file__).resolve().parent.parent
    inside = package / name
    return inside if inside.exists() else package.parent / name


def serve(
    lora_dir: Path | None = None, port: int | None = None, demo: bool = False, open_browser: bool = True
) -> None:
    """Serve the tab until interrupted.

    Args:
        lora_dir: Folder of LoRAs, read and written; the current folder when not given.
        port: None takes the first free one from 7865 on.
        demo: Start with two sample LoRAs in a folder of their own.

    Raises:
        LoraMergeError: The folder does not exist, or the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="loramerge-demo-") as temporary:
        folder = _folder(lora_dir, Path(temporary), demo)
        page = Page(folder, port, StandaloneHost([folder], first_inputs=demo_inputs() if demo else ()))
        try:
            print(f"LoRA Merge: {page.address}  (LoRAs in {folder}; Ctrl+C ends it)", flush=True)
            if open_browser:
                webbrowser.open(page.address)
            page.wait()
        except KeyboardInterrupt:
            pass
        finally:
            page.close()


def _folder(lora_dir: Path | None, temporary: Path, demo: bool) -> Path:
    if demo:
        folder = Path(lora_dir) if lora_dir is not None else temporary
        folder.mkdir(parents=True, exist_ok=True)
        samples.make_samples(folder)
        return folder
    folder = Path(lora_dir) if lora_dir is not None else Path.cwd()
    if not folder.is_dir():
        raise FileError(f"There is no folder {folder}. Name the folder of your LoRAs with --lora-dir.")
    return folder


def demo_inputs() -> list[LoraInput]:
    """The samples, ready to be merged."""
    return [LoraInput(name, te=value, unet=value) for name, value in samples.STRENGTHS.items()]


class Page:
    """A page being served; :meth:`close` ends it."""

    def __init__(self, folder: Path, port: int | None = None, host: Host | None = None) -> None:
        self.host = host or StandaloneHost([folder])
        self.jobs = JobQueue(self.host)
        with gr.Blocks(title=TITLE, analytics_enabled=False) as self.blocks:
            fill_tab(self.host, self.jobs)
            compat.on(self.blocks.load, None, js=page_script())
        self.port, self.app = self._launch(port)
        self._add_rest()
        self._add_files()

    def _launch(self, wanted: int | None) -> tuple[int, Any]:
        """The port and the application.

        Raises:
            LoraMergeError: No port is free.
        """
        ports = range(FIRST_PORT, FIRST_PORT + PORTS) if wanted is None else (wanted,)
        for port in filter(_is_free, ports):
            options = compat.launch_options(
                server_name=ADDRESS, server_port=port, prevent_thread_lock=True, quiet=True, show_api=False,
                inbrowser=False, share=False, footer_links=[], ssr_mode=False,
            )  # fmt: skip
            try:
                return port, self.blocks.launch(**options)[0]
            except OSError:
                continue  # Another one has taken it since we looked.
        if wanted is not None:
            raise LoraMergeError(f"Port {wanted} is taken. Choose another one with --port.")
        raise LoraMergeError(
            f"No port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} is free. Choose one with --port."
        )

    def _add_rest(self) -> None:
        from . import api

        api.mount(self.app, self.host, self.jobs)

    def _add_files(self) -> None:
        """Gives out what was merged here, and no other file."""
        if not isinstance(self.host, StandaloneHost):
            return

        def download(name: str, request: Request) -> Any:
            folder = self.host.write_dir()
            done = [job.output for job in self.jobs.list() if job.state == DONE and not job.request.trial]
            written = {path.relative_to(folder).as_posix(): path for path in done if path is not None}
            path = written.get(name)
            # A page elsewhere on the net has no business here.
            if path is None or not path.is_file() or request.headers.get("sec-fetch-site") == "cross-site":
                raise HTTPException(404, "There is no merged file of this name.")
            return FileResponse(path, filename=path.name)

        self.app.add_api_route(
            f"/{FILES}{{name:path}}", download, include_in_schema=False, response_model=None
        )
        self.host.serves_files = True

    @property
    def address(self) -> str:
        return f"http://{ADDRESS}:{self.port}/"

    def wait(self) -> None:
        """Blocks until interrupted."""
        self.blocks.block_thread()

    def close(self) -> None:
        self.jobs.close()
        self.blocks.close(verbose=False)
        self.host.close()


_PAGE_STYLE = """
.gradio-container { max-width: 1600px !important; }
footer { display: none !important; }
"""


def page_script() -> str:
    """Style, translations and the tab's own script as one JavaScript function.

    Inside a WebUI the host loads the files and translates; here we do. The
    style goes the same way, because some versions of Gradio rewrite a style
    sheet given to them and lose parts of it.
    """
    style = shared_file("style.css").read_text(encoding="utf-8") + _PAGE_STYLE
    scripts = sorted(shared_file("javascript").glob("*.js"))
    script = "\n".join(path.read_text(encoding="utf-8") for path in scripts)
    words = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(shared_file("localizations").glob("*.json"))
    }
    translate = Path(__file__).with_name("standalone.js").read_text(encoding="utf-8")
    return (
        "() => {\nif (window.loramergeLoaded) return;\nwindow.loramergeLoaded = true;\n"
        "document.head.append(Object.assign(document.createElement('style'), "
        f"{{textContent: {json.dumps(style)}}}));\n"
        f"window.loramergeWords = {json.dumps(words, ensure_ascii=True)};\n{translate}\n{script}\n}}"
    )


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        if os.name == "posix":
            # As servers do: connections of a page that has just ended do not count. Windows has another
            # meaning for this, and no need of it.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except OSError:
            return False
    return True


def main(arguments: Any = None) -> None:
    """For ``python -m lib_loramerge.webui.standalone``."""
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--lora-dir", type=Path)
    parser.add_argument("--port", type=int)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--no-browser", action="store_true")
    options = parser.parse_args(arguments)
    serve(options.lora_dir, options.port, options.demo, not options.no_browser)


if __name__ == "__main__":
    main()
