"""The maps are transformers' own attention weights, reduced; reading in pieces changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.factories import LLM_CONFIGS, ask, make_solo, png

from solo_vlm.data.encode import encode
from solo_vlm.data.sample import parse_sample
from solo_vlm.serve.page import attention_map
from solo_vlm.serve.page.attention_map import attention_maps


def chat(answer, *images):
    messages = ask("what is this?", *map(png, images))
    return [*messages, {"role": "assistant", "content": answer}]


def read(solo, messages):
    return encode(parse_sample({"messages": messages}), solo.processor)


def all_attention(model, document):
    """Of every token to every token, (layers, length, length): one pass over all, with eager attention."""
    model.model.language_model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(document.input_ids)[None],
            pixel_values=torch.tensor(document.patches),
            image_grid_thw=torch.tensor(document.grids),
            output_attentions=True,
        )
    return torch.stack([layer[0].mean(0) for layer in output.attentions]).numpy()


@pytest.mark.parametrize("family", LLM_CONFIGS)
def test_maps_are_the_weights_of_one_pass_over_everything(family, picture, monkeypatch):
    """Also with sliding windows, and for an answer that is read in several pieces."""
    monkeypatch.setattr(attention_map, "_ROWS", 3)
    solo = make_solo(family)
    document = read(solo, chat("a red circle left of a blue square", picture(96, 64), picture(32, 64)))
    maps = attention_maps(solo.model, document)  # before anything is set to eager

    supervised = np.flatnonzero(document.labels != -100)
    patches = np.flatnonzero(document.input_ids == solo.model.config.image_token_id)
    whole = all_attention(solo.model, document)
    expected = whole[:, supervised - 1][:, :, patches]
    assert maps.weights.shape == (2, len(supervised), 2 * 3 + 2 * 1)
    np.testing.assert_allclose(maps.weights, expected, atol=1e-6)
    assert maps.token_ids.tolist() == document.input_ids[supervised].tolist()
    assert (maps.weights.sum(-1) < 1).all()

    first, second = maps.of(slice(2, 4))
    np.testing.assert_allclose(first.ravel(), expected[:, 2:4].mean((0, 1))[:6], atol=1e-6)
    assert first.shape == (2, 3) and second.shape == (2, 1)
    (_, second) = maps.of(slice(0, 1), layer=1)
    np.testing.assert_allclose(second.ravel(), expected[1, 0, 6:], atol=1e-6)


def test_a_map_is_of_the_step_that_chose_the_token(picture):
    """Against the attention that generation itself returns, step by step."""
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
    document = read(solo, messages)
    prompt = inputs["input_ids"].shape[1]
    ids = output.sequences[0].numpy()
    generated = type(document)(
        ids, np.where(np.arange(len(ids)) < prompt, -100, ids), document.patches, document.grids
    )
    maps = attention_maps(solo.model, generated)
    patches = np.flatnonzero(ids == solo.model.config.image_token_id)
    for step, layers in enumerate(output.attentions):
        expected = torch.stack([layer[0, :, -1].mean(0) for layer in layers])[:, patches]
        np.testing.assert_allclose(maps.weights[:, step], expected, atol=1e-6)


def test_only_the_last_answer_counts_and_images_may_be_missing(solo):
    messages = [*chat("red"), *chat("blue square")]
    document = read(solo, messages)
    maps = attention_maps(solo.model, document)
    text = solo.processor.tokenizer.decode(maps.token_ids, skip_special_tokens=True)
    assert text.strip() == "blue square"
    assert maps.weights.shape == (2, len(maps.token_ids), 0)
    assert maps.of(slice(0, 1)) == []


def test_the_model_is_left_as_it_was(picture):
    solo = make_solo()
    attention_maps(solo.model, read(solo, chat("red", picture())))
    assert solo.model.model.language_model.config._attn_implementation == "sdpa"
    assert solo.model.config._attn_implementation == "sdpa"
