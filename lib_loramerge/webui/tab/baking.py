"""What the Merge page has for a checkpoint as the result: controls, and what is seen with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import baking, compat
from ..compat import update
from .controls import BUTTONS, Control, choice, open_list

if TYPE_CHECKING:
    from ..facts import Facts
    from ..form import Changes, Form
    from ..host import Host
    from .filling import Filling
    from .layout import Layout

CONTROLS = (
    Control(
        "result_kind",
        "Radio",
        {
            "label": "Make",
            "choices": list(baking.RESULTS),
            "value": baking.LORA_FILE,
            "scale": 1,
            "min_width": 300,
        },
        "A LoRA to use in prompts, or a checkpoint that has the LoRAs in it for good.",
    ),
    Control(
        "bake_base",
        "Dropdown",
        open_list("Checkpoint", scale=4, min_width=220),
        "The LoRAs are added to this one. Its file stays as it is; a new one is written.",
        ("bake.base",),
    ),
    Control(
        "bake_dtype",
        "Dropdown",
        choice("Precision of the checkpoint", baking.DTYPES, "same", scale=2, min_width=190),
        "How the matrices of denoiser and text encoders are stored. All else stays as it is.",
        ("bake.dtype",),
    ),
    Control(
        "bake_rounding",
        "Dropdown",
        choice("Rounding", baking.ROUNDINGS, "auto", visible=False, scale=2, min_width=190),
        (
            "To the nearest float8 number, small changes vanish. By chance, all of them stay on average. "
            "Automatic does the latter for float8 alone."
        ),
        ("bake.rounding",),
    ),
    Control(
        "bake_drop_ema",
        "Checkbox",
        {
            "label": "Leave out EMA weights",
            "value": False,
            "visible": False,
            "scale": 1,
            "min_width": 180,
        },
        "A copy of the weights that only training needs; no WebUI uses it.",
        ("bake.drop_ema",),
    ),
)
NAMES = tuple(control.name for control in CONTROLS)
LINE = ("bake_base", "bake_dtype", "bake_rounding", "bake_drop_ema")
# Controls of a LoRA file, which a checkpoint has no use for.
OF_A_LORA = ("dtype", "host", "dialect", "conv_rank", "subfolder", "result_more", "button.try")
SEEN = ("bake_line", *OF_A_LORA, "button.merge", "bake_rounding", "bake_drop_ema")


def lay_out_choice(layout: Layout) -> None:
    """The choice between a LoRA and a checkpoint, where there may be one."""
    layout.control("result_kind", visible=layout.host.can_bake())


def lay_out(layout: Layout) -> None:
    """The line of a checkpoint's settings, hidden until it is chosen."""
    with compat.make("Row", visible=False, elem_id="loramerge_bake_line") as row:
        for name in LINE:
            layout.control(name)
    layout.widgets["bake_line"] = row


def by_choice(values: Form, host: Host) -> Changes:
    """What is seen for this result."""
    bake = baking.is_bake(values)
    seen = dict.fromkeys(OF_A_LORA, not bake)
    seen["button.try"] &= host.can_try
    seen["subfolder"] &= not host.hide_dirs()
    changes: Changes = {name: update(visible=visible) for name, visible in seen.items()}
    changes["bake_line"] = update(visible=bake)
    changes["button.merge"] = update(value=baking.BUTTON if bake else BUTTONS["merge"][0])
    if bake:
        changes |= dict.fromkeys(("rank_rule", "rank", "retain", "size", "fair"), update(visible=False))
    return changes


def by_facts(found: Facts, values: Form) -> Changes:
    """What is seen for this checkpoint."""
    if not baking.is_bake(values):
        return {}
    chosen = values["bake_rounding"] != baking.ROUNDINGS["auto"]
    return {
        "bake_rounding": update(visible=found.float8 or chosen),
        "bake_drop_ema": update(visible=found.ema or bool(values["bake_drop_ema"])),
    }


def connect(wiring: Filling) -> None:
    """Attach the handlers of the choice."""

    def choose(values: Form) -> Changes:
        # The tick was for a file of the other kind.
        changes = {**wiring.by_choice(values), "overwrite": False}
        if baking.is_bake(values) and not values["bake_base"]:
            known = wiring.host.checkpoints()
            changes["bake_base"] = update(choices=["", *known], value=wiring.host.current_checkpoint())
        return changes

    wiring.on(
        wiring.widgets["result_kind"].input,
        choose,
        ("mode", "rank_rule", "result_kind", "bake_base"),
        (*wiring.shown_by_choice, "overwrite", "bake_base"),
        message="how_message",
    )
