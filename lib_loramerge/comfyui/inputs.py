"""What several nodes take: any number of LoRAs, and the parameters of a mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..methods import METHODS
from ..recipe import LoraInput, Param

CATEGORY = "loaders/LoRA Merge"
OF_MODE = "as the mode has it"
LORAS = "LORAMERGE_LORAS"


def loras_of(connected: Mapping[str, Any]) -> tuple[LoraInput, ...]:
    """The LoRAs of all inputs ``loras_1``, ``loras_2`` ..., in order."""
    names = [name for name in connected if name.startswith("loras_")]
    ordered = sorted(names, key=lambda name: int(name.rpartition("_")[2]))
    return tuple(given for name in ordered for given in connected[name] or ())


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
    """One widget for each parameter of the modes; ``modes`` tells the page when to show it."""
    shared: dict[str, list[tuple[str, Param]]] = {}
    for mode, method in METHODS.items():
        for param in method.params:
            shared.setdefault(param.name, []).append((mode, param))
    return {name: _widget(uses) for name, uses in shared.items()}


def _widget(uses: Sequence[tuple[str, Param]]) -> tuple[Any, dict[str, Any]]:
    modes, param = [mode for mode, _ in uses], uses[0][1]
    options = {"tooltip": f"{param.help} For: {', '.join(modes)}.", "modes": modes}
    if param.choices:
        return [OF_MODE, *param.choices], options
    if isinstance(param.default, bool):
        return "BOOLEAN", {"default": param.default, **options}
    limits = {"min": param.minimum, "max": param.maximum, "step": 0.01}
    return "FLOAT", {"default": param.default, **limits, **options}
