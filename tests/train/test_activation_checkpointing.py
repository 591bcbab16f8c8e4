"""Activation checkpointing of all layers or some, alone and in compiled code."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tests.factories import make_llm, without_layers
from torch._dynamo.utils import counters

from solo_vlm.check.tiny import tiny_llm
from solo_vlm.models.load import decoder_layers
from solo_vlm.train.activation_checkpointing import LayerModes, prepare_layers
from solo_vlm.utils.errors import SoloError

MIXED = LayerModes(full=3, selective=2, none=1)


def gradients(modes=None, **options):
    """Return the loss and the gradients of a model with six layers."""
    model, ids = make_llm(num_hidden_layers=6)[0].train(), torch.arange(24)[None]
    if modes:
        prepare_layers(model, modes, **options)
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("modes", ["full", "selective", MIXED, LayerModes(selective=2, none=4)], ids=str)
def test_layers_compute_the_same_to_the_bit(modes):
    for ours, plain in zip(gradients(modes), gradients(), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("modes", ["full", "selective", MIXED], ids=str)
def test_activation_checkpointing_works_with_compiled_layers(modes):
    """Results selected outside compiled code would be overwritten by it (an error in torch 2.11)."""
    torch.testing.assert_close(gradients(modes, is_compiled=True), gradients(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("is_split", "graphs"), [(False, 3), (True, 2)])
def test_layers_of_a_mode_share_compiled_code(is_split, graphs, monkeypatch):
    """Split layers are compiled inside a full checkpoint, as if there were none."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    gradients(MIXED, is_compiled=True, is_split=is_split)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_modes_begin_with_the_layers_that_keep_least():
    assert MIXED.layers == ["full", "full", "full", "selective", "selective", "none"]
    assert MIXED.recomputed == 0.5
    assert str(MIXED) == "full in 3 layers, selective in 2, none in 1"


@pytest.mark.parametrize("settings", [{"modes": "full"}, {"modes": "none", "is_compiled": True}])
def test_settings_without_effect_are_rejected(settings):
    prepare_layers(without_layers(), "none")
    with pytest.raises(SoloError, match="the decoder has no list of layers; unset both settings"):
        prepare_layers(without_layers(), **settings)


@pytest.mark.parametrize("family", ["ctrl", "gpt_neox_japanese", "openai-gpt"])
def test_layers_that_transformers_does_not_mark_are_recomputed(family):
    model, ids = tiny_llm(family), torch.arange(24)[None]
    calls = []
    for layer in decoder_layers(model):
        next(layer.children()).register_forward_hook(lambda *_: calls.append(1))
    prepare_layers(model.train(), "full")
    model(input_ids=ids, use_cache=False).logits.sum().backward()
    assert len(calls) == 2 * len(decoder_layers(model))
