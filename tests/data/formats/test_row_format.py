"""Recognition of formats, and one line for columns, filters and rows that do not fit."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.formats.test_converters import ROWS, messages, turns

from solo_vlm.data.formats.row_format import FORMATS, KNOWN_COLUMNS, RowFormat, choose_format
from solo_vlm.data.sample import FilteredRow, SampleError, parse_sample
from solo_vlm.utils.errors import SoloError

LLAVA = {"id": 1, "image": "a.jpg", "conversations": turns("<image>\nWhat?", "A cat.")}
PHOTO = {"photo": "a.jpg", "title": "A cat.", "stars": 4}


def chosen(*rows, format="auto", columns=None, filter=None) -> RowFormat:
    return choose_format("x.json", rows, format, columns or {}, filter)


@pytest.mark.parametrize(("name", "row", "expected"), ROWS)
def test_row_is_recognized(name, row, expected):
    found = chosen(row).name
    is_text_only = "<" not in expected
    assert found in {name, *(("sharegpt",) if name == "llava" and is_text_only else ())} or (
        found == "samples" and ("messages" in row or name == "chatml")
    )


def test_rows_that_are_samples_stay_samples():
    for row in (
        {"messages": messages("What?", "A cat."), "prompt": "What?", "response": "A cat."},
        {"messages": [], "images": []},
        {"messages": None},
        {"conversations": messages("What?", "A cat.")},
        messages("What?", "A cat."),
        {"role": "assistant", "content": "A cat."},
    ):
        assert chosen(row).name == "samples"
    assert chosen().name == "samples"


def test_text_only_rows_among_the_first_do_not_hide_the_images():
    assert chosen({"conversations": turns("2 + 2?", "4")}, LLAVA).name == "llava"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (PHOTO, r"^x\.json: unknown rows; rows have photo, title, stars, but captions has image .*; "
                r"llava has conversations .*, and there are sharegpt, .*: set format and columns$"),
        ({"image": "a.jpg", "title": "A"},
         r"unknown rows; rows have image, title, but captions has image .*, and there are sharegpt, .*: set"),
        ({"image": "a.jpg", "text": 7},
         r"^x\.json: raw-schema: text is int, not text; rows have image, text, but captions has image .*"),
        ({"image": "a.jpg", "text": "A", "question": "Q", "answer": "B"},
         r"^x\.json: rows may be instruction or captions; rows have image, text, question, answer, and .*"),
    ],
)  # fmt: skip
def test_unknown_or_ambiguous_rows_give_one_line_with_found_and_expected(row, message):
    with pytest.raises(SoloError, match=message):
        chosen(row)


def test_message_about_unknown_rows_describes_the_nearest_formats_alone():
    with pytest.raises(SoloError) as error:
        chosen({"image": "a.jpg", "conversations": "[]", "split": "train"})
    assert str(error.value).count(" has ") == 3
    assert "sharegpt has" in str(error.value)
    assert "llava has" in str(error.value)


def test_turns_whose_other_keys_a_table_filled_up_are_read():
    empty = {"role": None, "content": None}
    turn = [{"from": "human", "value": "Q", **empty}, {"from": "gpt", "value": "A", **empty}]
    row_format = chosen({"conversations": turn})
    assert [message["role"] for message in row_format({"conversations": turn})["messages"]] == [
        "user",
        "assistant",
    ]


def test_columns_are_read_by_the_names_of_the_format():
    row_format = chosen(PHOTO, columns={"image": "photo", "text": "title"})
    assert row_format.name == "captions"
    assert row_format(PHOTO)["images"] == ["a.jpg"]
    assert row_format(PHOTO | {"image": "other.jpg"})["images"] == ["a.jpg"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"image": "foto"}},
         r"columns reads image from foto, but rows have photo, title, stars; did you mean photo\?"),
        ({"columns": {"imag": "photo"}, "format": "captions"},
         r"columns names imag, but captions reads image, .*did you mean image\?"),
        ({"format": "llava"},
         r"no field conversations; rows have photo, title, stars, but llava has conversations"),
        ({"filter": "star >= 3"},
         r"filter names star, but rows have photo, title, stars; did you mean stars\?"),
        ({"filter": "title >= 3", "columns": {"image": "photo", "text": "title"}},
         r"filter: title >= 3: .*rows have photo, title, stars"),
    ],
)  # fmt: skip
def test_wrong_settings_give_one_line_with_found_and_expected(options, message):
    with pytest.raises(SoloError, match=rf"^x\.json: .*{message}") as error:
        chosen(PHOTO, **options)
    assert "\n" not in str(error.value)


def test_filtered_row_is_told_apart_from_a_broken_one():
    row_format = chosen(PHOTO, columns={"image": "photo", "text": "title"}, filter="stars >= 5")
    with pytest.raises(FilteredRow, match="filtered: not stars >= 5"):
        row_format(PHOTO)
    assert row_format(PHOTO | {"stars": 5})["images"] == ["a.jpg"]


def test_filter_names_columns_as_found_or_as_read():
    for expression in ("len(title) > 2", "len(text) > 2"):
        assert chosen(PHOTO, columns={"image": "photo", "text": "title"}, filter=expression)(PHOTO)


SIMPLE = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=4) | st.text(max_size=30)
)
NAMES = st.sampled_from(
    sorted({*KNOWN_COLUMNS, "role", "content", "from", "value", "user", "assistant", "type"})
)
VALUES = st.recursive(
    SIMPLE | st.sampled_from(["user", "gpt", "<image>", "a.jpg"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.fuzz
@given(row=VALUES | st.dictionaries(NAMES, VALUES, max_size=5))
def test_any_row_is_recognized_and_read_or_is_an_error_with_a_reason(row):
    with contextlib.suppress(SoloError):
        chosen(row)
    for name in FORMATS:
        with contextlib.suppress(SampleError):
            parse_sample(RowFormat(name)(row))


@pytest.mark.parametrize(("name", "row", "expected"), ROWS)
@given(changes=st.dictionaries(NAMES, VALUES, min_size=1, max_size=2))
def test_usual_row_with_any_change_is_read_or_is_an_error_with_a_reason(name, row, expected, changes):
    with contextlib.suppress(SoloError):
        chosen(row | changes)
    with contextlib.suppress(SampleError):
        parse_sample(RowFormat(name)(row | changes))
