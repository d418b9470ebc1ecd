"""What lies beside a checkpoint's weights and goes with them: configuration, and the index of its shards."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ..errors import OutputError, Sentence
from ..files import LoraFile
from ..files.place import write_whole
from .rewriting import written_bytes
from .summing import Entry

INDEX = ".index.json"


def index_of(index: Path, written: Iterable[tuple[LoraFile, list[Entry]]]) -> bytes | None:
    """An index of shards without the tensors that were left out; None where all that it says stays true."""
    left_out: set[tuple[str, str]] = set()
    growth = 0
    for file, entries in written:
        if file.path.parent == index.parent:
            left_out |= {(key, file.path.name) for key in {*file.tensors} - {entry.key for entry in entries}}
            growth += written_bytes(file, entries) - (file.header.size - file.header.data_start)
    if not left_out and not growth:
        return None
    content = json.loads(index.read_bytes())
    content["weight_map"] = {
        key: name for key, name in content["weight_map"].items() if (key, name) not in left_out
    }
    metadata = content.get("metadata")
    if isinstance(metadata, dict) and isinstance(metadata.get("total_size"), int):
        metadata["total_size"] += growth
    return json.dumps(content, indent=2, ensure_ascii=False).encode()


def copy_settings(base: Path, output: Path, overwrite: bool) -> list[str]:
    """The model's configuration that A1111 and Forge read beside a checkpoint (v-prediction, say).

    Returns:
        A warning where another one stays there: the checkpoint itself is written by now.
    """
    beside, target = base.with_suffix(".yaml"), output.with_suffix(".yaml")
    try:
        wanted, there = (path.read_bytes() if path.is_file() else None for path in (beside, target))
        if wanted == there:
            return []
        if wanted is None:
            return [
                Sentence(
                    "{target} was there before, and WebUIs read the configuration of {file} in it. "
                    "Remove it unless it is meant for this model.",
                    target.name,
                    output.name,
                )
            ]
        if there is not None and not overwrite:
            return [
                Sentence(
                    "{target} was there before and differs from {file}; choose which one stays.",
                    target.name,
                    beside.name,
                )
            ]
        write_whole(target, wanted)
    except (OSError, OutputError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        return [
            Sentence(
                "{file} could not be copied to {target} ({reason}). Copy it yourself.",
                beside.name,
                target.name,
                reason,
            )
        ]
    return []
