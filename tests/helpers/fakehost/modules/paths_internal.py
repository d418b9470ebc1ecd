import argparse
import os

_early = argparse.ArgumentParser(add_help=False)
_early.add_argument("--data-dir", default=None)
_early.add_argument("--models-dir", default=None)
_known, _ = _early.parse_known_args()

script_path = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
data_path = _known.data_dir or script_path
models_path = _known.models_dir or os.path.join(data_path, "models")
extensions_dir = os.path.join(data_path, "extensions")
extensions_builtin_dir = os.path.join(script_path, "extensions-builtin")
cwd = os.getcwd()
