"""What was computed for earlier prompts is reused wherever it fits, nowhere else, and changes no answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.factories import LLM_CONFIGS, ask, make_solo
from transformers import DynamicCache, Qwen3NextConfig

from solo_vlm.generate import GenerationPipeline, PrefixCache
from solo_vlm.generate.cache import drop_cached_images, prompt_key, supports_prefix_cache

QUESTIONS = [
    *("what is this?", "what is left?", "what is seven?", "hello", "hello world"),
    *("a red circle?", "a blue square?", "is this red?", "is this blue?", "what?"),
]


def pipelines(family: str, **sizes) -> tuple[GenerationPipeline, GenerationPipeline]:
    """One without a prefix cache, and one with."""
    solo = make_solo(family)
    for name, value in sizes.items():
        setattr(solo.model.config.text_config, name, value)
    solo.model.eval()
    cached = GenerationPipeline(solo.model, solo.processor, PrefixCache())
    return GenerationPipeline(solo.model, solo.processor), cached


def reply(pipeline, chat, tokens=4):
    return pipeline.stream(chat, lambda text: None, tokens)


@pytest.mark.parametrize("family", LLM_CONFIGS)
def test_the_answers_are_those_without_a_cache(family, picture):
    without, cached = pipelines(family)
    image = picture(320, 256)
    for number, question in enumerate(QUESTIONS):
        chat = ask(question, image)
        ours = reply(cached, chat)
        assert ours.text == reply(without, chat).text
        assert (ours.cached_tokens > ours.num_patches) == (number > 0)


@pytest.mark.parametrize("family", LLM_CONFIGS)
def test_logits_after_a_reused_beginning(family, picture):
    without, cached = pipelines(family)
    image = picture(160, 96)
    reply(cached, ask(QUESTIONS[0], image))
    inputs = without.encode([ask(QUESTIONS[1], image)])
    prompt = prompt_key(inputs, without.model.config.image_token_id)
    known, cache = cached.prefix_cache.find(prompt)
    assert 15 < known < len(prompt)
    rest = drop_cached_images(inputs, prompt[:known])
    assert "pixel_values" not in rest
    with torch.inference_mode():
        whole = without.model(**inputs).logits[0, known:]
        pieces = without.model(
            input_ids=rest["input_ids"][:, known:],
            attention_mask=rest["attention_mask"],
            past_key_values=cache,
        ).logits[0]
    assert torch.allclose(whole, pieces, atol=1e-4)


def test_an_image_of_1024_pixels_is_computed_once(picture):
    without, cached = pipelines("llama", max_position_embeddings=2048)
    computed = []
    cached.model.model.language_model.register_forward_pre_hook(
        lambda module, args, inputs: computed.append(inputs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    image = picture(1024, 1024)
    ours = [reply(cached, ask(question, image), 2) for question in QUESTIONS]
    assert sum(computed) < 1057 + 10 * 40
    assert [one.text for one in ours] == [
        reply(without, ask(question, image), 2).text for question in QUESTIONS
    ]
    assert ours[-1].num_patches == 1024


def test_another_image_of_the_same_size_is_not_taken_for_the_first(picture):
    without, cached = pipelines("qwen3")
    one, other = picture(64, 64, seed=0), picture(64, 64, seed=1)
    asked = [(one, one), (one, other), (other, one), (other, other), (one, one)]
    known = []
    for images in asked:
        chat = ask("what is this?", *images)
        ours = reply(cached, chat)
        assert ours.text == reply(without, chat).text
        known.append(ours.cached_tokens)
    text, image = known[2], 4 + 2 + 1
    assert known[:4] == [0, text + image, text, text + image]
    assert known[4] > text + 2 * image


def test_images_of_one_colour_that_lie_otherwise_are_told_apart():
    without, cached = pipelines("llama")
    for size in ((96, 64), (64, 96), (96, 64)):
        chat = ask("what is this?", Image.new("RGB", size, "red"))
        ours = reply(cached, chat)
        assert ours.text == reply(without, chat).text
    first = cached.encode([ask("what is this?", Image.new("RGB", (96, 64), "red"))])
    second = cached.encode([ask("what is this?", Image.new("RGB", (64, 96), "red"))])
    ids = [prompt_key(inputs, cached.model.config.image_token_id) for inputs in (first, second)]
    same = first["input_ids"][0, : common(*ids)]
    assert same[-1] == cached.model.config.vision_start_token_id
    assert cached.model.config.image_token_id not in same


def test_a_conversation_goes_on_from_its_own_answers(picture):
    without, cached = pipelines("mistral")
    turns = ask("what is this?", picture(96, 64))
    before = 0
    for question in ("and what is left?", "and seven?", "hello"):
        ours = reply(cached, turns)
        assert ours.text == reply(without, turns).text
        assert ours.cached_tokens >= before
        before = ours.prompt_tokens
        turns = [*turns, {"role": "assistant", "content": ours.text}, *ask(question)]


def test_batches_and_single_answers_agree(picture):
    _, cached = pipelines("gemma3")
    chats = [ask(question, picture(64, 64)) for question in QUESTIONS[:3]]
    alone = [reply(cached, chat).text for chat in chats]
    assert cached.answer(chats, 4) == alone


def test_no_budget_is_no_cache(picture):
    solo = make_solo("llama")
    pipeline = GenerationPipeline(solo.model.eval(), solo.processor, PrefixCache(max_bytes=0))
    chat = ask("what is this?", picture(64, 64))
    assert reply(pipeline, chat).text == reply(pipeline, chat).text
    assert reply(pipeline, chat).cached_tokens == 0
    assert pipeline.prefix_cache.bytes == 0


def test_recurrent_layers_are_not_reused():
    config = Qwen3NextConfig(num_hidden_layers=4, hidden_size=16, vocab_size=32)
    assert "linear_attention" in config.layer_types
    assert not supports_prefix_cache(config)
    assert all(supports_prefix_cache(make_solo(family).model.config.text_config) for family in LLM_CONFIGS)


# --- the tree alone: keys and values that say which tokens they belong to -------------------------------


def states(tokens: np.ndarray) -> DynamicCache:
    """Two layers that hold, at each position, the tokens up to there as one number."""
    told = torch.tensor(np.cumsum(tokens * 7 ** np.arange(len(tokens))), dtype=torch.float64)
    keys = told.view(1, 1, -1, 1)
    cache = DynamicCache()
    for layer in range(2):
        cache.update(keys + layer, -keys - layer, layer)
    return cache


def common(one: np.ndarray, other: np.ndarray) -> int:
    return next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


sequences = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=9).map(np.array), min_size=1, max_size=25
)


@settings(deadline=None, max_examples=60)
@given(sequences=sequences, tokens=st.sampled_from([10**6, 12, 30]))
def test_the_longest_common_beginning_is_found(sequences, tokens):
    budget = tokens * 2 * 2 * 8  # layers, keys and values, float64
    tree = PrefixCache(budget)
    added: list[np.ndarray] = []
    for sequence in sequences:
        known, cache = tree.find(sequence)
        longest = max((common(sequence[:-1], other) for other in added), default=0)
        assert known == longest if tokens == 10**6 else known <= longest
        assert cache.get_seq_length() == known
        for layer, expected in zip(
            cache.layers, states(sequence[:known]).layers if known else (), strict=True
        ):
            assert torch.equal(layer.keys, expected.keys)
            assert torch.equal(layer.values, expected.values)
        tree.add(sequence, states(sequence))
        added.append(sequence)
        assert tree.bytes <= budget
    beginnings = {tuple(sequence[: n + 1]) for sequence in added for n in range(len(sequence))}
    if tokens == 10**6:  # every token that has the same tokens before it is held once
        assert tree.bytes == len(beginnings) * 2 * 2 * 8


def test_what_was_used_last_stays():
    tree = PrefixCache(2 * 2 * 8 * 12)
    one, two, three = (np.full(5, token) for token in (1, 2, 3))
    for sequence in (one, two):
        tree.add(sequence, states(sequence))
    tree.find(one)
    tree.add(three, states(three))
    assert [tree.find(np.append(sequence, 9))[0] for sequence in (one, two, three)] == [5, 0, 5]
