"""Merges as jobs: what is asked for, its check from headers, its run, and what the host learns of it.

Knows no Gradio. What merges is imported when used, not at the WebUI's start; see extension.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LoraMergeError, OutputError, Sentence
from ..recipe import LoraInput, MergeRecipe
from ..recipe.rank_rules import with_rank
from . import sidecar
from .errand import Errand, Task, as_conflict
from .host import ConflictError, Host
from .origins import changed_sources, stamp_of
from .sidecar import UserMetadata
from .trial import Made

if TYPE_CHECKING:
    from ..merge import MergePlan, Progress
    from ..report import MergeReport

# Writing is the last phase, and short: the bar is nearly full when it begins.
WRITING_STARTS = 0.95
# A size rule looks at every layer before it merges them.
LOOKING_ENDS = 0.5


@dataclass(frozen=True)
class MergeRequest(Errand):
    """What is to be merged, and what is to become of it.

    Attributes:
        name: Of the file, without folder; not needed for a trial.
        user_metadata: Written as the WebUI's ``<name>.json``.
        preview: Name of the LoRA whose preview picture is copied to ``<name>.png``.
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
    in_prompts = True

    def check(self, host: Host) -> Path | None:
        if self.trial and not host.can_try:
            raise LoraMergeError("Trying a merge without saving it needs a WebUI.")
        # The name first: it is what a person sees and can fix at once.
        output = None if self.trial else self.place(host)
        host.plan(self.recipe, self._strict(host))
        preview = self._preview(host)
        if output is not None and not self.overwrite:
            check_beside(output, self.user_metadata, preview)
        return output

    def place(self, host: Host) -> Path:
        output = host.check_name(self.name, self.subfolder, self.overwrite)
        check_no_input(output, {host.find(entry.name, self._strict(host)) for entry in self.recipe.inputs})
        return output

    def _strict(self, host: Host) -> bool:
        return self.strict or host.restricted()

    def _preview(self, host: Host) -> Path | None:
        if not self.preview or self.trial:
            return None
        preview = sidecar.preview_of(host.find(self.preview, self._strict(host)))
        if preview is None:
            raise OutputError("{lora} has no preview picture to copy.", self.preview)
        return preview

    def run(self, task: Task) -> MergeReport:
        """Computes the file, or takes it over from a trial."""
        host, strict = task.host, self._strict(task.host)
        # Planned again: the job may have waited, and the files may have changed.
        plan = host.plan(self.recipe, strict, not self.changed_sources, task.stop)
        base = host.base_path(self.recipe.base, strict)
        paths = [*(source.path for source in plan.sources), *([base] if base else [])]
        task.made = Made(plan.recipe, tuple((path, stamp_of(path)) for path in paths))
        report = task.merged = self._saved_trial(task, task.made) or self._computed(task, plan)
        task.exact_bytes = self._exact_bytes(host, plan, report)
        task.notes += self._changed_sources(host, task.made, report)
        return report

    def _saved_trial(self, task: Task, made: Made) -> MergeReport | None:
        """The report of a trial that was merged from the same and is now saved as it is; None without one."""
        from ..merge import Progress  # Not at the WebUI's start, see extension.py.

        trial = None if self.trial else task.trials.find(made)
        if trial is None or not trial.fits(task.output.stem):
            return None
        task.progress(Progress("write", 0, trial.report.layers))
        return trial.save_as(task.output, self.overwrite, task.stop)

    def _computed(self, task: Task, plan: MergePlan) -> MergeReport:
        # Not at the WebUI's start, see extension.py.
        from ..merge import run_merge
        from . import forecast

        report = run_merge(
            plan, task.output, overwrite=self.overwrite, progress=task.progress, cancel=task.cancel
        )
        forecast.learn(plan, report.seconds.get("merge", 0.0))
        return report

    def _exact_bytes(self, host: Host, plan: MergePlan, report: MergeReport) -> int | None:
        """What a file that keeps everything may take; None where the written one does, but for rounding."""
        from ..report import lossy  # Not at the WebUI's start, see extension.py.

        exact = keeping_everything(self.recipe)
        lost = lossy(report.error, report.dtype) or report.cuts_off()
        if exact == self.recipe or not plan.method.uses_rank or not lost:
            return None
        try:
            return host.plan(exact, self._strict(host)).predicted_bytes
        except Exception:  # The files have gone meanwhile; the one that is written must not be lost by it.
            return None

    def _changed_sources(self, host: Host, made: Made, report: MergeReport) -> list[str]:
        """Which sources are not those of the recipe; nothing here may lose the file, which is written."""
        hashed = []
        try:
            for given, (path, stamp), found in zip(self.recipe.inputs, made.files, report.inputs):
                digest = found.sshs_model_hash or ""
                host.source_hashes.remember(path, stamp, digest)
                hashed.append((given, path, digest))
            return changed_sources(hashed)
        except Exception as error:
            host.log("the sources could not be compared with the recipe", error)
            return []

    def publish(self, task: Task) -> list[str]:
        """Makes the host know a finished file; nothing here may lose it."""
        host, output = task.host, task.output
        if self.trial:
            assert task.made is not None
            assert task.merged is not None
            task.trials.add(output, self.recipe, task.made, task.merged)
            return []
        notes = []
        try:
            sidecar.write(output, self.user_metadata, self._preview(host), self.overwrite)
        except LoraMergeError as error:
            notes.append(str(error))
        except Exception as error:  # The file exists, whatever went wrong beside it.
            host.log("what belongs beside the merged file could not be written", error)
            notes.append(
                Sentence("{name}.json or .png could not be written; the console tells why.", output.stem)
            )
        try:
            if task.replaced:
                notes.append(host.after_overwrite(output))
            else:
                host.announce(output)
        except Exception as error:  # The host's code, which may raise anything.
            host.log("the host's LoRA list could not be refreshed", error)
            notes.append("The WebUI's LoRA list could not be refreshed; use its own Refresh button.")
        for name in self._remove_trials(task):
            notes.append(
                Sentence(
                    "{name}, made by Try without saving, was removed; use {kept} in its place.",
                    name,
                    output.stem,
                )
            )
        return [note for note in notes if note]

    def _remove_trials(self, task: Task) -> list[str]:
        try:
            return [*task.trials.remove_of(self.recipe)]
        except Exception as error:  # The host's code, too.
            task.host.log("a tried merge could not be removed", error)
            return []

    def fraction(self, progress: Progress) -> float:
        merging_starts = LOOKING_ENDS if self.recipe.size is not None else 0.0
        start, end = {"look": (0.0, LOOKING_ENDS), "write": (WRITING_STARTS, 1.0)}.get(
            progress.phase, (merging_starts, WRITING_STARTS)
        )
        return start + (end - start) * min(1.0, super().fraction(progress))

    def exactly(self, host: Host) -> MergeRequest:
        """The same merge, keeping everything, under a free name."""
        name = "" if self.trial else host.propose_name([LoraInput(self.name)])
        return replace(self, recipe=keeping_everything(self.recipe), name=name, overwrite=False)


def keeping_everything(recipe: MergeRecipe) -> MergeRecipe:
    """The same merge without a limit of rank or size."""
    return with_rank(recipe, "full")


def check_no_input(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse to write over a LoRA that is being read.

    Raises:
        ConflictError: It is one of the inputs.
    """
    from ..files.place import refuse_inputs  # Not at the WebUI's start, see extension.py.

    with as_conflict():
        refuse_inputs(output, inputs)


def check_beside(output: Path, data: UserMetadata | None, preview: Path | None) -> None:
    """Refuse to write over what the WebUI keeps beside a LoRA of that name.

    Raises:
        ConflictError: There is such a file.
    """
    taken = sidecar.taken(output, data, preview)
    if taken:
        raise ConflictError(
            "{file} exists already. Choose another name, or allow overwriting.", taken[0].name
        )
