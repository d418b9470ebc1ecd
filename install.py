"""What a WebUI runs before it loads the extension.

Every WebUI brings torch, safetensors and numpy itself, in versions that fit together, so this installs
nothing: a `pip install` that lets one of them move is how an extension breaks its host. Only a missing
safetensors, which depends on nothing else, is installed, and that without touching any other package.
"""

from __future__ import annotations

import importlib.util

NEEDED = ("torch", "safetensors", "numpy")


def missing() -> list[str]:
    """Names of the needed packages that cannot be imported; nothing is imported to find out."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def main() -> None:
    absent = missing()
    if absent == ["safetensors"] and _install_safetensors():
        return
    if absent:
        print(
            f"LoRA Merge: {', '.join(absent)} cannot be found in the WebUI's Python, so the LoRA Merge tab"
            " will not appear; start the WebUI once without --skip-install so that it installs what it needs."
        )


def _install_safetensors() -> bool:
    """Installs safetensors alone through the WebUI's own launcher; True when it is there afterwards."""
    try:
        import launch

        launch.run_pip("install --no-deps safetensors", "safetensors for LoRA Merge")
    except Exception as error:  # Whatever goes wrong here must not stop the WebUI from starting.
        print(f"LoRA Merge: safetensors could not be installed ({error}).")
        return False
    importlib.invalidate_caches()
    return importlib.util.find_spec("safetensors") is not None


if __name__ == "__main__":
    main()
