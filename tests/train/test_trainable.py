"""What a run does not train stays as it was, bit for bit; weight decay included."""

from __future__ import annotations

import pytest
import torch
from tests.factories import make_llm, make_solo, picture_chat, text_chat

from solo_vlm.data.collate import collate
from solo_vlm.data.encode import encode
from solo_vlm.data.sample import parse_sample
from solo_vlm.train import Recipe
from solo_vlm.train.model import adapter_state_dict, has_adapters, merge_adapter, set_trainable
from solo_vlm.train.optimizer import make_optimizer
from solo_vlm.utils.errors import SoloError

PATCHES = "model.embed_vision_patch.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"


def recipe(**settings) -> Recipe:
    optimizer = {"learning_rate": 1e-2, "weight_decay": 0.5}
    data = {"sources": [{"path": "unused"}]}
    return Recipe.parse(
        {"model": "unused", "out": "unused", "data": data, "optimizer": optimizer, **settings}
    )


def take_steps(model, processor, settings, count=3) -> list[float]:
    documents = [encode(parse_sample(chat), processor) for chat in (picture_chat(2), text_chat())]
    batch = collate(documents, sum(map(len, documents)), pad_token_id=0)
    optimizer = make_optimizer(model, settings.optimizer)
    losses = []
    for _ in range(count):
        loss = model.train()(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_patch_embedding_alone():
    solo = make_solo()
    before = weights(solo.model)
    set_trainable(solo.model, settings := recipe(trainable="patch_embedding"))
    take_steps(solo.model, solo.processor, settings)
    assert {name for name, value in weights(solo.model).items() if not torch.equal(value, before[name])} == {
        PATCHES
    }
    assert not has_adapters(solo.model)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma"])  # llama's and gemma's heads are tied
def test_new_tokens_alone(family, tmp_path):
    solo = make_solo(family)
    before = weights(solo.model)
    set_trainable(solo.model, settings := recipe(trainable="new_tokens"))
    losses = take_steps(solo.model, solo.processor, settings)
    assert losses[-1] < losses[0]
    solo.model.save_pretrained(tmp_path, state_dict=adapter_state_dict(solo.model))
    merged = merge_adapter(make_solo(family).model, tmp_path)
    after = weights(merged)
    assert after.keys() == before.keys()
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        PATCHES,
        EMBEDDING,
        HEAD,
    }
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == (family != "mistral")
    for table in (EMBEDDING, HEAD):
        changed = (after[table] != before[table]).any(dim=1).nonzero().flatten().tolist()
        assert set(changed) == set(merged.config.vision_token_ids)


def test_all_is_all():
    model = make_solo().model
    set_trainable(model, recipe())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("settings", [{"trainable": "new_tokens"}, {"lora": {}}])
def test_adapters_change_nothing_at_first(settings):
    solo = make_solo()
    ids = torch.tensor([[5, 6, 7, solo.model.config.vision_start_token_id, 8]])
    before = solo.model(input_ids=ids).logits
    set_trainable(solo.model, recipe(**settings))
    assert torch.equal(solo.model.eval()(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("settings", "processes", "said"),
    [
        ({"quantize": "nf4"}, 1, "also set lora"),
        ({"quantize": "nf4", "lora": {}}, 2, "cannot be sharded"),
        ({"lora": {}, "parallel": {"tensor": 2}}, 2, "set parallel.tensor to 1"),
        ({"lora": {"targets": ["q_proj", "no_such"]}}, 1, "no linear layer no_such; it has down_proj, "),
    ],
)
def test_what_does_not_go_together_is_said(settings, processes, said):
    with pytest.raises(SoloError, match=said):
        set_trainable(make_solo().model, recipe(**settings), processes)


@pytest.mark.parametrize("trainable", ["patch_embedding", "new_tokens"])
def test_a_plain_llm_has_nothing_of_solo(trainable):
    with pytest.raises(SoloError, match="solo init"):
        set_trainable(make_llm()[0], recipe(trainable=trainable))
