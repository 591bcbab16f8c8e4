"""Characters of an answer find the tokens that spell them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solo_vlm.serve.page.spans import tokens_of


def ids_of(text, tokenizer):
    return np.array([*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id])


@pytest.mark.parametrize("word", ["a", "red", "circle", "left", "blue"])
def test_the_tokens_of_a_word_spell_it(solo, word):
    text, tokenizer = "a red circle left of a blue square.", solo.processor.tokenizer
    ids = ids_of(text, tokenizer)
    start = text.index(word)
    tokens = tokens_of(start, start + len(word), text, ids, tokenizer)
    spelled = tokenizer.decode(ids[tokens])
    assert word in spelled
    assert spelled.strip() in text
    shorter = [tokenizer.decode(ids[slice(tokens.start + 1, tokens.stop)])]
    shorter += [tokenizer.decode(ids[slice(tokens.start, tokens.stop - 1)])]
    assert all(word not in part for part in shorter)


def test_white_space_before_the_answer_does_not_shift_it(solo):
    tokenizer = solo.processor.tokenizer
    ids = ids_of("\n blue red", tokenizer)
    tokens = tokens_of(5, 8, "blue red", ids, tokenizer)
    assert tokenizer.decode(ids[tokens]).strip() == "red"


def test_a_character_that_is_spread_over_tokens_has_all_of_them(solo):
    tokenizer = solo.processor.tokenizer
    ids = ids_of("red 字 blue", tokenizer)
    spelled = [tokenizer.decode(ids[tokens_of(at, at + 1, "red 字 blue", ids, tokenizer)]) for at in (4, 6)]
    assert spelled[0].strip() == "字"
    assert "字" not in spelled[1]


@given(text=st.text(min_size=1).map(str.strip).filter(bool), data=st.data())
def test_neighbouring_stretches_have_neighbouring_tokens(solo, text, data):
    """For any text: nothing is left out between them, and no token lies outside the answer."""
    tokenizer = solo.processor.tokenizer
    ids = np.array(
        [*tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True), tokenizer.eos_token_id]
    )
    cut = data.draw(st.integers(1, len(text)))
    before = tokens_of(0, cut, text, ids, tokenizer)
    assert not tokenizer.decode(ids[: before.start]).strip()  # a mark of the beginning, perhaps
    assert before.start < before.stop <= len(ids)
    if cut < len(text):
        after = tokens_of(cut, len(text), text, ids, tokenizer)
        assert before.stop - 1 <= after.start <= before.stop
