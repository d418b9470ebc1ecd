"""Bake and extract over REST: titles alone, inside the host's folders, and closed where others come in."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_loramerge.files import read_header
from tests.helpers.checkpoint_files import lora_of, make_checkpoint, product
from tests.helpers.hosting import FakeHost
from tests.helpers.inprocess import fake_modules

API = "/loramerge/v1"
LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
RECIPE = {"inputs": [{"name": "style", "te": 0.5, "unet": 0.5}]}


def fill(data):
    loras = data / "models" / "Lora"
    loras.mkdir(parents=True, exist_ok=True)
    save_file(lora_of({LAYER: (320, 320)}), loras / "style.safetensors")
    folder = data / "models" / "Stable-diffusion"
    folder.mkdir(parents=True, exist_ok=True)
    base = make_checkpoint(folder / "base.safetensors", "sd1-ldm")
    tuned = dict(base)
    generator = torch.Generator().manual_seed(9)
    up, down = torch.randn(320, 2, generator=generator), torch.randn(2, 320, generator=generator)
    tuned[KEY] = (base[KEY].float() + 0.01 * (up @ down)).half()
    save_file(tuned, folder / "tuned.safetensors")
    (folder / "old.ckpt").write_bytes(b"x")
    outside = data / "private"
    outside.mkdir()
    shutil.copy(folder / "base.safetensors", outside / "secret.safetensors")
    (folder / "linked.safetensors").symlink_to(outside / "secret.safetensors")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    data = tmp_path_factory.mktemp("checkpoints")
    fill(data)
    with FakeHost(data, "--nowebui") as running:
        yield running


def bake(host, **changes):
    return host.request(
        "POST", f"{API}/bake", {"recipe": RECIPE, "base": "base.safetensors", "name": "baked", **changes}
    )


def extract(host, **changes):
    body = {"tuned": "tuned.safetensors", "base": "base.safetensors", "name": "made", **changes}
    return host.request("POST", f"{API}/extract", body)


def test_a_bake_is_a_job_whose_file_is_listed_and_holds_the_sum(host):
    status, job = bake(host)
    assert (status, job["kind"]) == (202, "bake")
    job = host.wait_for_job(job["id"])
    assert (job["state"], job["error"]) == ("done", "")
    assert (job["output"], job["progress"]["unit"]) == ("baked.safetensors", "bytes")
    assert job["report"]["survives"] == pytest.approx(1, abs=0.01)
    assert str(host.data_dir) not in json.dumps(job)
    folder = host.data_dir / "models" / "Stable-diffusion"
    lora = load_file(host.lora_dir / "style.safetensors")
    before, after = load_file(folder / "base.safetensors"), load_file(folder / "baked.safetensors")
    wanted = (before[KEY].double() + 0.5 * product(lora, LAYER)).half()
    assert (after[KEY] != wanted).float().mean() < 1e-4
    assert "baked.safetensors" in host.get(f"{API}/checkpoints")["checkpoints"]
    status, content = bake(host)
    assert (status, "exists already" in content["error"]) == (409, True)
    assert host.wait_for_job(bake(host, overwrite=True)[1]["id"])["state"] == "done"


def test_an_extraction_is_a_job_whose_lora_can_be_used(host):
    status, job = extract(host, rank=4, subfolder="got")
    assert (status, job["kind"]) == (202, "extract")
    job = host.wait_for_job(job["id"])
    assert (job["state"], job["error"]) == ("done", "")
    assert (job["output"], job["prompt_name"]) == ("got/made.safetensors", "made")
    assert job["report"]["error"] < 0.1
    assert "made" in [entry["name"] for entry in host.get(f"{API}/loras")["loras"]]
    assert extract(host, rank=4, subfolder="got")[0] == 409
    status, job = extract(host, size=0.01, name="small")
    assert status == 202, job
    job = host.wait_for_job(job["id"])
    assert job["report"]["size_bytes"] <= 10_000
    status, job = extract(host, rank=4, name="spelled", dialect="diffusers", hash=False)
    assert (status, host.wait_for_job(job["id"])["state"]) == (202, "done")
    header = read_header(host.lora_dir / "spelled.safetensors")
    assert "ss_new_sd_model_hash" not in header.metadata
    assert all(key.startswith("unet.") for key in header.tensors)
    assert extract(host, rank=4, name="other", dialect="peft")[0] == 422
    assert extract(host, rank=4, max_rank=8, name="other")[0] == 422


def test_a_dry_run_of_an_extraction_is_a_job_that_tells_every_rank_and_writes_nothing(host):
    before = sorted(host.data_dir.rglob("*"))
    body = {"tuned": "tuned.safetensors", "base": "base.safetensors", "rank": 4, "dry_run": True}
    status, job = host.request("POST", f"{API}/extract", body)
    assert (status, job["kind"]) == (202, "analysis")
    job = host.wait_for_job(job["id"])
    assert (job["state"], job["error"], job["notes"]) == ("done", "", [])
    assert (job["output"], job["prompt_name"]) == (None, "")
    assert job["progress"]["unit"] == "bytes"
    assert job["progress"]["done"] == job["progress"]["total"]
    advice = job["report"]["advice"]
    assert [point["rank"] for point in advice["uniform"]][:4] == [1, 2, 3, 4]
    assert (advice["auto"]["least"], advice["auto"]["most"]) == (2, 2)
    folder = host.data_dir / "models" / "Stable-diffusion"
    first, second = (load_file(folder / f"{name}.safetensors")[KEY].double() for name in ("tuned", "base"))
    values = np.linalg.svd((first - second).numpy(), compute_uv=False) ** 2
    for point in advice["uniform"][:2]:
        wanted = (values[point["rank"] :].sum() / values.sum()) ** 0.5
        assert point["error"] == pytest.approx(wanted, abs=1e-3)
    assert sorted(host.data_dir.rglob("*")) == before
    assert str(host.data_dir) not in json.dumps(job)
    status, content = host.request("POST", f"{API}/extract", {**body, "base": "tuned.safetensors"})
    assert (status, "same file" in content["error"]) == (422, True)
    status, content = host.request("POST", f"{API}/extract", {**body, "dry_run": "yes"})
    assert (status, "dry_run" in content["error"]) == (422, True)


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"base": "../../private/secret.safetensors"}, 404, "no checkpoint called"),
        ({"base": "/etc/passwd"}, 404, "no checkpoint called"),
        ({"base": ""}, 422, "Choose a checkpoint"),
        ({"base": "bass.safetensors"}, 404, "Did you mean base"),
        ({"base": "linked.safetensors"}, 422, "leads out of the checkpoint folder"),
        ({"base": "old.ckpt"}, 422, "old.ckpt"),
        ({"name": "../over"}, 400, "not a name inside"),
        ({"name": ""}, 400, "name is missing"),
        ({"name": "base"}, 409, "exists already"),
        ({"name": "base", "overwrite": True}, 400, "base itself"),
        ({"rounding": "up"}, 422, "rounding must be one of"),
        ({"dtype": "int8"}, 422, "dtype must be one of"),
        ({"path": "x"}, 422, "Unknown field"),
        ({"recipe": {"inputs": [{"name": "../x"}]}}, 400, "not a name inside"),
        ({"recipe": {"inputs": [{"name": "nothing"}]}}, 404, "no LoRA called"),
    ],
)
def test_a_bake_that_cannot_be_is_refused_in_one_sentence(host, changes, status, words):
    before = sorted(host.data_dir.rglob("*"))
    answer = bake(host, **{"name": "other", **changes})
    assert (answer[0], words in answer[1]["error"]) == (status, True), answer
    assert str(host.data_dir) not in answer[1]["error"]
    assert "--" not in answer[1]["error"]
    assert sorted(host.data_dir.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"base": "tuned.safetensors"}, 422, "same file"),
        ({"tuned": "style"}, 404, "no checkpoint called"),
        ({"tuned": "linked.safetensors"}, 422, "leads out of the checkpoint folder"),
        ({"rank": 0}, 422, "rank must be"),
        ({"rank": True}, 422, "rank must be"),
        ({"rank": 8, "retain": 0.5}, 422, "exclude each other"),
        ({"rank": 8, "size": 5}, 422, "exclude each other"),
        ({"size": 0}, 422, "size must be"),
        ({"retain": 2}, 422, "retain must be"),
        ({"parts": ["vae"]}, 422, "no part 'vae'"),
        ({"parts": "te"}, 422, "list of texts"),
        ({"name": "a/b"}, 400, "name"),
        ({"subfolder": "../x"}, 400, "lead out"),
    ],
)
def test_an_extraction_that_cannot_be_is_refused_in_one_sentence(host, changes, status, words):
    answer = extract(host, **{"name": "other", **changes})
    assert (answer[0], words in answer[1]["error"]) == (status, True), answer
    assert str(host.data_dir) not in answer[1]["error"]


def test_with_others_coming_in_it_is_closed_unless_the_owner_opens_it(tmp_path):
    fill(tmp_path)
    with FakeHost(tmp_path, "--nowebui", "--listen") as closed:
        for answer in (bake(closed), extract(closed)):
            assert answer[0] == 403
            assert "--enable-insecure-extension-access" in answer[1]["error"]
    with FakeHost(tmp_path, "--nowebui", "--listen", "--enable-insecure-extension-access") as opened:
        assert bake(opened)[0] == 202


def test_a_disk_that_is_too_full_is_a_conflict_before_any_work(tmp_path, monkeypatch):
    from lib_loramerge.files import place
    from lib_loramerge.webui.checkpoint_jobs import BakeRequest, ExtractRequest
    from lib_loramerge.webui.host import ConflictError, WebuiHost
    from lib_loramerge.webui.jobs import JobQueue
    from tests.web.test_tab_form import LoraInput, MergeRecipe

    fill(tmp_path)
    monkeypatch.setattr(place, "free_space", lambda folder: 1000)
    with fake_modules(tmp_path):
        host = WebuiHost()
        recipe = MergeRecipe((LoraInput("style"),))
        settings = (("rank", 4),)
        for request in (
            BakeRequest(recipe, "base.safetensors", "full"),
            ExtractRequest("tuned.safetensors", "base.safetensors", settings, "full"),
        ):
            with pytest.raises(ConflictError, match="are needed, 1"):
                JobQueue(host).submit(request)
        assert host.without_folders(str(tmp_path / "models" / "Stable-diffusion")) == "the checkpoint folder"
        host.close()


def test_an_analysis_without_matplotlib_says_so_and_can_be_cancelled(tmp_path, monkeypatch):
    from lib_loramerge.checkpoints import extracting
    from lib_loramerge.errors import RecipeError
    from lib_loramerge.webui import plots, render_jobs
    from lib_loramerge.webui.checkpoint_jobs import AnalysisRequest, ExtractRequest
    from lib_loramerge.webui.host import WebuiHost
    from lib_loramerge.webui.jobs import JobQueue

    def lacking(report, theme):
        raise RecipeError("Pictures need matplotlib: pip install matplotlib.")

    fill(tmp_path)
    monkeypatch.setattr(plots, "advise_figure", lacking)
    asked = ExtractRequest("tuned.safetensors", "base.safetensors", (("rank", 4),), "")
    with fake_modules(tmp_path):
        host = WebuiHost()
        jobs = JobQueue(host)
        job = jobs.submit(AnalysisRequest(asked, "dark"))
        assert jobs._line.wait_for(lambda: job.finished, 60)
        assert (job.state, job.picture, job.error) == ("done", b"", "")
        page = render_jobs.analysis_page(job, host)
        assert "Pictures need matplotlib" in page
        assert 'data-table="ranks"' in page
        usual = extracting.measure

        def cancelled(*about, **how):
            jobs.cancel(jobs.current().id)
            return usual(*about, **how)

        monkeypatch.setattr(extracting, "measure", cancelled)
        job = jobs.submit(AnalysisRequest(asked))
        assert jobs._line.wait_for(lambda: job.finished, 60)
        assert (job.state, job.report) == ("cancelled", None)
        host.close()


@pytest.mark.parametrize("flags", [(), ("--sdnext",), ("--ckpt-dir", "elsewhere")])
def test_a_baked_checkpoint_goes_where_the_webuis_own_merger_writes_and_is_listed(
    tmp_path, flags, monkeypatch
):
    from lib_loramerge.webui.host import host_of_this_process

    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    with fake_modules(tmp_path, *flags):
        host = host_of_this_process()
        folder = tmp_path / ("elsewhere" if "--ckpt-dir" in flags else "models/Stable-diffusion")
        path = host.check_checkpoint_name("new")
        assert path == folder / "new.safetensors"
        path.parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "models" / "Stable-diffusion" / "base.safetensors", path)
        host.refresh_checkpoints()
        assert host.checkpoint_path("new.safetensors", "one", strict=True) == path
        host.close()


def test_a_hash_that_the_webui_keeps_is_taken(tmp_path):
    fill(tmp_path)
    folder = tmp_path / "models" / "Stable-diffusion"
    own = hashlib.sha256((folder / "base.safetensors").read_bytes()).hexdigest()
    asked = []

    def kept(answer):
        def ask(filename, title, use_addnet_hash=False):
            asked.append((Path(filename).name, title))
            return answer

        return ask

    def failing(filename, title):
        raise KeyError(title)

    with fake_modules(tmp_path):
        from lib_loramerge.recipe import from_json
        from lib_loramerge.webui.checkpoint_jobs import BakeRequest, ExtractRequest
        from lib_loramerge.webui.errand import Task
        from lib_loramerge.webui.host import WebuiHost

        sys.modules["modules.sd_models"].list_models()
        host = WebuiHost()
        request = BakeRequest(from_json(json.dumps(RECIPE)), "base.safetensors", "baked")
        cases = [(kept("ab" * 32), "ab" * 32), (kept(None), own), (kept("short"), own), (failing, own)]
        for number, (ask, wanted) in enumerate(cases):
            sys.modules["modules.hashes"] = types.SimpleNamespace(sha256_from_cache=ask)
            with request.prepared(host) as prepared:
                prepared.run(tmp_path / f"out{number}.safetensors")
            recipe = json.loads(
                read_header(tmp_path / f"out{number}.safetensors").metadata["sd_merge_recipe"]
            )
            assert recipe["primary_model_hash"] == wanted
        assert set(asked) == {("base.safetensors", "checkpoint/base.safetensors")}

        tuned = hashlib.sha256((folder / "tuned.safetensors").read_bytes()).hexdigest()
        cases = [
            ({}, "ab" * 32, ("ab" * 32, "ab" * 32)),
            ({}, None, (tuned, own)),
            ({"hashed": False}, "ab" * 32, (None, None)),
        ]
        for number, (settings, answer, wanted) in enumerate(cases):
            sys.modules["modules.hashes"] = types.SimpleNamespace(sha256_from_cache=kept(answer))
            output, phases = tmp_path / f"made{number}.safetensors", set()
            settings = tuple({"rank": 2, **settings}.items())
            task = Task(
                host,
                None,
                output,
                False,
                lambda at, seen=phases: seen.add(at.phase),
                lambda: False,
                lambda: None,
            )
            ExtractRequest("tuned.safetensors", "base.safetensors", settings, "made").run(task)
            facts = json.loads(read_header(output).metadata["loramerge_extract"])
            assert (facts["tuned"]["sha256"], facts["base"]["sha256"]) == wanted
            assert ("hash" in phases) == (answer is None)
        host.close()


def test_the_schema_names_what_the_library_knows():
    from lib_loramerge.checkpoints import baking, differing
    from lib_loramerge.webui import schema

    assert baking.ROUNDINGS == schema.ROUNDINGS
    assert {"same", *baking.DTYPES} == set(schema.BAKED_DTYPES)
    assert (differing.PARTS, differing.VECTORS) == (schema.PARTS, schema.VECTORS)
