"""Starting and stopping the fake WebUI from a test."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SERVE = ROOT / "tests" / "helpers" / "fakehost" / "serve.py"
START_SECONDS = 240  # On a machine that does other things, too.


class FakeHost:
    """One fake WebUI in a process of its own; use it in a ``with``.

    Args:
        data_dir: Its data folder; LoRAs are in ``models/Lora`` below unless ``lora_dir`` says otherwise.
        flags: Further command line flags of the host.
        options: Settings that the user has changed.
    """

    def __init__(
        self,
        data_dir: Path,
        *flags: str,
        lora_dir: Path | None = None,
        options: Mapping[str, Any] | None = None,
        forge: bool | None = None,
        extension: Path = ROOT,
    ) -> None:
        self.data_dir = data_dir
        self.lora_dir = lora_dir or data_dir / "models" / "Lora"
        self.lora_dir.mkdir(parents=True, exist_ok=True)
        import gradio

        if forge is None:
            forge = not gradio.__version__.startswith("3.")
        self.forge = forge
        self.url = ""
        self.log: list[str] = []
        self._command = [sys.executable, str(SERVE), "--extension", str(extension)]
        self._command += ["--data-dir", str(data_dir)]
        self._command += [
            "--lora-dir",
            str(self.lora_dir),
            "--options",
            json.dumps(dict(options or {})),
            *flags,
        ]
        self._command += ["--forge"] if forge else []
        self._lines: queue.Queue[str | None] = queue.Queue()

    def __enter__(self) -> FakeHost:
        # Elsewhere than in the checkout, as a WebUI is: nothing of ours may be found by the current folder.
        self._process = subprocess.Popen(
            self._command,
            cwd=self.data_dir,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            env={
                **os.environ,
                "PYTHONDONTWRITEBYTECODE": "1",
                "PYTHONIOENCODING": "utf-8",
                "OMP_NUM_THREADS": "1",
            },
        )
        threading.Thread(target=self._read, daemon=True).start()
        self.wait_until_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the process as a user who presses Ctrl+C would; by force if it does not."""
        if self._process.poll() is None:
            if self.url:
                with contextlib.suppress(OSError):
                    self.post("/fake/stop")
            else:
                self._process.kill()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)
        if self._process.stdin:
            self._process.stdin.close()
        if self._process.stdout:
            self._process.stdout.close()

    def wait_until_ready(self) -> None:
        limit = time.monotonic() + START_SECONDS
        while True:
            try:
                line = self._lines.get(timeout=max(0.1, limit - time.monotonic()))
            except queue.Empty:
                line = None
            if line is None:
                self.stop()
                raise RuntimeError("the fake host did not start:\n" + "\n".join(self.log))
            if line.startswith("READY "):
                self.url = line.split()[1]
                return

    def restart(self) -> None:
        """ "Reload UI": the same process unloads its extensions and loads them again."""
        self.post("/fake/restart")
        self.wait_until_ready()

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self.log.append(line.rstrip())
                self._lines.put(line.rstrip())
        except ValueError:
            pass
        self._lines.put(None)

    def get(self, path: str, **more: Any) -> Any:
        return self.request("GET", path, **more)[1]

    def post(self, path: str, body: object = None, **more: Any) -> Any:
        return self.request("POST", path, body, **more)[1]

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        raw: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 120,
    ) -> tuple[int, Any]:
        """(status, JSON) of a request; the text where the answer is no JSON."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} if data is not None else {}
        request = urllib.request.Request(
            self.url + path, data=data, method=method, headers={**sent, **(headers or {})}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=timeout) as answer:
                return answer.status, _json(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, _json(error.read())

    @contextlib.contextmanager
    def held(self, batches: int = 1) -> Iterator[None]:
        """Merges stop after so many batches of layers inside, however fast the machine is."""
        self.post(f"/fake/hold?batches={batches}")
        try:
            yield
        finally:
            self.post("/fake/let-go")

    def picture(self, prompt: str) -> Any:
        """(name, multiplier, digest) of the LoRAs that a picture would be made with."""
        return self.get("/fake/picture?prompt=" + urllib.request.quote(prompt))

    def wait_for_job(self, job_id: str, seconds: float = 240) -> Any:
        limit = time.monotonic() + seconds
        while True:
            job = self.get(f"/loramerge/v1/jobs/{job_id}")
            if job["state"] in ("done", "failed", "cancelled") or time.monotonic() > limit:
                return job
            time.sleep(0.05)


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode("utf-8", "replace")
