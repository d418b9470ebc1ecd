"""The Analyse button: starts a look, follows it, shows what was found."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ...methods import METHODS
from .. import form
from ..form import Changes, Form
from .wiring import FORM_NAMES

if TYPE_CHECKING:
    from ..analyse import Look
    from .wiring import Wiring

STATE, RESULT = "analyse_state", "analyse_result"


def connect(wiring: Wiring) -> None:
    """Attach the handlers of the button and of the page's questions about a running look."""
    host, jobs = wiring.host, wiring.jobs

    def start(values: Form) -> Changes:
        from .. import analyse  # Not at the WebUI's start, see extension.py.

        theme, _, before = str(values["argument"] or "").partition(" ")
        if before:
            jobs.looks.cancel(before)  # Of another form: nobody waits for it any more.
        recipe = form.read_form(values, host, METHODS).check()
        plan = host.plan(recipe)
        theme = theme if theme in analyse.THEMES else analyse.THEMES[0]
        question = analyse.Question(plan, analyse.kinds_for(plan), theme, analyse.limit_for(plan))
        look = jobs.looks.ask(question)
        return shown(look)

    def follow(values: Form) -> Changes:
        look = jobs.looks.get(str(values["argument"] or ""))
        return {STATE: ""} if look is None else shown(look)

    def stop(values: Form) -> Changes:
        look = jobs.looks.cancel(str(values["argument"] or ""))
        if look is None:
            return {STATE: ""}
        jobs.looks.wait(look, 1.0)
        return shown(look)

    names = ("argument", *FORM_NAMES)
    wiring.on(
        "analyse",
        start,
        names,
        (STATE, RESULT),
        message=STATE,
        js=f"(...v) => [loramergeLook(), ...v.slice(1, {len(names)})]",
    )
    for name, handler in (("look", follow), ("unlook", stop)):
        js = f"() => loramergeArgument('{name}')"
        wiring.on(name, handler, ("argument",), (STATE, RESULT), message=STATE, js=js)


def shown(look: Look) -> Changes:
    """What the page shows of a look; findings stay until the next ones are there."""
    from .. import render_analysis  # Not at the WebUI's start, see extension.py.

    changes: Changes = {STATE: render_analysis.look_state(look, f"{time.time()}")}
    if look.findings is not None:
        changes[RESULT] = render_analysis.look_page(look)
    return changes
