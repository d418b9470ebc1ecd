"""The queue: one merge at a time, cancel, and what is left behind."""

from __future__ import annotations

import json
import pkgutil
import threading
import time
from dataclasses import replace

import pytest

from lib_loramerge.errors import LoraMergeError, RecipeError
from lib_loramerge.files import model_hash, read_header
from lib_loramerge.metadata import read_recipe
from lib_loramerge.recipe import LoraInput, MergeRecipe
from lib_loramerge.webui import jobs as jobs_module
from lib_loramerge.webui import sidecar
from lib_loramerge.webui.host import ConflictError, StandaloneHost, WebuiHost
from lib_loramerge.webui.jobs import JobQueue
from lib_loramerge.webui.merge_jobs import MergeRequest
from lib_loramerge.webui.schema import job_schema
from lib_loramerge.webui.sidecar import UserMetadata
from tests.helpers.fixtures import SD1_LAYERS, dense_deltas, make_lora, weighted_sum
from tests.helpers.inprocess import fake_modules

SMALL = dict(list(SD1_LAYERS.items())[1:4])
BOTH = MergeRecipe(inputs=(LoraInput("a", 0.5, 0.5), LoraInput("b", -0.7, -0.7)), mode="concat")


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(("a", "b")):
        make_lora(tmp_path / f"{name}.safetensors", SMALL, seed=seed)
    return tmp_path


@pytest.fixture
def queue(folder):
    queue = JobQueue(StandaloneHost([folder]))
    yield queue
    queue.close()
    queue.host.close()


def wait_for(condition, seconds=120.0):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.01)


def end(queue, job):
    version = -1
    limit = time.monotonic() + 240
    while not job.finished and time.monotonic() < limit:
        version = queue.wait(version, 0.2)
    assert job.finished
    return job


class Gate:
    """Stands in for the merge: waits until it is let through, and can be cancelled meanwhile."""

    def __init__(self, monkeypatch):
        import lib_loramerge.merge as merge
        import lib_loramerge.merge.run as run

        self.inside, self.go, self.order = threading.Event(), threading.Event(), []
        self.at_once = self.most_at_once = 0
        original = run.run_merge

        def slow(plan, output, *, cancel, **options):
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            self.order.append(output.stem)
            self.inside.set()
            while not self.go.wait(0.01):
                if cancel():
                    break
            try:
                return original(plan, output, cancel=cancel, **options)
            finally:
                self.at_once -= 1

        monkeypatch.setattr(merge, "run_merge", slow, raising=False)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.go.set()


def test_a_job_writes_the_weighted_sum_and_its_report(queue, folder):
    job = end(queue, queue.submit(MergeRequest(BOTH, "merged")))
    assert job.state == "done", job.error
    assert job.output == folder / "merged.safetensors"
    assert job.prompt_name == "merged"
    expected = weighted_sum([(folder / "a.safetensors", 0.5), (folder / "b.safetensors", -0.7)])
    written = dense_deltas(job.output)
    assert written.keys() == expected.keys() or len(written) == len(expected)
    for delta in written.values():
        assert any(
            delta.shape == e.shape and (delta - e).norm() <= 1e-5 * e.norm() for e in expected.values()
        )
    content = job.to_json(folder)
    json.dumps(content, allow_nan=False)
    assert content["output"] == "merged.safetensors"
    assert str(folder) not in json.dumps(content), "no folder of this machine is told"
    assert job.fraction == 1.0
    assert content["progress"]["done"] == content["progress"]["total"] > 0


def test_later_jobs_wait_their_turn_one_at_a_time(queue, gate):
    jobs = [queue.submit(MergeRequest(BOTH, name)) for name in ("one", "two", "three")]
    assert gate.inside.wait(120)
    assert [job.state for job in jobs] == ["running", "waiting", "waiting"]
    assert [job.position for job in jobs] == [0, 1, 2]
    assert queue.current() is jobs[0]
    gate.go.set()
    for job in jobs:
        assert end(queue, job).state == "done"
    assert gate.order == ["one", "two", "three"]
    assert gate.most_at_once == 1


def test_a_waiting_job_can_be_dropped_and_the_others_move_up(queue, gate, folder):
    jobs = [queue.submit(MergeRequest(BOTH, name)) for name in ("one", "two", "three")]
    assert gate.inside.wait(120)
    assert queue.cancel(jobs[1].id) is jobs[1]
    assert jobs[1].state == "cancelled"
    assert [job.position for job in jobs[::2]] == [0, 1]
    gate.go.set()
    assert end(queue, jobs[2]).state == "done"
    assert not (folder / "two.safetensors").exists()


# What is promised is one second, on a machine that does nothing else; the work is held for a minute.
CANCEL_SECONDS = 15.0


@pytest.mark.parametrize(
    ("phase", "owner", "function"),
    [
        ("comparing hashes", "lib_loramerge.merge.plan", "model_hash"),
        ("looking at all layers", "lib_loramerge.merge.layer.Merger", "spectrum"),
        ("merging", "lib_loramerge.merge.layer.Merger", "merge_together"),
        ("hashing the sources", "lib_loramerge.merge.read.SourceReader", "model_hash"),
        ("writing", "lib_loramerge.files.write", "_bytes_of"),
    ],
)
def test_cancelling_acts_within_a_second_in_every_phase_and_leaves_nothing(
    queue, folder, monkeypatch, phase, owner, function
):
    """A part of the work is made to last: those that look for a stop themselves look on, others sleep."""
    inside, go = threading.Event(), threading.Event()
    owner = pkgutil.resolve_name(owner)
    original = getattr(owner, function)

    def slow(*args):
        inside.set()
        if function == "model_hash":
            while not go.wait(0.01):
                args[1]()
        elif function == "_bytes_of":
            go.wait(0.2)
        else:
            go.wait(60)
        return original(*args)

    monkeypatch.setattr(owner, function, slow)
    before = sorted(folder.rglob("*"))
    digest = model_hash(folder / "a.safetensors")
    inputs = (LoraInput("a", 0.5, 0.5, hash=digest), LoraInput("b"))
    recipe = MergeRecipe(inputs=inputs, mode="svd", size=0.05 if function == "spectrum" else None)
    try:
        job = queue.submit(MergeRequest(recipe, "merged", subfolder="new"))
        assert inside.wait(120)
        start = time.monotonic()
        queue.cancel(job.id)
        wait_for(lambda: job.finished)
        seconds = time.monotonic() - start
    finally:
        go.set()
    print(f"{phase}: cancelled after {seconds * 1000:.0f} ms")
    assert seconds < CANCEL_SECONDS
    assert (job.state, job.error, job.report) == ("cancelled", "", None)
    assert sorted(folder.rglob("*")) == before
    monkeypatch.undo()
    again = end(queue, queue.submit(MergeRequest(BOTH, "merged")))
    assert again.state == "done", "the queue goes on after a cancel"


def test_a_new_subfolder_is_made_and_goes_again_with_a_cancelled_job(queue, gate, folder):
    job = queue.submit(MergeRequest(BOTH, "merged", subfolder="new/deep"))
    assert gate.inside.wait(120)
    queue.cancel(job.id)
    end(queue, job)
    assert not (folder / "new").exists()
    again = queue.submit(MergeRequest(BOTH, "merged", subfolder="new/deep"))
    gate.go.set()
    assert end(queue, again).state == "done"
    assert (folder / "new" / "deep" / "merged.safetensors").is_file()


def test_the_thread_ends_when_there_is_nothing_to_do(queue):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "loramerge-jobs"]

    assert threads() == []
    end(queue, queue.submit(MergeRequest(BOTH, "merged")))
    wait_for(lambda: threads() == [])
    end(queue, queue.submit(MergeRequest(BOTH, "again")))
    wait_for(lambda: threads() == [])


def test_closing_cancels_what_runs_and_what_waits(queue, gate, folder):
    jobs = [queue.submit(MergeRequest(BOTH, name)) for name in ("one", "two")]
    assert gate.inside.wait(120)
    queue.close()
    assert [job.state for job in jobs] == ["cancelled", "cancelled"]
    assert not [thread for thread in threading.enumerate() if thread.name == "loramerge-jobs"]
    assert not (folder / "one.safetensors").exists()


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (MergeRequest(BOTH, ""), "name is empty"),
        (MergeRequest(BOTH, "../out"), "holds '/'|lead out"),
        (MergeRequest(BOTH, "new", subfolder="../up"), "not allowed"),
        (MergeRequest(BOTH, "a", overwrite=True), "one of the LoRAs being merged"),
        (MergeRequest(BOTH, "a"), "exists already"),
        (MergeRequest(MergeRecipe(inputs=(LoraInput("nobody"),)), "new"), "no LoRA called nobody"),
        (MergeRequest(MergeRecipe(inputs=(LoraInput("a"),), mode="magic"), "new"), "no mode 'magic'"),
        (MergeRequest(MergeRecipe(inputs=(LoraInput("a", lbw="NOPE"),)), "new"), "NOPE"),
        (MergeRequest(BOTH, "new", preview="a"), "no preview picture"),
        (MergeRequest(BOTH, trial=True), "needs a WebUI"),
    ],
)
def test_what_cannot_work_is_refused_before_it_is_queued(queue, request_, sentence):
    with pytest.raises(LoraMergeError, match=sentence):
        queue.submit(request_)
    assert queue.list() == []


def test_two_unfinished_jobs_cannot_write_one_file(queue, gate):
    queue.submit(MergeRequest(BOTH, "merged"))
    with pytest.raises(ConflictError, match="Another merge"):
        queue.submit(MergeRequest(BOTH, "merged", overwrite=True))


def test_only_so_many_jobs_wait(queue, gate, monkeypatch):
    monkeypatch.setattr(jobs_module, "MAX_WAITING", 2)
    for index in range(3):
        queue.submit(MergeRequest(BOTH, f"m{index}"))
    with pytest.raises(ConflictError, match="2 merges are waiting"):
        queue.submit(MergeRequest(BOTH, "m3"))


def test_finished_jobs_are_forgotten_after_a_while(queue, monkeypatch):
    monkeypatch.setattr(jobs_module, "MAX_FINISHED", 2)
    made = [end(queue, queue.submit(MergeRequest(BOTH, f"m{index}"))) for index in range(4)]
    assert queue.get(made[0].id) is None
    assert queue.get(made[-1].id) is made[-1]
    assert len(queue.list()) <= 3


def test_a_failing_job_says_why_and_the_next_one_runs(queue, folder, gate):
    first = queue.submit(MergeRequest(BOTH, "first"))
    assert gate.inside.wait(120)
    second = queue.submit(MergeRequest(BOTH, "second"))
    third = queue.submit(MergeRequest(MergeRecipe(inputs=(LoraInput("a"),), mode="concat"), "third"))
    (folder / "b.safetensors").write_bytes(b"broken meanwhile")
    gate.go.set()
    assert end(queue, second).state == "failed"
    assert "b.safetensors" in second.error
    assert end(queue, third).state == "done"
    assert first.finished


def test_a_bug_of_ours_is_told_and_logged_and_the_next_one_runs(queue, monkeypatch):
    import lib_loramerge.merge as merge

    logged = []
    monkeypatch.setattr(queue.host, "log", lambda message, error=None: logged.append(error))
    monkeypatch.setattr(merge, "run_merge", lambda *_, **__: 1 / 0, raising=False)
    job = end(queue, queue.submit(MergeRequest(BOTH, "merged")))
    assert job.state == "failed"
    assert "ZeroDivisionError" in job.error
    assert isinstance(logged[0], ZeroDivisionError)
    monkeypatch.undo()
    assert end(queue, queue.submit(MergeRequest(BOTH, "merged"))).state == "done"


def test_the_name_may_be_taken_while_a_job_waits(queue, gate, folder):
    queue.submit(MergeRequest(BOTH, "first"))
    assert gate.inside.wait(120)
    second = queue.submit(MergeRequest(BOTH, "second"))
    (folder / "second.safetensors").write_bytes(b"mine")
    gate.go.set()
    assert end(queue, second).state == "failed"
    assert "exists already" in second.error
    assert (folder / "second.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize(("size", "phases"), [(None, ["merge", "write"]), (1, ["look", "merge", "write"])])
def test_progress_is_told_while_a_job_runs_and_never_goes_back(queue, monkeypatch, size, phases):
    seen = []
    tell = queue._show

    def telling(job, progress):
        tell(job, progress)
        seen.append((progress.phase, job.fraction, progress.done, progress.total))

    monkeypatch.setattr(queue, "_show", telling)
    recipe = replace(BOTH, mode="svd", size=size)
    job = end(queue, queue.submit(MergeRequest(recipe, "merged")))
    assert job.state == "done", job.error
    assert list(dict.fromkeys(phase for phase, *_ in seen)) == phases
    assert set(phases) <= set(job_schema()["properties"]["progress"]["properties"]["phase"]["enum"])
    assert [fraction for _, fraction, *_ in seen] == sorted(fraction for _, fraction, *_ in seen)
    writing = [(done, total) for phase, _, done, total in seen if phase == "write"]
    assert writing == [(done, len(writing)) for done in range(len(writing))]


def test_waiting_for_a_change_ends_by_itself(queue):
    start = time.monotonic()
    assert queue.wait(queue.version, 0.05) == queue.version
    assert time.monotonic() - start < 5


def test_the_sidecar_files_of_a_webui_are_written(queue, folder):
    picture = b"\x89PNG\r\n\x1a\n" + b"picture"
    (folder / "a.preview.png").write_bytes(picture)
    data = UserMetadata(activation_text="猫, cat", preferred_weight=0.8, notes="made of a and b")
    job = end(queue, queue.submit(MergeRequest(BOTH, "merged", user_metadata=data, preview="a")))
    assert job.notes == ()
    stored = json.loads((folder / "merged.json").read_text(encoding="utf-8"))
    assert stored["activation text"] == "猫, cat"
    assert stored["preferred weight"] == 0.8
    assert stored["notes"] == "made of a and b"
    assert (folder / "merged.png").read_bytes() == picture
    assert sidecar.read(folder / "merged.safetensors") == data


def test_a_picture_of_another_kind_becomes_a_png(folder):
    from PIL import Image

    Image.new("RGB", (4, 3), (200, 10, 10)).save(folder / "a.jpg")
    sidecar.write(folder / "m.safetensors", None, sidecar.preview_of(folder / "a.safetensors"))
    with Image.open(folder / "m.png") as image:
        assert (image.format, image.size) == ("PNG", (4, 3))
    (folder / "b.jpg").write_bytes(b"no picture")
    with pytest.raises(LoraMergeError, match="not a picture"):
        sidecar.write(folder / "n.safetensors", None, sidecar.preview_of(folder / "b.safetensors"))
    assert not list(folder.glob("*.tmp"))


def test_a_sidecar_that_is_there_is_not_replaced_unasked(queue, folder):
    (folder / "merged.json").write_text('{"notes": "old", "mine": 1}', encoding="utf-8")
    data = UserMetadata(notes="new")
    with pytest.raises(ConflictError, match=r"merged\.json exists already"):
        queue.submit(MergeRequest(BOTH, "merged", user_metadata=data))
    end(queue, queue.submit(MergeRequest(BOTH, "merged", user_metadata=data, overwrite=True)))
    stored = json.loads((folder / "merged.json").read_text(encoding="utf-8"))
    assert (stored["notes"], stored["mine"]) == ("new", 1)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"activation text": 5, "preferred weight": "x"}', "[" * 100_000, "\udcff"]
)
def test_a_sidecar_that_makes_no_sense_is_read_as_empty(folder, content):
    (folder / "a.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert sidecar.read(folder / "a.safetensors").empty


def test_activation_texts_are_joined_without_repeats(folder):
    (folder / "a.json").write_text('{"activation text": "cat, red hat"}', encoding="utf-8")
    (folder / "b.json").write_text('{"activation text": "red hat , dog"}', encoding="utf-8")
    joined = sidecar.union([folder / "a.safetensors", folder / "b.safetensors"])
    assert joined.activation_text == "cat, red hat, dog"


def test_a_merge_waits_for_a_picture_only_when_the_user_says_so(tmp_path):
    data = tmp_path / "data"
    for seed, name in enumerate(("a", "b")):
        make_lora(data / "models" / "Lora" / f"{name}.safetensors", SMALL, seed=seed)
    for wanted in (False, True):
        options = json.dumps({"loramerge_queue_lock": wanted})
        with fake_modules(data, "--options", options) as modules:
            host = WebuiHost()
            queue = JobQueue(host)
            lock = modules.call_queue.queue_lock
            lock.acquire()  # A picture in the making.
            try:
                job = queue.submit(MergeRequest(BOTH, f"m-{wanted}"))
                dropped = queue.submit(MergeRequest(BOTH, f"d-{wanted}"))
                if wanted:
                    time.sleep(0.2)
                    assert (job.state, dropped.state) == ("waiting", "waiting")
                    queue.cancel(dropped.id)
                    assert dropped.state == "cancelled", "a waiting job can be dropped at once"
                else:
                    assert end(queue, job).state == "done"
            finally:
                lock.release()
            assert end(queue, job).state == "done"
            queue.close()
            host.close()


@pytest.mark.parametrize("forge", [False, True], ids=["a1111", "forge"])
def test_replacing_a_file_while_merges_wait_for_pictures_does_not_lock_up(tmp_path, forge):
    """The host's lock cannot be taken twice, and both the merge and its end may want it."""
    data = tmp_path / "data"
    for seed, name in enumerate(("a", "b")):
        make_lora(data / "models" / "Lora" / f"{name}.safetensors", SMALL, seed=seed)
    with fake_modules(data, "--options", '{"loramerge_queue_lock": true}', forge=forge) as modules:
        queue = JobQueue(WebuiHost())
        for overwrite in (False, True):
            job = end(queue, queue.submit(MergeRequest(BOTH, "merged", overwrite=overwrite)))
            assert job.state == "done", job.error
        assert modules.call_queue.queue_lock.acquire(blocking=False), "the lock is free again"
        modules.call_queue.queue_lock.release()
        queue.close()
        queue.host.close()


def test_a_merge_of_a_recipe_that_names_other_bytes_is_refused(queue, folder):
    recipe = MergeRecipe(inputs=(LoraInput("a", hash="0" * 64), LoraInput("b")), mode="concat")
    job = end(queue, queue.submit(MergeRequest(recipe, "merged")))
    assert job.state == "failed"
    assert "not the file this recipe was made with" in job.error


def test_the_tab_merges_other_bytes_says_so_and_knows_from_then_on(queue, folder):
    first = end(queue, queue.submit(MergeRequest(MergeRecipe((LoraInput("a"), LoraInput("b"))), "first")))
    hashes = [entry.sshs_model_hash for entry in first.report.inputs]
    inputs = (LoraInput("a", hash="0" * 64), LoraInput("b", hash=hashes[1]))
    job = end(queue, queue.submit(MergeRequest(MergeRecipe(inputs), "merged", changed_sources=True)))
    assert job.state == "done"
    [note] = job.notes
    assert note.startswith("a.safetensors is not the file this recipe was made with")
    assert queue.host.source_hashes.find(folder / "a.safetensors", {}) == hashes[0]
    # The new file's own recipe names what was really merged.
    stored = read_recipe(read_header(job.output).metadata)
    assert [entry.hash for entry in stored.inputs] == hashes
    make_lora(folder / "a.safetensors", SMALL, seed=9)
    assert queue.host.source_hashes.find(folder / "a.safetensors", {}) == ""


def test_an_old_trial_goes_when_the_user_keeps_them_for_hours_only(tmp_path, monkeypatch):
    data = tmp_path / "data"
    make_lora(data / "models" / "Lora" / "a.safetensors", SMALL)
    recipe = MergeRecipe(inputs=(LoraInput("a"),), mode="concat")
    with fake_modules(data, "--options", '{"loramerge_keep_trials_hours": 2}'):
        host = WebuiHost()
        queue = JobQueue(host)
        trial = end(queue, queue.submit(MergeRequest(recipe, trial=True)))
        assert queue.trials.names() == [trial.prompt_name]
        now = time.time()
        monkeypatch.setattr("lib_loramerge.webui.trial.time.time", lambda: now + 3 * 3600)
        end(queue, queue.submit(MergeRequest(recipe, "saved-other", subfolder="x")))
        assert queue.trials.names() == []
        queue.close()
        queue.trials.remove_all()
        host.close()


def test_a_recipe_error_names_what_is_wrong(queue):
    with pytest.raises(RecipeError):
        queue.submit(MergeRequest(MergeRecipe(inputs=(LoraInput("a", lbw="1,2,3"),)), "new"))
