"""One merge at a time: the queue that the tab and REST share.

A merge runs in a thread of ours that is started when there is work and ends when there is none, so that a
page may be reloaded, closed or opened twice while it runs. Finished jobs stay for a while to be read.
"""

from __future__ import annotations

import atexit
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import Cancelled, LoraMergeError, OutputError
from ..recipe import LoraInput, MergeRecipe
from . import sidecar
from .errand import Errand
from .host import ConflictError, Host
from .origins import changed_sources, stamp_of
from .sidecar import UserMetadata
from .trial import Made, Trials

if TYPE_CHECKING:
    from ..merge import MergePlan, Progress
    from ..report import MergeReport
    from .analyse import Looks

MAX_WAITING = 32
MAX_FINISHED = 50
NOTIFY_SECONDS = 0.1
# Writing is the last phase, and short: the bar is nearly full when it begins.
WRITING_STARTS = 0.95
# A size rule looks at every layer before it merges them.
LOOKING_ENDS = 0.5

Notes = list[str]

WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"


@dataclass(frozen=True)
class MergeRequest:
    """What is to be merged, and what is to become of it.

    Attributes:
        name: Of the file, without folder; not needed for a trial.
        trial: Make it in the temporary folder and let the host list it until it ends.
        user_metadata: Written as the WebUI's ``<name>.json``.
        preview: Name of the LoRA whose preview picture is copied to ``<name>.png``.
        strict: Refuse links that lead out of the LoRA folder.
        changed_sources: Merge files that are not what a stored recipe was made
            with, and say so, where they would be refused otherwise.
    """

    recipe: MergeRecipe
    name: str = ""
    subfolder: str = ""
    overwrite: bool = False
    trial: bool = False
    user_metadata: UserMetadata | None = None
    preview: str = ""
    strict: bool = False
    changed_sources: bool = False

    kind = "merge"


class Job:
    """One request on its way. Everything but :attr:`id` and :attr:`request` changes while it runs.

    Attributes:
        prompt_name: What a prompt calls the result, once it exists.
        by_rest: No page asked for it.
        closed: It was cancelled by nobody: the WebUI reloaded its interface, or ended.
        exact_bytes: Size at most of a file that keeps everything, where this one does not.
        in_place_of: Names of earlier trials of the same LoRAs, which a prompt may hold.
    """

    def __init__(self, request: MergeRequest | Errand, output: Path, by_rest: bool = False) -> None:
        self.id = secrets.token_hex(6)
        self.request = request
        self.by_rest = by_rest
        self.output: Path | None = output
        self.title = output.stem
        self.state = WAITING
        self.position = 0
        self.progress: Progress | None = None
        self.report: Any = None  # A MergeReport, or what an errand reports.
        self.error = ""
        self.prompt_name = ""
        self.notes: tuple[str, ...] = ()
        self.exact_bytes: int | None = None
        self.closed = False
        self.in_place_of: tuple[str, ...] = ()
        self.created = time.time()
        self.started: float | None = None
        self.ended: float | None = None
        self._stop = threading.Event()

    @property
    def finished(self) -> bool:
        return self.state in (DONE, FAILED, CANCELLED)

    @property
    def stopping(self) -> bool:
        """Whether somebody asked for it to be cancelled."""
        return self._stop.is_set()

    def stop_here(self) -> None:
        """Ends the work if somebody asked for it.

        Raises:
            Cancelled: Somebody did.
        """
        if self.stopping:
            raise Cancelled("Stopped. Nothing was written.")

    @property
    def fraction(self) -> float:
        """Share of the work done, 0 to 1."""
        if self.state == DONE:
            return 1.0
        progress = self.progress
        if progress is None or not progress.total:
            return 0.0
        if isinstance(self.request, Errand):
            return self.request.fraction(progress)
        merging_starts = LOOKING_ENDS if self.request.recipe.size is not None else 0.0
        start, end = {"look": (0.0, LOOKING_ENDS), "write": (WRITING_STARTS, 1.0)}.get(
            progress.phase, (merging_starts, WRITING_STARTS)
        )
        return start + (end - start) * min(1.0, progress.done / progress.total)

    @property
    def unit(self) -> str:
        """What its progress counts."""
        if self.progress is None or not isinstance(self.request, Errand):
            return "layers"
        return self.request.unit(self.progress.phase)

    @property
    def eta(self) -> float | None:
        """Seconds left; None while unknown."""
        return self.progress.eta if self.progress is not None and self.state == RUNNING else None

    def to_json(self, folder: Path | None = None) -> dict[str, Any]:
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
            "output": _below(self.output, folder) if self.state == DONE else None,
            "prompt_name": self.prompt_name,
            "report": None if self.report is None else report_json(self.report, folder),
            "error": self.error,
            "notes": list(self.notes),
        }


def report_json(report: Any, folder: Path | None) -> dict[str, Any]:
    """A report without the folders of this machine in it."""
    content: dict[str, Any] = report.to_json()
    if content.get("output"):
        content["output"] = _below(Path(content["output"]), folder)
    if "outputs" in content:
        content["outputs"] = [_below(Path(path), folder) for path in content["outputs"]]
    content["inputs"] = [
        {**entry, "path": Path(entry["path"]).name} if isinstance(entry, dict) else entry
        for entry in content.get("inputs", ())
    ]
    return content


def _below(path: Path | None, folder: Path | None) -> str | None:
    if path is None:
        return None
    if folder is not None and path.is_relative_to(folder):
        return path.relative_to(folder).as_posix()
    return path.name


class _Merged(NamedTuple):
    """A file that was written, and what is reported of it.

    Attributes:
        replaced: Whether it took the place of another.
        notes: Which sources are not those of the recipe.
    """

    report: MergeReport
    output: Path
    made: Made
    replaced: bool
    notes: tuple[str, ...]


class JobQueue:
    """The queue of one process. All methods may be called from any thread."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.trials = Trials(host.register_trial, host.unregister_trial)
        self._looks: Looks | None = None
        self._changed = threading.Condition(threading.RLock())
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._thread: threading.Thread | None = None
        self._version = 0
        self._told = 0.0
        atexit.register(self._at_exit)

    @property
    def looks(self) -> Looks:
        """The analyses, which wait for no merge and no merge for them."""
        with self._changed:
            if self._looks is None:
                from .analyse import Looks  # Not at the WebUI's start, see extension.py.

                self._looks = Looks(self.host.log)
            return self._looks

    # For the tab and REST

    def submit(self, request: MergeRequest | Errand, by_rest: bool = False) -> Job:
        """Queues a job after checking everything that can be checked without computing.

        Raises:
            ConflictError: The name is taken, or too many jobs wait.
            LoraMergeError: Whatever else stops it.
        """
        self.trials.remove_older_than(self.host.settings().keep_trials_hours)
        output: Path | None
        if isinstance(request, Errand):
            output = request.check(self.host)
        else:
            request = self._as_allowed(request)
            output = self._checked(request)
        with self._changed:
            unfinished = [job for job in self._jobs.values() if not job.finished]
            if len(unfinished) > MAX_WAITING:
                raise ConflictError(
                    f"{MAX_WAITING} merges are waiting already. Wait until some are done, or drop them."
                )
            if output is not None and any(job.output == output for job in unfinished):
                raise ConflictError(
                    f"Another merge that is not done yet writes {output.name}. Choose another name."
                )
            job = Job(request, output if output is not None else self.trials.new_path(), by_rest)
            self._jobs[job.id] = job
            self._forget_old()
            self._notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="loramerge-jobs", daemon=True)
                self._thread.start()
        return job

    def get(self, job_id: str) -> Job | None:
        with self._changed:
            return self._jobs.get(job_id)

    def list(self) -> list[Job]:
        """Every job still remembered, oldest first."""
        with self._changed:
            return [*self._jobs.values()]

    def current(self) -> Job | None:
        """The job that runs, else the one that is next."""
        with self._changed:
            return next((job for job in self._jobs.values() if not job.finished), None)

    def cancel(self, job_id: str) -> Job | None:
        """Drops a waiting job, stops a running one; None when there is no such job."""
        with self._changed:
            job = self._jobs.get(job_id)
            if job is not None and not job.finished:
                job._stop.set()
                if job.state == WAITING:
                    self._finish(job, CANCELLED)
                self._notify()
            return job

    @property
    def version(self) -> int:
        """A number that grows with every change of any job."""
        return self._version

    def wait(self, version: int, timeout: float) -> int:
        """Blocks until something changed after ``version``, or for ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != version, timeout)
            return self._version

    def close(self, timeout: float = 5.0) -> None:
        """Cancels everything and ends the threads. The queue can be used again."""
        if self._looks is not None:
            self._looks.close(timeout)
        with self._changed:
            for job in self._jobs.values():
                job.closed = not job.finished
                self.cancel(job.id)
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    # Checking

    def _as_allowed(self, request: MergeRequest) -> MergeRequest:
        if self.host.restricted() and not request.strict:
            return replace(request, strict=True)
        return request

    def _checked(self, request: MergeRequest) -> Path | None:
        """Where a merge goes; None for a trial, which gets a place of its own."""
        if request.trial and not self.host.can_try:
            raise LoraMergeError("Trying a merge without saving it needs a WebUI.")
        # The name first: it is what a person sees and can fix at once.
        output = None if request.trial else self._output(request)
        self.host.plan(request.recipe, request.strict)
        preview = self._preview(request)
        if output is not None and not request.overwrite:
            check_beside(output, request.user_metadata, preview)
        return output

    def _output(self, request: MergeRequest) -> Path:
        output = self.host.check_name(request.name, request.subfolder, request.overwrite)
        check_no_input(
            output, {self.host.find(entry.name, request.strict) for entry in request.recipe.inputs}
        )
        return output

    def _preview(self, request: MergeRequest) -> Path | None:
        if not request.preview or request.trial:
            return None
        lora = self.host.find(request.preview, request.strict)
        preview = sidecar.preview_of(lora)
        if preview is None:
            raise OutputError(f"{request.preview} has no preview picture to copy.")
        return preview

    # The thread

    def _work(self) -> None:
        while True:
            with self._changed:
                job = next((job for job in self._jobs.values() if job.state == WAITING), None)
                if job is None:
                    self._thread = None
                    return
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
                text = f"Unexpected error ({type(error).__name__}: {error}). The console tells more."
                self._end(job, FAILED, text)

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

    def _begin(self, job: Job) -> bool:
        with self._changed:
            if job.finished:
                return False
            job.state, job.started = RUNNING, time.time()
            self._notify()
            return True

    def _run(self, job: Job) -> None:
        request = job.request
        if isinstance(request, Errand):
            self._run_errand(job, request)
            return
        with self._host_lock():
            if not self._begin(job):
                return
            merged = self._merge(job, request)
        job.in_place_of = tuple(self._earlier_trials(job))
        # Not under the host's lock, which cannot be taken twice: telling the host may need it.
        notes = [*merged.notes, *self._publish(request, merged)]
        with self._changed:
            job.prompt_name = merged.output.stem
            self._done(job, merged.report, merged.output, notes)

    def _run_errand(self, job: Job, errand: Errand) -> None:
        with self._host_lock():
            if not self._begin(job):
                return
            output = errand.check(self.host)  # Again: it may have waited.
            replaced = output.exists()
            with folder_for(output):
                report = errand.run(
                    self.host, output, lambda progress: self._tell(job, progress), job._stop.is_set
                )
        try:
            notes = errand.publish(self.host, output, replaced)
        except Exception as error:  # The host's code, which may raise anything; the file is there.
            self.host.log("the host's list could not be refreshed", error)
            notes = ["The WebUI's list could not be refreshed; use its own Refresh button."]
        with self._changed:
            if errand.in_prompts:
                job.prompt_name = output.stem
            self._done(job, report, output, notes)

    def _done(self, job: Job, report: Any, output: Path, notes: Notes) -> None:
        """To be called with the condition held."""
        job.report, job.output, job.notes = report, output, tuple(notes)
        if job.progress is not None:
            # Each step is reported before it is done; who reads the numbers later sees all of it done.
            job.progress = replace(job.progress, done=job.progress.total)
        self._finish(job, DONE)

    def _merge(self, job: Job, request: MergeRequest) -> _Merged:
        """Computes a job's file, or takes it over from a trial."""
        # Planned again: the job may have waited, and the files may have changed.
        plan = self.host.plan(request.recipe, request.strict, not request.changed_sources, job.stop_here)
        base = self.host.base_path(request.recipe.base, request.strict)
        paths = [*(source.path for source in plan.sources), *([base] if base else [])]
        made = Made(plan.recipe, tuple((path, stamp_of(path)) for path in paths))
        output = job.output if request.trial else self._output(request)
        assert output is not None
        replaced = output.exists()
        with folder_for(output):
            report = self._saved_trial(job, made, output) or self._computed(job, plan, output)
        job.exact_bytes = self._exact_bytes(request, plan, report)
        return _Merged(report, output, made, replaced, self._changed_sources(request, made, report))

    def _changed_sources(self, request: MergeRequest, made: Made, report: MergeReport) -> tuple[str, ...]:
        """Which sources are not those of the recipe; nothing here may lose the file, which is written."""
        hashed = []
        try:
            for given, (path, stamp), told in zip(request.recipe.inputs, made.files, report.inputs):
                digest = told.sshs_model_hash or ""
                self.host.source_hashes.remember(path, stamp, digest)
                hashed.append((given, path, digest))
            return tuple(changed_sources(hashed))
        except Exception as error:
            self.host.log("the sources could not be compared with the recipe", error)
            return ()

    def _computed(self, job: Job, plan: MergePlan, output: Path) -> MergeReport:
        # Not at the WebUI's start, see extension.py.
        from ..merge import run_merge
        from . import forecast

        report = run_merge(
            plan,
            output,
            overwrite=job.request.overwrite,
            progress=lambda progress: self._tell(job, progress),
            cancel=job._stop.is_set,
        )
        forecast.learn(plan, report.seconds.get("merge", 0.0))
        return report

    def _exact_bytes(self, request: MergeRequest, plan: MergePlan, report: MergeReport) -> int | None:
        """What a file that keeps everything may take; None where the written one does, but for rounding."""
        from ..report import lossy  # Not at the WebUI's start, see extension.py.

        exact = keeping_everything(request.recipe)
        lost = lossy(report.error, report.dtype) or report.cuts_off()
        if exact == request.recipe or not plan.method.uses_rank or not lost:
            return None
        try:
            return self.host.plan(exact, request.strict).predicted_bytes
        except Exception:  # The files have gone meanwhile; the one that is written must not be lost by it.
            return None

    def again_exactly(self, job: Job) -> Job:
        """Queues a merge once more that keeps everything, under a free name.

        Raises:
            LoraMergeError: Whatever stops it.
        """
        request = job.request
        assert isinstance(request, MergeRequest)
        name = "" if request.trial else self.host.propose_name([LoraInput(request.name)])
        return self.submit(
            replace(request, recipe=keeping_everything(request.recipe), name=name, overwrite=False)
        )

    def _saved_trial(self, job: Job, made: Made, output: Path) -> MergeReport | None:
        """The report of a trial that was merged from the same and is now saved as it is; None without one."""
        from ..merge import Progress  # Not at the WebUI's start, see extension.py.

        trial = None if job.request.trial else self.trials.find(made)
        if trial is None or not trial.fits(output.stem):
            return None
        self._tell(job, Progress("write", 0, trial.report.layers))
        return trial.save_as(output, job.request.overwrite, job.stop_here)

    def _publish(self, request: MergeRequest, merged: _Merged) -> Notes:
        """Makes the host know a finished file; nothing here may lose it."""
        output = merged.output
        if request.trial:
            self.trials.add(output, request.recipe, merged.made, merged.report)
            return []
        notes = []
        try:
            sidecar.write(output, request.user_metadata, self._preview(request), request.overwrite)
        except LoraMergeError as error:
            notes.append(str(error))
        except Exception as error:  # The file exists, whatever went wrong beside it.
            self.host.log("what belongs beside the merged file could not be written", error)
            notes.append(f"{output.stem}.json or .png could not be written; the console tells why.")
        try:
            if merged.replaced:
                notes.append(self.host.after_overwrite(output))
            else:
                self.host.announce(output)
        except Exception as error:  # The host's code, which may raise anything.
            self.host.log("the host's LoRA list could not be refreshed", error)
            notes.append("The WebUI's LoRA list could not be refreshed; use its own Refresh button.")
        for name in self._remove_trials(request.recipe):
            notes.append(f"{name}, made by Try without saving, was removed; use {output.stem} in its place.")
        return [note for note in notes if note]

    def _earlier_trials(self, job: Job) -> Notes:
        """Names of the trials of the same LoRAs: in a prompt, this merge belongs where they are."""

        def loras(one: Job) -> set[str]:
            recipe = getattr(one.request, "recipe", None)
            return set() if recipe is None else {given.name for given in recipe.inputs}

        trials = [one for one in self.list() if one.request.trial and one.prompt_name]
        return [one.prompt_name for one in trials if loras(one) == loras(job)]

    def _remove_trials(self, recipe: MergeRecipe) -> Notes:
        try:
            return [*self.trials.remove_of(recipe)]
        except Exception as error:  # The host's code, too.
            self.host.log("a tried merge could not be removed", error)
            return []

    def _tell(self, job: Job, progress: Progress) -> None:
        last = job.progress
        job.progress = progress
        now = time.monotonic()
        if last is None or last.phase != progress.phase or now - self._told >= NOTIFY_SECONDS:
            self._told = now
            with self._changed:
                self._notify()

    def _end(self, job: Job, state: str, error: str) -> None:
        with self._changed:
            job.error = error if state == FAILED else ""
            self._finish(job, state)

    def _finish(self, job: Job, state: str) -> None:
        """To be called with the condition held."""
        if not job.finished:
            job.state, job.ended = state, time.time()
            self._notify()

    def _notify(self) -> None:
        """To be called with the condition held."""
        self._version += 1
        unfinished = [job for job in self._jobs.values() if not job.finished]
        start = 0 if unfinished and unfinished[0].state == RUNNING else 1
        for index, job in enumerate(unfinished):
            job.position = index + start
        self._changed.notify_all()

    def _forget_old(self) -> None:
        """To be called with the condition held."""
        finished = [job.id for job in self._jobs.values() if job.finished]
        for job_id in finished[: max(0, len(finished) - MAX_FINISHED)]:
            del self._jobs[job_id]

    def _at_exit(self) -> None:
        self.close(timeout=2.0)
        self.trials.remove_all()


@contextmanager
def folder_for(output: Path) -> Iterator[None]:
    """Makes the folder of a file to be written; what was made goes again when the work fails."""
    missing = [folder for folder in output.parents if not folder.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"The folder {output.parent.name} could not be made: {reason}.") from error
    try:
        yield
    except BaseException:
        for folder in missing:  # The innermost first; one that is in use by now stays.
            with suppress(OSError):
                folder.rmdir()
        raise


def keeping_everything(recipe: MergeRecipe) -> MergeRecipe:
    """The same merge without a limit of rank or size."""
    return replace(recipe, rank="full", retain=None, size=None, keep=None, fair=False, conv_rank=None)


def check_no_input(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse to write over a LoRA that is being read.

    Raises:
        ConflictError: It is one of the inputs.
    """
    if any(_same(output, path) for path in inputs):
        raise ConflictError(
            f"{output.name} is one of the LoRAs being merged, so it cannot be overwritten. "
            "Choose another name."
        )


def check_beside(output: Path, data: UserMetadata | None, preview: Path | None) -> None:
    """Refuse to write over what the WebUI keeps beside a LoRA of that name.

    Raises:
        ConflictError: There is such a file.
    """
    taken = sidecar.taken(output, data, preview)
    if taken:
        raise ConflictError(f"{taken[0].name} exists already. Choose another name, or allow overwriting.")


def _same(one: Path, other: Path) -> bool:
    try:
        return one == other or one.samefile(other)
    except OSError:
        return False
