import json

from modules import scripts


def translations(name):
    """All files of one language, later ones winning."""
    merged = {}
    for _, path in scripts.list_scripts("localizations", f"{name}.json"):
        with open(path, encoding="utf8") as file:
            merged.update(json.load(file))
    return merged
