"""Patches of an image that see each other in both directions."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tests.factories import ask, make_solo, png

from solo_vlm.data.collate import collate
from solo_vlm.data.encode import Encoder
from solo_vlm.data.sample import parse_sample
from solo_vlm.generate import GenerationPipeline
from solo_vlm.models.solo.image_attention_solo import image_index
from solo_vlm.train.attention import packed_attention, use_packed_attention

FAMILIES = ["llama", "mistral", "qwen3", "gemma3"]  # mistral has a sliding window, gemma3 two kinds of layers
ANSWER = [{"role": "assistant", "content": [{"type": "text", "text": "a blue square"}]}]


def both_ways(family):
    solo = make_solo(family)
    solo.model.config.bidirectional_images = True
    return solo


def encoded(solo, *chats):
    encoder = Encoder(solo.processor)
    return [encoder(parse_sample({"messages": chat + ANSWER})) for chat in chats]


def hidden(model, document, **changes):
    with torch.no_grad():
        return model.model(
            input_ids=torch.tensor(document.input_ids)[None],
            pixel_values=changes.get("patches", torch.tensor(document.patches)),
            attention_mask=torch.ones(1, len(document), dtype=torch.long),
        ).last_hidden_state[0]


def noise(width, height, seed):
    return png(Image.effect_noise((width, height), 60 + seed).convert("RGB"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_later_patch_changes_earlier_ones_of_its_image_and_nothing_else_before(family, attention):
    solo = both_ways(family)
    solo.model.set_attn_implementation(attention)
    (document,) = encoded(solo, ask("compare", noise(64, 64, 1), noise(64, 32, 2)))
    ids = torch.tensor(document.input_ids)
    images = image_index(ids[None], solo.model.config.image_token_id, solo.model.config.vision_start_token_id)
    assert images.unique().tolist() == [-1, 0, 1]
    patches = torch.tensor(document.patches)
    changed = patches.clone()
    changed[-1] = 255 - changed[-1]  # the last patch of the second image
    differs = (hidden(solo.model, document) - hidden(solo.model, document, patches=changed)).abs().amax(
        -1
    ) > 1e-6
    last = int((ids == solo.model.config.image_token_id).nonzero()[-1])
    second = images[0] == 1
    assert differs[second].all()
    assert not differs[:last][~second[:last]].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_training_attends_as_the_model_does_to_each_document_alone(family):
    solo = both_ways(family)
    documents = encoded(
        solo,
        ask("what is this?", noise(64, 96, 1)),
        ask("a red circle"),
        ask("compare", noise(64, 64, 2), noise(32, 64, 3)),
    )
    solo.model.set_attn_implementation("eager")
    with torch.no_grad():
        alone = torch.cat([hidden(solo.model, document) for document in documents])
    batch = collate(documents, 192, 0)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    for implementation in ("sdpa", "packed"):
        solo.model.set_attn_implementation("sdpa")
        if implementation == "packed":
            use_packed_attention(solo.model)
        with torch.no_grad():
            together = solo.model.model(**inputs, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(together[: len(alone)], alone, atol=1e-4, rtol=1e-4)


def test_packed_attention_equals_a_dense_mask():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 60, 8) for _ in range(3))
    bounds = torch.tensor([0, 25, 60])
    images = torch.full((1, 60), -1)
    images[0, 3:12], images[0, 14:20], images[0, 30:55] = 0, 1, 2
    position, document = torch.arange(60), (torch.arange(60) >= 25).long()
    distance = position[:, None] - position
    for window in (None, 4):
        causal = (distance >= 0) & (document[:, None] == document)
        if window:
            causal &= distance < window
        mask = causal | ((images[0][:, None] == images[0]) & (images[0] >= 0))
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        packed, _ = packed_attention(
            None,
            query,
            key,
            value,
            None,
            sliding_window=window,
            cu_seq_lens_q=bounds.int(),
            image_index=images,
        )
        torch.testing.assert_close(packed.transpose(1, 2), expected, atol=1e-5, rtol=1e-4)


def test_without_an_image_nothing_changes(solo):
    inputs = solo.processor.apply_chat_template(
        ask("a red circle"), tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        causal = solo.model(**inputs).logits
        torch.testing.assert_close(both_ways("llama").model(**inputs).logits, causal, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_batches_and_from_a_prefix_are_those_given_alone(family, picture):
    solo = both_ways(family)
    chats = [
        ask("what is this?", picture(96, 64)),
        ask("a red circle and a blue square"),
        ask("why?", picture()),
    ]
    alone = [GenerationPipeline(solo.model, solo.processor).answer([chat], 8)[0] for chat in chats]
    assert GenerationPipeline(solo.model, solo.processor).answer(chats, 8) == alone
    warm = GenerationPipeline(solo.model, solo.processor)
    again = [warm.answer([chat], 8)[0] for chat in chats + chats]
    assert again == alone + alone


def test_the_setting_is_saved_and_other_attention_refused(tmp_path, picture):
    solo = both_ways("llama")
    solo.save(tmp_path / "model")
    assert type(solo.model.config).from_pretrained(tmp_path / "model").bidirectional_images
    (document,) = encoded(solo, ask("what?", noise(64, 64, 1)))
    solo.model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="both directions"):
        hidden(solo.model, document)
