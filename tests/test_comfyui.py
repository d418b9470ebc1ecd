"""The ComfyUI nodes in a small ComfyUI: what they load, merge, apply and save, and when they do it again."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_loramerge.errors import IncompatibleError, LoraMergeError, OutputError, RecipeError
from lib_loramerge.methods import METHODS
from lib_loramerge.recipe import LoraInput
from tests.helpers.checkpoint_files import lora_of, make_checkpoint, product
from tests.helpers.fake_comfyui import ROOT, Clip, FakeComfyUI, InterruptProcessingException, Patcher, running
from tests.helpers.fixtures import (
    SD1_LAYERS,
    SDXL_LAYERS,
    make_lora,
    metadata_of,
    relative_error,
    weighted_sum,
)

MODEL = {name for name in SD1_LAYERS if name.startswith("lora_unet_")}
TEXT = set(SD1_LAYERS) - MODEL
LOAD = {
    "lora_name": "none",
    "strength_model": 1.0,
    "strength_clip": 1.0,
    "preset": "none",
    "block_weights": "",
}
MERGE = {
    "mode": "svd", "rank_rule": "Automatic", "rank": 32, "retain": 0.99, "size": 100.0, "fair": False,
    "conv_rank": 0, "precision": "float32", "device": "CPU", "random_seed": 0, "base": "none",
}  # fmt: skip


@pytest.fixture
def comfyui(tmp_path: Path) -> Iterator[FakeComfyUI]:
    with running(tmp_path) as host:
        make_lora(host.loras / "a.safetensors", SD1_LAYERS, seed=1, alpha=2.0)
        make_lora(host.loras / "sub" / "b.safetensors", SD1_LAYERS, seed=2, rank=3)
        yield host


def load(name: str, strength: float) -> dict:
    inputs = {**LOAD, "lora_name": name, "strength_model": strength, "strength_clip": strength}
    return {"class_type": "LoraMergeLoad", "inputs": inputs}


def two(**merge) -> dict[str, dict]:
    inputs = {**MERGE, "loras_1": ["1", 0], "loras_2": ["2", 0], **merge}
    return {
        "1": load("a.safetensors", 0.8),
        "2": load("sub/b.safetensors", -0.5),
        "3": {"class_type": "LoraMergeMerge", "inputs": inputs},
    }


def files(host: FakeComfyUI) -> list[tuple[Path, float]]:
    return [(host.loras / "a.safetensors", 0.8), (host.loras / "sub" / "b.safetensors", -0.5)]


def test_apply_changes_the_model_by_the_weighted_sum_and_saves_nothing(comfyui):
    merged = comfyui.run(two())["3"][0]
    model, clip = Patcher(MODEL), Clip(TEXT)
    apply = comfyui.nodes["LoraMergeApply"]()
    patched, patched_clip = apply.apply(merged, 1.0, 1.0, model, clip)
    got = {**patched.delta(), **patched_clip.patcher.delta()}
    assert set(got) == set(SD1_LAYERS)
    assert relative_error(got, weighted_sum(files(comfyui))) < 1e-6
    assert not model.patches
    assert not clip.patcher.patches
    assert sorted(path.name for path in comfyui.loras.rglob("*.safetensors")) == [
        "a.safetensors",
        "b.safetensors",
    ]


def test_save_then_load_equals_apply_and_keeps_recipe_and_workflow(comfyui):
    prompt = two()
    prompt["4"] = {
        "class_type": "LoraMergeSave",
        "inputs": {"merged_lora": ["3", 0], "name": "both", "subfolder": "made/here", "overwrite": False},
    }
    results = comfyui.run(prompt, workflow={"nodes": [1]})
    assert results["4"] == (str(Path("made/here/both.safetensors")),)
    saved = comfyui.loras / "made" / "here" / "both.safetensors"
    got = weighted_sum([(saved, 1.0)])
    assert relative_error(got, weighted_sum(files(comfyui))) < 1e-6
    metadata = metadata_of(saved)
    assert metadata["ss_output_name"] == "both"
    assert [entry["name"] for entry in json.loads(metadata["loramerge_recipe"])["inputs"]] == ["a", "sub/b"]
    assert json.loads(metadata["workflow"]) == {"nodes": [1]}
    assert json.loads(metadata["prompt"])["4"]["inputs"]["name"] == "both"


def test_no_workflow_is_kept_where_the_user_disabled_metadata(comfyui):
    comfyui.args.disable_metadata = True
    merged = comfyui.run(two())["3"][0]
    comfyui.nodes["LoraMergeSave"]().save(merged, "x", "", False, {"1": {}}, {"workflow": {}})
    assert not {"prompt", "workflow"} & set(metadata_of(comfyui.loras / "x.safetensors"))


def test_a_taken_name_is_kept_unless_overwrite_is_on_and_no_name_leads_out(comfyui):
    merged = comfyui.run(two())["3"][0]
    save = comfyui.nodes["LoraMergeSave"]().save
    before = (comfyui.loras / "a.safetensors").read_bytes()
    with pytest.raises(OutputError, match=r"a\.safetensors"):
        save(merged, "a", "", False)
    assert (comfyui.loras / "a.safetensors").read_bytes() == before
    for name, subfolder in (("../x", ""), ("x", "../.."), ("", ""), ("x", "/tmp")):
        with pytest.raises(OutputError):
            save(merged, name, subfolder, True)
    save(merged, "a", "", True)
    assert (comfyui.loras / "a.safetensors").read_bytes() != before


def test_only_what_changed_is_done_again(comfyui):
    prompt = two()
    comfyui.run(prompt)
    assert comfyui.ran == ["1", "2", "3"]
    comfyui.run(prompt)
    assert comfyui.ran == []
    prompt["2"]["inputs"]["strength_model"] = 0.25
    comfyui.run(prompt)
    assert comfyui.ran == ["2", "3"]
    make_lora(comfyui.loras / "a.safetensors", SD1_LAYERS, seed=9, alpha=2.0, rank=5)
    comfyui.run(prompt)
    assert comfyui.ran == ["1", "3"]


def test_a_changed_preset_is_read_again_where_a_preset_is_used(comfyui, tmp_path, monkeypatch):
    import lib_loramerge.comfyui.merging as merging

    file = tmp_path / "preset.txt"
    file.write_text("MINE:" + ",".join(["1"] * 17), encoding="utf-8")
    monkeypatch.setattr(merging, "preset_file", lambda: file)
    prompt = two()
    prompt["1"]["inputs"]["preset"] = "MINE"
    before = comfyui.run(prompt)["3"][0].report.sshs_model_hash
    file.write_text("MINE:" + ",".join(["0.5"] * 17) + "\n", encoding="utf-8")
    after = comfyui.run(prompt)["3"][0].report.sshs_model_hash
    assert comfyui.ran == ["1", "3"]
    assert before != after


def test_the_temporary_file_goes_with_the_last_node_that_holds_it(comfyui):
    prompt = two()
    first = comfyui.run(prompt)["3"][0].path
    assert first.is_file()
    prompt["1"]["inputs"]["strength_model"] = 0.1
    second = comfyui.run(prompt)["3"][0].path
    gc.collect()
    assert second.is_file()
    assert not first.exists()


def test_a_third_input_and_a_whole_prompt_are_merged_too(comfyui):
    prompt = two(loras_3=["4", 0])
    prompt["4"] = {
        "class_type": "LoraMergeLoad",
        "inputs": {**LOAD, "prompt": "a cat, <lora:a:0.2> in <lora:sub/b:0.3:0.7>"},
    }
    merged = comfyui.run(prompt)["3"][0]
    strengths = [(given.input.name, given.input.te, given.input.unet) for given in merged.plan.sources]
    assert strengths == [("a", 0.8, 0.8), ("sub/b", -0.5, -0.5), ("a", 0.2, 0.2), ("sub/b", 0.3, 0.7)]


def test_block_weights_come_by_preset_or_as_numbers(comfyui):
    ones = ",".join(["1"] * 17)
    node = comfyui.nodes["LoraMergeLoad"]()
    chosen = {**LOAD, "lora_name": "a.safetensors", "preset": "MIDD"}
    by_preset, by_list = (node.load(**{**chosen, "block_weights": text})[0][0] for text in ("", ones))
    assert (by_preset.lbw, by_list.lbw) == ("MIDD", ones)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("Same as the inputs", {"rank": "same", "fair": True, "conv_rank": 3}),
        ("A number", {"rank": 2, "fair": True, "conv_rank": 3}),
        ("Keep everything", {"rank": "full", "fair": False, "conv_rank": 3}),
        ("Keep a share", {"rank": "auto", "retain": 0.5, "fair": False, "conv_rank": None}),
        ("Keep a share of each LoRA", {"rank": "auto", "keep": 0.5, "fair": False, "conv_rank": None}),
        ("Fit a size", {"rank": "auto", "size": 50.0, "fair": True, "conv_rank": None}),
    ],
)
def test_every_rank_rule_reaches_the_recipe_and_what_does_not_apply_is_ignored(comfyui, rule, expected):
    given = two(rank_rule=rule, rank=2, retain=0.5, size=50.0, fair=True, conv_rank=3)
    recipe = comfyui.run(given)["3"][0].plan.recipe
    assert {name: getattr(recipe, name) for name in expected} == expected


def test_the_rank_rules_of_the_node_are_those_of_the_tab(comfyui):
    from lib_loramerge.recipe.rank_rules import RANK_RULES

    accepted = comfyui.nodes["LoraMergeMerge"].INPUT_TYPES()["required"]
    assert accepted["rank_rule"][0] == list(RANK_RULES.values())
    for _, options in accepted.values():
        if isinstance(options, dict):
            assert set(options.get("shown_for", {}).get("rank_rule", ())) <= set(RANK_RULES.values())


def test_parameters_reach_the_recipe(comfyui):
    merged = comfyui.run(two(mode="ties", density=0.4, normalize=False, gamma=0.3))["3"][0]
    assert merged.plan.params == {"density": 0.4, "normalize": False, "lambda": 1.0}
    assert merged.plan.recipe.rank == "auto"
    assert list(merged.report.ranks) == [4]


def test_a_mode_without_a_rank_ignores_the_hidden_rank(comfyui):
    make_lora(comfyui.loras / "sub" / "b.safetensors", SD1_LAYERS, seed=2, rank=4)
    merged = comfyui.run(two(mode="add", rank_rule="A number", rank=2, fair=True))["3"][0]
    assert merged.plan.recipe.rank == "auto"


def test_every_parameter_of_every_mode_has_a_widget_of_its_limits(comfyui):
    widgets = comfyui.nodes["LoraMergeMerge"].INPUT_TYPES()["optional"]
    for mode, method in METHODS.items():
        for param in method.params:
            kind, options = widgets[param.name]
            assert mode in options["shown_for"]["mode"]
            if param.choices:
                assert kind[1:] == list(param.choices)
            elif not isinstance(param.default, bool):
                assert (kind, options["min"], options["max"]) == ("FLOAT", param.minimum, param.maximum)
                assert options["default"] == param.default


@pytest.mark.parametrize("mode", ["knots", "ctm"])
def test_a_parameter_of_several_defaults_is_left_to_the_mode(comfyui, mode):
    merged = comfyui.run(two(mode=mode, rule="as the mode has it"))["3"][0]
    assert merged.plan.params["rule"] == {"knots": "ties", "ctm": "linear"}[mode]
    merged = comfyui.run(two(mode=mode, rule="dare_ties"))["3"][0]
    assert merged.plan.params["rule"] == "dare_ties"


@pytest.mark.parametrize(
    ("merge", "error"),
    [
        ({"density": 2.0, "mode": "ties"}, "density"),
        ({"mode": "add"}, "rank"),
    ],
)
def test_what_is_wrong_is_a_sentence_and_leaves_no_file(comfyui, merge, error):
    with pytest.raises(LoraMergeError, match=error):
        comfyui.run(two(**merge))
    assert not list(comfyui.temp.glob("*")) if comfyui.temp.exists() else True


def test_nothing_chosen_is_a_sentence(comfyui):
    with pytest.raises(RecipeError, match="Choose a LoRA"):
        comfyui.nodes["LoraMergeLoad"]().load(**LOAD)
    merged = comfyui.run(two())["3"][0]
    with pytest.raises(RecipeError, match="Connect"):
        comfyui.nodes["LoraMergeApply"]().apply(merged, 1.0, 1.0)


def test_a_model_of_another_kind_is_refused_with_the_base_model(comfyui):
    merged = comfyui.run(two())["3"][0]
    with pytest.raises(IncompatibleError, match="Stable Diffusion 1"):
        comfyui.nodes["LoraMergeApply"]().apply(merged, 1.0, 1.0, Patcher(set(SDXL_LAYERS)), None)


def test_interrupt_ends_the_merge_and_leaves_nothing(comfyui):
    comfyui.interrupted = True
    with pytest.raises(InterruptProcessingException):
        comfyui.run(two())
    assert list(comfyui.temp.glob("*")) == []


def test_no_widget_has_a_name_for_which_the_page_draws_a_new_number_each_run(comfyui):
    for node in comfyui.nodes.values():
        accepted = node.INPUT_TYPES()
        assert not {"seed", "noise_seed"} & {*accepted["required"], *accepted.get("optional", {})}


def test_progress_reaches_its_end(comfyui):
    comfyui.run(two())
    assert comfyui.progress[-1][0] <= comfyui.progress[-1][1]
    assert any(value == total == len(SD1_LAYERS) for value, total in comfyui.progress)


def test_the_report_has_text_and_a_picture(comfyui):
    prompt = two()
    prompt["4"] = {"class_type": "LoraMergeReport", "inputs": {"merged_lora": ["3", 0]}}
    text, picture = comfyui.run(prompt)["4"]
    (png,) = comfyui.temp.glob("*.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "Stable Diffusion 1" in text
    assert "not saved" in text
    assert picture.shape[0] == 1
    assert picture.shape[3] == 3
    assert picture.dtype == torch.float32
    assert 0 <= float(picture.min()) < float(picture.max()) <= 1


def test_every_node_says_what_comfyui_asks_of_it(comfyui):
    for name, node in comfyui.nodes.items():
        accepted = node.INPUT_TYPES()
        assert set(accepted) <= {"required", "optional", "hidden"}, name
        assert callable(getattr(node, node.FUNCTION))
        assert node.CATEGORY == "loaders/LoRA Merge"
        assert len(node.RETURN_TYPES) == len(getattr(node, "RETURN_NAMES", node.RETURN_TYPES))
        json.dumps(accepted)  # The page is sent all of it.


def test_the_pack_is_loaded_from_anywhere_and_leaves_the_path_alone(tmp_path):
    script = (
        "import sys, pathlib; sys.path.append(sys.argv[1])\n"
        "from tests.helpers.fake_comfyui import running\n"
        "sys.path.remove(sys.argv[1])\n"
        "with running(pathlib.Path(sys.argv[2])) as host: print(len(host.nodes), sys.argv[1] in sys.path)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT), str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["6", "False"]


def test_without_comfyui_the_top_of_the_checkout_does_nothing():
    done = subprocess.run(
        [sys.executable, "-c", "import runpy; print(sorted(runpy.run_path('__init__.py')))"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "NODE_CLASS_MAPPINGS" not in done.stdout


def test_the_example_workflow_uses_the_nodes_as_they_are(comfyui):
    workflow = json.loads(
        (ROOT / "examples" / "comfyui" / "merge-two-loras.json").read_text(encoding="utf-8")
    )
    ours = [node for node in workflow["nodes"] if node["type"].startswith("LoraMerge")]
    assert {node["type"] for node in ours} == set(comfyui.nodes) - {"LoraMergeBake"}
    for node in ours:
        accepted = comfyui.nodes[node["type"]].INPUT_TYPES()
        names = {**accepted["required"], **accepted.get("optional", {})}
        given = [entry["name"] for entry in node["inputs"]]
        assert set(names) - {"loras_2"} <= set(given) | {"prompt"}
        assert [name for name in given if name not in names and not name.startswith("loras_")] == []
        typed = ("STRING", "FLOAT", "INT", "BOOLEAN")
        widgets = [name for name, kind in names.items() if isinstance(kind[0], list) or kind[0] in typed]
        assert len(node.get("widgets_values", [])) == len(widgets)


BAKE = {
    "ckpt_name": "base.safetensors", "name": "baked", "overwrite": False, "mode": "svd", "precision": "same",
    "rounding": "auto", "drop_ema": False, "random_seed": 0,
}  # fmt: skip


def test_bake_writes_a_checkpoint_with_the_sum_beside_the_old_one(comfyui):
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    before = make_checkpoint(comfyui.checkpoints / "base.safetensors", "sd1-ldm", dtype=torch.float32)
    lora = lora_of({layer: (320, 320)})
    save_file(lora, comfyui.loras / "one.safetensors")
    prompt = {
        "1": load("one.safetensors", 0.5),
        "2": {"class_type": "LoraMergeBake", "inputs": {**BAKE, "loras_1": ["1", 0]}},
    }
    name, report = comfyui.run(prompt)["2"]
    assert name == "baked.safetensors"
    assert "Survives" in report
    assert str(comfyui.checkpoints) not in report
    after = load_file(comfyui.checkpoints / name)
    assert torch.allclose(after[key].double(), before[key].double() + 0.5 * product(lora, layer), atol=1e-8)
    assert [k for k in before if not torch.equal(before[k], after[k])] == [key]
    assert comfyui.progress[-1] == (100, 100)
    with pytest.raises(OutputError, match="exists already"):
        comfyui.nodes["LoraMergeBake"]().bake(**BAKE, loras_1=(LoraInput("one"),))
    with pytest.raises(RecipeError, match="at least one LoRA"):
        comfyui.nodes["LoraMergeBake"]().bake(**BAKE)


def test_a_model_without_text_encoders_is_baked_in_its_own_folder(comfyui):
    layer = "lora_unet_double_blocks_0_img_attn_proj"
    before = make_checkpoint(comfyui.diffusion_models / "flux.safetensors", "flux-flux", dtype=torch.float32)
    lora = lora_of({layer: (3072, 3072)})
    save_file(lora, comfyui.loras / "one.safetensors")
    listed = "diffusion_models/flux.safetensors"
    assert listed in comfyui.nodes["LoraMergeBake"].INPUT_TYPES()["required"]["ckpt_name"][0]
    assert listed in comfyui.nodes["LoraMergeMerge"].INPUT_TYPES()["required"]["base"][0]
    prompt = {
        "1": load("one.safetensors", 1.0),
        "2": {"class_type": "LoraMergeBake", "inputs": {**BAKE, "ckpt_name": listed, "loras_1": ["1", 0]}},
    }
    name, _ = comfyui.run(prompt)["2"]
    after = load_file(comfyui.diffusion_models / name)
    (key,) = [key for key in before if not torch.equal(before[key], after[key])]
    assert torch.allclose(after[key].double(), before[key].double() + product(lora, layer), atol=1e-8)
