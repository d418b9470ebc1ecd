"""One job at a time: the queue that the tab and REST share.

A job runs in a thread of ours, so that a page may be reloaded, closed or opened twice while it runs.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Cancelled, LoraMergeError, Sentence
from .background import CANCELLED, DONE, FAILED, RUNNING, Line, Piece
from .errand import Errand, Task, folder_for
from .host import ConflictError, Host
from .merge_jobs import MergeRequest
from .trial import Trials

if TYPE_CHECKING:
    from ..merge import Progress
    from .analyse import Looks
    from .errand import Report

MAX_WAITING = 32
MAX_FINISHED = 50
NOTIFY_SECONDS = 0.1

Texts = list[str]


class Job(Piece):
    """One request on its way. Everything but :attr:`id` and :attr:`request` changes while it runs.

    Attributes:
        prompt_name: What a prompt calls the result, once it exists.
        by_rest: No page asked for it.
        exact_bytes: Size at most of a file that keeps everything, where this one does not.
        in_place_of: Names of earlier trials of the same LoRAs, which a prompt may hold.
        output: The file; None where none is made.
        picture: What was found as PNG; empty for none.
    """

    def __init__(self, request: Errand, output: Path | None, by_rest: bool = False) -> None:
        super().__init__()
        self.request = request
        self.by_rest = by_rest
        self.output = output
        self.title = request.title if output is None else output.stem
        self.progress: Progress | None = None
        self.report: Report | None = None
        self.error = ""
        self.prompt_name = ""
        self.notes: tuple[str, ...] = ()
        self.exact_bytes: int | None = None
        self.in_place_of: tuple[str, ...] = ()
        self.picture = b""

    @property
    def fraction(self) -> float:
        """Share of the work done, 0 to 1."""
        if self.state == DONE:
            return 1.0
        progress = self.progress
        return self.request.fraction(progress) if progress is not None and progress.total else 0.0

    @property
    def unit(self) -> str:
        """What its progress counts."""
        return self.request.unit("" if self.progress is None else self.progress.phase)

    @property
    def eta(self) -> float | None:
        """Seconds left; None while unknown."""
        return self.progress.eta if self.progress is not None and self.state == RUNNING else None

    def to_json(self, folder: Path | None = None) -> dict[str, object]:
        """Plain JSON types. Paths are names below ``folder``, never whole."""
        progress = self.progress
        return {
            "id": self.id,
            "state": self.state,
            "kind": self.request.kind,
            "title": self.title,
            "trial": self.request.trial,
            "position": self.position,
            "created": self.created,
            "started": self.started,
            "ended": self.ended,
            "progress": None
            if progress is None
            else {
                "phase": progress.phase,
                "done": progress.done,
                "total": progress.total,
                "unit": self.unit,
                "layer": progress.layer,
                "fraction": self.fraction,
                "seconds_left": self.eta,
            },
            "output": _below(self.output, folder) if self.output and self.state == DONE else None,
            "prompt_name": self.prompt_name,
            "report": None if self.report is None else report_json(self.report, folder),
            "error": self.error,
            "notes": list(self.notes),
        }


def report_json(report: Report, folder: Path | None) -> dict[str, object]:
    """A report without the folders of this machine in it."""
    content = report.to_json()
    if content.get("output"):
        content["output"] = _below(Path(content["output"]), folder)
    if "outputs" in content:
        content["outputs"] = [_below(Path(path), folder) for path in content["outputs"]]
    content["inputs"] = [
        {**entry, "path": Path(entry["path"]).name} if isinstance(entry, dict) else entry
        for entry in content.get("inputs", ())
    ]
    return content


def _below(path: Path, folder: Path | None) -> str:
    if folder is not None and path.is_relative_to(folder):
        return path.relative_to(folder).as_posix()
    return path.name


class JobQueue:
    """The queue of one process. All methods may be called from any thread."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.trials = Trials(host.register_trial, host.unregister_trial)
        self._looks: Looks | None = None
        self._line: Line[Job] = Line("loramerge-jobs", self._do)
        self._shown = 0.0
        atexit.register(self._at_exit)

    @property
    def looks(self) -> Looks:
        """The analyses, which wait for no merge and no merge for them."""
        with self._line.changed:
            if self._looks is None:
                from .analyse import Looks  # Not at the WebUI's start, see extension.py.

                self._looks = Looks(self.host.log)
            return self._looks

    # For the tab and REST

    def submit(self, request: Errand, by_rest: bool = False) -> Job:
        """Queues a job after checking everything that can be checked without computing.

        Raises:
            ConflictError: The name is taken, or too many jobs wait.
            LoraMergeError: Whatever else stops it.
        """
        self.trials.remove_older_than(self.host.settings().keep_trials_hours)
        output = request.check(self.host)
        with self._line.changed:
            if output is not None and any(job.output == output for job in self._line.unfinished()):
                raise ConflictError(
                    "Another merge that is not done yet writes {file}. Choose another name.", output.name
                )
            job = Job(request, self.trials.new_path() if request.trial else output, by_rest)
            if not self._line.add(job, MAX_WAITING, MAX_FINISHED):
                raise ConflictError(
                    "{most} merges are waiting already. Wait until some are done, or drop them.", MAX_WAITING
                )
        return job

    def again_exactly(self, job: Job) -> Job:
        """Queues a merge once more that keeps everything, under a free name.

        Raises:
            LoraMergeError: Whatever stops it.
        """
        assert isinstance(job.request, MergeRequest)
        return self.submit(job.request.exactly(self.host))

    def get(self, job_id: str) -> Job | None:
        return self._line.get(job_id)

    def list(self) -> list[Job]:
        """Every job still remembered, oldest first."""
        return self._line.all()

    def current(self) -> Job | None:
        """The job that runs, else the one that is next."""
        return next(iter(self._line.unfinished()), None)

    def cancel(self, job_id: str) -> Job | None:
        """Drops a waiting job, stops a running one; None when there is no such job."""
        return self._line.cancel(job_id)

    @property
    def version(self) -> int:
        """A number that grows with every change of any job."""
        return self._line.version

    def wait(self, version: int, timeout: float) -> int:
        """Blocks until something changed after ``version``, or for ``timeout`` seconds."""
        self._line.wait_for(lambda: self._line.version != version, timeout)
        return self._line.version

    def close(self, timeout: float = 5.0) -> None:
        """Cancels everything and ends the threads. The queue can be used again."""
        if self._looks is not None:
            self._looks.close(timeout)
        self._line.close(timeout)

    def _at_exit(self) -> None:
        self.close(timeout=2.0)
        self.trials.remove_all()

    # The thread

    def _do(self, job: Job) -> None:
        try:
            self._run(job)
        except LoraMergeError as error:
            self._end(job, CANCELLED if isinstance(error, Cancelled) else FAILED, str(error))
        except BaseException as error:
            if isinstance(error, RuntimeError) and "interpreter shutdown" in str(error):
                self._end(job, CANCELLED, "")  # The host was ended in the middle of the merge.
                return
            # A bug of ours: the console shows it, and the queue goes on.
            self.host.log("a merge failed unexpectedly", error)
            text = Sentence(
                "Unexpected error ({kind}: {error}). The console tells more.", type(error).__name__, error
            )
            self._end(job, FAILED, text)

    def _run(self, job: Job) -> None:
        request = job.request
        with self._host_lock():
            if not self._line.begin(job):
                return
            task = self._task(job)
            with nullcontext() if job.output is None else folder_for(task.output):
                report = request.run(task)
        job.in_place_of = tuple(self._earlier_trials(job))
        # Not under the host's lock, which cannot be taken twice: the host's list may need it.
        notes = [*task.notes, *self._publish(request, task)]
        with self._line.changed:
            if request.in_prompts:
                job.prompt_name = task.output.stem
            job.report, job.notes, job.picture = report, tuple(notes), task.picture
            job.output = None if job.output is None else task.output
            job.exact_bytes = task.exact_bytes
            if job.progress is not None:
                # Each step is reported before it is done; who reads the numbers later sees all of it done.
                job.progress = replace(job.progress, done=job.progress.total)
            self._line.end(job, DONE)

    def _task(self, job: Job) -> Task:
        if job.output is None:
            output = self.host.write_dir()
        else:
            output = job.output if job.request.trial else job.request.place(self.host)
        return Task(
            host=self.host,
            trials=self.trials,
            output=output,
            replaced=job.output is not None and output.exists(),
            progress=lambda progress: self._show(job, progress),
            cancel=lambda: job.stopping,
            stop=job.stop_here,
        )

    def _publish(self, request: Errand, task: Task) -> Texts:
        try:
            return request.publish(task)
        except Exception as error:
            if request.trial:
                raise  # Nobody could use it.
            # The host's code, which may raise anything; the file is there.
            self.host.log("the host's list could not be refreshed", error)
            return ["The WebUI's list could not be refreshed; use its own Refresh button."]

    @contextmanager
    def _host_lock(self) -> Iterator[None]:
        """The host's queue lock, if the user wants merges to wait for pictures.

        A job stays waiting until the lock is free, so that it can be dropped at once.
        """
        lock = self.host.queue_lock() if self.host.settings().queue_lock else None
        if lock is None:
            yield
            return
        with lock:
            yield

    def _earlier_trials(self, job: Job) -> Texts:
        """Names of the trials of the same LoRAs: in a prompt, this merge belongs where they are."""

        def loras(one: Job) -> set[str]:
            recipe = getattr(one.request, "recipe", None)
            return set() if recipe is None else {given.name for given in recipe.inputs}

        trials = [one for one in self.list() if one.request.trial and one.prompt_name]
        trials = trials if job.request.in_prompts else []
        return [one.prompt_name for one in trials if loras(one) == loras(job)]

    def _show(self, job: Job, progress: Progress) -> None:
        last = job.progress
        job.progress = progress
        now = time.monotonic()
        if last is None or last.phase != progress.phase or now - self._shown >= NOTIFY_SECONDS:
            self._shown = now
            self._line.notify()

    def _end(self, job: Job, state: str, error: str) -> None:
        with self._line.changed:
            job.error = error if state == FAILED else ""
            self._line.end(job, state)
