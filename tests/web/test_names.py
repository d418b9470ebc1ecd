"""Names that are no text, names that are nobody's, and what may go wrong once a file is written."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lib_loramerge import cli
from lib_loramerge.errors import LoraMergeError
from lib_loramerge.files import LoraFolder
from lib_loramerge.recipe import LoraInput, MergeRecipe
from lib_loramerge.webui import sidecar
from lib_loramerge.webui.background import DONE
from lib_loramerge.webui.host import StandaloneHost
from lib_loramerge.webui.jobs import JobQueue
from lib_loramerge.webui.merge_jobs import MergeRequest
from lib_loramerge.webui.sidecar import UserMetadata
from tests.helpers.fixtures import SD1_LAYERS, make_lora
from tests.helpers.hosting import FakeHost

API = "/loramerge/v1"
UNREADABLE = b"caf\xe9.safetensors"
RECIPE = MergeRecipe(inputs=(LoraInput("a"),))
BYTES_IN_NAMES = pytest.mark.skipif(os.name == "nt", reason="names are no bytes there")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_lora(tmp_path / "a.safetensors", SD1_LAYERS)
    return tmp_path


def unreadable(folder: Path) -> Path:
    path = Path(os.fsdecode(os.fsencode(folder) + b"/" + UNREADABLE))
    path.write_bytes((folder / "a.safetensors").read_bytes())
    return path


def finish(host: StandaloneHost, request: MergeRequest):
    jobs = JobQueue(host)
    job = jobs.submit(request)
    limit = time.monotonic() + 240
    while not job.finished and time.monotonic() < limit:
        time.sleep(0.02)
    jobs.close()
    return job


@BYTES_IN_NAMES
def test_a_name_that_is_not_utf_8_is_listed_marked_and_merged_on_the_command_line(folder):
    path = unreadable(folder)
    (folder / os.fsdecode(b"d\xe9p")).mkdir()
    host = StandaloneHost([folder])
    entries = {entry.path: entry for entry in host.loras()}
    marked = entries[path]
    assert marked.name == "caf<E9> (name is not UTF-8)"
    for text in (marked.name, marked.alias, marked.label, marked.subfolder, *host.subfolders()):
        text.encode("utf-8")
    with pytest.raises(LoraMergeError, match="merge it on the command line") as refused:
        host.find(marked.name)
    str(refused.value).encode("utf-8")
    host.close()
    assert cli.main(["merge", str(path), "-o", str(folder / "out"), "--json"]) == 0
    assert cli.main(["merge", os.fsdecode(b"caf\xe9"), "--lora-dir", str(folder), "-o", "again"]) == 0
    assert (folder / "out.safetensors").exists()
    assert (folder / "again.safetensors").exists()


@BYTES_IN_NAMES
def test_rest_lists_it_too_and_takes_no_text_that_is_none(folder):
    loras = folder / "models" / "Lora"
    loras.mkdir(parents=True)
    make_lora(loras / "a.safetensors", SD1_LAYERS)
    unreadable(loras)
    with FakeHost(folder, "--nowebui") as host:
        names = {entry["name"] for entry in host.get(f"{API}/loras")["loras"]}
        assert names == {"a", "caf<E9> (name is not UTF-8)"}
        half = '"\\ud800"'
        for path, body in (
            ("inspect", f'{{"name": {half}}}'),
            ("inspect", f"{{{half}: 1}}"),
            (
                "merge",
                f'{{"name": "x", "activation_text": {half}, "recipe": {{"inputs": [{{"name": "a"}}]}}}}',
            ),
            ("plan", f'{{"recipe": {{"inputs": [{{"name": {half}}}]}}}}'),
        ):
            status, answer = host.request(
                "POST", f"{API}/{path}", raw=body.encode(), headers={"Content-Type": "application/json"}
            )
            assert (status, list(answer)) == (400, ["error"])


def test_an_activation_text_with_half_a_character_loses_nothing(folder):
    host = StandaloneHost([folder])
    job = finish(host, MergeRequest(RECIPE, "out", user_metadata=UserMetadata(activation_text="x \ud800 y")))
    assert job.state == DONE
    assert "x ? y" in (folder / "out.json").read_text(encoding="utf-8")
    host.close()


@pytest.mark.parametrize("place", ["sidecar", "announce", "sources"])
def test_what_goes_wrong_after_the_file_is_there_is_a_note(folder, monkeypatch, place):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of the host")

    host = StandaloneHost([folder])
    if place == "sidecar":
        monkeypatch.setattr(sidecar, "write", broken)
    elif place == "announce":
        monkeypatch.setattr(host, "announce", broken)
    else:
        monkeypatch.setattr(host.source_hashes, "remember", broken)
    job = finish(host, MergeRequest(RECIPE, "out", user_metadata=UserMetadata(activation_text="x")))
    assert job.state == DONE
    assert bool(job.notes) is (place != "sources")
    assert (folder / "out.safetensors").exists()
    host.close()


def test_the_longest_name_keeps_its_notes_and_a_longer_one_is_refused(folder):
    host = StandaloneHost([folder])
    name = "n" * 240
    job = finish(host, MergeRequest(RECIPE, name, user_metadata=UserMetadata(activation_text="x")))
    assert (job.state, job.notes) == (DONE, ())
    assert (folder / f"{name}.json").exists()
    with pytest.raises(LoraMergeError, match="too long"):
        finish(host, MergeRequest(RECIPE, name + "nnn"))
    host.close()


def test_the_tab_alone_finds_a_file_by_the_name_that_its_trainer_gave_it_as_the_command_line_does(folder):
    save_file(
        {"lora_unet_x.lora_up.weight": torch.ones(2, 1)},
        folder / "renamed.safetensors",
        {"ss_output_name": "inkstyle"},
    )
    host = StandaloneHost([folder])
    assert host.find("inkstyle") == LoraFolder([folder]).find("inkstyle") == folder / "renamed.safetensors"
    (folder / "again.safetensors").write_bytes((folder / "renamed.safetensors").read_bytes())
    host.refresh()
    with pytest.raises(LoraMergeError, match="Several LoRAs are called inkstyle"):
        host.find("inkstyle")
    host.close()


def test_a_thousand_names_of_nobody_are_answered_without_a_look_at_the_disk_for_each(folder, monkeypatch):
    for number in range(300):
        (folder / f"lora{number}.safetensors").write_bytes(b"")
    long_ago = time.time() - 60
    os.utime(folder, (long_ago, long_ago))
    host = StandaloneHost([folder])
    host.refresh()
    monkeypatch.setattr("lib_loramerge.webui.host.base.scan", lambda *_: pytest.fail("looked again"))
    start = time.process_time()
    for number in range(1000):
        with pytest.raises(LoraMergeError, match="There is no LoRA called"):
            host.find(f"nothing{number}")
    assert time.process_time() - start < 20  # Mostly well under two; this rules out a wait for each.
    monkeypatch.undo()
    make_lora(folder / "fresh.safetensors", SD1_LAYERS)
    assert host.find("fresh") == folder / "fresh.safetensors"
    host.close()
