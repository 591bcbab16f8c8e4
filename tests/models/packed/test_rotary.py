"""Packed documents with rotary embeddings that depend on their lengths."""

from __future__ import annotations

import pytest
import torch
from tests.factories import make_llm
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from solo_vlm.check.probe import Probe
from solo_vlm.check.properties import packing
from solo_vlm.models.from_llm import ImageDesign, compose
from solo_vlm.models.packed.groups import IsolationError
from solo_vlm.models.packed.isolation import isolate_documents

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0, 3.0, 8.0, 2.0, 5.0, 6.0, 7.0, 9.0],
    "original_max_position_embeddings": 12,
    "partial_rotary_factor": 1.0,
}


def packed_and_alone(config, lengths):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(1, 64, (1, sum(lengths)))
    with torch.no_grad():
        alone = torch.cat([model(part, use_cache=False).logits[0] for part in ids.split(lengths, 1)])
        isolate_documents(model)
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        packed = model(
            ids, position_ids=positions, cu_seq_lens_q=bounds, max_length_q=max(lengths), use_cache=False
        ).logits[0]
    return packed, alone


@pytest.mark.parametrize("lengths", [[5, 20, 12, 13, 1], [30], [3, 4]])
def test_longrope_depends_on_each_document_alone(lengths):
    packed, alone = packed_and_alone(Phi3Config(rope_parameters=LONGROPE, **SIZES), lengths)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("base", [None, 1e3])
def test_longrope_counts_positions_of_images_in_two_dimensions(base):
    """The first document has more tokens than the limit, but not more positions."""
    rope = {**LONGROPE, "short_factor": [1.0] * 6, "long_factor": [6.0] * 6}
    llm = make_llm(rope_parameters={**rope, "original_max_position_embeddings": 40})
    solo = compose(*llm, design=ImageDesign(image_positions="2d", rope_base_2d=base))
    solo.model.model.embed_vision_patch.weight.data.mul_(20.0)
    shapes = ((10, (6, 6), 12), (7,), (30, (3, 4), 18))
    finding = packing(Probe(solo.model, shapes=shapes))
    assert finding.status == "holds", finding


def test_dynamic_rope_is_refused_beyond_the_original_length():
    settings = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    config = LlamaConfig(rope_parameters=settings, **{**SIZES, "max_position_embeddings": 12})
    packed, alone = packed_and_alone(config, [5, 12, 3])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(IsolationError, match="dynamic RoPE rotates documents of more than 12 tokens"):
        packed_and_alone(config, [5, 13])
