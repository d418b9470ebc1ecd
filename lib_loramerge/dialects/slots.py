"""The end of a key: which tensor of a layer it is.

The adapter kinds say how their slots are spelled; a new spelling is one entry there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from ..adapters import endings

_ENDINGS = endings()

# What we write for a slot; these spellings are also read.
WRITTEN: dict[str, str] = {slot: spelled[0] for slot, spelled in _ENDINGS.items()}

# Everything that is read: ending of the key, after a dot, to our slot.
SLOTS: dict[str, str] = {
    **{ending: slot for slot, spelled in _ENDINGS.items() for ending in spelled},
    "diff_m": "diff_m",
}

# Slots that every host leaves out with a line in its log: trainers wrote them for modulations.
DROPPED = frozenset({"diff_m"})

# PEFT puts the name of the adapter into the key when it is asked for the raw state.
_NAMED: dict[str, str] = {
    "lora_B": "up", "lora_A": "down", "lora_magnitude_vector": "magnitude",
    **{slot: slot for slot in WRITTEN if slot.startswith(("hada_", "lokr_"))},
}  # fmt: skip
_NAMED_BIAS = {"lora_B": "up_bias", "lora_A": "down_bias"}

# Endings that mean something only after a layer's name of this form.
_PROCESSOR_SLOTS = {"up.weight": "up", "down.weight": "down"}
_PROCESSOR = re.compile(r".+_lora\d?")

# Absolute values of the query and key norms, as in the control adapters of Flux.
_NORM_SCALE = re.compile(r".+\.(?:query|key)_norm")

_LOWER = {ending.lower(): slot for ending, slot in SLOTS.items()}


class SplitKey(NamedTuple):
    """A key taken apart: the layer as the file names it, our slot, and the ending as spelled."""

    layer: str
    slot: str
    ending: str


def split_key(key: str) -> SplitKey | None:
    """Split a key into layer and slot; the longest known ending counts. None if there is none."""
    layer, _, ending = key.partition(".")
    slot = SLOTS.get(ending)
    if slot is not None:
        return SplitKey(layer, slot, ending)
    if ":" in key:
        layer, _, ending = key.rpartition(":")
        return SplitKey(layer, ending, ending) if ending in ("up", "down") else None
    return _split_named(key) or _split_dotted(key, SLOTS) or _split_dotted(key.lower(), _LOWER, key)


def _split_dotted(key: str, slots: Mapping[str, str], original: str | None = None) -> SplitKey | None:
    parts = key.rsplit(".", 3)
    original = original or key
    for count in (3, 2, 1):
        if len(parts) <= count:
            continue
        ending = ".".join(parts[-count:])
        layer = original[: -len(ending) - 1]
        slot = slots.get(ending)
        if slot is None and ending in _PROCESSOR_SLOTS and _PROCESSOR.fullmatch(layer):
            slot = _PROCESSOR_SLOTS[ending]
        if slot == "scale" and _NORM_SCALE.fullmatch(layer):
            slot = "set_weight"
        if slot is not None:
            return SplitKey(layer, slot, ending)
    return None


def _split_named(key: str) -> SplitKey | None:
    """`X.lora_A.NAME.weight`, `X.lora_magnitude_vector.NAME`, `X.hada_w1_a.NAME`."""
    parts = key.rsplit(".", 3)
    if len(parts) == 4 and parts[3] in ("weight", "bias"):
        slot = (_NAMED if parts[3] == "weight" else _NAMED_BIAS).get(parts[1])
        if slot is not None:
            return SplitKey(parts[0], slot, ".".join(parts[1:]))
    if len(parts) >= 3 and f"{parts[-2]}.{parts[-1]}" not in SLOTS:
        slot = _NAMED.get(parts[-2])
        if slot is not None:
            return SplitKey(".".join(parts[:-2]), slot, ".".join(parts[-2:]))
    return None


# Slots whose endings tensors of whole models have, too.
ANYBODYS = frozenset({"ia3_weight", "bias", "scale"})


def is_adapters(key: str) -> bool:
    """Whether a key ends as only those of adapters do."""
    split = split_key(key)
    return split is not None and split.slot not in ANYBODYS


# --- Writing ------------------------------------------------------------------------------

# The ending of `up` that a file uses, to those of `up`, `down` and `up_bias`.
_PAIRS: dict[str, tuple[str, str, str]] = {
    "lora_up.weight": ("lora_up.weight", "lora_down.weight", "diff_b"),
    "lora_B.weight": ("lora_B.weight", "lora_A.weight", "lora_B.bias"),
    "lora_B": ("lora_B", "lora_A", "lora_B.bias"),
    "lora.up.weight": ("lora.up.weight", "lora.down.weight", "lora.up.bias"),
    "lora_linear_layer.up.weight": (
        "lora_linear_layer.up.weight", "lora_linear_layer.down.weight", "lora_linear_layer.up.bias",
    ),
}  # fmt: skip

KOHYA_STYLE = "lora_up.weight+alpha"
PEFT_STYLE = "lora_B.weight"


def style_of(ending: str, has_alpha: bool) -> str:
    """Name of the way a file spells its slots, from the ending of its ``up`` tensors."""
    if ending == WRITTEN["up"]:
        return KOHYA_STYLE
    return f"{ending}+alpha" if has_alpha else ending


def writes_alpha(style: str) -> bool:
    """Whether files of this style carry ``alpha``; if not, the scale must already be in the factors."""
    return style.endswith("+alpha")


def ending_for(slot: str, style: str) -> str:
    """How a style spells a slot."""
    up = style.removesuffix("+alpha")
    pair = _PAIRS.get(up)
    if pair is None and up.startswith("lora_B."):
        pair = (up, up.replace("lora_B", "lora_A", 1), f"{up.removesuffix('.weight')}.bias")
    if pair is None:
        pair = _PAIRS["lora_up.weight"]
    return {"up": pair[0], "down": pair[1], "up_bias": pair[2]}.get(slot) or WRITTEN[slot]
