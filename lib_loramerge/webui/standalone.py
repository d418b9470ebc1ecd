"""``loramerge ui``: the tab alone in a browser, with REST beside it, for its owner alone."""

from __future__ import annotations

import getpass
import inspect
import json
import logging
import os
import re
import secrets
import socket
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path

# Gradio asks the net for its version and fonts unless it is forbidden; this page is for this machine alone.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse

from .. import demo as samples
from .. import interrupts
from ..errors import FileError, LoraMergeError
from ..recipe import LoraInput
from . import api, compat
from .access import Names, allowed_hosts
from .background import DONE
from .guard import App, Guard
from .host import Host, StandaloneHost
from .host.standalone import FILES
from .jobs import JobQueue
from .tab import fill_tab

ADDRESS, EVERYWHERE = "127.0.0.1", "0.0.0.0"
FIRST_PORT = 7865
PORTS = 100
TITLE = "LoRA Merge"
TOKEN, PASSWORD = "LORAMERGE_TOKEN", "LORAMERGE_PASSWORD"
"""Environment variables: the secret of the address, else a new one each time; what others type to come in."""
SHORTEST_SECRET = 8


def shared_file(name: str) -> Path:
    """A file of the checkout's top, or its copy in an installed package."""
    package = Path(__file__).resolve().parent.parent
    inside = package / name
    return inside if inside.exists() else package.parent / name


def serve(
    lora_dir: Path | None = None,
    port: int | None = None,
    demo: bool = False,
    open_browser: bool = True,
    *,
    base_dirs: Sequence[Path] = (),
    checkpoint_dir: Path | None = None,
    listen: bool = False,
    allow_hosts: Sequence[str] = (),
) -> None:
    """Serve the tab until interrupted.

    Args:
        lora_dir: Folder of LoRAs, read and written; the current folder when not given.
        port: None takes the first free one from 7865 on.
        demo: Start with two sample LoRAs in a folder of their own.
        base_dirs: Folders whose checkpoints may be named as base model.
        checkpoint_dir: Folder of checkpoints, read and written; without one nothing is baked or extracted.
        listen: Let other machines in, who know the password.
        allow_hosts: Further names by which the page may be opened, with or without a port.

    Raises:
        LoraMergeError: There is no such folder, port or password, or Gradio is too old.
    """
    if compat.MAJOR < 4:
        raise LoraMergeError(
            "The page alone needs Gradio 4.40 or newer, and {version} is installed: pip install "
            '"sd-webui-lora-merge[ui]".',
            gr.__version__,
        )
    password = _password() if listen else None
    with tempfile.TemporaryDirectory(prefix="loramerge-demo-") as temporary:
        folder = _folder(lora_dir, Path(temporary), demo)
        for base in base_dirs:
            if not Path(base).is_dir():
                raise FileError(
                    "There is no folder {base}. Name a folder of checkpoints with --base-dir.", base
                )
        if checkpoint_dir is not None and not Path(checkpoint_dir).is_dir():
            raise FileError(
                "There is no folder {checkpoint_dir}. Name a folder of checkpoints with --ckpt-dir.",
                checkpoint_dir,
            )
        host = StandaloneHost(
            [folder],
            base_dirs,
            first_inputs=demo_inputs() if demo else (),
            shared=listen,
            checkpoint_dir=checkpoint_dir,
        )
        page = Page(folder, port, host, password=password, allow_hosts=allow_hosts)
        try:
            print(f"LoRA Merge: {page.entrance}  (LoRAs in {folder}; Ctrl+C ends it)", flush=True)
            if password is not None:
                print(f"Others: http://{socket.gethostname()}:{page.port}/ and the password", flush=True)
            if open_browser:
                webbrowser.open(page.entrance)
            page.wait()
        except KeyboardInterrupt:
            pass
        finally:
            page.close()


def _password() -> str:
    """What others must type, from the environment or asked for; never from the command line, which all see.

    Raises:
        LoraMergeError: There is none, or it is too short.
    """
    password = os.environ.get(PASSWORD, "")
    if not password and sys.stdin is not None and sys.stdin.isatty():
        password = getpass.getpass("Password for those who open the page from elsewhere: ")
    if len(password) < SHORTEST_SECRET:
        raise LoraMergeError(
            "--listen lets other machines in and needs a password of {most} characters or more: type it "
            "when asked, or set the environment variable {password}.",
            SHORTEST_SECRET,
            PASSWORD,
        )
    return password


def _token() -> str:
    token = os.environ.get(TOKEN, "")
    if not token:
        return secrets.token_urlsafe(24)
    if not re.fullmatch(rf"[A-Za-z0-9_-]{{{SHORTEST_SECRET},}}", token):
        raise LoraMergeError(
            "{token} must have {most} characters or more, of A to Z, a to z, 0 to 9, - and _.",
            TOKEN,
            SHORTEST_SECRET,
        )
    return token


def _folder(lora_dir: Path | None, temporary: Path, demo: bool) -> Path:
    if demo:
        folder = Path(lora_dir) if lora_dir is not None else temporary
        folder.mkdir(parents=True, exist_ok=True)
        samples.make_samples(folder)
        return folder
    folder = Path(lora_dir) if lora_dir is not None else Path.cwd()
    if not folder.is_dir():
        raise FileError("There is no folder {folder}. Name the folder of your LoRAs with --lora-dir.", folder)
    return folder


def demo_inputs() -> list[LoraInput]:
    """The samples, ready to be merged."""
    return [LoraInput(name, te=value, unet=value) for name, value in samples.STRENGTHS.items()]


class Page:
    """A page being served; :meth:`close` ends it.

    Attributes:
        entrance: The address that lets its owner in.
        token: What REST asks for, ``Authorization: Bearer TOKEN``.
    """

    def __init__(
        self,
        folder: Path,
        port: int | None = None,
        host: Host | None = None,
        *,
        password: str | None = None,
        allow_hosts: Sequence[str] = (),
    ) -> None:
        """Start to serve.

        Args:
            password: Given, the page is open to other machines, for those who know it.

        Raises:
            LoraMergeError: No port is free.
        """
        self.host = host or StandaloneHost([folder])
        self.token = _token()
        self._socket = _bind(ADDRESS if password is None else EVERYWHERE, port)
        self.port = self._socket.getsockname()[1]
        self.jobs = JobQueue(self.host)
        with gr.Blocks(title=TITLE, analytics_enabled=False) as self.blocks:
            fill_tab(self.host, self.jobs)
            compat.on(self.blocks.load, None, js=page_script())
        names = [f"{name}:{self.port}" for name in ("127.0.0.1", "localhost", "[::1]")]
        if password is not None:
            names += [socket.gethostname(), f"{socket.gethostname()}.local"]
        known = Names([*names, *allow_hosts, *allowed_hosts()], addresses=password is not None)
        self.guard = Guard(self._application(), known, self.port, self.token, password)
        self._serve(self.guard)

    def _application(self) -> FastAPI:
        """REST, the files that were merged here, and Gradio behind them."""
        app = FastAPI(title=TITLE)
        api.mount(app, self.host, self.jobs)
        self._add_files(app)
        off = ("ssr_mode", "show_api", "run_history", "pwa")
        options = {"footer_links": [], **dict.fromkeys(off, False)}
        known = inspect.signature(gr.mount_gradio_app).parameters
        wanted = {name: value for name, value in options.items() if name in known}
        return gr.mount_gradio_app(app, self.blocks, path="/", **wanted)

    def _serve(self, app: App) -> None:
        import uvicorn

        # Not by Gradio's launch(), which asks itself whether it is reached and gives up on a busy machine.
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, proxy_headers=False, server_header=False
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="loramerge-page", daemon=True
        )
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise LoraMergeError("The page could not be started; the lines above tell why.")
            time.sleep(0.01)

    def _add_files(self, app: FastAPI) -> None:
        """Gives out what was merged here, and no other file."""
        if not isinstance(self.host, StandaloneHost):
            return

        def download(name: str) -> FileResponse:
            folder = self.host.write_dir()
            done = [job.output for job in self.jobs.list() if job.state == DONE and not job.request.trial]
            written = {
                path.relative_to(folder).as_posix(): path
                for path in done
                if path is not None and path.is_relative_to(folder)
            }
            path = written.get(name)
            if path is None or not path.is_file():
                raise HTTPException(404, "There is no merged file of this name.")
            return FileResponse(path, filename=path.name)

        app.add_api_route(f"/{FILES}{{name:path}}", download, include_in_schema=False, response_model=None)
        self.host.serves_files = True

    @property
    def address(self) -> str:
        return f"http://{ADDRESS}:{self.port}/"

    @property
    def entrance(self) -> str:
        return f"{self.address}?token={self.token}"

    def wait(self) -> None:
        """Blocks until interrupted."""
        while self._thread.is_alive() and not interrupts.asked():
            self._thread.join(0.2)

    def close(self) -> None:
        # Answers that never end, such as that by which the page learns of news, are not waited for, and
        # that the server then says so is of no use.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self._server.should_exit = self._server.force_exit = True
        self.jobs.close()
        self._thread.join(1.0)
        self._socket.close()
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


def _bind(address: str, wanted: int | None) -> socket.socket:
    """A socket of the port that was asked for, else of the first free one; from now on it is taken.

    Raises:
        LoraMergeError: No port is free.
    """
    for port in range(FIRST_PORT, FIRST_PORT + PORTS) if wanted is None else (wanted,):
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if os.name == "posix":
            # As servers do: connections of a page that has just ended do not count.
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        elif hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Where Windows would let another program share it.
            server.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        try:
            server.bind((address, port))
            server.listen(128)
            return server
        except (OSError, OverflowError):
            server.close()
    if wanted is not None:
        raise LoraMergeError("Port {wanted} is taken. Choose another one with --port.", wanted)
    raise LoraMergeError(
        "No port from {first} to {last} is free. Choose one with --port.", FIRST_PORT, FIRST_PORT + PORTS - 1
    )
