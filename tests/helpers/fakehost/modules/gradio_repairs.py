"""What the hosts change in Gradio at runtime, as far as an extension can notice it."""

import functools
import inspect
import warnings

import gradio as gr


def repair_gradio_3():
    """A1111: ``tooltip=`` is accepted by every component."""
    original = gr.components.IOComponent.__init__

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        self.webui_tooltip = kwargs.pop("tooltip", None)
        original(self, *args, **kwargs)

    gr.components.IOComponent.__init__ = init


def repair_gradio_4():
    """Forge: unknown arguments are dropped, ``_js`` becomes ``js``, and some names of Gradio 3 come back."""
    for name in {*gr.components.__all__, *gr.layouts.__all__}:
        kind = getattr(gr, name, None)
        if getattr(kind, "EVENTS", None):
            _repair(kind)
    gr.Box = gr.Group

    class Dependency(gr.events.Dependency):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.then = _with_js(self.then)

    gr.events.Dependency = Dependency


def _repair(kind):
    original = kind.__init__
    known = inspect.signature(original).parameters

    @functools.wraps(original)
    def init(self, *args, tooltip=None, source=None, **kwargs):
        if source:
            kwargs["sources"] = [source]
        for key in [key for key in kwargs if key not in known]:
            warnings.warn(f"unexpected argument for {kind.__name__}: {key}", stacklevel=2)
            del kwargs[key]
        original(self, *args, **kwargs)
        self.webui_tooltip = tooltip
        for event in self.EVENTS:
            setattr(self, str(event), _with_js(getattr(self, str(event))))

    kind.__init__ = init
    kind.update = gr.update


class _with_js:  # noqa: N801 - stands where a function stood
    """An event listener that also takes Gradio 3's ``_js``; Gradio reads the attributes of the original."""

    def __init__(self, original):
        self.original = original
        for name in ("has_trigger", "event_name", "callback"):
            setattr(self, name, getattr(original, name, None))
        self.__self__ = getattr(original, "__self__", None)

    def __call__(self, *args, **kwargs):
        if "_js" in kwargs:
            kwargs["js"] = kwargs.pop("_js")
        return self.original(*args, **kwargs)
