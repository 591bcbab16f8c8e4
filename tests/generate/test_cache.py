"""Prefix cache: reuse for every shared prefix, for nothing else, and with unchanged answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.factories import LLM_CONFIGS, ask, make_solo
from transformers import DynamicCache

from solo_vlm.check.tiny import tiny_config
from solo_vlm.generate import GenerationPipeline, PrefixCache
from solo_vlm.generate.cache import (
    drop_cached_images,
    preallocated_cache,
    prompt_key,
    supports_prefix_cache,
)

QUESTIONS = [
    *("what is this?", "what is left?", "what is seven?", "hello", "hello world"),
    *("a red circle?", "a blue square?", "is this red?", "is this blue?", "what?"),
]


def pipelines(family: str, **sizes) -> tuple[GenerationPipeline, GenerationPipeline]:
    """Return a pipeline without and one with a prefix cache."""
    solo = make_solo(family)
    for name, value in sizes.items():
        setattr(solo.model.config.text_config, name, value)
    solo.model.eval()
    cached = GenerationPipeline(solo.model, solo.processor, PrefixCache())
    return GenerationPipeline(solo.model, solo.processor), cached


def reply(pipeline, chat, tokens=4):
    return pipeline.stream(chat, lambda text: None, tokens)


@pytest.mark.parametrize("family", LLM_CONFIGS)
def test_prefix_cache_does_not_change_answers(family, picture):
    without, cached = pipelines(family)
    image = picture(320, 256)
    for number, question in enumerate(QUESTIONS):
        chat = ask(question, image)
        ours = reply(cached, chat)
        assert ours.text == reply(without, chat).text
        assert (ours.cached_tokens > ours.num_patches) == (number > 0)


@pytest.mark.parametrize("family", LLM_CONFIGS)
def test_logits_after_a_reused_prefix(family, picture):
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


def test_shared_image_is_computed_once(picture):
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


def test_images_of_equal_size_are_distinguished(picture):
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


def test_equal_patches_with_different_grids_are_distinguished():
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


def test_conversation_reuses_its_own_answers(picture):
    without, cached = pipelines("mistral")
    turns = ask("what is this?", picture(96, 64))
    before = 0
    for question in ("and what is left?", "and seven?", "hello"):
        ours = reply(cached, turns)
        assert ours.text == reply(without, turns).text
        assert ours.cached_tokens >= before
        before = ours.prompt_tokens
        turns = [*turns, {"role": "assistant", "content": ours.text}, *ask(question)]


def test_batched_answers_match_single_answers(picture):
    _, cached = pipelines("gemma3")
    chats = [ask(question, picture(64, 64)) for question in QUESTIONS[:3]]
    alone = [reply(cached, chat).text for chat in chats]
    assert cached.answer(chats, 4) == alone


def test_zero_bytes_caches_nothing(picture):
    solo = make_solo("llama")
    pipeline = GenerationPipeline(solo.model.eval(), solo.processor, PrefixCache(max_bytes=0))
    chat = ask("what is this?", picture(64, 64))
    assert reply(pipeline, chat).text == reply(pipeline, chat).text
    assert reply(pipeline, chat).cached_tokens == 0
    assert pipeline.prefix_cache.nbytes == 0


def test_only_keys_and_values_of_attention_are_cached():
    """Recurrent states cannot be cut, and the keys of an indexer are not in the cache's keys and values."""
    cached = {"llama": True, "llama4_text": True, "gemma3n_text": True, "deepseek_v3": True}
    cached |= dict.fromkeys(("qwen3_5_text", "mamba", "rwkv", "xlstm", "minimax", "lfm2", "zamba2"), False)
    cached |= dict.fromkeys(("deepseek_v32", "deepseek_v4", "minimax_m3_vl_text"), False)
    assert {family: supports_prefix_cache(tiny_config(family)) for family in cached} == cached


# --- the radix tree alone, with keys and values that encode their tokens ---------------------------------


def states(tokens: np.ndarray) -> DynamicCache:
    """Return two layers whose value at each position encodes all tokens up to it."""
    codes = torch.tensor(np.cumsum(tokens * 7 ** np.arange(len(tokens))), dtype=torch.float64)
    keys = codes.view(1, 1, -1, 1)
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
def test_longest_common_prefix_is_found(sequences, tokens):
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
        assert tree.nbytes <= budget
    prefixes = {tuple(sequence[: n + 1]) for sequence in added for n in range(len(sequence))}
    if tokens == 10**6:  # equal prefixes are stored once
        assert tree.nbytes == len(prefixes) * 2 * 2 * 8


def test_least_recently_used_branch_is_evicted():
    tree = PrefixCache(2 * 2 * 8 * 12)
    one, two, three = (np.full(5, token) for token in (1, 2, 3))
    for sequence in (one, two):
        tree.add(sequence, states(sequence))
    tree.find(one)
    tree.add(three, states(three))
    assert [tree.find(np.append(sequence, 9))[0] for sequence in (one, two, three)] == [5, 0, 5]


# --- the preallocated cache ------------------------------------------------------------------------------

LAYERS = 2
STEPS = st.lists(
    st.one_of(
        st.integers(1, 300).map(lambda tokens: ("append", tokens)),
        st.integers(1, 5).map(lambda tokens: ("crop", tokens)),
        st.permutations(range(3)).map(lambda rows: ("reorder", rows)),
    ),
    max_size=12,
)


@given(STEPS)
@settings(deadline=None, max_examples=50)
def test_preallocated_cache_equals_dynamic_cache(steps):
    expected, ours = DynamicCache(), preallocated_cache()
    for kind, what in [("append", 7), *steps]:
        for index in range(LAYERS):
            if kind == "append":
                keys, values = torch.rand(3, 2, what, 4), torch.rand(3, 2, what, 6)
                for one, other in zip(
                    ours.update(keys, values, index), expected.update(keys, values, index), strict=True
                ):
                    assert torch.equal(one, other)
        for cache in (ours, expected):
            if kind == "crop" and expected.get_seq_length() > what:
                cache.crop(-what)
            elif kind == "reorder":
                cache.reorder_cache(torch.tensor(what))
        assert ours.get_seq_length() == expected.get_seq_length()
    for one, other in zip(ours.layers, expected.layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


def test_tokens_are_appended_in_place():
    cache = preallocated_cache()
    keys, _ = cache.update(torch.rand(1, 2, 1000, 4), torch.rand(1, 2, 1000, 4), 0)
    addresses = {
        cache.update(torch.rand(1, 2, 1, 4), torch.rand(1, 2, 1, 4), 0)[0].data_ptr() for _ in range(200)
    }
    assert addresses == {keys.data_ptr()}
