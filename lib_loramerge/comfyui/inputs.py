"""What several nodes take: any number of LoRAs, and the parameters of a mode."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..errors import RecipeError
from ..methods import METHODS
from ..recipe import LoraInput, Param
from ..recipe.model import MAX_RANK, MAX_SIZE
from ..recipe.rank_rules import CONV_RULES, FAIR_RULES, RANK_RULES, RULE_FIELDS

CATEGORY = "loaders/LoRA Merge"
OF_MODE = "as the mode has it"
LORAS = "LORAMERGE_LORAS"


def loras_of(connected: Mapping[str, Any]) -> tuple[LoraInput, ...]:
    """The LoRAs of all inputs ``loras_1``, ``loras_2`` ..., in order.

    Raises:
        RecipeError: None is connected.
    """
    names = [name for name in connected if name.startswith("loras_")]
    ordered = sorted(names, key=lambda name: int(name.rpartition("_")[2]))
    loras = tuple(given for name in ordered for given in connected[name] or ())
    if not loras:
        raise RecipeError("Connect at least one LoRA.")
    return loras


def params_of(mode: str, widgets: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a mode among all widgets."""
    own = [param.name for param in METHODS[mode].params]
    return {name: widgets[name] for name in own if widgets.get(name, OF_MODE) != OF_MODE}


class GrowingInputs(dict):  # type: ignore[type-arg]
    """Optional inputs of one type under any name that starts alike: ``loras_3``, ``loras_4`` and so on."""

    def __init__(self, start: str, kind: tuple[Any, ...], first: dict[str, Any]) -> None:
        super().__init__(first)
        self._start, self._kind = start, kind

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and name.startswith(self._start))

    def __missing__(self, name: str) -> tuple[Any, ...]:
        if name.startswith(self._start):
            return self._kind
        raise KeyError(name)


def parameter_widgets() -> dict[str, tuple[Any, dict[str, Any]]]:
    """One widget for each parameter of the modes; ``shown_for`` tells the page when to show it."""
    shared: dict[str, list[tuple[str, Param]]] = {}
    for mode, method in METHODS.items():
        for param in method.params:
            shared.setdefault(param.name, []).append((mode, param))
    return {name: _widget(uses) for name, uses in shared.items()}


def _widget(uses: Sequence[tuple[str, Param]]) -> tuple[Any, dict[str, Any]]:
    modes, param = [mode for mode, _ in uses], uses[0][1]
    options = {"tooltip": f"{param.help} For: {', '.join(modes)}.", "shown_for": {"mode": modes}}
    if param.choices:
        return [OF_MODE, *param.choices], options
    if isinstance(param.default, bool):
        return "BOOLEAN", {"default": param.default, **options}
    limits = {"min": param.minimum, "max": param.maximum, "step": 0.01}
    return "FLOAT", {"default": param.default, **limits, **options}


def rank_widgets() -> dict[str, tuple[Any, dict[str, Any]]]:
    """The rank rule and what some rules need beside it, shown where it applies."""
    ranked = [mode for mode, method in METHODS.items() if method.uses_rank]
    exact = [mode for mode in ranked if METHODS[mode].exact]

    def options(modes: Sequence[str], rules: Collection[str], tooltip: str, **more: Any) -> dict[str, Any]:
        labels = [label for rule, label in RANK_RULES.items() if rule in rules]
        shown = {"mode": list(modes), "rank_rule": labels}
        return {**more, "tooltip": f"{tooltip} For: {', '.join(labels)}.", "shown_for": shown}

    def beside(field: str) -> list[str]:
        return [rule for rule, own in RULE_FIELDS.items() if own == field]

    return {
        "rank_rule": (
            list(RANK_RULES.values()),
            {
                "tooltip": "Automatic keeps everything, where the mode allows a bounded rank.",
                "shown_for": {"mode": ranked},
            },
        ),
        "rank": (
            "INT",
            options(ranked, beside("rank"), "Of every layer.", default=32, min=1, max=MAX_RANK),
        ),
        "retain": (
            "FLOAT",
            options(ranked, beside("retain"), "1 is all.", default=0.99, min=0.01, max=1.0, step=0.01),
        ),
        "size": (
            "FLOAT",
            options(ranked, beside("size"), "MB at most.", default=100.0, min=0.1, max=MAX_SIZE, step=1.0),
        ),
        "fair": (
            "BOOLEAN",
            options(exact, FAIR_RULES, "Cuts so that the LoRA kept least is kept most.", default=False),
        ),
        "conv_rank": (
            "INT",
            options(
                ranked,
                CONV_RULES,
                "Rank of k x k convolutions; 0 is as the others.",
                default=0,
                min=0,
                max=MAX_RANK,
            ),
        ),
    }
