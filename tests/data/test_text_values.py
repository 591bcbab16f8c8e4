"""Names and texts as rows hold them."""

from __future__ import annotations

import pytest

from solo_vlm.data.text_values import check_text, load_json, natural_key, printable


def test_names_sort_by_number():
    names = [f"{folder}/img{number}.png" for folder in ("A", "b2", "b10") for number in range(12)]
    assert sorted(sorted(names), key=natural_key) == names


@pytest.mark.parametrize("text", ["", "café", "\U0001f600", "nul \0"])
def test_text_is_kept(text):
    assert check_text(text) == printable(text) == text


@pytest.mark.parametrize(("text", "place"), [("\ud83d", 0), ("ab\udcff", 2), ("\ude00\ud83d", 0)])
def test_lone_surrogates_are_named(text, place):
    with pytest.raises(ValueError, match=rf"character {place} \('\\ud") as error:
        check_text(text)
    str(error.value).encode()
    assert "\\ud" in printable(text)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", b"\xff", ""])
def test_json_that_cannot_be_read_is_a_value_error(text):
    with pytest.raises(ValueError):
        load_json(text)
