"""What SD.Next calls ``modules.scripts``."""

from modules.scripts import AlwaysVisible, Script, ScriptClassData, load_scripts, scripts_data

__all__ = ["AlwaysVisible", "Script", "ScriptClassData", "load_scripts", "scripts_data"]
