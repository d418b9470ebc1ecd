"""Everything a user can cause or fix.

Front ends catch :class:`LoraMergeError` and show ``str(error)``. Any other
exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class LoraMergeError(Exception):
    """Base of every error a user can cause or fix.

    The message is one or two sentences: what is wrong, in which file and
    layer, and the way out.
    """


class FileError(LoraMergeError):
    """A file that cannot be read, is damaged, or is not what its name says."""


class UnsupportedError(LoraMergeError):
    """A file or layer of a kind that cannot be merged, with the reason."""


class UnknownKeyError(LoraMergeError):
    """Tensor names that no dialect or adapter kind claims."""


class RecipeError(LoraMergeError):
    """A recipe, preset, parameter or option that makes no sense."""


class IncompatibleError(LoraMergeError):
    """Inputs that do not fit each other: base models, shapes, ranks."""


class OutputError(LoraMergeError):
    """A result that cannot be written where it was asked for."""


class Cancelled(LoraMergeError):
    """The user stopped the work; nothing was written."""
