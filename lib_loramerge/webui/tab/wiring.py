"""How a handler is attached to its component. Values travel by name; no Gradio component is returned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from ...errors import LoraMergeError
from ...methods import METHODS
from .. import compat, form, render
from ..compat import Event, Trigger, Update, Widget, update
from ..form import Changes, Form
from . import baking, extracting
from .controls import CONTROLS, ROW_CONTROLS, param_control

if TYPE_CHECKING:
    from ..host import Host
    from ..jobs import JobQueue

Handler = Callable[[Form], Changes]

ROW_NAMES = tuple(f"row{index}.{control.name}" for index in range(form.MAX_ROWS) for control in ROW_CONTROLS)
FORM_NAMES = (
    *ROW_NAMES,
    *(control.name for control in CONTROLS),
    *baking.NAMES,
    *(param_control(method.name, param).name for method in METHODS.values() for param in method.params),
)
ROW_PLACES = tuple(f"row{index}" for index in range(form.MAX_ROWS))


class Wiring:
    """The tab's components by name, and how to attach handlers to them."""

    def __init__(self, widgets: Mapping[str, Widget], host: Host, jobs: JobQueue) -> None:
        self.widgets = widgets
        self.host = host
        self.jobs = jobs
        self.shown_by_choice = shown_by_choice()
        # Where running jobs and their ends are shown, on each page that begins some.
        self.job_places = tuple(
            name
            for name in ("jobs", "result", extracting.JOBS, extracting.RESULT, extracting.ANALYSIS)
            if name in widgets
        )
        # No answer to a question that was asked before may hide from the page that a merge of its own began.
        self.begun_places = (*self.job_places, "started", "overwrite", "refused")
        self.form_places = (*FORM_NAMES, *ROW_PLACES, "fitted", *self.shown_by_choice)

    def on(
        self,
        trigger: Trigger | str,
        handler: Handler,
        inputs: Iterable[str] = (),
        outputs: Iterable[str] = (),
        *,
        message: str = "message",
        js: str | None = None,
    ) -> Event:
        """Connect a handler that takes and gives values by name; an event, or a button by its name.

        A :class:`LoraMergeError` is shown in the place ``message``; all else stays as it is.
        """
        names, places = list(inputs), list(dict.fromkeys([*outputs, message]))

        def run(*values: object) -> list[object]:
            changes: Changes
            try:
                changes = {message: "", **handler(dict(zip(names, values)))}
            except LoraMergeError as error:
                changes = {message: render.error_box(self.host.shown(str(error)))}
            return [changes.get(place, update()) for place in places]

        return compat.on(
            self.widgets[f"button.{trigger}"].click if isinstance(trigger, str) else trigger,
            run,
            [self.widgets[name] for name in names],
            [self.widgets[name] for name in places],
            js=js,
        )

    def browser(self, trigger: Trigger, inputs: Iterable[str], outputs: Iterable[str], js: str) -> None:
        """Connect a piece of JavaScript that needs nothing of the server."""
        compat.on(
            trigger,
            None,
            [self.widgets[name] for name in inputs],
            [self.widgets[name] for name in outputs],
            js=js,
        )


# JavaScript of the page, called with the values of the inputs.
def argument(name: str) -> str:
    return f"() => loramergeArgument('{name}')"


def shown_by_choice() -> tuple[str, ...]:
    """What is seen or not, depending on mode, rank rule and kind of result."""
    return (
        "rank_rule",
        "rank",
        "retain",
        "size",
        "fair",
        "normalize",
        "mode_text",
        *baking.SEEN,
        *(f"params.{name}" for name, method in METHODS.items() if method.params),
    )


def listed(choices: list[str], value: object) -> Update:
    """New choices for a list that keeps its value; some versions of Gradio drop a value that is no choice."""
    text = str(value or "")
    return update(choices=choices if text in choices or not text else [text, *choices])


def with_values(changes: Changes, wanted: Form) -> Changes:
    """Visibility and value of a control in one change."""
    return {
        name: joined(change, {"value": wanted[name]})
        if name in wanted and isinstance(change, dict)
        else change
        for name, change in changes.items()
    }


def joined(*changes: object) -> Update:
    """Several changes of a control as one; a plain value is none."""
    return {name: new for change in changes if isinstance(change, dict) for name, new in change.items()}
