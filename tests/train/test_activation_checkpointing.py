"""Activation checkpointing of all layers or some, alone and in compiled code."""

from __future__ import annotations

import pytest
import torch
from tests.factories import make_llm

from solo_vlm.models.packed.isolation import isolate_documents
from solo_vlm.train.activation_checkpointing import LayerModes, prepare_layers

LAYERS = 4
MIXED = [
    LayerModes(full=LAYERS),
    LayerModes(selective=LAYERS),
    LayerModes(full=1, selective=3),
    LayerModes(selective=1, none=3),
    LayerModes(full=2, selective=1, none=1),
]


def gradients(model):
    """Return the loss and the gradients of a packed row of two documents."""
    ids, positions = torch.arange(24)[None], torch.cat([torch.arange(10), torch.arange(14)])[None]
    loss = model.train()(ids, position_ids=positions, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss, *(parameter.grad for parameter in model.parameters())]


def model(modes=None, **options):
    llm = make_llm(num_hidden_layers=LAYERS)[0]
    isolate_documents(llm)
    if modes:
        prepare_layers(llm, modes, **options)
    return llm


@pytest.mark.parametrize("modes", MIXED, ids=str)
def test_mixed_layers_compute_the_same_to_the_bit(modes):
    for ours, plain in zip(gradients(model(modes)), gradients(model()), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("modes", MIXED, ids=str)
def test_activation_checkpointing_works_with_compiled_layers(modes, is_split):
    """Results selected outside compiled code would be overwritten by it (an error in torch 2.11)."""
    compiled = model(modes, is_compiled=True, is_split=is_split)
    torch.testing.assert_close(gradients(compiled), gradients(model()), atol=1e-5, rtol=1e-4)


def test_modes_begin_with_the_layers_that_keep_least():
    modes = LayerModes(full=2, selective=1, none=1)
    assert modes.layers == ["full", "full", "selective", "none"]
    assert modes.recomputed == 0.5
    assert str(modes) == "full in 2 layers, selective in 1, none in 1"
