"""What SD.Next calls ``modules.scripts``."""

from modules.scripts import load_scripts

__all__ = ["load_scripts"]
