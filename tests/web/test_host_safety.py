"""What the host's flags allow, and what we leave behind in it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from lib_loramerge import merge
from lib_loramerge.errors import LoraMergeError, OutputError, Sentence
from lib_loramerge.recipe import LoraInput, MergeRecipe
from lib_loramerge.webui import settings
from lib_loramerge.webui.host import UnknownNameError, WebuiHost
from lib_loramerge.webui.jobs import JobQueue
from lib_loramerge.webui.merge_jobs import MergeRequest
from lib_loramerge.webui.trial import PREFIX, remove_stale_folders
from tests.helpers.fixtures import SD1_LAYERS, make_lora
from tests.helpers.inprocess import fake_modules

SMALL = dict(list(SD1_LAYERS.items())[1:4])
BOTH = MergeRecipe(inputs=(LoraInput("a", 0.5, 0.5), LoraInput("b")), mode="concat")


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    for seed, name in enumerate(("a", "b")):
        make_lora(folder / "models" / "Lora" / f"{name}.safetensors", SMALL, seed=seed)
    checkpoint = folder / "models" / "Stable-diffusion" / "base.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"x")
    return folder


def finish(jobs, request):
    job = jobs.submit(request)
    version = -1
    limit = time.monotonic() + 240
    while not job.finished and time.monotonic() < limit:
        version = jobs.wait(version, 0.1)
    assert job.state == "done", job.error
    return job


@pytest.mark.parametrize(
    ("flags", "restricted"),
    [
        ((), False),
        (("--listen",), True),
        (("--share",), True),
        (("--server-name", "127.0.0.1"), True),
        (("--listen", "--enable-insecure-extension-access"), False),
    ],
)
def test_a_page_that_others_may_use_takes_names_only(data, tmp_path, flags, restricted):
    outside = tmp_path / "elsewhere.safetensors"
    outside.write_bytes(b"x")
    with fake_modules(data, *flags):
        host = WebuiHost()
        assert host.restricted() is restricted
        assert host.paths_allowed() is not restricted
        assert host.base_path("base.safetensors").name == "base.safetensors"
        assert host.base_path("base").name == "base.safetensors", "short names of the host work too"
        inside = outside.rename(data / "models" / "Stable-diffusion" / "unlisted.safetensors")
        outside.write_bytes(b"x")
        with pytest.raises(UnknownNameError):
            host.base_path(str(outside))
        with pytest.raises(UnknownNameError):
            host.base_path(str(inside.parent / ".." / ".." / ".." / outside.name))
        if restricted:
            with pytest.raises(UnknownNameError):
                host.base_path(str(inside))
        else:
            assert host.base_path(str(inside)) == inside
        with pytest.raises(UnknownNameError):
            host.find(str(outside))
        host.close()


def test_a_link_out_of_the_folder_is_refused_to_a_page_that_others_may_use(data, tmp_path):
    target = make_lora(tmp_path / "private" / "secret.safetensors", SMALL)
    try:
        (data / "models" / "Lora" / "secret.safetensors").symlink_to(target)
    except OSError:
        pytest.skip("this system makes no links")
    recipe = MergeRecipe(inputs=(LoraInput("a"), LoraInput("secret")), mode="concat")
    with fake_modules(data, "--listen"):
        host = WebuiHost()
        jobs = JobQueue(host)
        with pytest.raises(LoraMergeError, match="leads out"):
            jobs.submit(MergeRequest(recipe, "new"))
        jobs.close()
        host.close()


def test_folders_are_not_chosen_where_the_owner_hides_them(data):
    with fake_modules(data, "--hide-ui-dir-config"):
        host = WebuiHost()
        assert host.hide_dirs()
        assert not host.paths_allowed()
        host.check_name("new")
        with pytest.raises(OutputError, match="hide-ui-dir-config"):
            host.check_name("new", "sub")
        host.close()


def test_a_merged_file_is_linked_only_where_gradio_gives_it_out_and_folders_are_no_secret(
    data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    file = data / "models" / "Lora" / "sub" / "a & b.safetensors"
    elsewhere = tmp_path.parent / "elsewhere" / "c.safetensors"
    with fake_modules(data) as host_modules:
        host = WebuiHost()
        assert WebuiHost().file_link(elsewhere) is None
        host_modules.shared.demo = SimpleNamespace(allowed_paths=[str(data)], blocked_paths=[])
        # Below the current folder, no folder above that is told.
        assert host.file_link(file) == "file=data/models/Lora/sub/a%20%26%20b.safetensors"
        assert host.file_link(elsewhere) is None
        host_modules.shared.demo.allowed_paths.append(str(elsewhere.parent))
        assert host.file_link(elsewhere) == f"file={elsewhere.as_posix()}"
        host_modules.shared.demo.blocked_paths.append(str(file.parent))
        assert host.file_link(file) is None
        host.close()
    with fake_modules(data, "--hide-ui-dir-config") as host_modules:
        host = WebuiHost()
        host_modules.shared.demo = SimpleNamespace(allowed_paths=[str(data)], blocked_paths=[])
        assert host.file_link(file) is None
        host.close()


@pytest.mark.parametrize("flag", ["--listen", "--share", "--hide-ui-dir-config"])
def test_where_others_see_the_page_no_folder_of_this_machine_is_told(data, flag, monkeypatch):
    monkeypatch.chdir(data.parent.parent)
    folder = data / "models" / "Lora"
    full = f"{folder / 'a.safetensors'} cannot be read. The disk of {folder} is full."
    with fake_modules(data) as modules:
        host = WebuiHost()
        assert host.shown(full) == full
        assert host.shown_path(folder / "sub" / "a.safetensors") == str(folder / "sub" / "a.safetensors")
        host.close()
    with fake_modules(data, flag) as modules:
        host = WebuiHost()
        assert host.shown(full) == "a.safetensors cannot be read. The disk of the LoRA folder is full."
        made = Sentence("{file} is in {folder}.", folder / "a.safetensors", folder)
        assert host.shown(made).to_json() == ["{file} is in {folder}.", "a.safetensors", ["the LoRA folder"]]
        temporary = os.path.join(tempfile.gettempdir(), "x", "y.safetensors")
        assert tempfile.gettempdir() not in host.shown(f"{temporary} is too large.")
        assert host.shown_path(folder / "sub" / "a.safetensors") == "sub/a.safetensors"
        # A link is relative to where the WebUI runs, or there is none.
        modules.shared.demo = SimpleNamespace(allowed_paths=[str(data)], blocked_paths=[])
        below = host.file_link(folder / "a.safetensors")
        assert below is None or below.startswith(f"file={data.parent.name}/")
        monkeypatch.chdir(folder)
        monkeypatch.chdir("..")
        assert host.file_link(data / "a.safetensors") is None
        host.close()


def test_settings_are_the_hosts_and_nonsense_falls_back(data):
    changed = '{"loramerge_mode": "concat", "loramerge_queue_lock": true, "loramerge_keep_trials_hours": "x"}'
    with fake_modules(data, "--options", changed) as modules:
        settings.add_to_host(modules.shared, settings.rows(("svd", "concat"), ("same",), ("cpu",)))
        host = WebuiHost()
        read = host.settings()
        assert (read.mode, read.queue_lock, read.keep_trials_hours) == ("concat", True, 0.0)
        assert read.rank == settings.Settings().rank
        sections = {
            info.section for key, info in modules.shared.opts.data_labels.items() if "loramerge" in key
        }
        assert sections == {("loramerge", "LoRA Merge")}
        host.close()


def test_frozen_settings_are_read_and_never_written(data):
    with fake_modules(data, "--freeze-settings") as modules:
        settings.add_to_host(modules.shared, settings.rows(("svd",), ("same",), ("cpu",)))
        host = WebuiHost()
        assert host.frozen_settings()
        assert host.settings() == settings.Settings()
        host.close()


@pytest.mark.parametrize("forge", [False, True], ids=["a1111", "forge"])
def test_a_trial_can_be_used_after_every_refresh_and_is_gone_after_removal(data, forge):
    with fake_modules(data, forge=forge) as modules:
        networks = modules.networks
        listing = networks.process_network_files
        host = WebuiHost()
        jobs = JobQueue(host)
        job = finish(jobs, MergeRequest(BOTH, trial=True))
        name, path = job.prompt_name, job.output
        assert path.is_file()
        assert not path.is_relative_to(data), "nothing is written to the LoRA folder"
        first = networks.picture([(name, 1.0)])
        assert first[0][2] is not None
        networks.list_available_networks()
        networks.update_available_networks_by_names(["a"])
        host.refresh()
        assert networks.picture([(name, 1.0)]) == first
        assert networks.available_networks[name].alias == name, "its metadata must not call it otherwise"
        jobs.trials.remove(name)
        assert not path.exists()
        networks.list_available_networks()
        assert name not in networks.available_networks
        assert name not in networks.available_network_aliases
        assert not [e for e in networks.available_network_hash_lookup.values() if e.name == name]
        assert networks.process_network_files is listing, "the host is as it was"
        jobs.close()
        host.close()


def test_a_name_of_a_trial_is_never_used_again(data):
    with fake_modules(data):
        host = WebuiHost()
        jobs = JobQueue(host)
        names = {finish(jobs, MergeRequest(BOTH, trial=True)).prompt_name for _ in range(3)}
        assert len(names) == 3
        jobs.trials.remove_all()
        assert finish(jobs, MergeRequest(BOTH, trial=True)).prompt_name not in names
        jobs.trials.remove_all()
        jobs.close()
        host.close()


def test_saving_what_was_tried_removes_the_trial(data):
    with fake_modules(data) as modules:
        host = WebuiHost()
        jobs = JobQueue(host)
        trial = finish(jobs, MergeRequest(BOTH, trial=True))
        other = finish(jobs, MergeRequest(MergeRecipe(inputs=(LoraInput("a"),), mode="concat"), trial=True))
        saved = finish(jobs, MergeRequest(BOTH, name="kept"))
        assert jobs.trials.names() == [other.prompt_name]
        assert any(trial.prompt_name in note and "kept" in note for note in saved.notes)
        assert modules.networks.picture([("kept", 1.0)])[0][2] is not None
        jobs.trials.remove_all()
        jobs.close()
        host.close()


def test_saving_what_was_tried_merges_nothing_again_and_writes_the_file_of_a_merge(data, monkeypatch):
    recipe = MergeRecipe(inputs=(LoraInput("a", 0.5, 0.5, lbw="MIDD"), LoraInput("b")), mode="svd", rank=3)
    with fake_modules(data):
        host = WebuiHost()
        jobs = JobQueue(host)
        merged = finish(jobs, MergeRequest(recipe, name="merged"))
        trial = finish(jobs, MergeRequest(recipe, trial=True))
        with monkeypatch.context() as patch:
            patch.setattr(merge, "run_merge", lambda *_, **__: pytest.fail("merged again"), raising=False)
            kept = finish(jobs, MergeRequest(recipe, name="kept", subfolder="new"))
        assert kept.output == data / "models" / "Lora" / "new" / "kept.safetensors"
        assert tensor_bytes(kept.output) == tensor_bytes(merged.output)
        with safe_open(kept.output, "pt") as file:
            metadata = file.metadata()
        assert (metadata["ss_output_name"], metadata["modelspec.title"]) == ("kept", "kept")
        assert kept.report.output == str(kept.output)
        assert kept.report.size_bytes == kept.output.stat().st_size
        assert kept.report.error == trial.report.error
        # To the last byte what a merge under that name writes.
        copied = kept.output.read_bytes()
        jobs.trials.remove_all()
        again = finish(jobs, MergeRequest(recipe, name="kept", subfolder="new", overwrite=True))
        assert "merge" in again.report.seconds
        assert again.output.read_bytes() == copied
        jobs.trials.remove_all()
        jobs.close()
        host.close()


def test_a_tried_file_is_merged_anew_when_anything_has_changed(data, monkeypatch):
    """Another source under its name, another preset under its name, another file in the trial's place."""
    folder = data / "models" / "Lora"
    recipe = MergeRecipe(inputs=(LoraInput("a", lbw="MINE"), LoraInput("b")), mode="concat")
    presets = data / "mine.txt"
    presets.write_text("MINE:1,0,0,0,1,1,1,1,1,1,1,1,1,1,1,1,1\n", encoding="utf-8")

    def changed_source():
        make_lora(folder / "b.safetensors", SMALL, seed=9)

    def changed_preset():
        presets.write_text("MINE:1,0,0,0,0.5,0.5,0.5,1,1,1,1,1,1,1,1,1,1\n", encoding="utf-8")

    def changed_trial():
        make_lora(jobs.trials.get(trial.prompt_name).path, SMALL, rank=2)

    with fake_modules(data):
        host = WebuiHost()
        monkeypatch.setattr(host, "preset_path", lambda: presets)
        jobs = JobQueue(host)
        for number, change in enumerate((changed_source, changed_preset, changed_trial)):
            trial = finish(jobs, MergeRequest(recipe, trial=True))
            change()
            saved = finish(jobs, MergeRequest(recipe, name=f"saved{number}"))
            assert "merge" in saved.report.seconds, change.__name__
            assert jobs.trials.names() == []
        jobs.close()
        host.close()


def test_a_tried_file_of_limited_size_is_saved_only_where_a_longer_name_leaves_it_within(data):
    with fake_modules(data):
        host = WebuiHost()
        jobs = JobQueue(host)
        recipe = MergeRecipe(inputs=BOTH.inputs, mode="svd", size=0.03)
        for name in ("s", "l" * 100):
            finish(jobs, MergeRequest(recipe, trial=True))
            saved = finish(jobs, MergeRequest(recipe, name=name))
            assert saved.output.stat().st_size <= 30_000
        jobs.close()
        host.close()


def tensor_bytes(path):
    """The bytes after the header."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_folders_of_hosts_that_were_killed_are_cleared_and_those_of_running_ones_are_not(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, alive = (tmp_path / f"{PREFIX}{pid}-x" for pid in (ended.pid, os.getpid()))
    other = tmp_path / "somebody-else"
    for folder in (dead, alive, other):
        folder.mkdir()
        (folder / "file").write_bytes(b"x")
    long_ago = time.time() - 30 * 24 * 3600
    os.utime(dead, (long_ago, long_ago))
    remove_stale_folders()
    assert [folder.exists() for folder in (dead, alive, other)] == [False, True, True]


def test_only_so_many_trials_are_kept(data, monkeypatch):
    monkeypatch.setattr("lib_loramerge.webui.trial.MAX_TRIALS", 2)
    with fake_modules(data):
        host = WebuiHost()
        jobs = JobQueue(host)
        made = [finish(jobs, MergeRequest(BOTH, trial=True)).output for _ in range(3)]
        assert [path.exists() for path in made] == [False, True, True]
        folder = made[0].parent
        jobs.trials.remove_all()
        assert not folder.exists()
        jobs.close()
        host.close()


@pytest.mark.parametrize("forge", [False, True], ids=["a1111", "forge"])
def test_an_overwritten_file_is_used_in_the_next_picture(data, forge):
    with fake_modules(data, forge=forge) as modules:
        networks = modules.networks
        host = WebuiHost()
        jobs = JobQueue(host)
        finish(jobs, MergeRequest(BOTH, name="merged"))
        old = networks.picture([("merged", 1.0)])
        other = MergeRecipe(inputs=(LoraInput("b", 0.3, 0.3),), mode="concat")
        job = finish(jobs, MergeRequest(other, name="merged", overwrite=True))
        new = networks.picture([("merged", 1.0)])
        [before], [after] = old[0][2].split()[:1], new[0][2].split()[:1]
        assert before != after, "the denoiser uses the new file"
        assert new[0][2].split() == [after, after], (
            "and so does the text encoder, though the prompt is the same"
        )
        assert networks.picture([("merged", 0.5), ("merged", 1.0)])[1][2] == new[0][2]
        assert any("next picture" in note for note in job.notes)
        jobs.close()
        host.close()


def test_a_new_file_is_listed_by_the_host_without_reading_all_others(data):
    with fake_modules(data) as modules:
        host = WebuiHost()
        jobs = JobQueue(host)
        modules.network.metadata_reads.clear()
        finish(jobs, MergeRequest(BOTH, name="fresh"))
        assert "fresh" in modules.networks.available_networks
        assert [path for path in modules.network.metadata_reads if "fresh" not in path] == []
        jobs.close()
        host.close()


def test_nothing_of_ours_stays_in_torchs_global_state(data):
    def state():
        return (
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.get_float32_matmul_precision(),
            torch.random.get_rng_state().sum().item(),
        )

    with fake_modules(data):
        host = WebuiHost()
        jobs = JobQueue(host)
        before = state()
        for mode in ("svd", "concat"):
            finish(jobs, MergeRequest(MergeRecipe(inputs=BOTH.inputs, mode=mode), name=f"m-{mode}"))
        assert state() == before
        jobs.close()
        host.close()


def test_presets_of_the_block_weight_extension_are_read_and_ours_win(data):
    folder = data / "extensions" / "sd-webui-lora-block-weight" / "scripts"
    folder.mkdir(parents=True)
    theirs = "MINE:1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0.25\nMIDD:0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0\n"
    (folder / "lbwpresets.txt").write_text(theirs, encoding="utf-8")
    with fake_modules(data):
        host = WebuiHost()
        presets = host.presets()
        assert presets.weights["MINE"].endswith("0.25")
        assert presets.weights["MIDD"] != "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0"
        assert host.presets() is presets, "read again only when a file changed"
        (folder / "lbwpresets.txt").write_text(theirs.replace("MINE", "OTHER"), encoding="utf-8")
        assert "OTHER" in host.presets().weights
        host.close()


@pytest.mark.parametrize("content", [b"", b"not a lora", b"\x00" * 64, b"\xff" * 2000])
def test_a_broken_file_is_refused_and_stays_where_it_is(data, content, monkeypatch):
    """Forge renames what its own loaders fail on; ours must not go through them."""
    import safetensors.torch

    def renamed(path, *_, **__):
        raise AssertionError(f"the host's wrapped loader was called with {path}")

    monkeypatch.setattr(torch, "load", renamed)
    monkeypatch.setattr(safetensors.torch, "load_file", renamed)
    with fake_modules(data, forge=True):
        host = WebuiHost()
        jobs = JobQueue(host)
        for suffix in (".safetensors", ".pt"):
            broken = data / "models" / "Lora" / f"broken{suffix}"
            broken.write_bytes(content)
            host.refresh()
            recipe = MergeRecipe(inputs=(LoraInput("a"), LoraInput("broken")), mode="concat")
            with pytest.raises(LoraMergeError, match="broken"):
                jobs.submit(MergeRequest(recipe, "new"))
            assert broken.read_bytes() == content
            broken.unlink()
        finish(jobs, MergeRequest(BOTH, "good"))
        jobs.close()
        host.close()
