"""Sentences that remember what they were made of, and the errors that are such sentences."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from lib_loramerge import errors
from lib_loramerge.errors import FileError, LoraMergeError, RecipeError, Sentence, counted, joined, mapped

NESTED = RecipeError("{name}: {error}", "{error}.safetensors", FileError("{file} is {what}.", "a", "{file}"))


def test_a_sentence_is_its_text() -> None:
    made = Sentence("{file} has {count} layers, {count} of {file}.", "a {count}", 3)
    assert made == "a {count} has 3 layers, 3 of a {count}."
    assert made.key == "{file} has {count} layers, {count} of {file}."
    assert made.parts == ("a {count}", "3")
    assert json.dumps([made]) == '["a {count} has 3 layers, 3 of a {count}."]'
    assert Sentence("{left} as it is") == "{left} as it is"
    assert Sentence(made) is made


@pytest.mark.parametrize("parts", [("a",), ("a", "b", "c")])
def test_parts_are_as_many_as_slots(parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="zip"):
        Sentence("{file} is {what}.", *parts)


def test_the_text_of_an_error_keeps_what_it_was_made_of() -> None:
    text = str(NESTED)
    assert text == f"{NESTED}" == "{error}.safetensors: a is {file}."
    assert isinstance(text, Sentence)
    assert text.to_json() == ["{name}: {error}", "{error}.safetensors", ["{file} is {what}.", "a", "{file}"]]
    assert NESTED.args == (text,)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_errors_are_copied_whole(again) -> None:
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LoraMergeError)
    ]
    for error in (NESTED, *(kind("{file} is empty.", "a") for kind in kinds)):
        found = again(error)
        assert type(found) is type(error)
        assert found.sentence == error.sentence
        assert found.sentence.to_json() == error.sentence.to_json()


def test_joined_and_counted_keep_sentences() -> None:
    one = counted(1, "{count} layer of {file}", "{count} layers of {file}", "a")
    two = counted(2, "{count} layer of {file}", "{count} layers of {file}", "b")
    both = joined(", ", [one, "x", two], " and ")
    assert both == "1 layer of a, x and 2 layers of b"
    assert both.parts == (one, "x", two)
    assert (joined(", ", []), joined(", ", ["a"], " and ")) == ("", "a")


def test_names_are_changed_within_a_sentence_and_never_its_own_words() -> None:
    made = Sentence("a: {name} is {what}", "a", Sentence("a {name}", "a"))
    found = mapped(made, lambda text: text.replace("a", "b"))
    assert (found, found.key) == ("a: b is a b", made.key)
    assert mapped("a", str.upper) == "A"


def test_counts_of_one_are_singular():
    from lib_loramerge.report import count_text, histogram_text

    assert (count_text(1, "layer"), count_text(0, "layer")) == ("1 layer", "0 layers")
    assert (count_text(1, "matrix", "matrices"), count_text(2, "matrix", "matrices")) == (
        "1 matrix",
        "2 matrices",
    )
    assert histogram_text({8: 3, 4: 1}) == "8 (3 layers), 4 (1 layer)"
