"""What a host refuses, by kind: REST answers each with a status of its own."""

from __future__ import annotations

from ...errors import FileError, LoraMergeError, OutputError


class ConflictError(OutputError):
    """What is asked for collides with a file or a job that is there already, or with what a disk holds."""


class UnknownNameError(FileError):
    """A LoRA or a checkpoint of that name is not in the host's lists."""


class ClosedError(LoraMergeError):
    """The owner has not opened this to others."""
