"""What a job of the queue does: a merge, a sweep, a bake, an extraction. Knows no Gradio."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..errors import OutputError
from .host import ConflictError

if TYPE_CHECKING:
    from ..checkpoints import BakeReport, ExtractReport
    from ..merge import Progress
    from ..report import MergeReport
    from .host import Host
    from .sweep_jobs import SweepReport
    from .trial import Made, Trials

    Report: TypeAlias = MergeReport | SweepReport | BakeReport | ExtractReport


@dataclass
class Task:
    """What the queue gives an errand for one run, and what the run leaves for its end.

    Attributes:
        output: The file to be written; the LoRA folder where none is.
        replaced: Whether it takes the place of another.
        progress: To be called often.
        cancel: Whether to stop.
        stop: Raises ``Cancelled`` if so.
        made, merged: What a merge was made of, and what came out.
        exact_bytes: Size at most of a file that keeps everything, where this one does not.
        notes: What to tell the user of the result.
        picture: What it looks like, as PNG; empty for none.
    """

    host: Host
    trials: Trials
    output: Path
    replaced: bool
    progress: Callable[[Progress], None]
    cancel: Callable[[], bool]
    stop: Callable[[], None]
    made: Made | None = None
    merged: MergeReport | None = None
    exact_bytes: int | None = None
    notes: list[str] = field(default_factory=list)
    picture: bytes = b""


class Errand:
    """What is to be done, as data; the queue gives it a thread, its turn, progress and an end.

    Attributes:
        kind: What it is, in one word.
        trial: Whether the host lists what it makes until it ends, and nothing goes to the LoRA folder.
        in_prompts: Whether the file is a LoRA.
        title: What the page calls it where no file is made; empty where one is.
        name: Of the file, without folder.
        overwrite: Replace a file of that name.
        strict: It came by REST: links that lead out of the host's folders are refused.
    """

    kind = ""
    trial = False
    in_prompts = False
    title = ""
    name: str
    overwrite: bool
    strict: bool

    def check(self, host: Host) -> Path | None:
        """Everything that can be checked without computing; the file that will be written.

        None for a trial, and where no file is made.

        Raises:
            LoraMergeError: Whatever stops it.
        """
        raise NotImplementedError

    def place(self, host: Host) -> Path:
        """The file to be written, checked again: the errand may have waited.

        Raises:
            LoraMergeError: Whatever stops it.
        """
        output = self.check(host)
        assert output is not None
        return output

    def run(self, task: Task) -> Report:
        """Write the file; its report.

        Raises:
            LoraMergeError: Anything a user can cause; nothing was written then.
        """
        raise NotImplementedError

    def publish(self, task: Task) -> list[str]:
        """Make the host know the file; what to tell the user."""
        raise NotImplementedError

    def fraction(self, progress: Progress) -> float:
        """Share of the work that is done, 0 to 1."""
        return progress.done / progress.total if progress.total else 0.0

    def unit(self, phase: str) -> str:
        """What ``progress`` counts in this phase: ``"layers"``, ``"bytes"`` or ``"thousandths"``."""
        return "layers"


@contextmanager
def as_conflict() -> Iterator[None]:
    """What the library refuses because of files or the disk is a conflict here.

    Raises:
        ConflictError: With the library's sentence.
    """
    try:
        yield
    except OutputError as error:
        raise ConflictError(str(error)) from error


@contextmanager
def folder_for(output: Path) -> Iterator[None]:
    """Makes the folder of a file to be written; what was made goes again when the work fails."""
    missing = [folder for folder in output.parents if not folder.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(
            "The folder {folder} could not be made: {reason}.", output.parent.name, reason
        ) from error
    try:
        yield
    except BaseException:
        for folder in missing:  # The innermost first; one that is in use by now stays.
            with suppress(OSError):
                folder.rmdir()
        raise
