import os
import sys
import time

from modules import errors, extensions, paths_internal, script_callbacks, script_loading

current_basedir = paths_internal.script_path
load_seconds = {}


def basedir():
    return current_basedir


def list_scripts(folder, suffix):
    """(extension folder, path) of every file, in the order of loading."""
    found = []
    for extension in extensions.active():
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
    global current_basedir
    script_callbacks.clear_callbacks()
    kept = sys.path
    for extension, path in list_scripts("scripts", ".py"):
        start = time.perf_counter()
        try:
            sys.path = [extension, *kept]
            current_basedir = extension
            script_loading.load_module(path)
        except Exception:
            errors.report(f"Error loading script: {os.path.basename(path)}", exc_info=True)
        finally:
            sys.path = kept
            current_basedir = paths_internal.script_path
            load_seconds[os.path.basename(path)] = time.perf_counter() - start
