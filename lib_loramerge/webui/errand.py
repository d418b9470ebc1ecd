"""A job of the queue that is no merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..merge import Progress
    from .host import Host


class Errand:
    """What is to be done, as data; the queue gives it a thread, its turn, progress and an end.

    Attributes:
        kind: What it is, in one word.
        trial: Never: what it makes is a file.
        in_prompts: Whether the file is a LoRA.
        name: Of the file, without folder.
        overwrite: Replace a file of that name.
        strict: It came by REST: links that lead out of the host's folders are refused.
    """

    kind = ""
    trial = False
    in_prompts = False
    name: str
    overwrite: bool
    strict: bool

    def check(self, host: Host) -> Path:
        """Everything that can be checked without computing; the file that will be written.

        Raises:
            LoraMergeError: Whatever stops it.
        """
        raise NotImplementedError

    def run(
        self,
        host: Host,
        output: Path,
        progress: Callable[[Progress], None],
        cancel: Callable[[], bool],
    ) -> Any:
        """Write the file; its report, with ``to_json``.

        Raises:
            LoraMergeError: Anything a user can cause; nothing was written then.
        """
        raise NotImplementedError

    def publish(self, host: Host, output: Path, replaced: bool) -> list[str]:
        """Make the host know the file; what to tell the user."""
        raise NotImplementedError

    def fraction(self, progress: Progress) -> float:
        """Share of the work that is done, 0 to 1."""
        return progress.done / progress.total if progress.total else 0.0

    def unit(self, phase: str) -> str:
        """What ``progress`` counts in this phase: ``"layers"``, ``"bytes"`` or ``"thousandths"``."""
        return "layers"
