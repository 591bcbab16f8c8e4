"""GenerationPipeline: how answers end, and options that must not change them."""

from __future__ import annotations

import pytest
import torch
from tests.factories import ask, make_llm, make_solo

from solo_vlm.generate import BatchGenerator, GenerationPipeline, GenerationRequest, PrefixCache
from solo_vlm.generate.exactness import padding_error
from solo_vlm.models.from_llm import ImageDesign, compose
from solo_vlm.utils.errors import SoloError


def pipeline(family: str = "llama", settings: dict | None = None, **options) -> GenerationPipeline:
    solo = make_solo(family, **(settings or {}))
    return GenerationPipeline(solo.model.eval(), solo.processor, **options)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "qwen3_5_text", "llama4_text"])
def test_static_cache_gives_the_same_answers(family, picture):
    dynamic, static = pipeline(family), pipeline(family, compile=True)
    chats = [ask("what is this?", picture(96, 64)), ask("hello"), ask("a red circle?", picture(32, 64))]
    for max_new_tokens in (12, 5):
        expected = dynamic.answer(chats, max_new_tokens)
        assert static.answer(chats, max_new_tokens) == expected
        assert static.stream(chats[0], lambda text: None, max_new_tokens).text == expected[0]


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_5_text"])
def test_static_cache_gives_the_same_answers_with_bidirectional_images(family, picture):
    solo = compose(*make_llm(family), design=ImageDesign("bidirectional", "2d", patch_embedding="conv"))
    for weight in solo.model.model.embed_vision_patch.parameters():
        weight.data.mul_(8.0)
    dynamic, static = (GenerationPipeline(solo.model, solo.processor, compile=flag) for flag in (False, True))
    chats = [ask("what is this?", picture(96, 64)), ask("hello"), ask("a red circle?", picture(32, 64))]
    assert static.answer(chats, 12) == dynamic.answer(chats, 12)


def test_joined_inputs_equal_those_encoded_together(picture):
    ours = pipeline()
    chats = [ask("hello"), ask("what is this?", picture(96, 64)), ask("a red circle?", picture(32, 64))]
    for some in (chats, chats[:1], chats[1:]):
        together, joined = ours.encode(some), ours.join([ours.encode([chat]) for chat in some])
        assert joined.keys() == together.keys()
        assert all(torch.equal(joined[name], tensor) for name, tensor in together.items())


def test_chats_are_answered_alone_where_padding_changes_answers(picture, caplog):
    ours = pipeline("rwkv")
    chats = [ask("what is this?", picture(96, 64)), ask("hello"), ask("a red circle?", picture(32, 64))]
    alone = [ours.stream(chat, lambda text: None, 6).text for chat in chats]
    assert ours.answer(chats, 6) == alone
    requests = [GenerationRequest(number, chat, 6) for number, chat in enumerate(chats)]
    outputs = [output for batch in BatchGenerator(ours).generate(requests) for output in batch]
    assert [output.text for output in sorted(outputs, key=lambda one: one.request_id)] == alone
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("solo_vlm")]
    assert warnings == ["chats are answered one at a time: padding would change the answers of rwkv"]
    with pytest.raises(SoloError, match="generate one at a time"):
        ours.generate(ours.encode(chats), 6)


@pytest.mark.parametrize("family", ["rwkv", "qwen3_5_text"])
def test_prefix_cache_is_off_where_the_past_cannot_be_cut(family, picture, caplog):
    ours = pipeline(family, prefix_cache=PrefixCache())
    assert f"the prefix cache is off: {family} keeps more" in caplog.text
    chat = ask("what is this?", picture(96, 64))
    first, second = (ours.stream(chat, lambda text: None, 6) for _ in range(2))
    assert first.text == second.text and second.cached_tokens == 0


@pytest.mark.parametrize("family", ["rwkv", "bloom", "gpt_neo"])
def test_compile_is_rejected_where_a_static_cache_fails_or_changes_answers(family):
    with pytest.raises(SoloError, match=f"{family} does not work with a static cache"):
        pipeline(family, compile=True)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_several_rows_per_chat_leave_the_prefix_cache_alone(options, picture):
    ours, plain = pipeline(prefix_cache=PrefixCache()), pipeline()
    inputs = plain.encode([ask("what is this?", picture(96, 64))])
    for more in (options, {}, options):  # before and after the prompt is cached
        assert ours.generate(inputs, 6, **more)[0].equal(plain.generate(inputs, 6, **more)[0])


@pytest.mark.parametrize("family", ["minimax", "rwkv"])
def test_beams_do_not_use_a_cache_that_cannot_be_reordered(family):
    """That of MiniMax reorders only its keys and values in transformers 5.23."""
    ours = pipeline(family)
    inputs = ours.encode([ask("a red circle")])
    expected = ours.model.generate(**inputs, max_new_tokens=6, num_beams=3, do_sample=False, use_cache=False)
    assert ours.generate(inputs, 6, num_beams=3)[0].equal(expected)


def test_cache_that_fails_is_not_used(picture, caplog):
    """The cache of xLSTM has other sizes than its states in transformers 5.23."""
    ours = pipeline("xlstm")
    chat = ask("what is this?", picture(96, 64))
    assert ours.generate(ours.encode([chat]), 6)[0][0].tolist() == uncached(ours, chat, 6)
    assert "the cache of xlstm does not work" in caplog.text


def test_decoder_without_a_cache_sees_the_whole_chat(picture):
    ours = pipeline("openai-gpt")
    chat = ask("what is this?", picture(96, 64))
    assert ours.generate(ours.encode([chat]), 6)[0][0].tolist() == uncached(ours, chat, 6)


def uncached(pipeline: GenerationPipeline, chat, tokens: int) -> list[int]:
    """Return the IDs of a greedy answer, each computed from the whole sequence."""
    inputs = pipeline.encode([chat])
    options = {"max_new_tokens": tokens, "do_sample": False, "use_cache": False}
    return pipeline.model.generate(**inputs, **options)[0].tolist()


@pytest.mark.parametrize("positions", ["1d", "2d"])
@pytest.mark.parametrize("has_cache", [False, True])
def test_answer_beyond_the_original_length_of_long_rope(has_cache, positions, picture):
    """All keys change there: those of the prompt, of a cached prefix, and of shorter chats in a batch."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 6,
        "long_factor": [6.0] * 6,
        "original_max_position_embeddings": 40,
        "factor": 12.8,
    }
    solo = compose(*make_llm(rope_parameters=rope), design=ImageDesign(image_positions=positions))
    solo.model.model.embed_vision_patch.weight.data.mul_(20.0)
    ours = GenerationPipeline(solo.model, solo.processor, PrefixCache() if has_cache else None)
    ours.model.generation_config.eos_token_id = None
    chats = [ask("what is this?", picture(96, 160)), ask("hello"), ask("a red circle?", picture(32, 64))]
    for tokens in (4, 30, 4):
        expected = [uncached(ours, chat, tokens) for chat in chats]
        lengths = [len(ids) for ids in expected]
        assert tokens < 30 or min(lengths) < 40 < max(lengths)
        found = [ours.generate(ours.encode([chat]), tokens)[0][0].tolist() for chat in chats]
        assert found == expected
        assert ours.answer(chats, tokens) == [ours.answer([chat], tokens)[0] for chat in chats]


def test_long_rope_of_one_kind_of_layers_counts(picture):
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    long_rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [6.0] * 8,
        "original_max_position_embeddings": 40,
    }
    settings = {"rope_parameters": {"sliding_attention": rope, "full_attention": long_rope}}
    ours = pipeline("olmo3", settings)
    ours.model.generation_config.eos_token_id = None
    chats = [ask("what is this?", picture(96, 160)), ask("hello")]
    for tokens in (4, 30):
        expected = [uncached(ours, chat, tokens) for chat in chats]
        assert [ours.generate(ours.encode([chat]), tokens)[0][0].tolist() for chat in chats] == expected
        assert ours.answer(chats, tokens) == [ours.answer([chat], tokens)[0] for chat in chats]


def test_chats_join_a_batch_up_to_the_place_where_scores_are_scaled():
    """Llama 4 and Inkling scale scores by a token's place in its row, which counts padding."""
    assert padding_error(pipeline("llama4_text", {"floor_scale": 8, "attn_scale": 1.0}).model) > 1e-3
    for family, name in (("llama4_text", "floor_scale"), ("inkling_text", "log_scaling_n_floor")):
        ours = pipeline(family, {name: 40})
        assert (ours.may_batch(39), ours.may_batch(40)) == (True, False)


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


def test_answer_is_capped_at_the_distances_of_mpt():
    ours = pipeline("mpt", {"max_seq_len": 64})
    ours.model.generation_config.eos_token_id = None
    reply = ours.stream(ask("hello"), lambda text: None, 100)
    assert reply.prompt_tokens + reply.completion_tokens == 64


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
