"""Offers on the page that one click takes: a rank, a size, or the strength of the sum, put into the form."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ...recipe.rank_rules import RANK_RULES
from .. import form
from ..form import Changes, Form
from .wiring import FORM_NAMES

if TYPE_CHECKING:
    from .filling import Filling


def connect(wiring: Filling) -> None:
    """Attach the handler of all offers."""

    def take(values: Form) -> Changes:
        offer = json.loads(str(values["argument"] or "{}"))
        wanted: Changes = {}
        for field, rule in (("rank", "number"), ("size", "size")):
            if field in offer:
                wanted |= {"rank_rule": RANK_RULES[rule], field: offer[field]}
        if "normalize" in offer:
            wanted["normalize"] = form.PLAIN["normalize"].shown(offer["normalize"])
        return wiring.chosen(values, wanted)

    wiring.on(
        "use",
        take,
        ("argument", *FORM_NAMES),
        wiring.shown_by_choice,
        js=f"(...v) => [...loramergeArgument('use'), ...v.slice(1, {len(FORM_NAMES) + 1})]",
    )
