"""SD.Next and Forge Neo: what they do otherwise than A1111 and Forge, and how each WebUI is recognised."""

from __future__ import annotations

import base64
import sys

import pytest

from lib_loramerge.hosts import HOSTS
from lib_loramerge.recipe import LoraInput, MergeRecipe
from lib_loramerge.webui.host import SdnextHost, WebuiHost, host_of_this_process
from lib_loramerge.webui.host.known import KNOWN
from lib_loramerge.webui.jobs import JobQueue
from lib_loramerge.webui.merge_jobs import MergeRequest
from tests.helpers.fixtures import SD1_LAYERS, make_lora
from tests.helpers.hosting import ROOT, FakeHost
from tests.helpers.inprocess import fake_modules
from tests.web.test_host_safety import finish

SMALL = dict(list(SD1_LAYERS.items())[1:4])
BOTH = MergeRecipe(inputs=(LoraInput("a", 0.5, 0.5), LoraInput("b")), mode="concat")
OTHER = MergeRecipe(inputs=(LoraInput("b", 0.3, 0.3),), mode="concat")


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    for seed, name in enumerate(("a", "b")):
        make_lora(folder / "models" / "Lora" / f"{name}.safetensors", SMALL, seed=seed)
    return folder


@pytest.fixture
def sdnext(data):
    with fake_modules(data, "--sdnext") as modules:
        host = host_of_this_process()
        jobs = JobQueue(host)
        yield host, jobs, modules
        jobs.trials.remove_all()
        jobs.close()
        host.close()


def test_it_is_recognised_and_speaks_of_its_own_list(sdnext):
    host, _, _ = sdnext
    assert isinstance(host, SdnextHost)
    assert host.name == "SD.Next"
    assert "networks" not in sys.modules, "it has no such module"
    assert [entry.name for entry in host.loras()] == ["a", "b"]
    assert host.prompts[0] == "txt2img_prompt"
    assert "control_prompt" in host.prompts


@pytest.mark.parametrize(
    ("marks", "name"),
    [
        ((), "A1111"),
        (("modules_forge",), "Forge"),
        (("modules_forge", "ldm_patched"), "reForge"),
        (("modules_forge", "modules_forge.packages.comfy"), "Forge Neo"),
    ],
)
def test_each_webui_is_recognised_by_what_it_alone_has_imported(data, monkeypatch, marks, name):
    with fake_modules(data):
        for mark in marks:
            monkeypatch.setitem(sys.modules, mark, type(sys)(mark))
        host = host_of_this_process()
        assert type(host) is WebuiHost
        assert host.name == name
        host.close()


def test_a_trial_can_be_used_after_every_refresh_and_is_gone_after_removal(sdnext):
    host, jobs, modules = sdnext
    networks = modules.networks
    listing = networks.list_available_networks
    name = finish(jobs, MergeRequest(BOTH, trial=True)).prompt_name
    first = networks.picture([(name, 1.0)])
    assert first[0][2] is not None
    networks.list_available_networks()
    host.refresh()
    networks.picture([("unknown", 1.0)])  # It looks through its folder for a name that it does not know.
    assert networks.picture([(name, 1.0)]) == first
    jobs.trials.remove(name)
    networks.list_available_networks()
    assert name not in networks.available_networks
    assert name not in networks.available_network_aliases
    assert networks.list_available_networks is listing, "the host is as it was"


def test_a_new_file_can_be_used_at_once(sdnext):
    _, jobs, modules = sdnext
    finish(jobs, MergeRequest(BOTH, name="fresh"))
    assert "fresh" in modules.networks.available_networks


@pytest.mark.parametrize("diffusers", [False, True], ids=["native", "diffusers"])
def test_an_overwritten_file_is_used_in_the_next_picture(sdnext, diffusers):
    _, jobs, modules = sdnext
    networks = modules.networks
    modules.shared.opts.lora_force_diffusers = diffusers
    saved = finish(jobs, MergeRequest(BOTH, name="merged"))
    old = networks.picture([("merged", 1.0)])
    named = networks.available_networks["merged"].metadata["sshs_model_hash"]
    assert named == saved.report.sshs_model_hash
    again = finish(jobs, MergeRequest(OTHER, name="merged", overwrite=True))
    new = networks.picture([("merged", 1.0)])
    [before], [after] = old[0][2].split()[:1], new[0][2].split()[:1]
    assert before != after, "the denoiser uses the new file"
    assert new[0][2].split() == [after, after], "and so does the text encoder"
    assert networks.available_networks["merged"].metadata["sshs_model_hash"] == again.report.sshs_model_hash


def test_a_name_with_a_dot_has_the_name_that_prompts_use(sdnext, data):
    host, jobs, modules = sdnext
    make_lora(data / "models" / "Lora" / "style.v2.safetensors", SMALL, metadata={"ss_output_name": "inside"})
    host.refresh()
    entry = next(entry for entry in host.loras() if entry.name == "style.v2")
    assert entry.alias == "style_v2"
    assert host.find("style_v2") == host.find("style.v2") == entry.path
    made = finish(jobs, MergeRequest(BOTH, name="of.both"))
    assert modules.networks.picture([(made.prompt_name, 1.0)])[0][2] is not None


def test_only_checkpoints_that_are_a_file_are_offered_as_base(data):
    folder = data / "models" / "Stable-diffusion"
    (folder / "a diffusers folder").mkdir(parents=True)
    (folder / "base.safetensors").write_bytes(b"x")
    with fake_modules(data, "--sdnext"):
        host = host_of_this_process()
        assert host.checkpoints() == ["base.safetensors"]
        assert host.base_path("base.safetensors") == folder / "base.safetensors"
        host.close()


def test_frozen_settings_are_its_own_flag(data):
    with fake_modules(data, "--sdnext", "--freeze"):
        host = host_of_this_process()
        assert host.frozen_settings()
        host.close()


def test_rest_asks_for_the_password_of_its_page(data, tmp_path):
    users = tmp_path / "users.txt"
    users.write_text("carl:from a file\n", encoding="utf-8")
    with FakeHost(data, "--sdnext", "--auth", "ann:secret,bob:other", "--auth-file", str(users)) as host:
        assert host.request("GET", "/loramerge/v1/loras")[0] == 401
        assert host.request("GET", "/loramerge/v1/loras", headers=basic("ann:wrong"))[0] == 401
        for user in ("ann:secret", "bob:other", "carl:from a file"):
            assert host.request("GET", "/loramerge/v1/loras", headers=basic(user))[0] == 200


def basic(user):
    return {"Authorization": "Basic " + base64.b64encode(user.encode()).decode()}


def test_it_serves_the_tab_and_rest_with_a_clean_log(data):
    with FakeHost(data, "--sdnext") as host:
        assert "tab_loramerge" in {c["props"].get("elem_id") for c in host.get("/config")["components"]}
        job = host.wait_for_job(
            host.post(
                "/loramerge/v1/merge",
                {"recipe": {"inputs": [{"name": "a"}, {"name": "b"}], "mode": "concat"}, "trial": True},
            )["id"]
        )
        assert host.picture(f"<lora:{job['prompt_name']}:1>")[0][2] is not None
        host.restart()
        assert host.picture(f"<lora:{job['prompt_name']}:1>")[0][2] is not None
        assert host.post("/fake/status")["errors"] == []


def test_forge_neos_further_folders_are_read_and_never_written(data, tmp_path, monkeypatch):
    elsewhere = tmp_path / "G" / "LORAS"
    make_lora(elsewhere / "far.safetensors", SMALL)
    monkeypatch.setitem(sys.modules, "modules_forge.packages.comfy", type(sys)("comfy"))
    with fake_modules(data, "--lora-dirs", str(elsewhere), "--lora-dirs", str(tmp_path / "gone"), forge=True):
        host = host_of_this_process()
        assert host.lora_dirs() == (data / "models" / "Lora", elsewhere)
        assert host.find("far") == elsewhere / "far.safetensors"
        assert host.check_name("new").parent == data / "models" / "Lora"
        host.close()


def test_the_readme_and_inspect_name_the_same_webuis():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## In a WebUI")[1].split("\n## ")[0]
    table = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("|")]
    names = {known.name for known in KNOWN}
    assert names <= set(table)
    assert names <= {host.label for host in HOSTS.values()}
