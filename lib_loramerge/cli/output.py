"""What commands print: JSON, reports, notes and a progress line."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import argparse

    from ..merge import Progress

EXIT_DONE, EXIT_ERROR = 0, 1


def one_line(text: str) -> str:
    """A message on one line, whatever a file name holds."""
    return " ".join(text.splitlines())


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False))


def print_report(report: Any, options: argparse.Namespace) -> None:
    print_json(report.to_json()) if options.json else print(report.to_text())


def print_notes(warnings: Sequence[str], skipped: Sequence[str] = ()) -> None:
    for text in skipped:
        print(f"{'Skipped':<13}{text}")
    for text in warnings:
        print(f"{'Warning':<13}{text}")


def draw(figure: str, subject: Any, options: argparse.Namespace) -> None:
    """Draw ``subject`` with a function of ``webui.plots``, where ``--plot`` asks for it."""
    if options.plot:
        from ..webui import plots

        plots.save(getattr(plots, figure)(subject), options.plot)


@contextlib.contextmanager
def progress_line(stream: TextIO) -> Iterator[Callable[[Progress], None] | None]:
    """A progress line on a terminal; nothing at all elsewhere."""
    if not stream.isatty():
        yield None
        return
    last = 0.0

    def show(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < 0.1 and progress.done < progress.total:
            return
        last = now
        left = f", {progress.eta:.0f} s left" if progress.eta is not None and progress.eta >= 1 else ""
        stream.write(f"\r\x1b[K{progress.phase}: {progress.done} of {progress.total}{left}")
        stream.flush()

    try:
        yield show
    finally:
        stream.write("\r\x1b[K")
        stream.flush()


def in_megabytes(show: Callable[[Progress], None] | None) -> Callable[[Progress], None] | None:
    """A progress line that counts bytes by the million."""
    from dataclasses import replace

    if show is None:
        return None
    return lambda progress: show(
        replace(
            progress,
            phase=f"{progress.phase}, MB",
            done=progress.done // 1_000_000,
            total=progress.total // 1_000_000,
        )
    )
