import inspect
import os
import re
import sys
import time
from collections import namedtuple

from modules import errors, extensions, paths_internal, script_callbacks, script_loading

current_basedir = paths_internal.script_path
load_seconds = {}
AlwaysVisible = object()
ScriptClassData = namedtuple("ScriptClassData", ["script_class", "path", "basedir", "module"])
scripts_data = []
scripts_txt2img = None


class Script:
    args_from = args_to = 0
    alwayson = False
    controls = None

    def title(self):
        raise NotImplementedError

    def ui(self, is_img2img):
        return None

    def show(self, is_img2img):
        return True

    def run(self, p, *args):
        return None

    def before_process(self, p, *args):
        pass

    def elem_id(self, item_id):
        title = re.sub(r"[^a-z_0-9]", "", re.sub(r"\s", "_", self.title().lower()))
        return f"script_txt2img_{title}_{item_id}"


def basedir():
    return current_basedir


def list_scripts(folder, suffix):
    """(extension folder, path) of every file, in the order of loading."""
    found = []
    for extension in [paths_internal.script_path, *extensions.active()]:
        place = os.path.join(extension, folder)
        if os.path.isdir(place):
            found += [
                (extension, os.path.join(place, name))
                for name in sorted(os.listdir(place))
                if name.endswith(suffix)
            ]
    return found


def list_files_with_name(name):
    return [
        path
        for path in (os.path.join(folder, name) for folder in extensions.active())
        if os.path.isfile(path)
    ]


def load_scripts():
    """Each extension's folder is on sys.path only while its scripts are executed."""
    global current_basedir, scripts_txt2img
    scripts_data.clear()
    script_callbacks.clear_callbacks()
    kept = sys.path
    for extension, path in list_scripts("scripts", ".py"):
        start = time.perf_counter()
        try:
            sys.path = [extension, *kept]
            current_basedir = extension
            module = script_loading.load_module(path)
            for kind in module.__dict__.values():
                if inspect.isclass(kind) and issubclass(kind, Script):
                    scripts_data.append(ScriptClassData(kind, path, extension, module))
        except Exception:
            errors.report(f"Error loading script: {os.path.basename(path)}", exc_info=True)
        finally:
            sys.path = kept
            current_basedir = paths_internal.script_path
            load_seconds[os.path.basename(path)] = time.perf_counter() - start
    scripts_txt2img = ScriptRunner()


class ScriptRunner:
    """The scripts of one page; the first input is the index of the chosen one, 0 for none."""

    def __init__(self):
        self.scripts = [data.script_class() for data in scripts_data]
        self.alwayson_scripts, self.selectable_scripts = [], []
        for script in self.scripts:
            script.alwayson = script.show(False) is AlwaysVisible
            (self.alwayson_scripts if script.alwayson else self.selectable_scripts).append(script)
        self.inputs = [None]

    def setup_ui(self):
        import gradio as gr

        self.inputs = [None]
        titles = [script.title() for script in self.selectable_scripts]
        dropdown = gr.Dropdown(
            label="Script", elem_id="script_list", choices=["None", *titles], value="None", type="index"
        )
        self.inputs[0] = dropdown
        for script in [*self.alwayson_scripts, *self.selectable_scripts]:
            with gr.Group(visible=script.alwayson) as script.group:
                script.args_from = script.args_to = len(self.inputs)
                controls = script.ui(False)
                if controls is not None:
                    script.controls = controls
                    self.inputs += controls
                    script.args_to = len(self.inputs)
        for number, script in enumerate(self.selectable_scripts, 1):
            dropdown.change(
                fn=lambda index, number=number: gr.update(visible=number == index),
                inputs=[dropdown],
                outputs=[script.group],
            )
        return self.inputs

    def run(self, p, *args):
        if not args or not args[0]:
            return None
        script = self.selectable_scripts[args[0] - 1]
        return script.run(p, *args[script.args_from : script.args_to])

    def before_process(self, p):
        for script in self.alwayson_scripts:
            try:
                script.before_process(p, *p.script_args[script.args_from : script.args_to])
            except Exception:
                errors.report("Error running before_process", exc_info=True)
