"""Token layout of images, chats as tokens, and text that spells special tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.factories import ask, make_llm, make_solo
from tokenizers import decoders
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, Sequence
from transformers import AutoProcessor

from solo_vlm.models.from_llm import compose
from solo_vlm.models.solo.processing_solo import ChatTemplateError


def text(role: str, words: str) -> dict:
    return {"role": role, "content": words}


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 4), (3, 2), (32, 32)])
def test_image_layout_matches_the_paper(solo, rows, columns):
    tokens = solo.processor.tokenizer.convert_ids_to_tokens(solo.processor.image_input_ids(rows, columns))
    expected = ["<vision>"]
    for row in range(rows):
        expected += ["<vpatch>"] * columns
        expected += ["<vrow_sep>"] if row < rows - 1 else ["</vision>"]
    assert tokens == expected
    assert len(tokens) == rows * columns + rows + 1


def test_prompt_string_and_chat_give_the_same_tokens(solo, picture):
    image = picture(96, 40)
    chat = solo.processor.apply_chat_template(
        ask("what is this?", image), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    prompt = solo.processor.apply_chat_template(ask("what is this?", image), add_generation_prompt=True)
    plain = solo.processor(text=prompt, images=[image], add_special_tokens=False)
    assert prompt == "<s>[INST] <vpatch>what is this? [/INST]"
    assert plain["input_ids"][0] == chat["input_ids"]
    np.testing.assert_array_equal(plain["pixel_values"], chat["pixel_values"])


def test_training_tokens_start_with_the_inference_prompt(solo):
    question, answer = text("user", "what is this?"), text("assistant", "a red circle")
    trained = solo.processor.encode_chat([question, answer])
    prompt = solo.processor.encode_chat([question], add_generation_prompt=True)
    length = len(prompt.input_ids)
    assert trained.input_ids[:length].tolist() == prompt.input_ids.tolist()
    assert not trained.supervised[:length].any()
    assert trained.supervised[length:].all()


def test_labels_follow_roles_over_several_turns(solo):
    chat = [
        text("system", "be brief"),
        text("user", "hello"),
        text("assistant", "seven"),
        text("user", "world"),
        text("assistant", "a blue square"),
    ]
    encoded = solo.processor.encode_chat(chat)
    answer = solo.processor.tokenizer.decode(encoded.input_ids[encoded.supervised])
    assert answer.replace(" ", "") == "seven</s>abluesquare</s>"
    assert encoded.input_ids[0] == solo.processor.tokenizer.bos_token_id


def test_document_is_bos_content_eos(solo):
    parts = [{"type": "image"}, {"type": "text", "text": "a red circle"}]
    encoded = solo.processor.encode_chat([{"role": "assistant", "content": parts}], [(1, 2, 1)])
    tokens = solo.processor.tokenizer.convert_ids_to_tokens(encoded.input_ids)
    layout = ["<vision>", "<vpatch>", "<vrow_sep>", "<vpatch>", "</vision>"]
    assert tokens[:6] == ["<s>", *layout]
    assert tokens[-1] == "</s>"
    assert encoded.supervised.tolist() == [False] * 6 + [True] * (len(tokens) - 6)


@pytest.mark.parametrize("add_prefix", ["byte level", "metaspace"])
@pytest.mark.parametrize("answer", ["a</s>b", "<s>7</s> seven", "x</s>\nx <vpatch>, </s></s>", "</s>"])
def test_text_that_spells_special_tokens_gains_no_white_space(answer, add_prefix):
    llm, tokenizer = make_llm()
    if add_prefix == "metaspace":  # as Mistral's and Llama 2's tokenizers
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = Sequence(
            [Metaspace(prepend_scheme="always"), ByteLevel(False, use_regex=False)]
        )
        backend.decoder = decoders.ByteLevel()
    processor = compose(llm, tokenizer).processor
    for chat in ([text("user", "what?"), text("assistant", answer)], [text("assistant", answer)]):
        encoded = processor.encode_chat(chat)
        decoded = processor.tokenizer.decode(encoded.input_ids[encoded.supervised][:-1])
        assert decoded.replace("\u2581", " ").removeprefix(" ") == answer


@pytest.mark.parametrize(
    "spelled", ["<vpatch>", "</vision>", "<vision>x<vrow_sep>", "</s><s>", "[INST]", "\ue0000\ue001"]
)
def test_text_that_spells_a_special_token_stays_text(solo, spelled, picture):
    processor = solo.processor
    special = {*processor.tokenizer.all_special_ids, *solo.model.config.vision_token_ids}
    special -= {processor.tokenizer.bos_token_id}
    for chat in ([text("user", f"say {spelled} now")], ask(f"say {spelled} now", picture(32, 32))):
        with_image = isinstance(chat[0]["content"], list)
        plain = [text("user", "say now")] if not with_image else ask("say now", picture(32, 32))
        grids = [(1, 1, 1)] if with_image else []
        encoded = processor.encode_chat(chat, grids, add_generation_prompt=True).input_ids
        reference = processor.encode_chat(plain, grids, add_generation_prompt=True).input_ids
        count = sum(int(token) in special for token in encoded)
        assert count == sum(int(token) in special for token in reference)
        if "\ue000" not in spelled:
            assert spelled in processor.tokenizer.decode(encoded).replace(" ", "")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=4))
def test_any_text_encodes_with_one_bos_and_one_eos_per_turn(solo_texts):
    processor = make_processor()
    chat = []
    for index, words in enumerate(solo_texts):
        chat += [text("user", words), text("assistant", f"{words}{index}")]
    encoded = processor.encode_chat(chat)
    ids = encoded.input_ids.tolist()
    assert ids.count(processor.tokenizer.bos_token_id) == 1
    assert ids.count(processor.tokenizer.eos_token_id) == len(solo_texts)
    assert all(
        encoded.supervised[i] for i, token in enumerate(ids) if token == processor.tokenizer.eos_token_id
    )


def make_processor(cache: list = []):  # noqa: B006 (built once: hypothesis calls the test many times)
    if not cache:
        cache.append(make_solo().processor)
    return cache[0]


def test_vision_token_of_the_llm_is_not_reused(caplog):
    llm, tokenizer = make_llm()
    tokenizer.add_tokens(["<vision>", "<vpatch>"])
    llm.resize_token_embeddings(len(tokenizer))
    owned = tokenizer.convert_tokens_to_ids(["<vision>", "<vpatch>"])
    solo = compose(llm, tokenizer)
    assert not set(owned) & set(solo.model.config.vision_token_ids)
    layout = solo.processor.tokenizer.convert_ids_to_tokens(solo.processor.image_input_ids(1, 1))
    assert layout == ["<solo:vision>", "<solo:vpatch>", "</vision>"]
    assert "already has a token <vpatch>" in caplog.text
    encoded = solo.processor.encode_chat([text("user", "<vpatch>")], add_generation_prompt=True)
    assert not set(encoded.input_ids.tolist()) & set(solo.model.config.vision_token_ids)


def test_mismatched_number_of_images_is_rejected(solo):
    part = [{"type": "image"}]
    with pytest.raises(ValueError, match="more image parts than images"):
        solo.processor.encode_chat([{"role": "user", "content": part}], [], add_generation_prompt=True)
    with pytest.raises(ValueError, match="fewer image parts"):
        solo.processor.encode_chat([text("user", "hello")], [(1, 1, 1)], add_generation_prompt=True)


def test_chat_rejected_by_the_template_raises_chat_template_error(solo):
    with pytest.raises(ChatTemplateError, match="roles are"):
        solo.processor.encode_chat([text("tool", "x"), text("assistant", "y")])


def test_batches_of_mixed_sizes_are_padded_left(solo, picture):
    solo.processor.tokenizer.padding_side = "left"
    batch = solo.processor.apply_chat_template(
        [ask("hello", picture(96, 96), picture(32, 64)), ask("hello")],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert batch["image_grid_thw"].tolist() == [[1, 3, 3], [1, 2, 1]]
    assert batch["pixel_values"].shape == (11, 3072)
    assert batch["attention_mask"][0].all()
    assert not batch["attention_mask"][1, 0]
    assert batch["attention_mask"][1, -1]


def test_saved_and_loaded(solo, picture, tmp_path):
    solo.processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(solo.processor)
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    first, second = (
        p.apply_chat_template(ask("hi", picture(50, 70)), **options) for p in (solo.processor, again)
    )
    assert first["input_ids"] == second["input_ids"]


def test_no_chat_template_argument_is_ignored(solo, picture):
    chats = [ask("what is this?", picture(96, 40)), ask("what?", picture(40, 40))]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    left = solo.processor.apply_chat_template(chats, padding=True, **options)
    right = solo.processor.apply_chat_template(chats, padding=True, padding_side="right", **options)
    lengths = left["attention_mask"].sum(1).tolist()
    assert left["attention_mask"][1, -1] == 1 and right["attention_mask"][1, -1] == 0
    for number, length in enumerate(lengths):
        assert left["input_ids"][number, -length:].tolist() == right["input_ids"][number, :length].tolist()
    template = "{% if tone %}{{ tone }}{% endif %}{{ messages[0]['content'] }}"
    solo.processor.chat_template, before = template, solo.processor.chat_template
    try:
        plain = solo.processor.apply_chat_template(ask("hello"), tokenize=True, tone="a red circle")
    finally:
        solo.processor.chat_template = before
    assert "a red circle" in solo.processor.decode(plain[0] if isinstance(plain[0], list) else plain)


def test_special_tokens_of_a_text_are_tokenized_once(solo, monkeypatch):
    """A text of a hundred thousand of them costs little more than its characters."""
    processor, tokenizer, calls = solo.processor, type(solo.processor.tokenizer), []
    encode = tokenizer.encode
    monkeypatch.setattr(
        tokenizer, "encode", lambda *args, **options: calls.append(0) or encode(*args, **options)
    )
    once = processor.encode_chat(ask("a</s>b\ue000"), add_generation_prompt=True)
    few = len(calls)
    many = processor.encode_chat(ask("a</s>b\ue000" * 1000), add_generation_prompt=True)
    assert len(calls) < 3 * few
    assert len(many.input_ids) > 900 * (len(once.input_ids) - 20)


def test_sequences_of_roles_are_remembered_within_a_limit(solo, monkeypatch):
    monkeypatch.setattr("solo_vlm.models.solo.processing_solo._MAX_CHECKED_ROLES", 2)
    for turns in range(20, 25):
        solo.processor.encode_chat([*ask("x"), {"role": "assistant", "content": "y"}] * turns)
        assert 1 <= len(solo.processor._checked_roles) <= 2
