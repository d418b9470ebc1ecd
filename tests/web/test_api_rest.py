"""REST as a client sees it, in the fake WebUI with the Gradio, FastAPI and pydantic of this environment."""

from __future__ import annotations

import base64
import concurrent.futures
import json
import socket
import urllib.parse

import pytest
import torch
from safetensors.torch import save_file

from tests.fuzz.rest import fuzz
from tests.helpers.fixtures import (
    SD1_LAYERS,
    SDXL_LAYERS,
    dense_deltas,
    lora_tensors,
    make_lora,
    weighted_sum,
)
from tests.helpers.hosting import FakeHost

SMALL = dict(list(SD1_LAYERS.items())[1:4])
API = "/loramerge/v1"
INPUTS = [{"name": "a", "te": 0.5, "unet": 0.5}, {"name": "b", "te": 0.7, "unet": 0.7}]
RECIPE = {"inputs": INPUTS, "mode": "concat"}


def fill(data):
    folder = data / "models" / "Lora"
    make_lora(folder / "a.safetensors", SMALL, seed=1)
    make_lora(folder / "sub" / "b.safetensors", SMALL, seed=2, alpha=2)
    make_lora(folder / "xl.safetensors", SDXL_LAYERS, seed=3)
    (folder / "broken.safetensors").write_bytes(b"no lora")
    private = make_lora(data / "private" / "secret.safetensors", SMALL, seed=4)
    (folder / "linked.safetensors").symlink_to(private)
    checkpoint = data / "models" / "Stable-diffusion" / "base.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"x")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """One host without a page for all tests here: REST is all it has, and ``demo`` is None."""
    data = tmp_path_factory.mktemp("api")
    fill(data)
    with FakeHost(data, "--nowebui") as host:
        yield host


def plan(host, recipe, **more):
    return host.request("POST", f"{API}/plan", {"recipe": recipe}, **more)


def test_loras_are_listed_by_name_without_any_folder_of_the_machine(host):
    content = host.get(f"{API}/loras")
    names = {entry["name"]: entry["subfolder"] for entry in content["loras"]}
    assert names["a"] == ""
    assert names["b"] == "sub"
    assert str(host.data_dir) not in json.dumps(content)


def test_methods_and_presets_are_told_in_full(host):
    methods = {entry["name"]: entry for entry in host.get(f"{API}/methods")["methods"]}
    assert {"svd", "concat", "add"} <= set(methods)
    assert methods["svd"]["summary"]
    assert methods["svd"]["formula"]
    assert methods["add"]["avoid"]
    assert {"name", "type", "default"} <= set(methods["ties"]["params"][0])
    assert "MIDD" in host.get(f"{API}/presets")["weights"]


def test_a_plan_tells_rank_size_and_base_model_without_merging(host):
    status, content = plan(host, RECIPE)
    assert status == 200
    assert content["ranks"] == {"8": 3}
    assert [entry["name"] for entry in content["inputs"]] == ["a", "b"]
    assert content["predicted_bytes"] > 0
    assert str(host.data_dir) not in json.dumps(content)


def test_an_error_names_fields_of_a_recipe_and_no_options_of_the_command_line(host):
    odd = host.lora_dir / "odd.safetensors"
    save_file({**lora_tensors(SMALL), "whatever.is.this": torch.zeros(2)}, str(odd))
    # A file that has just appeared is found at once.
    status, content = plan(host, {"inputs": [{"name": "odd", "te": 1.0, "unet": 1.0}]})
    odd.unlink()
    assert status == 422
    assert "--" not in content["error"]
    assert "; skip_unsupported merges the rest" in content["error"]


def test_a_merge_writes_the_exact_sum_and_reports_it(host):
    status, job = host.request(
        "POST", f"{API}/merge", {"recipe": RECIPE, "name": "rest", "subfolder": "made"}
    )
    assert status == 202
    job = host.wait_for_job(job["id"])
    assert (job["state"], job["error"]) == ("done", "")
    assert job["output"] == "made/rest.safetensors"
    assert job["progress"]["fraction"] == 1.0
    assert job["report"]["layers"] == 3
    folder = host.lora_dir
    written = dense_deltas(folder / "made" / "rest.safetensors")
    expected = weighted_sum([(folder / "a.safetensors", 0.5), (folder / "sub" / "b.safetensors", 0.7)])
    total = sum(float(delta.norm() ** 2) for delta in expected.values())
    assert sum(float(delta.norm() ** 2) for delta in written.values()) == pytest.approx(total, rel=1e-5)
    assert str(host.data_dir) not in json.dumps(job)
    assert job["id"] in [entry["id"] for entry in host.get(f"{API}/jobs")["jobs"]]


def test_the_name_of_a_finished_merge_is_taken_until_overwriting_is_allowed(host):
    body = {"recipe": RECIPE, "name": "twice"}
    first = host.wait_for_job(host.post(f"{API}/merge", body)["id"])
    assert first["state"] == "done"
    status, content = host.request("POST", f"{API}/merge", body)
    assert status == 409
    assert "exists already" in content["error"]
    again = host.wait_for_job(host.post(f"{API}/merge", {**body, "overwrite": True})["id"])
    assert again["state"] == "done"


def test_a_trial_can_be_used_in_a_prompt_and_is_not_in_the_lora_folder(host):
    before = sorted(host.lora_dir.rglob("*"))
    job = host.wait_for_job(host.post(f"{API}/merge", {"recipe": RECIPE, "trial": True})["id"])
    assert job["state"] == "done"
    assert sorted(host.lora_dir.rglob("*")) == before
    [[name, strength, digest]] = host.picture(f"a cat <lora:{job['prompt_name']}:1>")
    assert (name, strength) == (job["prompt_name"], 1.0)
    assert digest is not None
    host.post("/sdapi/v1/refresh-loras")
    assert host.picture(f"<lora:{job['prompt_name']}:1>") == [[name, strength, digest]]


def test_a_finished_job_that_is_cancelled_stays_as_it_is(host):
    job = host.wait_for_job(host.post(f"{API}/merge", {"recipe": RECIPE, "name": "kept"})["id"])
    status, content = host.request("DELETE", f"{API}/jobs/{job['id']}")
    assert (status, content["state"]) == (200, "done")
    assert (host.lora_dir / "kept.safetensors").exists()


def test_inspect_tells_what_a_file_is(host):
    status, content = host.request("POST", f"{API}/inspect", {"name": "a"})
    assert status == 200
    assert str(host.data_dir) not in json.dumps(content)


@pytest.mark.parametrize(
    ("path", "body", "status", "sentence"),
    [
        ("plan", {"recipe": {"inputs": [{"name": "nobody"}]}}, 404, "no LoRA called nobody"),
        ("inspect", {"name": "nobody"}, 404, "no LoRA called nobody"),
        ("plan", {"recipe": {**RECIPE, "base": "nothing"}}, 404, "no checkpoint called nothing"),
        ("plan", {"recipe": {"inputs": [{"name": "a"}, {"name": "xl"}]}}, 422, "different base models"),
        ("plan", {"recipe": {"inputs": [{"name": "broken"}]}}, 422, "broken.safetensors"),
        ("plan", {"recipe": {"inputs": [{"name": "linked"}]}}, 422, "leads out of the LoRA folder"),
        ("inspect", {"name": "linked"}, 422, "leads out of the LoRA folder"),
        ("plan", {"recipe": {**RECIPE, "mode": "magic"}}, 422, "magic"),
        ("plan", {"recipe": {**RECIPE, "params": {"what": 1}}}, 422, "what"),
        ("plan", {"recipe": {**RECIPE, "surprise": 1}}, 422, "surprise"),
        ("plan", {"recipe": {"inputs": [{"name": "a", "te": "much"}]}}, 422, "te"),
        ("plan", {"recipe": {"inputs": [{"name": "a", "te": 1e999}]}}, 400, "JSON"),
        ("plan", {"recipe": {"inputs": []}}, 422, "LoRA"),
        ("plan", {"recipe": {"inputs": 5}}, 422, "inputs"),
        ("plan", {"recipe": {"inputs": [3]}}, 422, ""),
        ("plan", {"recipe": {"inputs": [{"name": None}]}}, 422, "name"),
        ("plan", {"recipe": {"inputs": [{"name": "a"}] * 65}}, 422, "64"),
        ("plan", {"recipe": [1]}, 422, "recipe must be an object"),
        ("plan", {}, 422, ""),
        ("plan", {"recipe": RECIPE, "more": 1}, 422, "more"),
        ("plan", [1], 422, "object"),
        ("plan", "text", 422, "object"),
        ("plan", {"recipe": {"inputs": [{"name": "a" * 200_000}]}}, 422, "characters"),
        ("merge", {"recipe": RECIPE}, 400, "name is missing"),
        ("merge", {"recipe": RECIPE, "name": 5}, 422, "name must be text"),
        (
            "merge",
            {"recipe": RECIPE, "name": "n", "overwrite": "yes"},
            422,
            "overwrite must be true or false",
        ),
        ("merge", {"recipe": RECIPE, "name": "n", "preferred_weight": True}, 422, "preferred_weight"),
        ("merge", {"recipe": RECIPE, "name": "con"}, 400, "Windows"),
        ("merge", {"recipe": RECIPE, "name": "a", "overwrite": True}, 409, "one of the LoRAs being merged"),
        ("inspect", {}, 422, ""),
        ("inspect", {"name": ["a"]}, 422, "name must be text"),
    ],
)
def test_what_is_wrong_is_answered_with_a_sentence(host, path, body, status, sentence):
    raw = json.dumps(body).replace("Infinity", "1e999" if status != 400 else "Infinity").encode()
    got, content = host.request("POST", f"{API}/{path}", raw=raw)
    assert (got, list(content)) == (status, ["error"]), content
    assert sentence in content["error"]
    assert str(host.data_dir) not in content["error"]


HOSTILE = [
    "/etc/passwd",
    "../a",
    "sub/../../a",
    "..\\a",
    "C:\\x",
    "\\\\server\\x",
    "~/x",
    "a\x00b",
    "sub/..",
    "/",
    "..",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_leads_out_is_refused_wherever_it_stands(host, name):
    before = sorted(host.data_dir.rglob("*"))
    for path, body in (
        ("inspect", {"name": name}),
        ("plan", {"recipe": {"inputs": [{"name": name}]}}),
        ("merge", {"recipe": RECIPE, "name": name}),
        ("merge", {"recipe": RECIPE, "name": "x", "subfolder": name}),
        ("merge", {"recipe": RECIPE, "name": "x", "preview": name}),
        ("plan", {"recipe": {**RECIPE, "base": name}}),
    ):
        status, content = host.request("POST", f"{API}/{path}", body)
        assert status in (400, 404, 422), (path, content)
        assert list(content) == ["error"]
    assert sorted(host.data_dir.rglob("*")) == before


@pytest.mark.parametrize(
    ("raw", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"", "application/json", 400),
        (b"\xff\xfe{}", "application/json", 400),
        (b"[" * 200_000, "application/json", 400),
        (b'{"recipe": NaN}', "application/json", 400),
        (b"9" * 6000, "application/json", 400),
        (json.dumps({"a": [[[[[[[[[[[[[[1]]]]]]]]]]]]]]}).encode(), "application/json", 422),
        (urllib.parse.urlencode({"recipe": "{}"}).encode(), "application/x-www-form-urlencoded", 400),
        (b'{"recipe": {}}', "text/plain", 400),
        (b"x" * ((1 << 20) + 1), "application/json", 413),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(host, raw, kind, status):
    got, content = host.request("POST", f"{API}/plan", raw=raw, headers={"Content-Type": kind})
    assert (got, list(content)) == (status, ["error"]), content


def test_a_huge_body_without_a_length_is_cut_off(host):
    """Sent in chunks, a body has no length that could be refused beforehand."""
    name, port = host.url.removeprefix("http://").split(":")
    with socket.create_connection((name, int(port)), timeout=120) as connection:
        head = f"POST {API}/plan HTTP/1.1\r\nHost: {name}\r\nContent-Type: application/json\r\n"
        connection.sendall((head + "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n").encode())
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        answer = b""
        try:
            for _ in range(64):
                connection.sendall(chunk)
            connection.sendall(b"0\r\n\r\n")
        except OSError:
            pass  # Refused before the end.
        while part := connection.recv(65536):
            answer += part
    assert b" 413 " in answer.split(b"\r\n")[0]


def test_what_is_not_there_is_answered_in_json(host):
    for method, path in (("GET", "jobs/none"), ("DELETE", "jobs/none"), ("GET", "nothing"), ("PUT", "loras")):
        status, content = host.request(method, f"{API}/{path}")
        assert (status, list(content)) == (404, ["error"])


def test_the_hosts_docs_describe_every_route(host):
    schema = host.get("/openapi.json")
    routes = {path: content for path, content in schema["paths"].items() if path.startswith(API)}
    assert set(routes) == {
        f"{API}/{p}"
        for p in (
            "loras",
            "methods",
            "presets",
            "plan",
            "merge",
            "inspect",
            "jobs",
            "jobs/{job_id}",
            "bake",
            "extract",
            "checkpoints",
        )
    } | {f"{API}/{p}" for p in ("compare", "advise", "plot", "sweep")}
    body = routes[f"{API}/merge"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"recipe", "name", "overwrite", "trial"} <= set(body["properties"])
    assert "svd" in body["properties"]["recipe"]["properties"]["mode"]["enum"]
    for path in routes.values():
        for operation in path.values():
            assert operation["summary"]
            error = operation["responses"]["422"]["content"]["application/json"]["schema"]
            assert error["properties"].keys() == {"error"}


def test_the_documented_recipe_and_the_recipe_that_is_taken_have_the_same_fields(host):
    from lib_loramerge.recipe import from_json, to_json
    from lib_loramerge.webui import schema

    stored = to_json(from_json(RECIPE))
    documented = schema.recipe_schema()["properties"]
    assert set(stored) <= set(documented)
    full = {
        "name": "a",
        "te1": 1,
        "te2": 1,
        "te3": 1,
        "dyn": 1,
        "lbw": "ALL",
        "lbwe": None,
        "x": 1,
        "hash": None,
    }
    fields = documented["inputs"]["items"]["properties"]
    assert set(
        to_json(from_json({"inputs": [{k: v for k, v in full.items() if v is not None}]}))["inputs"][0]
    ) <= set(fields)
    for field in documented:
        if field not in ("version", "inputs"):
            value = stored.get(field, documented[field].get("default"))
            assert from_json({**RECIPE, **({field: value} if value is not None else {})})


def test_two_hundred_requests_at_once_are_all_answered(host):
    def ask(index):
        kind = index % 5
        if kind == 0:
            return host.request("GET", f"{API}/loras")[0]
        if kind == 1:
            return plan(host, RECIPE)[0]
        if kind == 2:
            return host.request("GET", f"{API}/jobs")[0]
        if kind == 3:
            return host.request("POST", f"{API}/plan", raw=b"{")[0]
        return host.request("POST", f"{API}/merge", {"recipe": RECIPE, "name": f"many-{index}"})[0]

    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(ask, range(200)))
    by_kind = [set(answers[kind::5]) for kind in range(5)]
    assert by_kind[:4] == [{200}, {200}, {200}, {400}]
    assert by_kind[4] <= {202, 409}
    assert answers[4::5].count(202) >= 30, "the queue takes as many as it says"
    for job in host.get(f"{API}/jobs")["jobs"]:
        if job["state"] == "waiting":
            host.request("DELETE", f"{API}/jobs/{job['id']}")
    assert host.request("GET", f"{API}/methods")[0] == 200


USERS = "ann:pass:with:colons,bob:ünï"


def basic(user, password):
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def test_without_the_api_flag_there_is_no_rest(tmp_path):
    fill(tmp_path)
    with FakeHost(tmp_path) as host:
        for method, path in (("GET", "loras"), ("POST", "plan"), ("GET", "anything")):
            assert host.request(method, f"{API}/{path}", {} if method == "POST" else None)[0] in (404, 405)


def test_a_password_is_asked_for_on_every_route(tmp_path):
    fill(tmp_path)
    with FakeHost(tmp_path, "--api", "--api-auth", USERS) as host:
        routes = [("GET", p) for p in ("loras", "methods", "presets", "jobs", "jobs/x", "nothing")]
        routes += [("POST", p) for p in ("plan", "merge", "inspect")] + [("DELETE", "jobs/x")]
        bad = [{}, basic("ann", "pass"), basic("ann", ""), basic("", ""), basic("bob", "pass:with:colons")]
        bad += [
            basic("carl", "x"),
            {"Authorization": "Basic !!!"},
            {"Authorization": "Bearer x"},
            {"Authorization": ""},
        ]
        for method, path in routes:
            for headers in bad if path == "loras" else bad[:2]:
                body = {"recipe": RECIPE, "name": "x"} if method == "POST" else None
                status, content = host.request(method, f"{API}/{path}", body, headers=headers)
                assert (status, list(content)) == (401, ["error"]), (method, path, headers)
        for headers in (basic("ann", "pass:with:colons"), basic("bob", "ünï")):
            assert host.request("GET", f"{API}/loras", headers=headers)[0] == 200
            assert plan(host, RECIPE, headers=headers)[0] == 200
        assert not (host.lora_dir / "x.safetensors").exists()
        assert "HTTPBasic" in json.dumps(
            host.get("/openapi.json")["paths"][f"{API}/loras"]["get"]["security"]
        ).replace("_BasicInDocs", "HTTPBasic")


def test_hostile_requests_get_a_sentence_each_and_write_nothing(host):
    before = sorted(path.name for path in host.lora_dir.rglob("*"))
    sent, wrong = fuzz(host.url, "", 600, seed=1, most=300)
    assert wrong == ""
    assert sent == 300
    assert sorted(path.name for path in host.lora_dir.rglob("*")) == before
