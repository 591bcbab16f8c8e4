"""Attention maps equal transformers' own weights; spans of characters map to tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.factories import LLM_CONFIGS, ask, make_solo, png

from solo_vlm.serve.engine import Prompt, merge_prompts
from solo_vlm.serve.page import attention
from solo_vlm.serve.page.attention import attention_maps, tokens_of_span

from ..conftest import encode_prompt


def chat(answer, *images):
    messages = ask("what is this?", *map(png, images))
    return [*messages, {"role": "assistant", "content": answer}]


def vision(prompt):
    """Return the model inputs of a prompt's images."""
    inputs = merge_prompts([prompt], 0)
    return {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}


def all_attention(model, prompt):
    """Return attention of all tokens, (layers, length, length), from one eager pass over everything."""
    model.model.language_model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(prompt.input_ids)[None],
            **vision(prompt),
            output_attentions=True,
        )
    return torch.stack([layer[0].mean(0) for layer in output.attentions]).numpy()


@pytest.mark.parametrize("family", LLM_CONFIGS)
def test_maps_equal_one_eager_pass_over_everything(family, picture, monkeypatch):
    """Includes sliding windows, and an answer that is processed in several pieces."""
    monkeypatch.setattr(attention, "_ROWS", 3)
    solo = make_solo(family)
    prompt = encode_prompt(
        solo.processor, chat("a red circle left of a blue square", picture(96, 64), picture(32, 64))
    )
    maps = attention_maps(solo.model, prompt)  # before anything is set to eager

    supervised = np.flatnonzero(prompt.supervised)
    patches = np.flatnonzero(prompt.input_ids == solo.model.config.image_token_id)
    whole = all_attention(solo.model, prompt)
    expected = whole[:, supervised - 1][:, :, patches]
    assert maps.weights.shape == (2, len(supervised), 2 * 3 + 2 * 1)
    np.testing.assert_allclose(maps.weights, expected, atol=1e-6)
    assert maps.token_ids.tolist() == prompt.input_ids[supervised].tolist()
    assert (maps.weights.sum(-1) < 1).all()

    first, second = maps.mean_over(slice(2, 4))
    np.testing.assert_allclose(first.ravel(), expected[:, 2:4].mean((0, 1))[:6], atol=1e-6)
    assert first.shape == (2, 3) and second.shape == (2, 1)
    (_, second) = maps.mean_over(slice(0, 1), layer=1)
    np.testing.assert_allclose(second.ravel(), expected[1, 0, 6:], atol=1e-6)


def test_map_is_of_the_step_that_generated_the_token(picture):
    """Compare with the attention that generation returns step by step."""
    solo = make_solo()
    messages = chat("?", picture(96, 64))
    inputs = solo.processor.apply_chat_template(
        messages[:1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    solo.model.set_attn_implementation("eager")
    output = solo.model.generate(
        **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_attentions=True
    )
    solo.model.set_attn_implementation("sdpa")
    prompt = encode_prompt(solo.processor, messages)
    length = inputs["input_ids"].shape[1]
    ids = output.sequences[0].numpy()
    generated = Prompt(ids, np.arange(len(ids)) >= length, prompt.images)
    maps = attention_maps(solo.model, generated)
    patches = np.flatnonzero(ids == solo.model.config.image_token_id)
    for step, layers in enumerate(output.attentions):
        expected = torch.stack([layer[0, :, -1].mean(0) for layer in layers])[:, patches]
        np.testing.assert_allclose(maps.weights[:, step], expected, atol=1e-6)


def test_only_the_last_answer_counts_and_images_are_optional(solo):
    messages = [*chat("red"), *chat("blue square")]
    prompt = encode_prompt(solo.processor, messages)
    maps = attention_maps(solo.model, prompt)
    text = solo.processor.tokenizer.decode(maps.token_ids, skip_special_tokens=True)
    assert text.strip() == "blue square"
    assert maps.weights.shape == (2, len(maps.token_ids), 0)
    assert maps.mean_over(slice(0, 1)) == []


def test_attention_implementation_is_restored(picture):
    solo = make_solo()
    attention_maps(solo.model, encode_prompt(solo.processor, chat("red", picture())))
    assert solo.model.model.language_model.config._attn_implementation == "sdpa"
    assert solo.model.config._attn_implementation == "sdpa"


def ids_of(text, tokenizer):
    return np.array([*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id])


@pytest.mark.parametrize("word", ["a", "red", "circle", "left", "blue"])
def test_tokens_of_a_word_spell_it(solo, word):
    text, tokenizer = "a red circle left of a blue square.", solo.processor.tokenizer
    ids = ids_of(text, tokenizer)
    start = text.index(word)
    tokens = tokens_of_span(start, start + len(word), text, ids, tokenizer)
    spelled = tokenizer.decode(ids[tokens])
    assert word in spelled
    assert spelled.strip() in text
    shorter = [tokenizer.decode(ids[slice(tokens.start + 1, tokens.stop)])]
    shorter += [tokenizer.decode(ids[slice(tokens.start, tokens.stop - 1)])]
    assert all(word not in part for part in shorter)


def test_leading_white_space_does_not_shift_the_span(solo):
    tokenizer = solo.processor.tokenizer
    ids = ids_of("\n blue red", tokenizer)
    tokens = tokens_of_span(5, 8, "blue red", ids, tokenizer)
    assert tokenizer.decode(ids[tokens]).strip() == "red"


def test_multi_token_character_has_all_of_its_tokens(solo):
    tokenizer = solo.processor.tokenizer
    ids = ids_of("red 字 blue", tokenizer)
    spelled = [
        tokenizer.decode(ids[tokens_of_span(at, at + 1, "red 字 blue", ids, tokenizer)]) for at in (4, 6)
    ]
    assert spelled[0].strip() == "字"
    assert "字" not in spelled[1]


@given(text=st.text(min_size=1).map(str.strip).filter(bool), data=st.data())
def test_adjacent_spans_have_adjacent_tokens(solo, text, data):
    """Spans have no gap between them and no token outside the answer, for any text."""
    tokenizer = solo.processor.tokenizer
    ids = np.array(
        [*tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True), tokenizer.eos_token_id]
    )
    cut = data.draw(st.integers(1, len(text)))
    before = tokens_of_span(0, cut, text, ids, tokenizer)
    assert not tokenizer.decode(ids[: before.start]).strip()  # a mark of the beginning, perhaps
    assert before.start < before.stop <= len(ids)
    if cut < len(text):
        after = tokens_of_span(cut, len(text), text, ids, tokenizer)
        assert before.stop - 1 <= after.start <= before.stop
