"""Sources that another program writes to, replaces, or has not finished, while they are read."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_loramerge.blocks import bundled_preset_path, load_presets
from lib_loramerge.errors import FileError
from lib_loramerge.files import LoraFolder, model_hash, open_file, read_header
from lib_loramerge.merge import plan_merge, run_merge
from lib_loramerge.merge.layer import Merger
from lib_loramerge.recipe import LoraInput, MergeRecipe
from tests.helpers.fixtures import SD1_LAYERS, make_lora


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, seed in (("a", 1), ("b", 2)):
        make_lora(tmp_path / f"{name}.safetensors", SD1_LAYERS, seed=seed)
    return tmp_path


def planned(folder: Path, **more):
    recipe = MergeRecipe(inputs=(LoraInput("a"), LoraInput("b")), **more)
    return plan_merge(recipe, find=LoraFolder([folder]).find, presets=load_presets([bundled_preset_path()]))


def other_numbers(path: Path) -> bytes:
    """A file of the same tensors with other values, byte for byte as long."""
    tensors = {key: tensor + 1 for key, tensor in load_file(path).items()}
    other = path.with_name("other")
    save_file(tensors, other, metadata=dict(read_header(path).metadata) or None)
    content = other.read_bytes()
    other.unlink()
    assert len(content) == path.stat().st_size
    return content


def rewritten(path: Path) -> None:
    content = other_numbers(path)
    with path.open("r+b") as file:
        file.write(content)


def rewritten_with_its_old_time(path: Path) -> None:
    status = path.stat()
    rewritten(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(other_numbers(path))
    os.replace(copy, path)


def removed(path: Path) -> None:
    path.unlink()


CHANGES = [rewritten, rewritten_with_its_old_time, replaced, removed]


@pytest.mark.skipif(os.name == "nt", reason="Windows lets nobody write to or replace a file that is open")
@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_while_it_is_merged_is_refused_by_name(folder, monkeypatch, change):
    original, done, one = Merger.merge_together, [], threading.Lock()

    def merge(self, *args):
        with one:
            if not done:
                change(folder / "b.safetensors")
                done.append(change)
        return original(self, *args)

    monkeypatch.setattr(Merger, "merge_together", merge)
    with pytest.raises(FileError, match=r"b\.safetensors was changed by another program"):
        run_merge(planned(folder), folder / "out.safetensors")
    assert done
    assert not (folder / "out.safetensors").exists()


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_between_the_look_and_the_merge_is_refused_by_name(folder, change):
    plan = planned(folder)
    change(folder / "b.safetensors")
    with pytest.raises(FileError, match=r"b\.safetensors"):
        run_merge(plan, folder / "out.safetensors")
    assert not (folder / "out.safetensors").exists()


def test_a_file_is_hashed_that_is_open_and_not_what_has_its_name_by_now(folder):
    path = folder / "a.safetensors"
    before = model_hash(path)
    with open_file(path) as file:
        if os.name == "posix":
            replaced(path)
        assert file.model_hash() == before
    if os.name == "posix":
        assert model_hash(path) != before


def test_reading_alone_or_touching_another_file_refuses_nothing(folder):
    plan = planned(folder)
    (folder / "c.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    report = run_merge(plan, folder / "out.safetensors")
    assert [entry.sshs_model_hash for entry in report.inputs] == [
        model_hash(folder / f"{name}.safetensors") for name in "ab"
    ]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_download_that_did_not_end_is_named(folder, share):
    path = folder / "b.safetensors"
    content = path.read_bytes()
    kept = int(len(content) * share)
    path.write_bytes(content[:kept] + bytes(len(content) - kept))
    notes = planned(folder).warnings
    [told] = [note for note in notes if "zeros" in note]
    assert told.startswith("b.safetensors: the last ")
    assert "download it again" in told


def test_layers_that_were_not_trained_are_no_broken_download(folder):
    path = folder / "b.safetensors"
    tensors = load_file(path)
    untrained = {key: torch.zeros_like(t) if "lora_up" in key else t for key, t in tensors.items()}
    save_file(untrained, path)
    assert not [note for note in planned(folder).warnings if "zeros" in note]
