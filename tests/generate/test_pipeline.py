"""GenerationPipeline: how answers end, and options that must not change them."""

from __future__ import annotations

import pytest
from tests.factories import ask, make_llm, make_solo

from solo_vlm.generate import GenerationPipeline, PrefixCache
from solo_vlm.utils.errors import SoloError


def pipeline(family: str = "llama", **options) -> GenerationPipeline:
    solo = make_solo(family)
    return GenerationPipeline(solo.model.eval(), solo.processor, **options)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_static_cache_gives_the_same_answers(family, picture):
    dynamic, static = pipeline(family), pipeline(family, compile=True)
    chats = [ask("what is this?", picture(96, 64)), ask("hello"), ask("a red circle?", picture(32, 64))]
    for max_new_tokens in (12, 5):
        expected = dynamic.answer(chats, max_new_tokens)
        assert static.answer(chats, max_new_tokens) == expected
        assert static.stream(chats[0], lambda text: None, max_new_tokens).text == expected[0]


def test_compile_with_prefix_cache_is_rejected():
    with pytest.raises(SoloError, match="choose one"):
        pipeline(compile=True, prefix_cache=PrefixCache())


@pytest.mark.parametrize("cache", [None, PrefixCache()])
def test_cancelled_answer_keeps_its_text(cache, picture):
    ours = pipeline(prefix_cache=cache)
    chat = ask("what is this?", picture(64, 64))
    whole = ours.stream(chat, lambda text: None, 9)
    assert (whole.completion_tokens, whole.finish_reason) == (9, "length")
    calls = iter([False, False, True])
    pieces: list[str] = []
    part = ours.stream(chat, pieces.append, 9, should_stop=lambda: next(calls))
    assert (part.completion_tokens, part.finish_reason) == (3, "cancelled")
    assert "".join(pieces).strip() == part.text
    assert whole.text.startswith(part.text[:-1])  # the last character may be incomplete


def test_answer_stops_at_eos():
    ours = pipeline()
    chat = ask("hello")
    tokens, _ = ours.generate(ours.encode([chat]), 5)
    ours.model.generation_config.eos_token_id = [int(tokens[0, -3])]
    reply = ours.stream(chat, lambda text: None, 5)
    assert reply.finish_reason == "stop"
    assert reply.completion_tokens <= 3


def test_answer_is_capped_at_the_context_length(picture):
    ours = pipeline(prefix_cache=PrefixCache())
    prompt = ours.stream(ask("what is this?", picture(64, 64)), lambda text: None, 1).prompt_tokens
    ours.model.config.text_config.max_position_embeddings = prompt + 4
    reply = ours.stream(ask("what is this?", picture(64, 64)), lambda text: None, 100)
    assert (reply.completion_tokens, reply.finish_reason) == (4, "length")
    ours.model.config.text_config.max_position_embeddings = prompt
    with pytest.raises(SoloError, match="context"):
        ours.stream(ask("what is this?", picture(64, 64)), lambda text: None, 100)


def test_lowest_temperature_equals_greedy_decoding():
    greedy = pipeline().stream(ask("what?"), lambda text: None, max_new_tokens=4)
    for temperature in (1e-45, 1e-9):
        reply = pipeline().stream(ask("what?"), lambda text: None, 4, temperature=temperature)
        assert reply.text == greedy.text


@pytest.mark.parametrize("command", [("generate", "--prompt", "x"), ("chat",)])
def test_infinite_temperature_is_rejected(command, run):
    code, _, errors = run(*command, "--model", "none", "--temperature", "inf")
    assert code == 2
    assert "--temperature" in errors


def test_plain_llm_is_rejected_instead_of_loaded_with_random_weights(tmp_path, run):
    llm, tokenizer = make_llm()
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    code, out, errors = run("generate", "--model", tmp_path / "llm", "--prompt", "x")
    assert (code, out) == (2, "")
    assert "is not a SOLO model but llama" in " ".join(errors.split())
