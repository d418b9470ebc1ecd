import importlib.util
import os


def load_module(path):
    """Executes a script under a module name that is not in sys.modules, as the hosts do."""
    spec = importlib.util.spec_from_file_location(os.path.basename(path), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
