"""Sweeps over REST: one job, files that are those of single merges, and refusals in words."""

from __future__ import annotations

import json

import pytest

from tests.helpers.fixtures import SD1_LAYERS, make_lora
from tests.helpers.hosting import FakeHost

API = "/loramerge/v1"
SMALL = dict(list(SD1_LAYERS.items())[1:4])
INPUTS = ["a:0.2/0.8", {"name": "b", "te": 0.7}]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    data = tmp_path_factory.mktemp("sweeps")
    folder = data / "models" / "Lora"
    make_lora(folder / "a.safetensors", SMALL, seed=1)
    make_lora(folder / "sub" / "b.safetensors", SMALL, seed=2, alpha=2)
    private = make_lora(data / "private" / "secret.safetensors", SMALL, seed=4)
    (folder / "linked.safetensors").symlink_to(private)
    with FakeHost(data, "--nowebui") as running:
        yield running


def sweep(host, inputs=INPUTS, axes=None, name="both", recipe=None, **more):
    body = {"recipe": {"inputs": inputs, **(recipe or {})}, "axes": axes or {}, "name": name, **more}
    return host.request("POST", f"{API}/sweep", body)


def files(host, name):
    return sorted(path.name for path in (host.lora_dir / name).glob("*.safetensors"))


def test_a_sweep_is_one_job_that_writes_what_single_merges_write(host):
    status, job = sweep(host, axes={"mode": ["svd", "ties"], "rank": [2]}, recipe={"dtype": "float32"})
    assert (status, job["kind"], job["title"]) == (202, "sweep", "both")
    job = host.wait_for_job(job["id"])
    assert (job["state"], job["error"], job["output"], job["prompt_name"]) == ("done", "", "both", "")
    assert job["progress"]["done"] == job["progress"]["total"] == 4000
    assert str(host.data_dir) not in json.dumps(job)
    rows = job["report"]["files"]
    assert [row["file"] for row in rows] == [
        f"both_a-{strength}_{mode}.safetensors" for strength in ("0.2", "0.8") for mode in ("svd", "ties")
    ]
    assert files(host, "both") == sorted(row["file"] for row in rows)
    assert json.loads((host.lora_dir / "both" / "sweep.json").read_text())["files"] == rows
    listed = [entry["name"] for entry in host.get(f"{API}/loras")["loras"]]
    for row in rows:
        stem = row["file"].removesuffix(".safetensors")
        assert stem in listed
        path = host.lora_dir / "both" / row["file"]
        swept = path.read_bytes()
        merge = {"recipe": row["recipe"], "name": stem, "subfolder": "both", "overwrite": True}
        done = host.wait_for_job(host.request("POST", f"{API}/merge", merge)[1]["id"])
        assert (done["state"], path.read_bytes() == swept) == ("done", True)


def test_ranges_mixes_and_pairs_make_axes(host):
    assert sweep(host, ["a", "b"], {"mix": "0..1/3"}, "mixed", subfolder="deep")[0] == 202
    axes = {"rank": [1, 2], "density": [0.5, 0.6]}
    answer = sweep(host, ["a:0.1/0.2", "b"], axes, "pairs", {"mode": "ties", "seed": 3}, zip=True)
    assert answer[0] == 202, answer
    rows = host.wait_for_job(answer[1]["id"])["report"]["files"]
    assert files(host, "deep/mixed") == [f"mixed_mix-{share}.safetensors" for share in ("0.5", "0", "1")]
    recipes = [row["recipe"] for row in rows]
    assert [
        (one["inputs"][0]["te"], one["rank"], float(one["params"]["density"]), one["mode"], one["seed"])
        for one in recipes
    ] == [(0.1, 1, 0.5, "ties", 3), (0.2, 2, 0.6, "ties", 3)]


def test_an_axis_of_true_and_false_is_what_it_says(host):
    answer = sweep(host, ["a", "b"], {"fair": [True, False]}, "fair", {"rank": 2})
    assert answer[0] == 202, answer
    rows = host.wait_for_job(answer[1]["id"])["report"]["files"]
    assert [(row["values"], row["recipe"].get("fair", False)) for row in rows] == [
        ({"fair": "True"}, True), ({"fair": "False"}, False),
    ]  # fmt: skip


def test_a_second_sweep_is_refused_or_goes_on(host):
    assert host.wait_for_job(sweep(host, name="twice")[1]["id"])["state"] == "done"
    first, second = (host.lora_dir / "twice" / name for name in files(host, "twice"))
    second.unlink()
    kept = first.stat().st_mtime_ns
    status, content = sweep(host, name="twice")
    assert (status, "exists already" in content["error"]) == (409, True)
    job = host.wait_for_job(sweep(host, name="twice", resume=True)[1]["id"])
    assert (job["state"], second.is_file(), first.stat().st_mtime_ns) == ("done", True, kept)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"inputs": ["a", "b"]}, 422, "Nothing varies"),
        ({"inputs": ["a:0..1/9", "b:0..1/9"]}, 422, "81 combinations; at most 64"),
        ({"inputs": ["a:0..1/99"], "zip": True}, 422, "99 combinations; at most 64"),
        ({"inputs": ["../a:0/1"]}, 400, "not a name inside"),
        ({"inputs": ["/etc/a:0/1"]}, 400, "not a name inside"),
        ({"inputs": ["nothing:0/1"]}, 404, "no LoRA called"),
        ({"inputs": ["linked:0/1"]}, 422, "leads out of the LoRA folder"),
        ({"inputs": ["a:0.5/0.5"]}, 422, "stands there twice"),
        ({"inputs": ["a:0/1", {"name": "b", "hash": "0" * 64}]}, 422, "Leave hash out"),
        ({"inputs": "a"}, 422, "list of its LoRAs"),
        ({"axes": {"mode": ["svd", "nothing"]}}, 422, "nothing"),
        ({"axes": {"density": [0.1, 0.2]}}, 422, "density"),
        ({"axes": {"fair": ["maybe", "true"]}}, 422, "fair must be true or false"),
        ({"axes": {"rank": {"a": 1}}}, 422, "must be a list"),
        ({"axes": {"rank": [[1]]}}, 422, "must be a list"),
        ({"axes": {"rank": []}}, 422, "must be a list"),
        ({"axes": {"base": ["/etc/passwd", "b"]}}, 404, "no checkpoint called"),
        ({"axes": {"rank": [1, 2, 3]}, "zip": True}, 422, "same number of values"),
        ({"recipe": {"ranks": 3}}, 422, "no field 'ranks'"),
        ({"name": ""}, 400, "name is missing"),
        ({"name": "../over"}, 400, "not a name inside"),
        ({"name": "new", "subfolder": "../x"}, 400, "not a name inside"),
        ({"path": "x"}, 422, "Unknown field"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_in_one_sentence(host, body, status, words):
    before = sorted(host.data_dir.rglob("*"))
    answer = sweep(host, **{"name": "refused", **body})
    assert (answer[0], words in answer[1]["error"]) == (status, True), answer
    assert str(host.data_dir) not in answer[1]["error"]
    assert "--zip" not in answer[1]["error"]
    assert sorted(host.data_dir.rglob("*")) == before
