"""Bakes and extractions as jobs: what is asked for, its check from headers, its run. Knows no Gradio.

What reads checkpoints is imported when used, not at the WebUI's start; see extension.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RecipeError, Sentence
from ..recipe import MergeRecipe
from .errand import Errand, Task, as_conflict
from .host import Host

if TYPE_CHECKING:
    from ..checkpoints import Bake, BakeReport, ExtractReport, ExtractSettings, Foreseen
    from ..merge import Progress

TO_BAKE = "a checkpoint to bake into"
TUNED, BASE = "the fine-tuned checkpoint", "the checkpoint that it was trained from"
# Shares of the work after which hashing ends, and where it begins in an extraction.
HASHED = 0.3
MEASURED, READ = 0.85, 0.97


@dataclass(frozen=True)
class BakeRequest(Errand):
    """LoRAs to be baked into a checkpoint.

    Attributes:
        base: Title of the checkpoint.
        rounding, dtype, drop_ema, hashed: As of ``BakeSettings``.
        changed_sources: Bake files that are not what a stored recipe was made with.
    """

    recipe: MergeRecipe
    base: str
    name: str
    overwrite: bool = False
    rounding: str = "auto"
    dtype: str = "same"
    drop_ema: bool = False
    hashed: bool = True
    strict: bool = False
    changed_sources: bool = False

    kind = "bake"

    def check(self, host: Host) -> Path:
        host.check_open()
        output = host.check_checkpoint_name(self.name, self.overwrite)
        with self.prepared(host) as bake:
            bake.refuse_inputs(output)
            _check_room(output, bake.size())
        return output

    def prepared(
        self, host: Host, *, check_hashes: bool = False, stop: Callable[[], None] | None = None
    ) -> AbstractContextManager[Bake]:
        """The bake, checked from headers.

        Raises:
            LoraMergeError: Whatever stops it.
        """
        from ..checkpoints import BakeSettings, prepare_bake

        return prepare_bake(
            replace(self.recipe, base=None),
            host.checkpoint_path(self.base, TO_BAKE, self.strict),
            find=lambda name: host.find(name, self.strict),
            presets=host.presets(),
            settings=BakeSettings(
                self.rounding,
                self.dtype,
                self.drop_ema,
                self.hashed,
                base_sha256=host.checkpoint_sha256(self.base) if self.hashed else "",
            ),
            check_hashes=check_hashes,
            stop=stop,
        )

    def run(self, task: Task) -> BakeReport:
        with self.prepared(task.host, check_hashes=not self.changed_sources, stop=task.stop) as bake:
            return bake.run(task.output, overwrite=self.overwrite, progress=task.progress, cancel=task.cancel)

    def publish(self, task: Task) -> list[str]:
        task.host.refresh_checkpoints()
        if task.replaced and task.host.is_webui:
            return [
                Sentence(
                    "{file} was replaced. If the WebUI has it loaded, choose another checkpoint and then "
                    "this one again.",
                    task.output.name,
                )
            ]
        return []

    def fraction(self, progress: Progress) -> float:
        share = super().fraction(progress)
        if not self.hashed:
            return share
        return HASHED * share if progress.phase == "hash" else HASHED + (1 - HASHED) * share

    def unit(self, phase: str) -> str:
        return "bytes"


@dataclass(frozen=True)
class ExtractRequest(Errand):
    """A LoRA to be made of two checkpoints.

    Attributes:
        tuned, base: Titles.
        settings: Of ``ExtractSettings``, by name.
    """

    tuned: str
    base: str
    settings: tuple[tuple[str, object], ...]
    name: str
    subfolder: str = ""
    overwrite: bool = False
    strict: bool = False

    kind = "extract"
    in_prompts = True

    def check(self, host: Host) -> Path:
        host.check_open()
        output = host.check_name(self.name, self.subfolder, self.overwrite)
        found = self.foreseen(host, output)
        _check_room(output, found.disk_bytes)
        return output

    def foreseen(self, host: Host, output: Path | None = None) -> Foreseen:
        """What is known from headers.

        Raises:
            LoraMergeError: Whatever stops it.
        """
        from ..checkpoints import foresee

        return foresee(*self._paths(host), self._settings(), output)

    def _paths(self, host: Host) -> tuple[Path, Path]:
        tuned = host.checkpoint_path(self.tuned, TUNED, self.strict)
        return tuned, host.checkpoint_path(self.base, BASE, self.strict)

    def _settings(self, host: Host | None = None) -> ExtractSettings:
        """With ``host`` also the hashes that it keeps."""
        from ..checkpoints import ExtractSettings

        settings = ExtractSettings(**dict(self.settings))  # type: ignore[arg-type]
        if host is None or not settings.hashed:
            return settings
        tuned, base = map(host.checkpoint_sha256, (self.tuned, self.base))
        return replace(settings, tuned_sha256=tuned, base_sha256=base)

    def run(self, task: Task) -> ExtractReport:
        return self.extracted(task, task.output)

    def extracted(self, task: Task, output: Path | None) -> ExtractReport:
        """The work; a dry run without ``output``."""
        from ..checkpoints import extract

        return extract(
            *self._paths(task.host),
            output,
            self._settings(task.host),
            overwrite=self.overwrite,
            progress=task.progress,
            cancel=task.cancel,
        )

    def publish(self, task: Task) -> list[str]:
        if task.replaced:
            return [note for note in (task.host.after_overwrite(task.output),) if note]
        task.host.announce(task.output)
        return []

    def fraction(self, progress: Progress) -> float:
        share = super().fraction(progress)
        start, end = {"extract": (0.0, MEASURED), "hash": (MEASURED, READ)}.get(progress.phase, (READ, 1.0))
        return start + (end - start) * share

    def unit(self, phase: str) -> str:
        return "bytes"


@dataclass(frozen=True)
class AnalysisRequest(Errand):
    """What an extraction would find, and what other ranks would, without a file.

    Attributes:
        theme: Colours of the picture, of ``analyse.THEMES``; None draws none.
    """

    extraction: ExtractRequest
    theme: str | None = None

    kind = "analysis"

    @property
    def title(self) -> str:  # type: ignore[override]
        return f"{self.extraction.tuned} − {self.extraction.base}"

    def check(self, host: Host) -> None:
        host.check_open()
        self.extraction.foreseen(host)

    def run(self, task: Task) -> ExtractReport:
        report = self.extraction.extracted(task, None)
        if self.theme is not None and report.advice is not None and report.advice.uniform:
            try:
                from . import plots  # Brings matplotlib.

                task.picture = plots.png(plots.advise_figure(report.advice, self.theme))
            except RecipeError as error:  # The host has no matplotlib.
                task.notes.append(str(error))
        return report

    def publish(self, task: Task) -> list[str]:
        return []

    def unit(self, phase: str) -> str:
        return "bytes"


def _check_room(output: Path, size: int) -> None:
    """Refuses a file that its disk has no room for.

    Raises:
        ConflictError: With both numbers.
    """
    from ..checkpoints.rewriting import check_room

    folder = next(folder for folder in output.parents if folder.exists())
    with as_conflict():
        check_room(folder / output.name, size)
