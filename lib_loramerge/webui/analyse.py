"""Looks at the LoRAs of a recipe, for the tab and REST: reports and pictures, made in the background.

One look is worked on at a time, in a thread that ends when none waits. What
was found is remembered for a while, so that a second press costs nothing.
Always on the CPU: a look must not take the GPU from a picture. Knows no Gradio.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import Cancelled, FileError, LoraMergeError, RecipeError
from ..recipe import to_json
from .background import CANCELLED, DONE, FAILED, Line, Piece
from .host import ConflictError

if TYPE_CHECKING:
    from ..analysis import AdviceReport, CompareReport, InspectReport
    from ..merge import MergePlan, Progress

T = TypeVar("T")
KINDS = ("inspect", "compare", "advise")
THEMES = ("light", "dark")
MAX_COMPARED = 12  # LoRAs; the pairs grow with the square
MAX_WAITING = 8
LIMIT_SECONDS = 600.0
_PATIENCE = 6.0  # Times the expected time that a slow or busy machine may take.
_LOOKS_KEPT = 8
_FINDINGS_KEPT = 32


@dataclass(frozen=True)
class Question:
    """What to look at.

    Attributes:
        kinds: Of :data:`KINDS`.
        theme: Colours of the pictures, of :data:`THEMES`; None draws none.
        limit: Seconds of work after which the look is given up.
    """

    plan: MergePlan
    kinds: tuple[str, ...]
    theme: str | None = None
    limit: float = LIMIT_SECONDS


@dataclass(frozen=True)
class Findings:
    """What a look found; empty where it was not asked.

    Attributes:
        inspect: A report for each different file.
        pictures: Kind to the bytes of a PNG file.
        unreadable: Letters of names for which the pictures have no font.
    """

    inspect: tuple[InspectReport, ...] = ()
    compare: CompareReport | None = None
    advise: AdviceReport | None = None
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    unreadable: str = ""


class Look(Piece):
    """One question on its way; read-only for everyone but :class:`Looks`.

    Attributes:
        stage: A kind, or ``draw``.
        eta: Seconds left in this stage, where that can be estimated.
        error: What went wrong, once ``failed``.
    """

    def __init__(self, question: Question) -> None:
        super().__init__()
        self.question = question
        self.stage = ""
        self.fraction = 0.0
        self.eta: float | None = None
        self.findings: Findings | None = None
        self.error: Exception | None = None
        self.deadline: float | None = None

    @property
    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def stopped(self) -> bool:
        """Whether the work is to end: asked to, or out of time."""
        return self.stopping or self.late


class Looks:
    """The looks of one process. All methods may be called from any thread.

    Args:
        log: Gets a sentence and the error when something unexpected happens.
    """

    def __init__(self, log: Callable[[str, Exception], None]) -> None:
        self._log = log
        self._line: Line[Look] = Line("loramerge-analyse", self._do)
        self._memory = _Memory()

    def ask(self, question: Question) -> Look:
        """Begin a look.

        Raises:
            RecipeError: There is nothing to compare, or too much.
            ConflictError: Too many looks wait.
        """
        check(question)
        look = Look(question)
        if not self._line.add(look, MAX_WAITING, _LOOKS_KEPT):
            raise ConflictError("{most} analyses are waiting already. Try again in a while.", MAX_WAITING)
        return look

    def known(self, plan: MergePlan) -> AdviceReport | None:
        """What a look found out about the ranks of a plan, where that was asked before."""
        found: AdviceReport | None = self._memory.find(identity(plan, "advise"))
        return found

    def get(self, look_id: str) -> Look | None:
        return self._line.get(look_id)

    def cancel(self, look_id: str) -> Look | None:
        """End a look; one that runs stops within moments."""
        return self._line.cancel(look_id)

    def wait(self, look: Look, timeout: float) -> bool:
        """Whether the look has finished within ``timeout`` seconds."""
        return self._line.wait_for(lambda: look.finished, timeout)

    def close(self, timeout: float = 5.0) -> None:
        """Ends everything that runs or waits. More can be asked afterwards."""
        self._line.close(timeout)

    def _do(self, look: Look) -> None:
        if self._line.begin(look):
            look.deadline = time.monotonic() + look.question.limit
            self._line.end(look, self._found(look))

    def _found(self, look: Look) -> str:
        try:
            look.findings = find(look.question, self._memory, look)
            return DONE
        except Cancelled:
            if not look.late:
                return CANCELLED
            look.error = LoraMergeError(
                "The analysis took longer than {limit} seconds and was ended. The command line has no such "
                "limit.",
                f"{look.question.limit:.0f}",
            )
        except LoraMergeError as error:
            look.error = error
        except Exception as error:  # A bug of ours: the page gets a sentence, the console the traceback.
            self._log("An analysis failed unexpectedly", error)
            look.error = error
        return FAILED


def check(question: Question) -> None:
    """Refuse what cannot be looked at.

    Raises:
        RecipeError: See the sentence.
    """
    count = len(question.plan.sources)
    if "compare" in question.kinds and count < 2:
        raise RecipeError("Comparing needs at least two LoRAs.")
    if "compare" in question.kinds and count > MAX_COMPARED:
        raise RecipeError(
            "Comparing takes {most} LoRAs at most here, and these are {count}. The command line takes more.",
            MAX_COMPARED,
            count,
        )


def limit_for(plan: MergePlan) -> float:
    """Seconds to give everything about a plan: more where whole layers have to be looked at."""
    from ..analysis import expected_seconds  # Not at the WebUI's start, see extension.py.

    return LIMIT_SECONDS + _PATIENCE * expected_seconds(plan)


def kinds_for(plan: MergePlan) -> tuple[str, ...]:
    """All analyses of a plan; one LoRA alone has nothing to be compared with."""
    return KINDS if 2 <= len(plan.sources) <= MAX_COMPARED else ("inspect", "advise")


def find(question: Question, memory: _Memory, look: Look) -> Findings:
    """Do the work of a look, in the calling thread.

    Raises:
        LoraMergeError: What a merge would refuse, too; ``Cancelled`` when the look was stopped.
    """
    # Not at the WebUI's start, see extension.py.
    from .. import analysis

    plan = replace(question.plan, recipe=replace(question.plan.recipe, device="cpu"))
    kinds = [kind for kind in KINDS if kind in question.kinds]
    steps = len(kinds) + (question.theme is not None)

    def enter(stage: str, index: int) -> Callable[[Progress], None]:
        look.stage, look.fraction, look.eta = stage, index / steps, None
        if look.stopped():
            raise Cancelled("The analysis was cancelled.")

        def tell(progress: Progress) -> None:
            look.fraction = (index + progress.done / max(1, progress.total)) / steps
            look.eta = progress.eta

        return tell

    def inspect(_: Callable[[Progress], None]) -> tuple[InspectReport, ...]:
        paths = list(dict.fromkeys(entry.path for entry in plan.sources))
        return tuple(
            memory.recall(
                ("inspect", stamps((path, plan.base))),
                partial(analysis.inspect, path, base=plan.base, cancel=look.stopped),
            )
            for path in paths
        )

    def work(kind: str, make: Callable[[Callable[[Progress], None]], T]) -> T | None:
        if kind not in kinds:
            return None
        return memory.recall(identity(plan, kind), partial(make, enter(kind, kinds.index(kind))))

    found = Findings(
        inspect=work("inspect", inspect) or (),
        compare=work("compare", lambda tell: analysis.compare(plan, progress=tell, cancel=look.stopped)),
        advise=work("advise", lambda tell: analysis.advise(plan, progress=tell, cancel=look.stopped)),
    )
    if question.theme is None or not kinds:
        return found
    pictures = {}
    for index, kind in enumerate(kinds):
        enter("draw", len(kinds))
        look.fraction = (len(kinds) + index / len(kinds)) / steps
        # The picture of the comparison shows what the mode makes of it, too, where that is known.
        shows_result = kind == "compare" and found.advise is not None and not plan.method.exact
        about = (kind, "advise") if shows_result else (kind,)
        key = (*(identity(plan, each) for each in about), question.theme)
        pictures[kind] = memory.recall(key, partial(draw, found, kind, question.theme, shows_result))
    from . import fonts  # Brings matplotlib.

    unreadable = fonts.lacking(entry.path.stem for entry in plan.sources)
    return replace(found, pictures=pictures, unreadable=unreadable)


def draw(found: Findings, kind: str, theme: str, shows_result: bool = False) -> bytes:
    """The picture of a report as a PNG file.

    Args:
        shows_result: A comparison shows the result of the advice's mode, too.
    """
    from . import plots  # Brings matplotlib.

    if kind == "inspect":
        return plots.png(plots.inspect_figure(found.inspect, theme))
    if kind == "compare" and found.compare is not None:
        advice = found.advise if shows_result else None
        result = None if advice is None else (advice.mode, advice.norm_by_block)
        return plots.png(plots.compare_figure(found.compare, theme, result))
    assert found.advise is not None
    return plots.png(plots.advise_figure(found.advise, theme))


def identity(plan: MergePlan, kind: str) -> Hashable:
    """Equal for two plans of which this kind of look finds the same."""
    recipe = to_json(plan.recipe)
    recipe.pop("device", None)
    loud = recipe["inputs"], recipe.get("normalize")
    subject = {"inspect": None, "compare": loud, "advise": recipe}[kind]
    files = stamps((*(entry.path for entry in plan.sources), plan.base))
    return (kind, files, json.dumps(subject, sort_keys=True, default=str))


def stamps(paths: Iterable[Path | None]) -> Hashable:
    """Path, size and time of change of each file.

    Raises:
        FileError: One of them is not there any more.
    """
    known = []
    for path in paths:
        if path is None:
            continue
        try:
            state = path.stat()
        except OSError as error:
            raise FileError("{path} cannot be read: {what}.", path.name, error.strerror) from error
        known.append((str(path), state.st_size, state.st_mtime_ns))
    return tuple(known)


class _Memory:
    """The last findings, by what they were found of."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, Any] = OrderedDict()

    def find(self, key: Hashable) -> Any:
        """What is known; None where nothing is."""
        return self._known.get(key)

    def recall(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._known:
            self._known[key] = make()
        self._known.move_to_end(key)
        while len(self._known) > _FINDINGS_KEPT:
            self._known.popitem(last=False)
        found: T = self._known[key]
        return found
