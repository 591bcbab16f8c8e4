"""Auxiliary loss of routers and load of experts, against transformers' own loss and counts by hand."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from tests.factories import make_llm, make_solo
from torch._dynamo.utils import counters
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from solo_vlm.check.tiny import text_families, tiny_llm
from solo_vlm.data.collate import collate
from solo_vlm.data.encode import Document
from solo_vlm.models.packed.isolation import isolate_documents
from solo_vlm.train.activation_checkpointing import prepare_layers
from solo_vlm.train.experts import ExpertRouting
from solo_vlm.train.model import add_adapters
from solo_vlm.train.parallel.context import DistributedContext, ParallelDims
from solo_vlm.train.recipe import LoraSettings
from solo_vlm.train.trainer import forward_backward
from solo_vlm.utils.errors import SoloError

CONTEXT = DistributedContext(0, ParallelDims(1, 1, 1), torch.device("cpu"))


def families_with_aux_loss():
    """Return the families whose loss in transformers contains an auxiliary loss, by its source."""
    for family in text_families():
        kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[family], None)
        if kind and family != "doge" and "load_balancing_loss_func(" in inspect.getsource(kind):
            yield family


@pytest.mark.parametrize("family", [*families_with_aux_loss()])
def test_loss_and_gradient_match_transformers(family):
    model = tiny_llm(family).train()
    ids = torch.randint(2, 300, (1, 24))
    parameters = dict(model.named_parameters())

    def gradients(loss):
        loss.backward()
        found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        model.zero_grad()
        return found

    torch.manual_seed(0)
    reference = model(ids, labels=ids, use_cache=False, output_router_logits=True)
    expected = gradients(reference.loss)
    experts = ExpertRouting.of(model)
    assert experts.coefficient > 0
    experts.start_step([24], 24)
    torch.manual_seed(0)
    with experts.recording() as routed:
        plain = model(ids, labels=ids, use_cache=False, output_router_logits=False).loss
    loss = plain + experts.add_row(0, routed)
    assert loss.item() > plain.item()
    torch.testing.assert_close(loss, reference.loss)
    torch.testing.assert_close(gradients(loss), expected)
    assert experts.metrics(CONTEXT)["moe/aux_loss"] == pytest.approx(reference.aux_loss.item(), rel=1e-5)


DOCUMENTS = [np.arange(3, 3 + n) * 7 % 280 + 3 for n in (20, 9, 13)]


def row(documents, length):
    """Return a packed row of text documents."""
    empty = np.empty((0, 3072), np.uint8), np.empty((0, 3), np.int64)
    encoded = [Document(ids, np.r_[-100, ids[1:]], *empty) for ids in documents]
    return collate(encoded, length, pad_token_id=0)


def one_step(model, rows, tokens, coefficient="auto"):
    """Run forward and backward passes; return the routing and the gradients."""
    experts = ExpertRouting.of(model, coefficient)
    experts.start_step(tokens, sum(tokens))
    model.zero_grad()
    supervised = sum(int((batch["labels"] != -100).sum()) for batch in rows)
    forward_backward(model, rows, supervised, nullcontext(), experts)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return experts, gradients


@pytest.fixture
def moe():
    """Return a plain LLM with experts that attends within documents."""
    model = make_llm("qwen3_moe")[0].train()
    isolate_documents(model)
    return model


def test_padding_is_left_out(moe):
    exact, expected = one_step(moe, [row(DOCUMENTS, 42)], [42], 1.0)
    padded, gradients = one_step(moe, [row(DOCUMENTS, 64)], [42], 1.0)
    torch.testing.assert_close(gradients, expected)
    assert padded.metrics(CONTEXT) == pytest.approx(exact.metrics(CONTEXT))


def test_strength_does_not_depend_on_the_number_of_rows(moe):
    """Twice the same row, or a row of padding besides, is the same step."""
    one, expected = one_step(moe, [row(DOCUMENTS, 42)], [42], 1.0)
    for rows, tokens in (([row(DOCUMENTS, 42)] * 2, [42, 42]), ([row(DOCUMENTS, 42), row([], 42)], [42, 0])):
        several, gradients = one_step(moe, rows, tokens, 1.0)
        torch.testing.assert_close(gradients, expected)
        for name in ("moe/aux_loss", "moe/max_load", "moe/unused_experts"):
            assert several.metrics(CONTEXT)[name] == pytest.approx(one.metrics(CONTEXT)[name])


@pytest.mark.parametrize("make", [make_llm, make_solo])
def test_loss_of_transformers_is_not_added(make):
    """A configuration that asks for router logits changes neither the loss nor its gradients."""
    losses = []
    for is_asked in (False, True):
        model = make("qwen3_moe")
        model = (model[0] if isinstance(model, tuple) else model.model).train()
        model.config.get_text_config().output_router_logits = is_asked
        isolate_documents(model)
        losses.append(forward_backward(model, [row(DOCUMENTS, 64)], 10, nullcontext()))
    assert losses[0] == losses[1]


def test_load_matches_counts_by_hand(moe):
    chosen = []
    for layer in moe.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, inputs: chosen.append(inputs[1]))
    experts, _ = one_step(moe, [row(DOCUMENTS, 64)], [42])
    counts = torch.stack([torch.bincount(index[:42].flatten(), minlength=4) for index in chosen])
    assert (counts.sum(1) == 42 * 2).all()
    metrics = experts.metrics(CONTEXT)
    assert metrics["moe/max_load"] == pytest.approx(counts.max().item() / (42 * 2 / 4))
    assert metrics["moe/unused_experts"] == (counts == 0).sum()


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_solo_gradients_survive_checkpointing(mode):
    def step(mode):
        model = make_solo("mixtral").model.train()
        prepare_layers(model, mode)
        isolate_documents(model)
        experts, gradients = one_step(model, [row(DOCUMENTS, 48)] * 2, [42, 42], 1.0)
        return gradients, experts.metrics(CONTEXT)

    (expected, metrics), (gradients, same) = step("none"), step(mode)
    torch.testing.assert_close(gradients, expected)
    assert same == pytest.approx(metrics)


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_layers_compile_to_one_graph(mode, monkeypatch):
    """Recording neither breaks the graph of a layer nor makes one per layer."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    ids = torch.arange(3, 35)[None]

    def step(prepare):
        model = make_llm("mixtral")[0].train()
        prepare(model)
        experts = ExpertRouting.of(model, 1.0)
        experts.start_step([32], 32)
        with experts.recording() as routed:
            loss = model(ids, labels=ids, use_cache=False).loss
        (loss + experts.add_row(0, routed)).backward()
        return [p.grad for p in model.parameters()], experts.metrics(CONTEXT)

    def prepare(model):
        prepare_layers(model, mode, is_compiled=True)

    torch._dynamo.reset()
    counters.clear()
    (expected, metrics), (gradients, same) = step(lambda model: None), step(prepare)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)
    assert same == pytest.approx(metrics, rel=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_frozen_routers_get_no_auxiliary_loss_unless_configured():
    model = make_llm("qwen3_moe")[0]
    add_adapters(model, LoraSettings(), new_tokens=False)
    assert ExpertRouting.of(model).coefficient == 0
    assert ExpertRouting.of(model, 0.01).coefficient == 0.01


@pytest.mark.parametrize("family", ["deepseek_v3", "llama4_text", "llama"])
def test_families_without_auxiliary_loss_say_so_and_reject_a_coefficient(family, caplog):
    model = tiny_llm(family)
    with pytest.raises(
        SoloError, match=f"no auxiliary loss for the routers of {family} models; set it to auto or 0"
    ):
        ExpertRouting.of(model, 0.01)
    experts = ExpertRouting.of(model)
    assert experts is None if family == "llama" else experts.coefficient == 0
    assert (f"transformers has none for {family}" in caplog.text) == (family != "llama")


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "llama4_text"])
def test_load_is_measured_without_auxiliary_loss(family):
    """With a router of zeros, ties go to the first experts."""
    model = tiny_llm(family).train()
    experts = ExpertRouting.of(model, 0)
    experts.start_step([24], 24)
    with experts.recording() as routed, torch.no_grad():
        model(torch.randint(2, 300, (1, 24)), use_cache=False)
    assert experts.add_row(0, routed) == 0
    metrics = experts.metrics(CONTEXT)
    assert 1 <= metrics["moe/max_load"] <= 4
    assert ("moe/aux_loss" in metrics) == (family == "gpt_oss")


def test_own_kind_of_auxiliary_loss_is_rejected():
    model = tiny_llm("doge", is_moe=True)
    with pytest.raises(SoloError, match="the auxiliary loss of doge models is not supported; set it to 0"):
        ExpertRouting.of(model)
