"""Sweeps as jobs: what is asked for, its check from headers, its run. Knows no Gradio.

What reads files is imported when used, not at the WebUI's start; see extension.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoraMergeError, RecipeError
from ..recipe import SETTINGS, format_input, from_json
from ..recipe.check import plain
from .errand import Errand, Task
from .host import Host

if TYPE_CHECKING:
    from ..merge import Progress
    from ..sweep import Point, Sweep
    from ..sweep.running import TableRow
    from .fields import Fields

# After so many seconds the time that files took tells how long the others take.
_TELLING = 2.0


@dataclass(frozen=True)
class SweepReport:
    """What a sweep wrote.

    Attributes:
        folder: Where its files and their table are.
        rows: One for each file, as the table has them.
        warnings: Of all merges, each once.
    """

    folder: Path
    rows: Sequence[TableRow]
    warnings: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "output": str(self.folder),
            "files": [dict(row) for row in self.rows],
            "size_bytes": sum(row["size_bytes"] or 0 for row in self.rows),
            "warnings": list(self.warnings),
            "seconds": {"total": round(self.seconds, 4)},
        }


@dataclass(frozen=True)
class SweepRequest(Errand):
    """Many merges into one folder.

    Attributes:
        name: Of the folder.
        subfolder: Below the LoRA folder, where it is made.
        resume: Keep files that exist and were made from the same recipe.
    """

    points: Sequence[Point]
    name: str
    subfolder: str = ""
    resume: bool = False
    strict: bool = False

    kind = "sweep"

    def check(self, host: Host) -> Path:
        from ..files import output_path

        place = f"{self.subfolder}/{self.name}" if self.subfolder else self.name
        output = output_path(host.write_dir(), self.name, self.subfolder)
        for point in self.points:
            host.check_name(point.name, place, self.resume)
        folder = output.with_name(output.stem)
        self._planned(host, folder)
        return folder

    def _planned(self, host: Host, folder: Path) -> Sweep:
        from ..sweep import plan_sweep

        return plan_sweep(
            self.points,
            folder,
            find=lambda name: host.find(name, self.strict),
            presets=host.presets(),
            base_of=lambda text: host.base_path(text, self.strict),
            resume=self.resume,
        )

    def run(self, task: Task) -> SweepReport:
        from ..merge import Progress
        from ..sweep import run_sweep

        start, count = time.perf_counter(), len(self.points)

        def show(index: int, found: Progress) -> None:
            within = {"merge": found.done / max(1, found.total), "write": 1.0}.get(found.phase, 0.0)
            share, passed = (index + within) / count, time.perf_counter() - start
            eta = passed / share - passed if share and passed > _TELLING else None
            # In thousandths of a file, so that the bar moves while one is merged.
            done = round(1000 * (index + within))
            task.progress(Progress(found.phase, done, 1000 * count, self.points[index].name, eta))

        rows, warnings = [], dict[str, None]()
        try:
            for row in run_sweep(self._planned(task.host, task.output), progress=show, cancel=task.cancel):
                rows.append(row.to_json())
                warnings |= dict.fromkeys(row.report.to_json()["warnings"] if row.report else ())
        except LoraMergeError:
            with suppress(OSError):
                task.output.rmdir()  # Only where nothing was written.
            raise
        return SweepReport(task.output, rows, tuple(warnings), time.perf_counter() - start)

    def publish(self, task: Task) -> list[str]:
        task.host.refresh()
        return []

    def unit(self, phase: str) -> str:
        return "thousandths"


def sweep_request(fields: Fields) -> SweepRequest:
    """A sweep as a client asks for it: a recipe, whose inputs may be texts with ranges, and axes.

    Raises:
        RecipeError: Nothing varies, too much does, or a value makes no sense.
    """
    from ..sweep import MOST_FILES, expand

    name = fields.name("name")
    given = dict(fields.mapping("recipe"))
    inputs, params = given.pop("inputs", None), given.pop("params", {})
    if not isinstance(inputs, list) or not isinstance(params, dict):
        raise RecipeError("A recipe needs inputs, the list of its LoRAs; params are an object.")
    if any(isinstance(item, dict) and item.get("hash") is not None for item in inputs):
        raise RecipeError(
            "A sweep does not compare sources with a stored hash. Leave hash out of the inputs."
        )
    settings, own, mix = _axes(fields.mapping("axes"))
    # What is the same in all, checked by itself; one LoRA stands for the inputs.
    same = from_json(
        {**{name: value for name, value in given.items() if name not in settings}, "inputs": ["x"]}
    )
    points = expand(
        [
            item if isinstance(item, str) else format_input(from_json({"inputs": [item]}).inputs[0])
            for item in inputs
        ],
        settings,
        {**{key: [value] for key, value in params.items()}, **own},
        mix=mix,
        zipped=fields.flag("zip"),
        prefix=name,
        fields={key: getattr(same, key) for key in SETTINGS if key in given and key not in settings},
        most=MOST_FILES,
    )
    return SweepRequest(
        points=tuple(points),
        name=name,
        subfolder=fields.text("subfolder"),
        resume=fields.flag("resume"),
        strict=True,
    )


def _axes(
    given: Mapping[str, object],
) -> tuple[dict[str, Sequence[str]], dict[str, Sequence[str]], str | None]:
    """Values of settings, values of parameters, and the range of a mix."""
    from ..sweep.axes import values_of

    settings: dict[str, Sequence[str]] = {}
    params: dict[str, Sequence[str]] = {}
    mix = None
    for name, value in given.items():
        texts = (
            [plain(v) if isinstance(v, (int, float)) else v for v in value]
            if isinstance(value, list)
            else value
        )
        if isinstance(texts, str):
            texts = list(values_of(texts))
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise RecipeError(
                "The axis {name} must be a list of numbers or words, or a range as 0.2..1/5.", name
            )
        if name == "mix":
            mix = "/".join(texts)
        elif name in SETTINGS:
            settings[name] = texts
        else:
            params[name] = texts
    return settings, params, mix
