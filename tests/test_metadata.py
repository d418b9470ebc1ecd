"""What a merged file says of itself, and what it must not say."""

from __future__ import annotations

import json

import pytest

from lib_loramerge.errors import RecipeError
from lib_loramerge.metadata import RECIPE_KEY, SourceMeta, build_metadata, output_name, read_recipe
from lib_loramerge.models import ARCHITECTURES
from lib_loramerge.recipe import LoraInput, MergeRecipe

TAGS = {"10_john smith private": {"1girl": 20, "sky": 3}, "5_other": {"sky": 4}}
PARENT = {
    "ss_output_name": "parent",
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_sd_model_name": "C:\\Users\\john\\models\\base.safetensors",
    "ss_clip_skip": "2",
    "ss_resolution": "(1024, 1024)",
    "ss_tag_frequency": json.dumps(TAGS),
    "ss_dataset_dirs": json.dumps({"10_john smith private": {"n_repeats": 10, "img_count": 5}}),
    "ss_datasets": "[secret]",
    "ss_bucket_info": "{}",
    "ss_session_id": "1234",
    "ss_training_started_at": "1700000000.5",
    "sshs_model_hash": "a" * 64,
    "sshs_legacy_hash": "b" * 8,
    "ssmd_cover_images": "[]",
    "modelspec.thumbnail": "data:image/png;base64,AAAA",
    "modelspec.date": "2024-01-01",
    "modelspec.tags": "ink, paper",
    "modelspec.trigger_phrase": "inkstyle",
    "modelspec.hash_sha256": "0x00",
    "lora_adapter_metadata": '{"transformer.lora_alpha": 16}',
}
RECIPE = MergeRecipe((LoraInput("a", 0.8, 0.5, hash="c" * 64), LoraInput("sub/b", 1.0, -1.0)))
SOURCES = (
    SourceMeta("a", PARENT, "c" * 64),
    SourceMeta("b", {**PARENT, "modelspec.tags": "paper, oil", "ss_clip_skip": "1"}, None),
)


def built(**changes) -> dict[str, str]:
    given = {
        "name": "new",
        "architecture": ARCHITECTURES["sdxl"],
        "sources": SOURCES,
        "recipe": RECIPE,
        "ranks": [32, 32],
        "alphas": [32.0, 32.0],
    }
    return build_metadata(**{**given, **changes})


def test_everything_is_text_and_sorted_and_the_same_each_time():
    metadata = built()
    assert all(isinstance(key, str) and isinstance(value, str) and value for key, value in metadata.items())
    assert list(metadata) == sorted(metadata)
    assert metadata == built()


def test_the_file_says_what_it_is_and_what_it_was_made_of():
    metadata = built()
    assert {key: value for key, value in metadata.items() if key not in (RECIPE_KEY, "ss_tag_frequency")} == {
        "ss_output_name": "new",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "32",
        "ss_network_alpha": "32",
        "ss_sd_model_name": "base.safetensors",
        "ss_resolution": "(1024, 1024)",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "new",
        "modelspec.resolution": "1024x1024",
        "modelspec.prediction_type": "epsilon",
        "modelspec.merged_from": "a, b",
        "modelspec.tags": "ink, paper, oil",
        "modelspec.trigger_phrase": "inkstyle",
    }
    assert built(date="2026-01-02")["modelspec.date"] == "2026-01-02"


@pytest.mark.parametrize(
    ("architecture", "forge"),
    [
        ("sd1", "stable-diffusion-v1/lora"),
        ("sdxl", "stable-diffusion-xl-v1-base/lora"),
        ("flux1", "flux-1-dev/lora"),
    ],
)
def test_forge_recognises_the_base_model_by_its_exact_words(architecture, forge):
    metadata = built(architecture=ARCHITECTURES[architecture], sources=())
    assert metadata["modelspec.architecture"] == forge
    if architecture == "flux1":
        assert metadata["modelspec.implementation"] == "https://github.com/black-forest-labs/flux"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_base_model_is_named_so_that_a1111_does_not_take_it_for_sd1(architecture):
    metadata = built(architecture=ARCHITECTURES[architecture], sources=())
    assert metadata["ss_v2"] == str(architecture == "sd2")
    if architecture != "unknown":
        assert metadata["ss_base_model_version"]
    if architecture.startswith("sdxl"):
        assert metadata["ss_base_model_version"].startswith("sdxl_")


def test_a_parents_base_model_is_reported_only_where_it_agrees_with_what_was_recognised():
    def version(architecture: str, *told: str) -> str | None:
        sources = [SourceMeta("x", {"ss_base_model_version": text}) for text in told]
        return built(architecture=ARCHITECTURES[architecture], sources=sources).get("ss_base_model_version")

    assert version("sd2", "sd_v2_768_v", "sd_v2_768_v") == "sd_v2_768_v"
    assert version("sd2", "sd_v2_768_v", "sd_v2") == "sd_v2"
    assert version("sdxl", "sd_v1", "sd_v1") == "sdxl_base_v1-0"
    assert version("unknown", "new_model", "new_model") == "new_model"
    assert version("unknown", "new_model", "other") is None


def test_nothing_private_of_the_parents_is_passed_on():
    text = json.dumps(built())
    for secret in (
        "john",
        "private",
        "secret",
        "1234",
        "1700000000",
        "AAAA",
        "a" * 64,
        "b" * 8,
        "2024-01-01",
    ):
        assert secret not in text
    for key in (
        "sshs_model_hash",
        "sshs_legacy_hash",
        "lora_adapter_metadata",
        "ss_clip_skip",
        "ss_dataset_dirs",
    ):
        assert key not in built()


def test_paths_in_the_recipe_become_names():
    for path in (
        "C:\\Users\\john\\a.safetensors",
        "/home/john/loras/a.safetensors",
        "~/a.pt",
        "../a.CKPT",
        "D:a",
    ):
        recipe = MergeRecipe((LoraInput(path),), base="/home/john/base model.safetensors")
        kept = read_recipe(built(sources=SOURCES[:1], recipe=recipe))
        assert kept.inputs[0].name == "a"
        assert kept.base == "base model.safetensors"
    assert read_recipe(built()).inputs[1].name == "sub/b"


def test_the_recipe_comes_back_as_it_went_in():
    assert read_recipe(built()) == RECIPE
    assert read_recipe({}) is None
    assert not RECIPE_KEY.startswith("ss_")
    with pytest.raises(RecipeError):
        read_recipe({RECIPE_KEY: "{broken"})


def test_a_recipe_too_long_to_keep_leaves_a_note_in_its_place():
    inputs = tuple(LoraInput("日" * 300, lbw=",".join(["0.123456789"] * 26)) for _ in range(90))
    metadata = built(recipe=MergeRecipe(inputs), sources=())
    assert RECIPE_KEY not in metadata
    assert "too long" in metadata["loramerge_note"]


def test_tags_are_summed_per_parent_and_the_rarest_dropped_where_there_are_too_many():
    assert json.loads(built()["ss_tag_frequency"]) == {
        "a": {"1girl": 20, "sky": 7},
        "b": {"1girl": 20, "sky": 7},
    }
    many = {"10_x": {f"tag number {n}": n + 1 for n in range(9000)}}
    text = built(sources=[SourceMeta("m", {"ss_tag_frequency": json.dumps(many)})])["ss_tag_frequency"]
    kept = json.loads(text)["m"]
    assert len(text.encode()) <= 64 * 1024
    assert len(kept) > 1000
    assert min(kept.values()) == 9000 - len(kept) + 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "5",
        "null",
        '{"a": 5}',
        '{"a": {"b": "c"}}',
        '{"a": {"b": NaN}}',
        '{"a": {"b": -5}}',
        "[" * 99999,
    ],
)
def test_broken_tags_of_a_parent_count_as_none(text):
    assert "ss_tag_frequency" not in built(sources=[SourceMeta("x", {"ss_tag_frequency": text})])


def test_ranks_and_alphas_that_differ_are_dynamic_and_convolutions_are_distinguished():
    metadata = built(ranks=[8, 16], alphas=[4.0, 4.0], conv_ranks=[3, 3], conv_alphas=[1.5, 2.0])
    assert metadata["ss_network_dim"] == "Dynamic"
    assert metadata["ss_network_alpha"] == "4"
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "3", "conv_alpha": "Dynamic"}
    assert "ss_network_args" not in built()
    assert built(module="lycoris.kohya")["ss_network_module"] == "lycoris.kohya"


@pytest.mark.parametrize(
    ("name", "told"),
    [("a:b,c<d>", "a_b_c_d_"), ("日本 語", "日本 語"), ("a\nb", "a_b"), ("", "merged"), ("\udcff", "?")],
)
def test_the_alias_can_stand_in_a_prompt(name, told):
    assert output_name(name) == told
    assert built(name=name)["ss_output_name"] == told


def test_long_values_of_the_parents_are_cut():
    sources = [
        SourceMeta(f"n{n}" * 99, {"modelspec.tags": f"t{n}" * 200, "ss_resolution": "9" * 9999})
        for n in range(40)
    ]
    metadata = built(sources=sources)
    assert all(len(value) <= 64 * 1024 for value in metadata.values())
    assert len(metadata["modelspec.merged_from"]) <= 2000
    assert "ss_resolution" not in metadata
