"""Putting the axes into the host's X/Y/Z plot, and the script that acts before each picture."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ...errors import LoraMergeError
from ...methods import METHODS
from ..host.webui import host_module
from .axes import AXES, MOST_STRENGTHS, Axis, names_in, typed_values
from .cell import ALL
from .plot import Plot, prompt_of

if TYPE_CHECKING:
    from .theirs import AxisOption, AxisOptions, Picture

TITLE = "LoRA Merge"
# The hosts execute the plot's script under the name of its file, outside sys.modules.
SCRIPTS = ("xyz_grid.py", "xy_grid.py")


def _scripts() -> ModuleType:
    """The host's module with the scripts of its pages; SD.Next has moved it."""
    known = (host_module(name) for name in ("scripts_manager", "scripts"))
    return next(module for module in known if module is not None and hasattr(module, "Script"))


def script_class(services: Callable[[], Plot]) -> type:
    """The always-on script, without controls, that the host finds in ``scripts/``."""
    scripts: Any = _scripts()  # Its class is known when the host runs.

    class LoraMergeAxes(scripts.Script):  # type: ignore[misc]
        def title(self) -> str:
            return TITLE

        def show(self, is_img2img: bool) -> object:
            return scripts.AlwaysVisible

        def ui(self, is_img2img: bool) -> list[object]:
            return []

        def before_process(self, p: Picture, *args: object, **kwargs: object) -> None:
            services().before_process(p)

    return LoraMergeAxes


def grid_modules() -> list[ModuleType]:
    """Every module of the host with the axes of a plot; SD.Next has them in one of their own."""
    scripts = _scripts()
    found = [
        data.module
        for data in getattr(scripts, "scripts_data", ())
        if data.script_class.__module__ in SCRIPTS
    ]
    found += [module for name, module in list(sys.modules.items()) if name.endswith("xyz_grid_classes")]
    return [m for m in found if hasattr(m, "axis_options") and hasattr(m, "AxisOption")]


def add_axes(plot: Plot) -> None:
    """Adds our axes to every plot of the host, once."""
    for module in grid_modules():
        known = {option.label for option in module.axis_options}
        module.axis_options.extend(
            _option(module.AxisOption, plot, axis) for axis in AXES if axis.label not in known
        )


def _option(kind: AxisOptions, plot: Plot, axis: Axis) -> AxisOption:
    def apply(p: Picture, x: object, xs: object) -> None:
        plot.apply(axis, p, x)

    def confirm(p: Picture, xs: Sequence[object]) -> None:
        plot.confirm(axis, p, xs)

    def format_value(p: Picture, opt: object, x: object) -> str:
        return axis.shown(names_in(prompt_of(p)), x)

    def prepare(text: str) -> list[str]:
        try:
            return typed_values(axis, text)
        except LoraMergeError as error:
            raise RuntimeError(str(error)) from None

    option = kind(axis.label, axis.kind, apply)
    option.format_value, option.confirm = format_value, confirm
    option.cost, option.prepare = axis.cost, prepare
    option.choices = partial(_choices, plot, axis) if axis.choices else None
    return option


def _choices(plot: Plot, axis: Axis) -> list[str]:
    if axis.choices == "modes":
        return list(METHODS)
    if axis.choices == "presets":
        return list(plot.host.presets().weights)
    return [ALL, *(str(number) for number in range(1, MOST_STRENGTHS + 1))]
