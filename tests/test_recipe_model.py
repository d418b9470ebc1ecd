"""Recipes as data: what the dataclasses refuse, and JSON and command line in both directions."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_loramerge.cli import build_parser, recipe_of
from lib_loramerge.errors import RecipeError
from lib_loramerge.recipe import (
    DIALECTS,
    DTYPES,
    MAX_INPUTS,
    LoraInput,
    MergeRecipe,
    Param,
    check_params,
    from_json,
    nearest,
    nearest_hint,
    parse_rank,
    to_command,
    to_json,
)
from tests.test_recipe_text import lora_inputs

A = (LoraInput("a"),)
DENSITY = Param("density", 0.5, "Share of each delta that is kept.", 0.01, 1.0)


# --- one parameter ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("param", "given_value", "expected"),
    [
        (DENSITY, 1, 1.0),
        (DENSITY, " 0.25 ", 0.25),
        (DENSITY, np.float32(0.5), 0.5),
        (Param("steps", 3, "", 1, 10), "7", 7),
        (Param("steps", 3, "", 1, 10), 7.0, 7),
        (Param("steps", 3, "", 1, 10), np.int64(7), 7),
        (Param("rescale", True, ""), "false", False),
        (Param("rescale", True, ""), "Yes", True),
        (Param("rescale", True, ""), False, False),
        (Param("sign", "sum", "", choices=("sum", "count")), "count", "count"),
        (Param("shift", 0.0, ""), -1e300, -1e300),
    ],
)
def test_a_parameter_takes_its_type_and_text_of_it(param, given_value, expected):
    found = param.check(given_value)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("param", "bad"),
    [
        *(
            (DENSITY, bad)
            for bad in (0, 1.01, -1, float("nan"), float("inf"), "nan", "inf", "0x1", "1_0", "", "a", True)
        ),
        *((DENSITY, bad) for bad in (None, [0.5], 10**400, "1e999")),
        *(
            (Param("density", 3, "", 1, 10), bad)
            for bad in (0, 11, 2.5, "2.5", True, float("nan"), float("inf"))
        ),
        *((Param("density", True, ""), bad) for bad in (1, 0.0, "maybe", None)),
        *((Param("density", "sum", "", choices=("sum", "count")), bad) for bad in ("cuont", "", 1, None)),
    ],
)
def test_a_parameter_refuses_all_else_naming_itself_and_the_value(param, bad):
    with pytest.raises(RecipeError, match=r"^density must") as caught:
        param.check(bad)
    assert str(bad)[:40] in str(caught.value) or repr(bad)[:40] in str(caught.value)


def test_a_parameter_out_of_range_is_refused_with_the_limits():
    with pytest.raises(RecipeError, match=r"density must be a number from 0\.01 to 1, got 2\."):
        DENSITY.check(2)


def test_missing_parameters_have_their_default_and_unknown_ones_are_refused_with_the_nearest():
    assert check_params([DENSITY], {}, mode="ties") == {"density": 0.5}
    with pytest.raises(RecipeError, match=r"ties.*'denstiy'.*density.*Nearest: density"):
        check_params([DENSITY], {"denstiy": 0.5}, mode="ties")
    with pytest.raises(RecipeError, match=r"svd.*takes none"):
        check_params([], {"density": 0.5}, mode="svd")


# --- one LoRA and the whole recipe --------------------------------------------------------------


@pytest.mark.parametrize("field", ["te", "unet", "te1", "te2", "te3", "x"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), True, "0.5", 1000.1, -1e9, 10**400, [1]])
def test_strengths_are_finite_numbers_within_the_limit(field, bad):
    with pytest.raises(RecipeError, match=rf"'a': {field} must be a number from -1000 to 1000"):
        LoraInput("a", **{field: bad})


@pytest.mark.parametrize(
    "fields",
    [
        {"name": ""},
        {"name": " "},
        {"name": "a\0"},
        {"name": "x" * 5000},
        {"name": 5},
        {"te": None},
        {"unet": None},
        {"dyn": 0},
        {"dyn": 1.0},
        {"dyn": True},
        {"lbw": ""},
        {"lbw": "A:B"},
        {"lbw": 5},
        {"lbwe": " "},
        {"lbw": "1," * 10_000},
        {"hash": "xyz"},
        {"hash": "ABCDEF01"},
        {"hash": ""},
    ],
)
def test_fields_of_a_lora_that_make_no_sense_are_refused(fields):
    with pytest.raises(RecipeError):
        LoraInput(**{"name": "a", **fields})


def test_the_strength_of_an_encoder_is_its_own_or_that_of_all_text_encoders():
    one = LoraInput("a", te=0.5, unet=2, te2=-1)
    assert {c: one.strength(c) for c in ("unet", "te", "te1", "te2", "te3")} == {
        "unet": 2,
        "te": 0.5,
        "te1": 0.5,
        "te2": -1,
        "te3": 0.5,
    }
    assert LoraInput("a", te=0.5, te1=0).strength("te") == 0  # the only encoder of SD1 is its first
    with pytest.raises(ValueError, match="vae"):
        one.strength("vae")


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"inputs": ()}, "1 to 100"),
        ({"inputs": A * (MAX_INPUTS + 1)}, "1 to 100"),
        ({"inputs": "a"}, "inputs"),
        ({"inputs": ["a"]}, "inputs"),
        ({"inputs": A[0]}, "inputs"),
        ({"mode": ""}, "mode"),
        ({"mode": 1}, "mode"),
        ({"mode": "a b"}, "mode"),
        ({"params": [1]}, "params"),
        ({"params": {"p": float("nan")}}, "p must"),
        ({"params": {"p": None}}, "p must"),
        ({"params": {"p q": 1}}, "p q"),
        ({"params": {1: 1}}, "1"),
        ({"rank": 0}, "rank"),
        ({"rank": -1}, "rank"),
        ({"rank": 1.5}, "rank"),
        ({"rank": True}, "rank"),
        ({"rank": "32"}, "rank"),
        ({"rank": "max"}, "same or full"),
        ({"rank": 70_000}, "65536"),
        ({"rank": None}, "rank"),
        ({"conv_rank": 0}, "conv_rank"),
        ({"conv_rank": "full"}, "conv_rank"),
        ({"retain": 0}, "retain"),
        ({"retain": 1.01}, "retain"),
        ({"retain": float("nan")}, "retain"),
        ({"size": 0}, "size"),
        ({"size": -1}, "size"),
        ({"size": 1e12}, "size"),
        ({"size": float("inf")}, "size"),
        ({"retain": 0.5, "size": 5}, "retain and size"),
        ({"retain": 0.5, "rank": 8}, "retain and rank"),
        ({"size": 5, "rank": "full"}, "size and rank"),
        ({"size": 5, "conv_rank": 8}, "size and conv_rank"),
        ({"dtype": "fp16"}, "dtype"),
        ({"dtype": "float15"}, "Nearest: float16"),
        ({"dialect": "peft"}, "dialect"),
        ({"device": "gpu"}, "device"),
        ({"device": "cuda:x"}, "device"),
        ({"device": "cuda:0; rm"}, "device"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**53}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"seed": True}, "seed"),
        ({"base": ""}, "base"),
        ({"skip_unsupported": 1}, "skip_unsupported"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(fields, word):
    with pytest.raises(RecipeError) as caught:
        MergeRecipe(**{"inputs": A, **fields})
    assert word in str(caught.value)


def test_a_recipe_is_not_changed_by_its_makers_later_changes():
    params = {"density": 0.5}
    recipe = MergeRecipe(list(A), params=params)
    params["density"] = 0.9
    assert recipe.params == {"density": 0.5}
    assert recipe.inputs == A
    assert len({recipe, replace(recipe)}) == 1


@pytest.mark.parametrize(("text", "rank"), [("32", 32), (32, 32), (" Full", "full"), ("same", "same")])
def test_a_rank_is_read_from_text(text, rank):
    assert parse_rank(text) == rank


@pytest.mark.parametrize("text", ["", "0", "1.5", "all", "1_0", None, True, float("nan")])
def test_other_ranks_are_refused(text):
    with pytest.raises(RecipeError, match="same or full"):
        parse_rank(text)


def test_the_nearest_names_come_best_first():
    names = ["MIDD", "MIDDXL", "INALL", "OUTALL", "style_v2", "スタイル"]
    assert nearest("middxl", names)[0] == "MIDDXL"
    assert nearest("style", names) == ["style_v2"]
    assert nearest("スタイ", names) == ["スタイル"]
    assert nearest("qqqq", names) == []
    assert nearest_hint("MIDDD", names).startswith(" Nearest: MIDD")
    assert nearest_hint("qqqq", names) == ""


# --- JSON and the command line ------------------------------------------------------------------

words = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True)
finite = st.floats(allow_nan=False, allow_infinity=False)
values = st.booleans() | st.integers(-(10**6), 10**6) | finite | words
hashes = st.none() | st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
rank_rules = st.one_of(
    st.fixed_dictionaries(
        {"rank": st.integers(1, 65536) | st.sampled_from(["same", "full"])},
        optional={"conv_rank": st.integers(1, 65536)},
    ),
    st.fixed_dictionaries({"retain": st.floats(0, 1, exclude_min=True)}),
    st.fixed_dictionaries({"size": st.floats(0, 1e6, exclude_min=True)}),
)
recipes = st.builds(
    lambda rule, **fields: MergeRecipe(**rule, **fields),
    rule=rank_rules,
    inputs=st.lists(st.builds(lambda i, h: replace(i, hash=h), lora_inputs, hashes), min_size=1, max_size=3),
    mode=words,
    params=st.dictionaries(words, values, max_size=3),
    dtype=st.sampled_from(DTYPES),
    device=st.sampled_from(["auto", "cpu", "cuda", "cuda:1", "mps", "xpu:0"]),
    seed=st.integers(0, 2**53 - 1),
    base=st.none() | st.just("models/base model.safetensors"),
    dialect=st.sampled_from([*DIALECTS]),
    skip_unsupported=st.booleans(),
)


@settings(deadline=None)
@given(recipes)
def test_a_recipe_reads_back_from_its_json(recipe):
    assert from_json(to_json(recipe)) == recipe
    assert from_json(json.dumps(to_json(recipe), allow_nan=False)) == recipe


def test_json_takes_loras_as_objects_as_text_or_as_a_prompt():
    expected = (LoraInput("a", 0.8, 0.8), LoraInput("b"))
    assert from_json({"inputs": [{"name": "a", "te": 0.8, "unet": 0.8}, "b"]}).inputs == expected
    assert from_json({"inputs": "x <lora:a:0.8> y <lora:b:1>"}).inputs == expected


def test_in_json_the_strength_of_the_unet_follows_that_of_the_text_encoder_as_in_a_prompt():
    given = [{"name": "a", "te": 0.5}, {"name": "b", "te": 0.5, "unet": 1}, {"name": "c", "unet": 0.5}]
    inputs = from_json({"inputs": given}).inputs
    assert [(each.te, each.unet) for each in inputs] == [(0.5, 0.5), (0.5, 1), (1, 0.5)]


def test_null_is_absent_only_where_absent_is_allowed():
    assert from_json('{"inputs": [{"name": "a", "te1": null}], "size": null}') == MergeRecipe(A)
    for text in ('{"inputs": ["a"], "seed": null}', '{"inputs": [{"name": "a", "te": null}]}'):
        with pytest.raises(RecipeError):
            from_json(text)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "JSON"),
        ("[]", "object"),
        ("5", "object"),
        ("null", "object"),
        ("{", "JSON"),
        ("{}", "inputs"),
        ("[" * 200_000, "deep"),
        ('{"a":' * 100_000, "deep"),
        ('{"inputs": ["a"], "rank": NaN}', "NaN"),
        ('{"inputs": ["a"], "size": 1e999}', "size"),
        ('{"inputs": ["a"], "size": -Infinity}', "Infinity"),
        ('{"inputs": ["a"], "seed": 1' + "0" * 10_000 + "}", "JSON"),
        ('{"inputs": ["a"], "seed": 1, "seed": 2}', "twice"),
        ('{"inputs": ["a"], "raank": 1}', "Nearest: rank"),
        ('{"inputs": ["a"], "rank": "32"}', "rank"),
        ('{"inputs": ["a"], "version": 2}', "version"),
        ('{"inputs": ["a"], "version": true}', "version"),
        ('{"inputs": ["a"], "version": "1"}', "version"),
        ('{"inputs": []}', "1 to 100"),
        ('{"inputs": {}}', "inputs"),
        ('{"inputs": [1]}', "input"),
        ('{"inputs": [{}]}', "name"),
        ('{"inputs": [{"name": "a", "strength": 1}]}', "strength"),
        ('{"inputs": [{"name": "a", "te": "1"}]}', "te"),
        ('{"inputs": [{"name": "a", "te": true}]}', "te"),
        ('{"inputs": [{"name": "a", "start": 5}]}', "start"),
        ('{"inputs": ["<lora:a:1><lora:b:1>"]}', "One LoRA"),
        ('{"inputs": ["a:start=5"]}', "start=5"),
        ('{"inputs": ["a"], "params": {"p": [1]}}', "p must"),
        ('{"inputs": ["a"], "skip_unsupported": "yes"}', "skip_unsupported"),
        ("x" * 5_000_000, "characters"),
    ],
    ids=lambda value: value[:40],
)
def test_json_that_is_no_recipe_is_refused_in_one_sentence(text, word):
    with pytest.raises(RecipeError) as caught:
        from_json(text)
    assert word in str(caught.value)
    assert len(str(caught.value)) < 600


def from_command(argv: list[str]) -> MergeRecipe:
    """The recipe that the command line's own parser makes of the words after ``loramerge``."""
    assert argv[0] == "loramerge"
    recipe, notes = recipe_of(build_parser(argv[1:]).parse_args(argv[1:]))
    assert notes == []
    return recipe


@settings(max_examples=60, deadline=None)
@given(recipes)
def test_the_command_line_of_a_recipe_makes_the_same_recipe(recipe):
    known = replace(recipe, params={}, inputs=tuple(replace(i, hash=None) for i in recipe.inputs))
    argv = to_command(known, "out dir/name")
    assert all(isinstance(word, str) for word in argv)
    assert from_command(argv) == known


@pytest.mark.parametrize(
    "name", ["-dash", "--help", "--", "a b", "<odd", "$(x)", "猫", "two\nlines", "@file"]
)
def test_odd_names_survive_the_command_line(name):
    recipe = MergeRecipe((LoraInput(name, 0.5, 0.5), LoraInput("b")), rank="full", seed=7)
    argv = to_command(recipe, "-o")
    assert from_command(argv) == recipe
    options = build_parser(argv[1:]).parse_args(argv[1:])
    assert options.output == "-o"


def test_only_settings_that_differ_from_the_default_are_in_the_command():
    assert to_command(MergeRecipe(A), "out") == ["loramerge", "merge", "-o", "out", "a:1"]
    recipe = MergeRecipe(A, mode="ties", params={"density": 0.25, "rescale": False, "shift": -1}, size=5.5)
    assert to_command(recipe) == [
        "loramerge",
        "merge",
        "--mode",
        "ties",
        "--size",
        "5.5",
        "--density",
        "0.25",
        "--rescale",
        "false",
        "--shift=-1",
        "a:1",
    ]


def test_a_stored_recipe_without_a_rank_means_what_it_meant_then():
    assert from_json({"version": 1, "inputs": ["a"]}).rank == "same"
    assert from_json({"inputs": ["a"]}).rank == "auto"
    assert from_json(to_json(MergeRecipe((LoraInput("a"),)))).rank == "auto"
    assert from_json({"version": 1, "inputs": ["a"], "retain": 0.9}).retain == 0.9
