"""Supervised tokens of encoded samples."""

from __future__ import annotations

import numpy as np
import pytest
from tests.factories import ask, make_llm, png

from solo_vlm.data.encode import IGNORE_INDEX, Document, Encoder
from solo_vlm.data.sample import SampleError, parse_sample
from solo_vlm.models.from_llm import compose

EOS_LAST = (  # <|im_end|> between turns, EOS after the chat, as in OLMo 3
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ eos_token }}{% else %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EOS_AFTER_LOOP = (  # <|im_end|> after every turn, EOS after the loop
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
TWO_TURNS = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]


def sample_of(*turns: tuple[str, str]):
    return parse_sample({"messages": [{"role": role, "content": text} for role, text in turns]})


def supervised(processor, document) -> list[str]:
    """Return the supervised text, one string per run of tokens, without white space."""
    starts = np.flatnonzero(np.diff(document.labels != IGNORE_INDEX, prepend=False))
    stretches = [piece for piece in np.split(document.labels, starts) if piece[0] != IGNORE_INDEX]
    return ["".join(processor.tokenizer.decode(piece).split()) for piece in stretches]


@pytest.mark.parametrize(
    ("template", "expected"),
    [(EOS_LAST, ["a1<|im_end|>", "a2</s>"]), (EOS_AFTER_LOOP, ["a1<|im_end|>", "a2<|im_end|>"])],
)
def test_only_answers_are_supervised_if_eos_only_ends_the_chat(template, expected):
    llm, tokenizer = make_llm()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    llm.resize_token_embeddings(len(tokenizer))
    tokenizer.chat_template = template
    processor = compose(llm, tokenizer).processor
    document = Encoder(processor)(sample_of(*TWO_TURNS))
    assert supervised(processor, document) == expected
    text = processor.tokenizer.decode(document.input_ids)
    assert [text.count(turn) for turn in ("q1", "a1", "q2", "a2")] == [1, 1, 1, 1]


def test_chat_starting_with_the_assistant_is_encoded(solo):
    document = Encoder(solo.processor)(sample_of(("assistant", "a0"), ("user", "q1"), ("assistant", "a1")))
    assert supervised(solo.processor, document) == ["a0</s>", "a1</s>"]


def test_system_messages_are_kept_or_the_row_is_rejected(solo):
    encoder = Encoder(solo.processor)
    document = encoder(sample_of(("system", "s1"), ("system", "s2"), ("user", "q"), ("assistant", "a")))
    text = solo.processor.tokenizer.decode(document.input_ids).replace(" ", "")
    assert text == "<s>[INST]s1\ns2\nq[/INST]a</s>"
    with pytest.raises(SampleError, match=r"chat-template: .* leaves out message 1 \(system\)"):
        encoder(sample_of(("system", "s1"), ("assistant", "a")))


def test_document_with_inconsistent_grids_is_rejected(solo, picture):
    image = {"type": "image", "image": png(picture(64, 64))}
    sample = parse_sample({"messages": [{"role": "assistant", "content": [image]}]})
    document = Encoder(solo.processor)(sample)
    assert len(document.pixel_values) == 4
    for patches in (document.pixel_values[1:], np.concatenate([document.pixel_values] * 2)):
        with pytest.raises(ValueError, match="grids of 4"):
            Document(document.input_ids, document.labels, patches, document.image_grid_thw)


@pytest.mark.parametrize("turns", ["document", "chat"])
def test_vision_loss_only_adds_image_tokens(solo, picture, turns):
    image, answer = {"type": "image", "image": png(picture(64, 64))}, {"type": "text", "text": "a red circle"}
    if turns == "document":
        messages = [{"role": "assistant", "content": [image, answer]}]
    else:
        messages = [*ask("what?", image["image"]), {"role": "assistant", "content": [answer]}]
    sample = parse_sample({"messages": messages})
    plain, more = Encoder(solo.processor)(sample), Encoder(solo.processor, vision_loss=True)(sample)
    np.testing.assert_array_equal(plain.input_ids, more.input_ids)
    tokens = solo.processor.tokenizer.convert_ids_to_tokens(plain.input_ids)
    layout = [token in ("<vision>", "<vpatch>", "<vrow_sep>", "</vision>") for token in tokens]
    assert sum(layout) == 7  # two rows of two patches
    assert (plain.labels[layout] == IGNORE_INDEX).all()
    np.testing.assert_array_equal(more.labels[layout], plain.input_ids[layout])
    np.testing.assert_array_equal(np.delete(more.labels, layout), np.delete(plain.labels, layout))


def test_chat_without_an_assistant_turn_is_rejected(solo):
    sample = sample_of(("user", "what is this?"))
    with pytest.raises(SampleError, match="turns are empty") as error:
        Encoder(solo.processor)(sample)
    assert error.value.reason == "unsupervised"


def test_image_tokens_alone_suffice_with_vision_loss(solo, picture):
    sample = parse_sample({"messages": ask("what?", png(picture(64, 64)))})
    assert (Encoder(solo.processor, vision_loss=True)(sample).labels != IGNORE_INDEX).sum() == 7
    with pytest.raises(SampleError, match="unsupervised"):
        Encoder(solo.processor)(sample)


def test_rows_are_filled_with_eos(solo):
    """The embedding of a padding token may be zero."""
    encoder = Encoder(solo.processor)
    encoder.tokenizer.pad_token = encoder.tokenizer.bos_token
    assert encoder.padding_id == encoder.tokenizer.eos_token_id
