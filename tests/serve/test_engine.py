"""Sampling and padding against brute force; streamed text against decoding the whole answer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.factories import TEXTS, ask, make_solo

from solo_vlm.generate import GenerationPipeline, PrefixCache
from solo_vlm.serve.engine import IncrementalDetokenizer, RowSampler, SamplingParams, merge_prompts
from solo_vlm.serve.limits import Limits

from .conftest import encode_prompt, question, served

LOGITS = torch.tensor([2.0, 1.0, 0.0, -3.0])


def frequencies(params: SamplingParams, draws: int = 4000) -> torch.Tensor:
    sampler = RowSampler([params], torch.device("cpu"))
    chosen = [int(sampler(torch.zeros(1, 1), LOGITS[None].clone()).argmax()) for _ in range(draws)]
    return torch.bincount(torch.tensor(chosen), minlength=4) / draws


def test_samples_follow_softmax_at_temperature():
    expected = (LOGITS / 0.7).softmax(0)
    assert torch.allclose(frequencies(SamplingParams(1, temperature=0.7, seed=0)), expected, atol=0.03)


def test_tiny_temperature_is_greedy():
    assert frequencies(SamplingParams(1, temperature=1e-300, top_p=0.5, seed=0), draws=10)[0] == 1


def test_top_p_drops_the_tail():
    expected = torch.tensor([*LOGITS[:2].softmax(0), 0, 0])  # these two have 0.9 of the probability
    assert torch.allclose(
        frequencies(SamplingParams(1, temperature=1.0, top_p=0.85, seed=0)), expected, atol=0.03
    )


def test_greedy_row_keeps_its_scores_next_to_a_sampled_one():
    sampler = RowSampler([SamplingParams(1), SamplingParams(1, temperature=1.0, seed=3)], torch.device("cpu"))
    scores = sampler(torch.zeros(2, 1), LOGITS.repeat(2, 1))
    assert torch.equal(scores[0], LOGITS)
    alone = RowSampler([SamplingParams(1, temperature=1.0, seed=3)], torch.device("cpu"))
    assert torch.equal(scores[1:], alone(torch.zeros(1, 1), LOGITS[None].clone()))


def test_merged_prompts_equal_a_padded_batch(solo, picture):
    processor = solo.processor
    chats = [ask("hello"), ask("what is this? a red circle", picture(64, 96)), ask("and", picture(32, 32))]
    merged = merge_prompts(
        [encode_prompt(processor, chat, True) for chat in chats], processor.tokenizer.pad_token_id
    )
    processor.tokenizer.padding_side = "left"
    batch = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert merged.keys() == batch.keys()
    assert all(torch.equal(merged[name], batch[name]) for name in batch)


@pytest.mark.parametrize(
    "family", ["qwen3_5_text", "falcon_mamba", "gpt_oss", "llama4_text", "gemma3n_text", "rwkv"]
)
def test_concurrent_answers_equal_those_given_alone(family, picture):
    """Hybrid, state space, experts and sinks, chunks, shared keys, and a state that padding changes."""
    solo = make_solo(family)
    images = [picture(32 * n, 64, seed=n) for n in range(1, 5)]
    chats = [("hello " * n, images[:n] if n % 2 else []) for n in range(1, 5)]
    with (
        served(solo, Limits(), prefix_cache=PrefixCache()) as server,
        ThreadPoolExecutor(len(chats) * 2) as clients,
    ):
        bodies = [question(text, *own, max_tokens=6) for text, own in chats] * 2
        replies = list(clients.map(server.ask, bodies))
    answers = [reply["choices"][0]["message"]["content"] for _, reply in replies]
    alone = GenerationPipeline(solo.model, solo.processor)
    assert answers == [alone.answer([ask(text, *own)], 6)[0] for text, own in chats] * 2


@pytest.fixture(scope="module")
def tokenizer(solo):
    return solo.processor.tokenizer


def pieces(tokenizer, ids, stop=()):
    text = IncrementalDetokenizer(tokenizer, stop)
    for token in ids:
        yield text.append(token)
        if text.stopped:
            return
    yield text.flush()


@given(st.lists(st.integers(0, 319), max_size=40))
@settings(deadline=None)
def test_pieces_concatenate_to_decoded_text(tokenizer, ids):
    whole = tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert "".join(pieces(tokenizer, ids)) == whole


@given(st.text(max_size=30), st.lists(st.text("ab \né", min_size=1, max_size=4), max_size=3))
@settings(deadline=None)
def test_text_ends_before_first_stop_string(tokenizer, text, stop):
    # A stop string inside another one is complete first and ends the stream before the longer one.
    assume(not any(one != other and one in other for one in stop for other in stop))
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids, skip_special_tokens=True).lstrip()
    # Character by character, as a reader of the stream would see it.
    until = next((n for n in range(len(whole) + 1) if any(one in whole[:n] for one in stop)), len(whole))
    end = min((whole[:until].find(one) for one in stop if one in whole[:until]), default=until)
    assert "".join(pieces(tokenizer, ids, stop)) == whole[:end].strip()


@pytest.mark.parametrize(
    ("text", "stop", "answer"),
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
def test_leading_white_space_is_not_a_stop_string(tokenizer, text, stop, answer):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids, [stop])) == answer


def test_words_are_emitted_as_soon_as_final(tokenizer):
    ids = tokenizer.encode(TEXTS[0], add_special_tokens=False)
    early = list(pieces(tokenizer, ids))[: len(ids) // 2]
    assert "".join(early).startswith("a red circle")


def test_multi_token_character_is_emitted_whole(tokenizer):
    ids = tokenizer.encode("🙂", add_special_tokens=False)
    assert len(ids) > 1
    assert [piece for piece in pieces(tokenizer, ids) if piece] == ["🙂"]
