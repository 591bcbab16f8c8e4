"""Questions with options, also in the columns of VLMEvalKit's tables."""

from __future__ import annotations

import pytest
from tests.data.formats.test_converters import shown

from solo_vlm.data.formats.row_format import RowFormat, choose_format
from solo_vlm.data.sample import SampleError
from solo_vlm.utils.errors import SoloError

ASKS = "Answer with the option's letter from the given choices directly."
LETTERED = {"question": "Which?", "A": "red", "B": "blue", "C": None, "D": "None", "answer": "D"}


def convert(row):
    return RowFormat("questions")(row)


@pytest.mark.parametrize(
    ("row", "asked", "answers"),
    [
        (LETTERED, f"Which?\nA. red\nB. blue\nC.\nD. None\n{ASKS}", ["D"]),
        (
            LETTERED | {"C": float("nan"), "answer": "blue"},
            f"Which?\nA. red\nB. blue\nC.\nD. None\n{ASKS}",
            ["B"],
        ),
        (LETTERED | {"C": 3, "D": "", "answer": 3}, f"Which?\nA. red\nB. blue\nC. 3\n{ASKS}", ["C"]),
        (
            LETTERED | {"hint": "Look.", "D": None, "answer": "A"},
            f"Hint: Look.\nWhich?\nA. red\nB. blue\n{ASKS}",
            ["A"],
        ),
        ({"question": "Q", "hint": float("nan"), "answer": "a"}, "Q", ["a"]),
        (dict.fromkeys("ABCD") | {"question": "Q", "answer": ["1.06", "1.07"]}, "Q", ["1.06", "1.07"]),
    ],
)
def test_options_by_letter_and_hints_are_read(row, asked, answers):
    converted = convert(row)
    assert shown(converted) == f"u:{asked}|a:{answers[0]}"
    assert converted["answers"] == answers


def test_numbered_marks_place_images_also_in_options_and_twice():
    row = {
        "question": "See <image 2>.",
        "A": "<image 1>",
        "B": "<image 2>",
        "answer": "A",
        "image": [b"1", b"2"],
    }
    one, two = f"<{b'1'!s}>", f"<{b'2'!s}>"
    assert shown(convert(row)) == f"u:See{two}.\nA.{one}B.{two}{ASKS}|a:A"


def test_image_path_is_read_where_no_image_is():
    row = {"question": "Q", "answer": "a", "image_path": ["a.png", "b.png"]}
    assert shown(convert(row)) == "u:<a.png><b.png>Q|a:a"
    assert shown(convert(row | {"image": b"1"})) == f"u:<{b'1'!s}>Q|a:a"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (LETTERED | {"answer": "C"}, "not the letter or the text of one of the options"),
        (LETTERED | {"answer": "E"}, "not the letter"),
        (LETTERED | {"answer": None}, "the row has no answer"),
        (LETTERED | {"B": None, "D": None, "answer": "A"}, "not the letter"),
        (LETTERED | {"options": ["red", "green"]}, "differ: fill one of them"),
        ({"question": "Q", "answer": "a", "choices": ["a", "b"]}, "columns: {options: choices} reads them"),
        ({"question": "<image 2>?", "answer": "a", "image": b"1"}, "<image 2> in the text, and 1 images"),
        ({"question": "<image 1>?", "answer": "a", "image": [b"1", b"2"]}, "and 2 images"),
        ({"question": "<image 1>?", "answer": "a"}, "and 0 images"),
        ({"question": 3, "answer": "a"}, "question is int, not text"),
        ({"question": "Q"}, "no field answer"),
    ],
)
def test_unclear_questions_are_refused(row, message):
    with pytest.raises(SampleError) as error:
        convert(row)
    assert message in str(error.value)


def test_tables_of_questions_are_recognized_and_never_read_without_their_options():
    for row in (LETTERED, {"index": 1, "question": "Q", "answer": "a", "image": "a.png"}):
        assert choose_format("x", [row], "auto", {}, None).name == "questions"
    assert choose_format("x", [{"question": "Q", "answer": "a"}], "auto", {}, None).name == "instruction"
    with pytest.raises(SoloError, match="options, which are not read: set format: questions"):
        choose_format("x", [LETTERED], "instruction", {}, None)
