"""The section "LoRA Merge" of the host's settings: one row per setting, read by host, tab and tests."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import NamedTuple

Value = str | float | bool
Choices = tuple[str | tuple[str, str], ...]

PREFIX = "loramerge_"
SECTION = ("loramerge", "LoRA Merge")


class Settings(NamedTuple):
    """What the tab starts with.

    Attributes:
        mode: Merge method of a fresh form.
        dtype: Precision of a fresh form.
        device: Device of a fresh form.
        rank: ``auto``, ``same``, ``full`` or a number, as text.
        queue_lock: Whether a merge waits for pictures in the making, and they for it.
        keep_trials_hours: How long an unsaved merge is kept; 0 means until the host ends.
    """

    mode: str = "svd"
    dtype: str = "same"
    device: str = "cpu"
    rank: str = "auto"
    queue_lock: bool = False
    keep_trials_hours: float = 0.0


class SettingRow(NamedTuple):
    """One line of the settings page.

    Attributes:
        choices: Values, or pairs: what people read, and the value that is stored.
        free: Other values may be typed, too.
    """

    field: str
    label: str
    info: str = ""
    choices: Choices = ()
    free: bool = False

    @property
    def key(self) -> str:
        return PREFIX + self.field

    @property
    def default(self) -> Value:
        default: Value = getattr(Settings(), self.field)
        return default


_RANKS: Choices = (
    ("Automatic", "auto"),
    ("Same as the inputs", "same"),
    ("Keep everything", "full"),
    *((rank, rank) for rank in ("8", "16", "32", "64", "128")),
)


def rows(modes: Choices, dtypes: Choices, devices: Choices) -> tuple[SettingRow, ...]:
    """The settings page, top to bottom."""
    return (
        SettingRow("mode", "Default merge method", choices=modes),
        SettingRow("dtype", "Default precision of merged files", choices=dtypes),
        SettingRow("device", "Default device", "a merge takes seconds on the CPU", choices=devices),
        SettingRow("rank", "Default rank", "or another number", choices=_RANKS, free=True),
        SettingRow(
            "queue_lock",
            "Merge only while no picture is being made",
            "a merge then waits in the WebUI's queue; needed only when both are short of memory",
        ),
        SettingRow(
            "keep_trials_hours",
            "Keep merges made with Try without saving for this many hours",
            "0: until the WebUI ends",
        ),
    )


def read(options: object) -> Settings:
    """The settings of the host; a value that makes no sense falls back to the default."""
    return Settings._make(_read(options, name, default) for name, default in Settings()._asdict().items())


def _read(options: object, name: str, default: Value) -> Value:
    try:
        stored: object = getattr(options, PREFIX + name, None)
    except Exception:  # The host's options object raises what it likes.
        return default
    if isinstance(default, str):
        return stored.strip() or default if isinstance(stored, str) else default
    if isinstance(stored, bool) or isinstance(default, bool):
        return stored if isinstance(stored, bool) and isinstance(default, bool) else default
    return float(stored) if isinstance(stored, (int, float)) and 0 <= stored < 1e9 else default


def add_to_host(shared: ModuleType, page: tuple[SettingRow, ...]) -> None:
    """Adds our section to the host's settings page.

    Args:
        shared: The host's ``modules.shared``.
    """
    import gradio as gr

    for row in page:
        component: type[object] | None = (
            None  # The host chooses by the type of the default: checkbox, number or text box.
        )
        arguments: Mapping[str, object] | None = None
        if row.choices:
            component, arguments = gr.Dropdown, {"choices": list(row.choices)}
            if row.free:
                arguments = {**arguments, "allow_custom_value": True}
        elif isinstance(row.default, float):
            component, arguments = gr.Number, {}
        option = shared.OptionInfo(row.default, row.label, component, arguments, section=SECTION)
        if row.info and hasattr(option, "info"):
            option.info(row.info)
        shared.opts.add_option(row.key, option)
