"""The table of adapter kinds for people, made from the registry."""

from __future__ import annotations

from .groups import REFUSED
from .kinds import ADAPTERS

# What comes along with a kind instead of being one.
_COMPANIONS = (
    ("alpha", "`alpha`", "alpha / rank scales the delta; none means 1, 0 means nothing, as in every WebUI."),
    ("LoRA bias", "`lora_B.bias`", "Scaled like the delta and added to the bias."),
    ("Bias", "`diff_b`", "Added to the bias of any kind."),
    (
        "Residual",
        "`bias`, or `bias_indices` `bias_values` `bias_size`",
        "Added to the delta before the scale, as A1111 does; the layer becomes dense.",
    ),
    ("scale", "`scale`", "Replaces alpha / rank, as A1111 and SD.Next do; Forge ignores it."),
    ("scalar", "`scalar`", "Ignored, as every WebUI does."),
)


def kinds_table() -> str:
    """Markdown table of every adapter kind, of what comes along, and of what is refused."""
    rows = [("Kind", "In the file", "Exactly low rank", "Needs `--base`", "What happens"), ("---",) * 5]
    for kind in ADAPTERS.values():
        rows.append((kind.label, kind.keys, _yes(kind.exact_low_rank), _yes(kind.needs_base), kind.does))
    rows += [(label, keys, "", "no", does) for label, keys, does in _COMPANIONS]
    for reason in dict.fromkeys(REFUSED.values()):
        slots = " ".join(f"`{slot}`" for slot in REFUSED if REFUSED[slot] == reason)
        rows.append(("Refused", slots, "", "", f"It {reason}."))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
