"""The WebUI side: the tab, REST, figures, and everything that knows a host.

Importing the package imports none of it: the command line draws figures
without Gradio or FastAPI. ``extension`` is what a WebUI loads, ``standalone``
the same tab without one.
"""

from __future__ import annotations
