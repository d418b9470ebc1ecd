"""Sweeps: many merges that differ in a few settings, as one run.

``expand`` turns texts with ranges into recipes; ``plan_sweep`` checks all of them before any work, and
``run_sweep`` writes one file for each, with a table of what every file is.
"""

from .axes import Axis, Point, combine, expand
from .running import MOST_FILES, Sweep, SweepRow, plan_sweep, rows_before, run_sweep, target

__all__ = [
    "MOST_FILES",
    "Axis",
    "Point",
    "Sweep",
    "SweepRow",
    "combine",
    "expand",
    "plan_sweep",
    "rows_before",
    "run_sweep",
    "target",
]
