"""The recipe grammar as text: what it takes, what it refuses, and that it reads back."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_loramerge.errors import RecipeError
from lib_loramerge.recipe import (
    MAX_INPUTS,
    STRENGTH_LIMIT,
    LoraInput,
    format_input,
    format_prompt,
    parse_input,
    parse_inputs,
    parse_prompt,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", LoraInput("a")),
        ("a:0.8", LoraInput("a", te=0.8, unet=0.8)),
        ("a:0.8:0.5", LoraInput("a", te=0.8, unet=0.5)),
        ("a:0.8:0.5:16", LoraInput("a", te=0.8, unet=0.5, dyn=16)),
        ("a:0.8:0.5:dyn=16", LoraInput("a", te=0.8, unet=0.5, dyn=16)),
        ("a:-1", LoraInput("a", te=-1, unet=-1)),
        ("a:.5e0", LoraInput("a", te=0.5, unet=0.5)),
        ("a:1e-7", LoraInput("a", te=1e-7, unet=1e-7)),
        ("a:0", LoraInput("a", te=0, unet=0)),
        ("a:te=0.5", LoraInput("a", te=0.5, unet=0.5)),
        ("a:te=0:unet=1", LoraInput("a", te=0, unet=1)),
        ("a:0.8:unet=0.3", LoraInput("a", te=0.8, unet=0.3)),
        ("a:unet=0.3:0.8", LoraInput("a", te=0.8, unet=0.3)),
        ("a:1:te1=0.2:te2=0.3:te3=0.4", LoraInput("a", te1=0.2, te2=0.3, te3=0.4)),
        ("a:1:lbw=MIDD", LoraInput("a", lbw="MIDD")),
        ("a:1:w=MIDD", LoraInput("a", lbw="MIDD")),
        ("a:1:lbw=1, 0 ,R,U,X+0.1:x=0.5", LoraInput("a", lbw="1, 0 ,R,U,X+0.1", x=0.5)),
        ("a:lbw=MIDD:lbwe=ATTNDEEPON", LoraInput("a", lbw="MIDD", lbwe="ATTNDEEPON")),
        ("a:0.5:lbwe=ON:lbw=MIDD", LoraInput("a", te=0.5, unet=0.5, lbw="MIDD", lbwe="ON")),
        ("a:lbwe=IN05-OUT05:attn:0", LoraInput("a", lbwe="IN05-OUT05:attn:0")),
        ("a:lbwe=IN05:attn:0,OUT01:ff:1:x=2", LoraInput("a", lbwe="IN05:attn:0,OUT01:ff:1", x=2)),
        ("a:lbwe=IN05::0.5", LoraInput("a", lbwe="IN05::0.5")),
        ("a:lbwe=::1", LoraInput("a", lbwe="::1")),
        ("a:lbwe=ON:0.8:0.6", LoraInput("a", te=0.8, unet=0.6, lbwe="ON")),
        (" a : 0.8 : te1 = 0.2 ", LoraInput("a", te=0.8, unet=0.8, te1=0.2)),
        ("<lora:a:0.8>", LoraInput("a", te=0.8, unet=0.8)),
        ("<lyco:a:0.8>", LoraInput("a", te=0.8, unet=0.8)),
    ],
)
def test_a_field_is_read_where_the_grammar_has_it(text, expected):
    assert parse_input(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a:0.7:1,1,0,1,1,1,1,1,1,1,1,1,1,1,1,1,1", LoraInput("a", 0.7, 0.7, lbw="1,1,0" + ",1" * 14)),
        ("a:1:MIDD", LoraInput("a", lbw="MIDD")),
        ("a:1:26-MIDD", LoraInput("a", lbw="26-MIDD")),
        ("a:0.5:ROUT:0.7", LoraInput("a", 0.5, 0.5, lbw="ROUT", x=0.7)),
        ("a:1:MIDD:ATTNDEEPON", LoraInput("a", lbw="MIDD", lbwe="ATTNDEEPON")),
    ],
)
def test_the_older_form_with_block_weights_in_third_place_is_read(text, expected):
    assert parse_input(text) == expected


@pytest.mark.parametrize(
    "name",
    [
        "my lora v1.2, (final)",
        "猫の絵 スタイル",
        "sub/name",
        "sub\\name",
        "with \"quotes\" and 'ticks'",
        "two\nlines",
        "a=b",
        "te=0.5",
        "-dash",
        "x" * 250,
        r"C:\x\a.safetensors",
        "C:/models/a",
        r"\\server\share\a.safetensors",
        "/abs/path",
        "./a.safetensors",
        "/tmp/odd:name.safetensors",
        "/tmp/a.v1.SAFETENSORS",
        "a.pt",
    ],
)
@pytest.mark.parametrize("rest", ["", ":0.5", ":0.5:0.25:lbw=MIDD:x=0.1"])
def test_a_name_or_path_is_taken_whole(name, rest):
    expected = {
        "": LoraInput(name),
        ":0.5": LoraInput(name, 0.5, 0.5),
        ":0.5:0.25:lbw=MIDD:x=0.1": LoraInput(name, 0.5, 0.25, lbw="MIDD", x=0.1),
    }[rest]
    assert parse_input(name + rest) == expected
    assert parse_input(f"<lora:{name}{rest}>") == expected


def test_a_lora_called_like_a_drive_is_still_a_name():
    assert parse_input("C:0.8") == LoraInput("C", 0.8, 0.8)


def test_all_tags_of_a_prompt_are_found_and_other_text_is_skipped():
    prompt = (
        "1girl, (hat:1.2) <lora:a:0.8>, [x|y] <hypernet:h:1> <lyco:b c:0.5:lbw=MIDD> a < b > c\n<lora:a:1>"
    )
    assert parse_prompt(prompt) == (
        LoraInput("a", 0.8, 0.8),
        LoraInput("b c", 0.5, 0.5, lbw="MIDD"),
        LoraInput("a"),
    )


def test_a_prompt_without_tags_holds_no_lora():
    assert parse_prompt("1girl, <hypernet:h:1>, <lora:unclosed:1") == ()


def test_each_argument_may_hold_one_lora_or_a_prompt_of_several():
    texts = ["a:0.5", "x <lora:b:1><lora:c:2> y", "<lyco:d>"]
    assert [i.name for i in parse_inputs(texts)] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a:nan", ["te", "'nan'", "1000"]),
        ("a:1:inf", ["unet", "'inf'"]),
        ("a:1:-Infinity", ["unet"]),
        ("a:0x1", ["te", "'0x1'"]),
        ("a:1_0", ["te", "'1_0'"]),
        ("a:true", ["te", "'true'"]),
        ("a:1:False", ["unet", "'False'"]),
        ("a:１", ["te"]),
        ("a:1e9", ["te", "1000", "'1e9'"]),
        ("a:1e999", ["te"]),
        ("a:-1000.5", ["te", "-1000"]),
        ("a:" + "9" * 5000, ["te"]),
        ("a:", ["te", "''"]),
        ("a::1", ["te", "''"]),
        ("a:te=", ["te", "''"]),
        ("a:1:1:1.5", ["dyn", "whole", "'1.5'"]),
        ("a:dyn=0", ["dyn", "1 to 65536", "'0'"]),
        ("a:dyn=nan", ["dyn"]),
        ("a:x=nan:lbw=MIDD", ["x", "'nan'"]),
        ("a:te2=1e4", ["te2"]),
        ("a:lbw=", ["lbw", "empty"]),
        ("a:lbwe=", ["lbwe", "empty"]),
        ("a:lbw=A:w=B", ["lbw=", "w="]),
        ("a:te=1:te=2", ["te=", "twice"]),
        ("a:1:MIDD:lbw=INS", ["twice", "MIDD", "INS"]),
        ("a:lwb=MIDD", ["lwb=", "lbw"]),
        ("a:1:1:1:1", ["at most 3"]),
        ("a:MIDD", ["te", "lbw=NAME"]),
    ],
)
def test_what_makes_no_sense_is_refused_naming_the_lora_the_field_and_the_value(text, words):
    with pytest.raises(RecipeError) as caught:
        parse_input(text)
    message = str(caught.value)
    assert message.startswith("'a': ")
    assert all(word in message for word in words), message
    assert len(message) < 400
    with pytest.raises(RecipeError):
        parse_prompt(f"<lora:{text}>")


@pytest.mark.parametrize(
    "text", ["", " ", ":0.5", "<lora::1>", "<lora: :1>", "<lora:a", "<LORA:a:1>", "<hypernet:a:1>"]
)
def test_no_name_or_no_tag_is_refused(text):
    with pytest.raises(RecipeError):
        parse_input(text)


@pytest.mark.parametrize("field", ["start=5", "stop=10", "step=5-10", "0.5@5", "te=0@0,1@0.5"])
def test_a_choice_of_sampling_steps_is_refused_with_the_reason_or_left_out_and_reported(field):
    with pytest.raises(RecipeError, match=r"sampling steps cannot be kept"):
        parse_input(f"a:{field}")
    notes: list[str] = []
    found = parse_prompt(f"<lora:a:{field}><lora:b:0.5>", skip_unsupported=True, notes=notes)
    assert found == (LoraInput("a"), LoraInput("b", 0.5, 0.5))
    assert len(notes) == 1
    assert field in notes[0]
    assert "'a'" in notes[0]


def test_more_loras_than_a_recipe_holds_are_refused():
    assert len(parse_inputs(["<lora:a:1>" * MAX_INPUTS])) == MAX_INPUTS
    for texts in (["<lora:a:1>" * (MAX_INPUTS + 1)], ["a"] * (MAX_INPUTS + 1), []):
        with pytest.raises(RecipeError, match=f"1 to {MAX_INPUTS}"):
            parse_inputs(texts)


def test_a_text_of_a_megabyte_is_answered_at_once():
    for text in ("<lora:" * 200_000, ":" * 900_000, "a:" + "lbwe=" * 100_000, ".safetensors" * 80_000 + "x"):
        with pytest.raises(RecipeError):
            parse_input(text)


# --- the WebUI's own reading of the same tag, written down again --------------------------------

number = st.floats(-STRENGTH_LIMIT, STRENGTH_LIMIT, allow_nan=False).map(lambda x: round(x, 3))
positional = st.lists(number, max_size=2).map(lambda numbers: [("", n) for n in numbers])
keyed = st.lists(st.tuples(st.sampled_from(["te", "unet"]), number), max_size=2, unique_by=lambda f: f[0])


def webui_strengths(fields):
    """Text encoder and denoiser as A1111's own prompt reader takes them."""
    values = [value for key, value in fields if not key]
    named = {key: value for key, value in fields if key}
    te = named.get("te", values[0] if values else 1.0)
    return te, named.get("unet", values[1] if len(values) > 1 else te)


def lbw_strengths(fields):
    """The same as sd-webui-lora-block-weight takes them, numbers in position before keys."""
    values = [value for key, value in fields if not key]
    named = {key: value for key, value in fields if key}
    te = named.get("te", values[0] if values else None)
    unet = named.get("unet", values[1] if len(values) > 1 else None)
    known = [value for value in (te, unet) if value is not None]
    return (te if te is not None else (known or [1.0])[0], unet if unet is not None else (known or [1.0])[0])


@settings(deadline=None)
@given(positional, keyed)
def test_strengths_are_what_the_webui_makes_of_the_tag(positions, keys):
    fields = [*positions, *keys]
    text = ":".join(["a", *(f"{key}={value!r}" if key else repr(value) for key, value in fields)])
    found = parse_input(text)
    assert (found.te, found.unet) == webui_strengths(fields)


@settings(deadline=None)
@given(positional, keyed)
def test_with_block_weights_strengths_are_what_lora_block_weight_makes_of_the_tag(positions, keys):
    fields = [*positions, *keys]
    text = ":".join(["a", *(f"{key}={value!r}" if key else repr(value) for key, value in fields), "lbw=MIDD"])
    found = parse_input(text)
    assert (found.te, found.unet) == lbw_strengths(fields)


# --- reading back -------------------------------------------------------------------------------

strengths = st.floats(-STRENGTH_LIMIT, STRENGTH_LIMIT, allow_nan=False)
optional_strengths = st.none() | strengths
plain_text = st.text(
    st.characters(exclude_characters=":<>\0", exclude_categories=("Cs",)), min_size=1, max_size=30
)
names = plain_text.map(str.strip).filter(bool)
preset_names = names.filter(lambda name: "," not in name)
rules = st.lists(
    st.tuples(
        st.sampled_from(["IN05-OUT05", "", "NOT BASE", "D00 S01"]),
        st.sampled_from(["attn", "", "NOT ff 1"]),
        strengths,
    ),
    min_size=1,
    max_size=3,
).map(lambda triples: ",".join(f"{b}:{e}:{r!r}" for b, e, r in triples))
lora_inputs = st.builds(
    LoraInput,
    name=names | st.sampled_from([r"C:\a b\c.safetensors", "/tmp/x:y.safetensors"]),
    te=strengths,
    unet=strengths,
    te1=optional_strengths,
    te2=optional_strengths,
    te3=optional_strengths,
    dyn=st.none() | st.integers(1, 65536),
    lbw=st.none() | preset_names | st.sampled_from([",".join(["0.5"] * 12), ",".join(["R"] * 17)]),
    lbwe=st.none() | preset_names | rules,
    x=optional_strengths,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(lora_inputs, min_size=1, max_size=4))
def test_what_is_written_as_a_prompt_reads_back_as_the_same_loras(inputs):
    assert parse_prompt(format_prompt(inputs)) == tuple(inputs)
    assert parse_inputs([format_input(i) for i in inputs]) == tuple(inputs)


def test_the_prompt_form_is_the_one_people_write():
    inputs = (LoraInput("a", 0.8, 0.8), LoraInput("b", 0.5, 0.5, lbw="MIDD"), LoraInput("c", 1, 0))
    assert format_prompt(inputs) == "<lora:a:0.8><lora:b:0.5:lbw=MIDD><lora:c:1:0>"


def test_a_hash_is_the_one_thing_text_does_not_carry():
    known = LoraInput("a", 0.5, 0.5, hash="0123456789abcdef")
    assert parse_prompt(format_prompt([known])) == (replace(known, hash=None),)


@pytest.mark.parametrize("name", ["a ", " a", "  a b  "])
def test_blanks_around_the_name_in_a_tag_belong_to_it_as_in_the_webui(name):
    [given] = parse_prompt(f"a cat <lora:{name}:0.5>")
    assert given.name == name
    assert parse_prompt(format_prompt([given])) == (given,)
    # Without brackets nobody means them.
    assert parse_input(f"{name}:0.5").name == name.strip()
    assert parse_input(format_input(given)) == given


@pytest.mark.parametrize("name", ["a:b", "a>b", "<lora:b:1>"])
def test_a_name_that_a_tag_cannot_hold_is_refused_rather_than_changed(name):
    with pytest.raises(RecipeError, match="cannot be written"):
        format_prompt([LoraInput(name)])


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=80))
def test_any_text_is_read_or_refused_and_what_is_read_reads_back(text):
    for wrapped in (text, f"<lora:{text}>", f"a:{text}"):
        try:
            found = parse_inputs([wrapped], skip_unsupported=True)
        except RecipeError:
            continue
        for one in found:
            assert all(math.isfinite(value) for value in (one.te, one.unet))
            assert parse_input(format_input(one)) == one
