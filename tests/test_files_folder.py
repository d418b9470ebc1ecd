"""Names of LoRAs to files, and names of results to places inside the folder."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lib_loramerge.errors import FileError, OutputError
from lib_loramerge.files import LoraFolder, output_path, read_header

POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows makes links only for administrators")


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_names_are_those_of_the_webui_with_the_subfolder_where_two_share_one(tmp_path):
    put(
        tmp_path,
        "b.safetensors",
        "A.pt",
        "sub/c.v1.5.CKPT",
        "sub/b.safetensors",
        "notes.txt",
        "x.safetensors.part",
    )
    folder = LoraFolder([tmp_path])
    assert folder.names() == ["A", "b", "sub/b", "c.v1.5"]
    for name in folder.names():
        if name != "b":
            assert folder.find(name).stem == name.split("/")[-1]


def test_a_name_is_found_with_subfolder_suffix_or_either_slash(tmp_path):
    put(tmp_path, "one.safetensors", "style/ink/two.safetensors", "three.pt", "three.safetensors")
    folder = LoraFolder([tmp_path])
    assert folder.find("one") == folder.find("one.safetensors") == tmp_path / "one.safetensors"
    two = tmp_path / "style/ink/two.safetensors"
    for name in ("two", "style/ink/two", "style\\ink\\two", "style/ink/two.safetensors", "two.safetensors"):
        assert folder.find(name) == two
    assert folder.find("three.pt") == tmp_path / "three.pt"
    with pytest.raises(FileError, match="2 files"):
        folder.find("three")


def test_two_of_one_name_are_an_error_that_names_both(tmp_path):
    put(tmp_path, "x/cat.safetensors", "y/cat.safetensors")
    folder = LoraFolder([tmp_path])
    with pytest.raises(FileError) as caught:
        folder.find("cat")
    assert str(tmp_path / "x" / "cat.safetensors") in str(caught.value)
    assert str(tmp_path / "y" / "cat.safetensors") in str(caught.value)
    assert folder.find("y/cat") == tmp_path / "y" / "cat.safetensors"


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path):
    put(tmp_path, "watercolor.safetensors", "pixelart.safetensors")
    with pytest.raises(FileError, match=r"no LoRA 'watercolour' .*Nearest: watercolor"):
        LoraFolder([tmp_path]).find("watercolour")
    with pytest.raises(FileError, match="no LoRA file is in"):
        LoraFolder([tmp_path / "none"]).find("x")
    with pytest.raises(FileError, match="no LoRA folder is set"):
        LoraFolder([]).find("x")


def test_a_lora_is_found_by_the_name_that_its_metadata_gives(tmp_path):
    for name, alias in (("file_a", "ink"), ("file_b", "oil"), ("file_c", "oil"), ("file_d", "file_a")):
        save_file({"x.alpha": torch.ones(1)}, tmp_path / f"{name}.safetensors", {"ss_output_name": alias})
    deceptive = {"a": '{"ss_output_name": "deep"}', "ss_output_name": 'say "日本"'}
    save_file({"x.alpha": torch.ones(1)}, tmp_path / "file_e.safetensors", deceptive)
    put(tmp_path, "broken.safetensors", "ink.txt")
    folder = LoraFolder([tmp_path])
    assert folder.find('say "日本"') == tmp_path / "file_e.safetensors"
    with pytest.raises(FileError, match="no LoRA 'deep'"):
        folder.find("deep")
    assert folder.find("ink") == tmp_path / "file_a.safetensors"
    assert folder.find("file_a") == tmp_path / "file_a.safetensors"  # A file's own name comes first.
    with pytest.raises(FileError, match="2 files"):
        folder.find("oil")


def test_several_folders_are_one_list_and_a_file_reached_twice_is_one(tmp_path):
    put(tmp_path, "lora/a.safetensors", "lora/sub/b.safetensors", "lyco/c.safetensors")
    folder = LoraFolder([tmp_path / "lora", tmp_path / "lora" / "sub", tmp_path / "lyco", tmp_path / "gone"])
    assert folder.names() == ["a", "b", "c"]


@POSIX
def test_links_are_followed_once_and_hidden_folders_not_at_all(tmp_path):
    put(tmp_path, "lora/a.safetensors", "other/b.safetensors", "lora/.trash/c.safetensors")
    (tmp_path / "lora" / "other").symlink_to(tmp_path / "other")
    (tmp_path / "lora" / "again").symlink_to(tmp_path / "lora")
    (tmp_path / "lora" / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    assert LoraFolder([tmp_path / "lora"]).find("b").name == "b.safetensors"
    assert set(LoraFolder([tmp_path / "lora"]).names()) == {"a", "b", "dangling"}


def test_a_subfolder_that_vanishes_or_may_not_be_read_is_skipped(tmp_path, monkeypatch):
    put(tmp_path, "a.safetensors", "locked/b.safetensors", "gone/c.safetensors")
    original = os.scandir

    def scandir(path):
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "denied")
        if os.path.basename(path) == "gone":
            raise FileNotFoundError(2, "gone")
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert LoraFolder([tmp_path]).names() == ["a"]


def test_accents_match_however_the_system_spells_them(tmp_path):
    put(tmp_path, unicodedata.normalize("NFD", "café") + ".safetensors")
    assert LoraFolder([tmp_path]).find(unicodedata.normalize("NFC", "café")).exists()


def test_paths_are_taken_only_where_allowed(tmp_path, monkeypatch):
    put(tmp_path, "outside/a.safetensors", "lora/b.safetensors", "lora/outside/c.safetensors")
    monkeypatch.chdir(tmp_path)
    inside = LoraFolder([tmp_path / "lora"])
    paths = [
        str(tmp_path / "outside/a.safetensors"),
        "outside/a.safetensors",
        "../outside/a",
        "outside/a",
        "./outside/a",
    ]
    for path in paths:
        with pytest.raises(FileError):
            inside.find(path)
    free = LoraFolder([tmp_path / "lora"], allow_paths=True)
    for path in [*paths[:2], *paths[3:]]:
        assert free.find(path).resolve() == (tmp_path / "outside/a.safetensors").resolve()
    assert free.find("b") == tmp_path / "lora/b.safetensors"
    with pytest.raises(FileError, match="does not exist"):
        free.find(str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, "..", "/", "~nobody/x", "C:\\x", "*", "a\nb"])
def test_odd_names_are_not_found_rather_than_a_crash(tmp_path, name):
    put(tmp_path, "a.safetensors")
    for allow_paths in (False, True):
        with pytest.raises(FileError):  # ".." is a path where paths are allowed, but no file.
            read_header(LoraFolder([tmp_path], allow_paths=allow_paths).find(name))


# output_path


@pytest.mark.parametrize("name", ["new", "new.safetensors", "New.SafeTensors"])
def test_the_suffix_is_added_once(tmp_path, name):
    assert output_path(tmp_path, name).name.lower() == "new.safetensors"
    assert output_path(tmp_path, name).parent == tmp_path
    assert output_path(tmp_path, name, "a/b").parent == tmp_path / "a" / "b"
    assert output_path(tmp_path, name, "a\\b/").parent == tmp_path / "a" / "b"


@pytest.mark.parametrize("name", ["日本語", "it's", "v1.5 (final)", "a,b", "con2", "common", ".hidden", "ñ"])
def test_ordinary_names_are_taken(tmp_path, name):
    assert output_path(tmp_path, name, name) == tmp_path / name / f"{name}.safetensors"


BAD = [
    "", " ", ".", "..", "...", "../x", "a/../../x", "/etc/x", "C:\\x", "C:x",
    "\\\\server\\x", "a/b", "a\\b", "a\0b",
    "a\nb", "a<b", "a>b", "a|b", "a?b", "a*b", 'a"b', "a:b", "x.", "x ", " x", "CON", "con", "nul", "Aux.txt",
    "COM1", "com¹.x", "LPT9", "CONIN$", "prn .x", "\ud800", "x" * 300, "日" * 82,
]  # fmt: skip


@pytest.mark.parametrize("name", BAD, ids=lambda name: ascii(name[:12]))
def test_a_name_that_leads_outside_or_some_system_forbids_is_refused(tmp_path, name):
    with pytest.raises(OutputError):
        output_path(tmp_path, name)
    with pytest.raises(OutputError):
        output_path(tmp_path, f"{name}.safetensors")


@pytest.mark.parametrize(
    "subfolder", ["..", "a/..", "a/../..", "/", "/tmp", "\\x", "C:\\x", "C:", "a/./b", "nul", "a /b", "a\0"]
)
def test_a_subfolder_that_leads_outside_is_refused(tmp_path, subfolder):
    with pytest.raises(OutputError):
        output_path(tmp_path, "new", subfolder)


@POSIX
def test_links_that_lead_out_are_refused_and_a_linked_folder_itself_is_fine(tmp_path):
    put(tmp_path, "lora/in/a.safetensors", "outside/b.safetensors")
    (tmp_path / "lora" / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "lora" / "near").symlink_to(tmp_path / "lora" / "in")
    (tmp_path / "lora" / "link.safetensors").symlink_to(tmp_path / "outside" / "b.safetensors")
    (tmp_path / "entry").symlink_to(tmp_path / "lora")
    with pytest.raises(OutputError, match="leads out"):
        output_path(tmp_path / "lora", "x", "out")
    with pytest.raises(OutputError, match="leads out"):
        output_path(tmp_path / "lora", "x", "out/deeper")
    with pytest.raises(OutputError, match="is a link"):
        output_path(tmp_path / "lora", "link")
    assert (
        output_path(tmp_path / "lora", "x", "near").parent.resolve() == (tmp_path / "lora" / "in").resolve()
    )
    assert output_path(tmp_path / "entry", "x") == tmp_path / "entry" / "x.safetensors"
