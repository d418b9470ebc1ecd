import inspect

from modules import errors

_KINDS = ("before_ui", "ui_tabs", "ui_settings", "app_started", "script_unloaded")
callbacks = {kind: [] for kind in _KINDS}


def _adder(kind):
    def add(callback, *, name=None):
        caller = next(frame.filename for frame in inspect.stack() if frame.filename != __file__)
        callbacks[kind].append((caller, callback))

    return add


on_before_ui = _adder("before_ui")
on_ui_tabs = _adder("ui_tabs")
on_ui_settings = _adder("ui_settings")
on_app_started = _adder("app_started")
on_script_unloaded = _adder("script_unloaded")


def clear_callbacks():
    for kind in _KINDS:
        callbacks[kind].clear()


def call(kind, *args):
    """Calls all; what raises is reported and passed over. Gives the results joined, as on_ui_tabs needs."""
    results = []
    for script, callback in callbacks[kind]:
        try:
            results += callback(*args) or []
        except Exception:
            errors.report(f"Error executing callback {kind} for {script}", exc_info=True)
    return results
