"""Layers that torch.compile has made are the layers that they were."""

from __future__ import annotations

import pytest
import torch
from tests.factories import make_llm

from solo_vlm.train.model import compile_layers, use_activation_checkpointing


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_compiled_layers_may_compute_again_what_they_did_not_keep(mode):
    """Selected outside of compiled code, what was kept would be overwritten by it (torch 2.11 refuses)."""
    ids = torch.arange(24)[None]

    def gradients(model):
        model.train()(ids, labels=ids, use_cache=False).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    plain, compiled = make_llm()[0], make_llm()[0]
    use_activation_checkpointing(compiled, mode)
    compile_layers(compiled)
    torch.testing.assert_close(gradients(compiled), gradients(plain), atol=1e-5, rtol=1e-4)
