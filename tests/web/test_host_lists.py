"""LoRA lists, names and folders as the host gives them."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lib_loramerge.errors import LoraMergeError
from lib_loramerge.recipe import LoraInput
from lib_loramerge.webui.host import ConflictError, StandaloneHost, UnknownNameError, WebuiHost, base
from tests.helpers.fixtures import SD1_LAYERS, SDXL_LAYERS, make_lora
from tests.helpers.inprocess import fake_modules

SMALL = dict(list(SD1_LAYERS.items())[1:4])


@pytest.fixture
def lora_dir(tmp_path):
    folder = tmp_path / "data" / "models" / "Lora"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def standalone(lora_dir):
    host = StandaloneHost([lora_dir])
    yield host
    host.close()


@pytest.fixture(params=[False, True], ids=["a1111", "forge"])
def webui(request, tmp_path, lora_dir):
    make_lora(lora_dir / "plain.safetensors", SMALL)
    make_lora(lora_dir / "file.safetensors", SMALL, metadata={"ss_output_name": "Pretty Name"})
    with fake_modules(tmp_path / "data", forge=request.param) as modules:
        host = WebuiHost()
        host.modules = modules
        yield host
        host.close()


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def test_files_are_listed_by_name_in_natural_order_with_their_subfolders(standalone, lora_dir):
    for name in ("b10", "b2", "A1", "people/x", "people/deep/y"):
        touch(lora_dir / f"{name}.safetensors")
    touch(lora_dir / "notes.txt")
    standalone.refresh()
    assert [(e.name, e.subfolder) for e in standalone.loras()] == [
        ("A1", ""),
        ("b2", ""),
        ("b10", ""),
        ("x", "people"),
        ("y", "people/deep"),
    ]
    assert standalone.subfolders() == ["", "people", "people/deep"]


def test_two_files_of_one_name_are_told_apart_by_their_folder(standalone, lora_dir):
    top, sub = touch(lora_dir / "x.safetensors"), touch(lora_dir / "people" / "x.safetensors")
    standalone.refresh()
    names = {entry.name: entry.path for entry in standalone.loras()}
    assert names == {"./x": top, "people/x": sub}
    assert standalone.find("people/x") == sub
    assert standalone.find("people\\x.safetensors") == sub
    assert standalone.find("./x") == top
    with pytest.raises(LoraMergeError, match=r"Several LoRAs are called x: \./x and people/x"):
        standalone.find("x")


def test_every_listed_name_finds_its_own_file_even_with_the_same_names_in_two_folders(tmp_path):
    for folder in ("one", "two"):
        for name in ("x.safetensors", "sub/x.safetensors", "x.pt", "sub/y.safetensors"):
            touch(tmp_path / folder / name)
    host = StandaloneHost([tmp_path / "one", tmp_path / "two"])
    entries = host.loras()
    assert len(entries) == 8
    assert [host.find(entry.name) for entry in entries] == [entry.path for entry in entries]
    host.close()


def test_an_unknown_name_is_refused_with_the_nearest_names(standalone, lora_dir):
    touch(lora_dir / "watercolor.safetensors")
    standalone.refresh()
    with pytest.raises(UnknownNameError, match=r"no LoRA called watercolour .*Did you mean watercolor\?"):
        standalone.find("watercolour")


def test_a_file_that_has_just_appeared_is_found_without_a_refresh(standalone, lora_dir):
    for number in range(3):  # However short ago the folder was looked through.
        standalone.refresh()
        path = touch(lora_dir / f"new{number}.safetensors")
        assert standalone.find(f"new{number}") == path


def test_a_storm_of_wrong_names_looks_through_the_folder_a_few_times_a_second(standalone, monkeypatch):
    scans = []
    original = base.scan
    monkeypatch.setattr(base, "scan", lambda *args: scans.append(1) or original(*args))

    def ask(number):
        with pytest.raises(UnknownNameError):
            standalone.find(f"nothing{number}")

    start = time.monotonic()
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(ask, range(100)))
    assert len(scans) <= 2 + (time.monotonic() - start) / base.RESCAN_SECONDS


def test_a_file_that_vanished_is_an_error_and_the_list_goes_on(standalone, lora_dir):
    path = touch(lora_dir / "gone.safetensors")
    standalone.refresh()
    path.unlink()
    with pytest.raises(UnknownNameError):
        standalone.find("gone")
    assert standalone.loras() == []


def test_an_unreadable_subfolder_is_passed_over(standalone, lora_dir, monkeypatch):
    touch(lora_dir / "seen.safetensors")
    touch(lora_dir / "bad" / "x.safetensors")
    real = os.scandir
    blocked = str(lora_dir / "bad")

    def scandir(path):
        if str(path) == blocked:
            raise PermissionError(13, "no", path)
        return real(path)

    monkeypatch.setattr("lib_loramerge.webui.listing.os.scandir", scandir)
    standalone.refresh()
    assert [entry.name for entry in standalone.loras()] == ["seen"]


def test_links_in_a_circle_end(standalone, lora_dir):
    touch(lora_dir / "sub" / "x.safetensors")
    try:
        (lora_dir / "sub" / "up").symlink_to(lora_dir, target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no links")
    standalone.refresh()
    assert [entry.name for entry in standalone.loras()] == ["x"]


def test_a_link_that_leads_out_is_used_by_the_owner_and_refused_to_others(standalone, lora_dir, tmp_path):
    outside = touch(tmp_path / "elsewhere" / "secret.safetensors")
    try:
        (lora_dir / "link").symlink_to(outside.parent, target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no links")
    standalone.refresh()
    assert standalone.find("secret").samefile(outside)
    with pytest.raises(LoraMergeError, match="leads out of the LoRA folder"):
        standalone.find("secret", strict=True)


def test_five_thousand_files_are_listed_and_looked_up_quickly(standalone, lora_dir):
    for index in range(5000):
        touch(lora_dir / f"f{index % 50}" / f"lora {index}.safetensors")
    start = time.process_time()
    # Headers are read in the background; here the list counts.
    standalone._labels.fill = lambda *_, **__: None
    standalone.refresh()
    assert len(standalone.loras()) == 5000
    scan_seconds = time.process_time() - start
    start = time.process_time()
    for _ in range(20):
        standalone.loras()
        standalone.find("lora 4999")
    assert time.process_time() - start < max(0.5, scan_seconds), "looking up must not list again"


def test_labels_tell_base_model_and_rank_without_any_metadata(standalone, lora_dir):
    make_lora(lora_dir / "one.safetensors", SMALL, rank=4)
    make_lora(
        lora_dir / "xl.safetensors", SDXL_LAYERS, rank={n: 2 + i % 3 for i, n in enumerate(SDXL_LAYERS)}
    )
    touch(lora_dir / "broken.safetensors")
    standalone.refresh()
    assert standalone.wait_for_labels(120)
    labels = {entry.name: (entry.base, entry.rank) for entry in standalone.loras()}
    assert labels["xl"] == ("SDXL", "2-4")
    assert labels["one"][1] == "4"
    assert labels["broken"] == ("", "")
    assert next(e.label for e in standalone.loras() if e.name == "xl") == "xl · SDXL · rank 2-4"


def test_labels_of_a_host_come_from_what_it_has_read_already(tmp_path, lora_dir):
    metadata = {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_dim": "16"}
    make_lora(lora_dir / "known.safetensors", SMALL, metadata=metadata)
    with fake_modules(tmp_path / "data"):
        host = WebuiHost()
        host.refresh()
        entry = host.loras()[0]
        assert (entry.base, entry.rank) == ("SDXL", "16"), "at once, without reading the header"
        host.close()


def test_a_changed_file_gets_a_new_label(standalone, lora_dir):
    make_lora(lora_dir / "x.safetensors", SMALL, rank=4)
    standalone.refresh()
    standalone.wait_for_labels(120)
    make_lora(lora_dir / "x.safetensors", SMALL, rank=6)
    standalone.refresh()
    standalone.wait_for_labels(120)
    assert standalone.loras()[0].rank == "6"


def test_a_host_knows_a_lora_by_its_alias(webui, lora_dir):
    assert webui.find("Pretty Name") == lora_dir / "file.safetensors"
    assert webui.find("file") == lora_dir / "file.safetensors"
    assert next(e.alias for e in webui.loras() if e.name == "file") == "Pretty Name"


def test_a_result_must_not_take_the_alias_of_another_lora(webui):
    with pytest.raises(ConflictError, match="called Pretty Name"):
        webui.check_name("Pretty Name")
    assert webui.propose_name([LoraInput("Pretty Name")]) == "Pretty Name-2"


def test_accents_spelled_in_two_ways_are_one_name(standalone, lora_dir):
    path = touch(lora_dir / "caf\u00e9.safetensors")
    standalone.refresh()
    assert standalone.find("cafe\u0301") == path


def test_an_alias_that_points_outside_the_folders_is_not_followed(webui, tmp_path):
    outside = make_lora(tmp_path / "outside.safetensors", SMALL)
    entry = webui.modules.network.NetworkOnDisk("outside", str(outside))
    webui.modules.networks.available_network_aliases["outside"] = entry
    with pytest.raises(UnknownNameError):
        webui.find("outside")


def test_a_host_without_its_lora_extension_still_lists_the_folder(tmp_path, lora_dir):
    make_lora(lora_dir / "x.safetensors", SMALL)
    with fake_modules(tmp_path / "data"):
        del sys.modules["networks"]
        host = WebuiHost()
        host.refresh()
        assert [entry.name for entry in host.loras()] == ["x"]
        with pytest.raises(LoraMergeError, match="no LoRA support"):
            host.register_trial("t", lora_dir / "x.safetensors")
        host.close()


def test_the_lycoris_folder_is_read_and_never_written(tmp_path, lora_dir):
    lycoris = tmp_path / "data" / "models" / "LyCORIS"
    touch(lycoris / "old.safetensors")
    with fake_modules(tmp_path / "data"):
        host = WebuiHost()
        assert host.find("old") == lycoris / "old.safetensors"
        assert host.check_name("new") == lora_dir / "new.safetensors"
        host.close()


def test_a_lora_folder_elsewhere_is_used(tmp_path):
    elsewhere = tmp_path / "other drive" / "LoRAs"
    touch(elsewhere / "x.safetensors")
    with fake_modules(tmp_path / "data", "--lora-dir", str(elsewhere)):
        host = WebuiHost()
        assert host.find("x") == elsewhere / "x.safetensors"
        assert host.write_dir() == elsewhere
        host.close()


def test_the_name_of_a_result_is_checked_before_work(standalone, lora_dir):
    touch(lora_dir / "sub" / "taken.safetensors")
    standalone.refresh()
    assert standalone.check_name("new", "sub") == lora_dir / "sub" / "new.safetensors"
    assert standalone.check_name("taken", "sub", overwrite=True) == lora_dir / "sub" / "taken.safetensors"
    with pytest.raises(ConflictError, match="exists already"):
        standalone.check_name("taken", "sub")
    with pytest.raises(ConflictError, match="is in sub already"):
        standalone.check_name("taken", overwrite=True)
    for name, subfolder in (("../x", ""), ("x", ".."), ("x", "/etc"), ("", ""), ("a/b", ""), ("con", "")):
        with pytest.raises(LoraMergeError):
            standalone.check_name(name, subfolder)


def test_a_proposed_name_is_free_and_fits_a_prompt(standalone, lora_dir):
    inputs = [LoraInput("people/a"), LoraInput("b:c,<d>")]
    name = standalone.propose_name(inputs)
    assert name.startswith("a+b")
    assert not set(name) & set('<>:,/\\"|?*')
    touch(lora_dir / f"{name.upper()}.safetensors")
    standalone.refresh()
    assert standalone.propose_name(inputs) == f"{name}-2"
    assert standalone.propose_name([LoraInput("???")]) == "merged"
    touch(lora_dir / "solo.safetensors")
    standalone.refresh()
    assert standalone.propose_name([LoraInput("solo")]) == "solo-2", (
        "one LoRA alone is a resize, not a replacement"
    )
