"""What is supervised in an encoded sample."""

from __future__ import annotations

import numpy as np
import pytest

from solo_vlm.data.encode import IGNORE_INDEX, Encoder
from solo_vlm.data.schema import SampleError, parse_sample
from tiny import ask, png


@pytest.mark.parametrize("turns", ["document", "chat"])
def test_vision_loss_adds_the_tokens_of_images_and_nothing_else(solo, picture, turns):
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


@pytest.mark.parametrize("role", ["user", "system"])
def test_chat_without_a_turn_of_the_assistant_is_unsupervised(solo, role):
    sample = parse_sample({"messages": [{"role": role, "content": "what is this?"}]})
    with pytest.raises(SampleError, match="the assistant says nothing") as error:
        Encoder(solo.processor)(sample)
    assert error.value.reason == "unsupervised"


def test_tokens_of_images_are_enough_to_learn_from_where_they_are_supervised(solo, picture):
    sample = parse_sample({"messages": ask("what?", png(picture(64, 64)))})
    assert (Encoder(solo.processor, vision_loss=True)(sample).labels != IGNORE_INDEX).sum() == 7
    with pytest.raises(SampleError, match="unsupervised"):
        Encoder(solo.processor)(sample)
