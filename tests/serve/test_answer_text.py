"""Text piece by piece against the tokenizer's own decoding of the whole."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.factories import TEXTS

from solo_vlm.serve.answer_text import AnswerText


@pytest.fixture(scope="module")
def tokenizer(solo):
    return solo.processor.tokenizer


def pieces(tokenizer, ids, stop=()):
    text = AnswerText(tokenizer, stop)
    for token in ids:
        yield text.add(token)
        if text.stopped:
            return
    yield text.end()


@given(st.lists(st.integers(0, 319), max_size=40))
@settings(deadline=None)
def test_pieces_make_the_decoded_text(tokenizer, ids):
    whole = tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert "".join(pieces(tokenizer, ids)) == whole


@given(st.text(max_size=30), st.lists(st.text("ab \né", min_size=1, max_size=4), max_size=3))
@settings(deadline=None)
def test_the_text_ends_before_the_first_stop_string(tokenizer, text, stop):
    # A stop string inside another is complete first, and ends the stream before the longer one is there.
    assume(not any(one != other and one in other for one in stop for other in stop))
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids, skip_special_tokens=True).lstrip()
    # Character by character, as somebody would read it.
    until = next((n for n in range(len(whole) + 1) if any(one in whole[:n] for one in stop)), len(whole))
    end = min((whole[:until].find(one) for one in stop if one in whole[:until]), default=until)
    assert "".join(pieces(tokenizer, ids, stop)) == whole[:end].strip()


@pytest.mark.parametrize(
    ("said", "stop", "answer"),
    [
        ("a red triangle", " ", "a"),
        ("  a red triangle", " ", "a"),
        ("\n\na red triangle", "\n", "a red triangle"),
        ("\n\na red\n\ntriangle", "\n\n", "a red"),
        (" \n a red\ntriangle", "\n", "a red"),
        ("   ", " ", ""),
        (" red red", " red", "red"),
    ],
)
def test_white_space_before_an_answer_is_no_stop_string(tokenizer, said, stop, answer):
    ids = tokenizer.encode(said, add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids, [stop])) == answer


def test_words_come_as_soon_as_they_are_certain(tokenizer):
    ids = tokenizer.encode(TEXTS[0], add_special_tokens=False)
    early = list(pieces(tokenizer, ids))[: len(ids) // 2]
    assert "".join(early).startswith("a red circle")


def test_a_character_of_several_tokens_comes_whole(tokenizer):
    ids = tokenizer.encode("🙂", add_special_tokens=False)
    assert len(ids) > 1
    assert [piece for piece in pieces(tokenizer, ids) if piece] == ["🙂"]
