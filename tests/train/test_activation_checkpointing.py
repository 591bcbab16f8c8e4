"""Activation checkpointing of all layers or some, alone and in compiled code."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tests.factories import make_llm, without_layers
from torch._dynamo.utils import counters

from solo_vlm.check.tiny import text_families, tiny_llm
from solo_vlm.models.load import decoder_layers
from solo_vlm.models.packed.isolation import isolate_documents
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


def packed_gradients(family, modes):
    """Return the gradients of three documents in one row."""
    model = tiny_llm(family).train()
    isolate_documents(model)
    prepare_layers(model, modes)
    torch.manual_seed(0)  # of dropout
    ids, positions = torch.arange(3, 33)[None], torch.cat([torch.arange(n) for n in (17, 4, 9)])[None]
    model(input_ids=ids, position_ids=positions, use_cache=False).logits.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("modes", ["full", "selective"])
@pytest.mark.parametrize("family", ["ctrl", "gpt_neox_japanese", "hrm_text", "zamba"])
def test_recomputed_layers_know_the_documents_of_their_row(family, modes):
    torch.testing.assert_close(packed_gradients(family, modes), packed_gradients(family, "none"))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*text_families()} - {"openai-gpt"}))  # which cannot be packed
def test_recomputed_layers_know_the_documents_of_their_row_in_every_family(family):
    expected = packed_gradients(family, "none")
    for modes in ("full", "selective"):
        torch.testing.assert_close(packed_gradients(family, modes), expected, atol=1e-4, rtol=1e-4)
