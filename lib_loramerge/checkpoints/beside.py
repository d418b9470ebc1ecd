"""What lies beside a checkpoint's weights and goes with them: files of a folder, configuration, index."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import OutputError, Sentence
from ..files import LoraFile
from ..files.place import write_whole
from ..merge.sources import some_text
from .reading import Checkpoint
from .rewriting import written_bytes
from .summing import Entry

INDEX = ".index.json"
_TEXTS = (".json", ".md", ".txt", ".yaml")
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".msgpack", ".onnx", ".pt", ".pth")


def folder_of(output: Path) -> Path:
    """The new folder that an output's name means."""
    return output.with_suffix("") if output.suffix == ".safetensors" else output


def check_folder(checkpoint: Checkpoint, output: Path) -> None:
    """Refuse a new folder that exists, or is within the one that is read.

    Raises:
        OutputError: With its name.
    """
    if os.path.lexists(output):
        raise OutputError("{folder} exists already; choose another name for the new folder.", output)
    if output.resolve().is_relative_to(_root(checkpoint.path).resolve()):
        raise OutputError("{folder} is within the checkpoint's own folder; choose another place.", output)


def folder_files(checkpoint: Checkpoint, encoders: Iterable[Path]) -> dict[Path, Path]:
    """Every file of the new folder, by its place in it, and where it is read.

    Args:
        encoders: Files of text encoders that belong to the checkpoint.

    Raises:
        OutputError: A text encoder's own file has the name of another.
    """
    root = _root(checkpoint.path)
    paths = sorted(root.rglob("*") if checkpoint.path.is_dir() else root.iterdir())
    found = {p.relative_to(root): p for p in paths if p.is_file() and _belongs(checkpoint, p)}
    for path in encoders:
        if path in found.values():
            continue
        other = found.setdefault(Path(path.name), path)
        if other != path:
            raise OutputError(
                "{first} and {second} would both be written to {file} in the new folder. Rename one.",
                other,
                path,
                path.name,
            )
    return found


def copied_weights(checkpoint: Checkpoint, files: Mapping[Path, Path]) -> list[str]:
    """A warning of weights in the folder that are not those which are baked, as its fp16 variant.

    Args:
        files: As of :func:`folder_files`.
    """
    own = {file.path for file in checkpoint.files}
    folders = {_root(checkpoint.path), *(path.parent for path in own)}
    others = [
        str(name)
        for name, path in files.items()
        if path not in own and path.parent in folders and path.suffix.lower() in _WEIGHTS
    ]
    if not others:
        return []
    return [
        Sentence(
            "{names}: other weights in the folder, copied as they are. The LoRAs are not in them, so "
            "load the new folder without a variant.",
            some_text(tuple(others)),
        )
    ]


def _root(path: Path) -> Path:
    """The folder of a checkpoint that is a folder or an index of shards."""
    return path if path.is_dir() else path.parent


def _belongs(checkpoint: Checkpoint, path: Path) -> bool:
    """Whether a file is part of the checkpoint: beside an index of shards lie other models, too."""
    if checkpoint.path.is_dir() or path == checkpoint.path:
        return True
    if any(path == file.path for file in checkpoint.files):
        return True
    return path.suffix.lower() in _TEXTS and not path.name.endswith(INDEX)


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
