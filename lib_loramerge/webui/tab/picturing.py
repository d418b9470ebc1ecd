"""From the form to the WebUI's X/Y/Z plot, with one of our axes filled in, and from a picture to its file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...errors import RecipeError
from ...methods import METHODS
from .. import compat, filled
from ..form import Changes, Form
from ..merge_jobs import MergeRequest
from ..xyz.axes import PREFIX
from .copying import as_prompt
from .wiring import FORM_NAMES

if TYPE_CHECKING:
    from .layout import Layout
    from .running import Running

# What varies, as the page says it, to the axis of the plot and values to begin with.
AXES: Mapping[str, tuple[str, str]] = {
    "Strength of LoRA 1": ("Strength of LoRA 1", "0.2..1.0/5"),
    "Mix of LoRA 1 and 2": ("Mix of LoRA 1 and 2", "0..1/5"),
    "Mode": ("Mode", ",".join(("svd", "ties", "dare_linear"))),
    "Rank": ("Rank", "auto, 32, 16, 8"),
}


def lay_out(layout: Layout) -> None:
    """The choice of what varies, and the button; hidden where the host has no such plot."""
    with compat.make("Row", elem_id="loramerge_see_line", visible=layout.host.can_plot):
        layout.widget(
            "see_axis",
            "Dropdown",
            label="What varies",
            choices=list(AXES),
            value=next(iter(AXES)),
            scale=1,
            min_width=140,
            interactive=True,
        )
        layout.button("see", scale=1, min_width=140)


def connect(wiring: Running) -> None:
    """Attach the way to the plot, which the page's script fills, and that from a picture to its file."""

    def see(values: Form) -> Changes:
        axis, text = AXES.get(str(values["see_axis"]), next(iter(AXES.values())))
        # The time tells two presses apart; after a refusal the page's script finds what it has seen.
        asked = [as_prompt(values, wiring.host), PREFIX + axis, text, time.time()]
        return {"plot": json.dumps(asked)}

    event = wiring.on("see", see, (*FORM_NAMES, "see_axis"), ("plot",))
    compat.on(
        event.then,
        None,
        [wiring.widgets["plot"]],
        [],
        js="text => { loramergePlot(text); return []; }",
    )

    def keep(values: Form) -> Changes:
        from ..xyz.infotext import recipe_of  # Not at the WebUI's start, see extension.py.

        text = str(values["argument"] or "").strip()
        if not text:
            raise RecipeError("Choose a picture first: its settings are shown below it.")
        recipe = recipe_of(text, wiring.host.settings())
        shown = wiring.show_form(filled.form_of(recipe, wiring.host, METHODS))
        return {**shown, **wiring.merge(MergeRequest(recipe))}

    places = (*wiring.form_places, *wiring.begun_places)
    wiring.on("keep", keep, ("argument",), places, js="() => loramergeArgument('keep')")
