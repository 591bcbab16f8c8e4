"""Options in every stored format: each keeps its letter, even next to an empty one."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest

from solo_vlm.evaluate.predictions import Prediction
from solo_vlm.evaluate.scoring.options import as_list, options_of, reference_letter, with_option_texts
from solo_vlm.utils.errors import SoloError

NAN = float("nan")
WITH_GAP = ["Two", "One", "", "Three"]


@pytest.mark.parametrize("empty", [None, "", "  ", NAN])
@pytest.mark.parametrize(
    "row_of",
    [
        lambda empty: dict(zip("abcd", ("Two", "One", empty, "Three"), strict=True)),
        lambda empty: {f"choice_{k}": v for k, v in zip("abcd", ("Two", "One", empty, "Three"), strict=True)},
        lambda empty: {"options": ["Two", "One", empty, "Three"]},
        lambda empty: {"choices": ["Two", "One", empty, "Three"]},
        lambda empty: {"options": {"A": "Two", "B": "One", "C": empty, "D": "Three"}},
    ],
    ids=["columns", "choice columns", "list", "choices", "object"],
)
def test_empty_option_keeps_later_letters(row_of, empty):
    assert options_of({**row_of(empty), "answer": "D"}) == WITH_GAP


@pytest.mark.parametrize(
    "text",
    [
        "['Two', 'One', '', 'Three']",
        "['Two', 'One', None, 'Three']",
        "['Two', 'One', nan, 'Three']",
        '["Two", "One", null, "Three"]',
        "('Two', 'One', '', 'Three')",
        "A. Two\nB. One\nC. \nD. Three",
        "A: Two, B: One, C: , D: Three",
        "A: Two, B: One, D: Three",
        "(A) Two\n(B) One\n(D) Three",
        "A．Two\nB．One\nC．\nD．Three",
        '{"A": "Two", "B": "One", "D": "Three"}',
        '{"D": "Three", "B": "One", "A": "Two"}',
        '{"label": ["A", "B", "C", "D"], "text": ["Two", "One", "", "Three"]}',
        '[{"label": "D", "text": "Three"}, {"label": "A", "text": "Two"}, {"label": "B", "text": "One"}]',
        "['A. Two', 'B. One', '', 'D. Three']",
    ],
)
def test_options_as_text(text):
    assert as_list(text) == WITH_GAP
    assert options_of({"options": text, "answer": "D"}) == WITH_GAP


@pytest.mark.parametrize(
    "options",
    [
        ["dog", "cat"],
        ["a dog", "it's a cat", 'the "bird"'],
        ['it\'s "both"', "a, b", "[c]", "d\\e"],
        ["an option of many words " * 4, "another one, that is long as well " * 3, "short"],
        ["one"],
    ],
)
def test_printed_numpy_arrays_and_pandas_series(options):
    """Long arrays are printed on several lines."""
    for array in (np.array(options), np.array(options, dtype=object)):
        for text in (str(array), repr(array), str(array.tolist())):
            assert as_list(text) == [option.strip() for option in options]
    frame = pd.DataFrame({"options": [np.array(options, dtype=object)]})
    assert as_list(pd.read_csv(io.StringIO(frame.to_csv()))["options"][0]) == [
        option.strip() for option in options
    ]


def test_printed_arrays_with_empty_entries():
    assert as_list(str(np.array(["a", None, "c"], dtype=object))) == ["a", "", "c"]
    assert as_list(str(np.array(["a", NAN, "c"], dtype=object))) == ["a", "", "c"]
    assert as_list(str(np.array([1, 2, 3]))) == ["1", "2", "3"]


@pytest.mark.parametrize("text", ["['a', 'b'", "['a' 'b' ... 'z']", "{'a': }", "[a, b]"])
def test_unreadable_list_gives_no_options(text):
    assert options_of({"options": text, "answer": "A"}) == [""] * 5


def test_options_that_are_not_texts_are_rejected():
    with pytest.raises(SoloError, match="an option must be a text"):
        as_list([["dog"], ["cat"]])


def test_empty_columns_fall_back_to_the_question():
    row = {"a": None, "b": "", "question": "Which?\nOptions: A: dog, B: cat"}
    assert options_of(row) == ["dog", "cat"]


def test_json_row_without_the_column_of_an_empty_option():
    assert options_of({"a": "Two", "b": "One", "d": "Three"}) == WITH_GAP
    assert options_of({"b": "One", "c": "x"}) == ["", "One", "x"]


def test_trailing_empty_options_count_only_if_one_is_the_reference():
    row = dict(zip("abcd", ("Two", "One", None, None), strict=True))
    assert options_of({**row, "answer": "B"}) == ["Two", "One"]
    assert options_of({**row, "answer": "D"}) == ["Two", "One", "", ""]
    assert options_of({"options": ["Two", "One", None], "answer": 2}) == ["Two", "One", ""]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("D", "D"),
        ("Ｄ", "D"),
        ("D．", "D"),
        ("**d**", "D"),
        ("Three", "D"),
        ("C", "C"),
        (3, "D"),
        ("3.0", "D"),
        (None, None),
        (NAN, None),
        ("", None),
        ("AB", None),
        ("A, B", None),
        ("4", None),
        ("nothing", None),
    ],
)
def test_reference_letter(answer, letter):
    assert (
        reference_letter(Prediction("1", "x", {"answer": answer}), WITH_GAP, answers_are_indices=True)
        == letter
    )


def test_empty_reference_is_not_the_option_none():
    assert reference_letter(Prediction("1", "x", {"answer": None}), ["Some", "None"], False) is None
    assert reference_letter(Prediction("1", "x", {"answer": NAN}), ["Some", "nan"], False) is None


def test_reference_that_matches_two_options_is_unusable():
    assert reference_letter(Prediction("1", "x", {"answer": "cat"}), ["cat", "cat", "dog"], False) is None
    assert reference_letter(Prediction("1", "x", {"answer": "MW"}), ["mW", "MW"], False) == "B"


def test_with_option_texts_shows_empty_options_as_empty():
    row = with_option_texts(
        {"options": ["a", None, NAN, "d", None], "choice_a": "x", "choice_b": None, "answer": "3"}
    )
    assert row == {"options": ["a", "", "", "d"], "choice_a": "x", "choice_b": "", "answer": "3"}


@pytest.mark.parametrize("text", ["cat, dog, bird", "cat; dog", "cat|dog", "cat\n\nbird"])
def test_ambiguous_options_text_is_rejected(text):
    with pytest.raises(SoloError, match="are not a list: write them as JSON"):
        options_of({"question": "Which?", "options": text, "answer": "B"})
    assert options_of({"question": "Which?", "options": "cat\ndog\n", "answer": "B"}) == ["cat", "dog"]
