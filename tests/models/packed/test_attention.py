"""Packed attention against dense attention with a mask."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.factories import LLM_CONFIGS, ask, make_solo, png

from solo_vlm.data.collate import collate
from solo_vlm.data.encode import Encoder
from solo_vlm.data.sample import parse_sample
from solo_vlm.models.packed.attention import _flash, _supports_flash, packed_attention
from solo_vlm.models.packed.isolation import isolate_documents

ANSWER = [{"role": "assistant", "content": [{"type": "text", "text": "a blue square"}]}]


def dense(query, key, value, bounds, window):
    """Return a dense boolean mask: same document, causal, within the window."""
    length = query.shape[2]
    document = torch.bucketize(torch.arange(length), bounds[1:], right=True)
    position = torch.arange(length)
    distance = position[:, None] - position[None]
    mask = (document[:, None] == document[None]) & (distance >= 0)
    if window:
        mask &= distance < window
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True, scale=0.3)
    return output.transpose(1, 2)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.sampled_from([None, 5]), st.booleans())
def test_output_and_gradients_equal_dense_attention(lengths, window, with_long):
    lengths = lengths + [300, 280] * with_long
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    torch.manual_seed(0)
    states = [torch.randn(1, heads, sum(lengths), 8, requires_grad=True) for heads in (4, 2, 2)]
    packed, _ = packed_attention(
        None, *states, None, scaling=0.3, sliding_window=window, cu_seq_lens_q=bounds.int()
    )
    expected = dense(*states, bounds, window)
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=1e-4)
    weight = torch.randn_like(packed)
    for one, other in zip(
        torch.autograd.grad((packed * weight).sum(), states),
        torch.autograd.grad((expected * weight).sum(), states),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 5])
def test_bfloat16_differs_by_rounding_only(window):
    """On CPU, short documents use another kernel in bfloat16 than long ones."""
    bounds = torch.tensor([0, 3, 20, 21, 60, 260, 600])
    torch.manual_seed(0)
    states = [torch.randn(1, heads, 600, 8, requires_grad=True) for heads in (4, 2, 2)]
    options = {"scaling": 0.3, "sliding_window": window, "cu_seq_lens_q": bounds.int()}
    exact, _ = packed_attention(None, *states, None, **options)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = packed_attention(None, *states, None, **options)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.03, rtol=0.03)
    weight = torch.randn_like(exact)
    for one, other in zip(
        torch.autograd.grad((rounded * weight).sum(), states),
        torch.autograd.grad((exact * weight).sum(), states),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=0.06, rtol=0.06)


@pytest.mark.parametrize("family", LLM_CONFIGS)
def test_packed_attention_matches_each_document_alone(family):
    """The reference is each family's eager attention without packing; Gemma 2 soft-caps its scores."""
    solo = make_solo(family)
    for module in solo.model.modules():
        if getattr(module, "attn_logit_softcapping", None):
            module.attn_logit_softcapping = 0.5  # low enough to matter at this size
    picture = png(Image.effect_noise((64, 64), 90).convert("RGB"))
    encoder = Encoder(solo.processor)
    documents = [
        encoder(parse_sample({"messages": ask(prompt, *pictures) + ANSWER}))
        for prompt, pictures in [("what is this?", [picture]), ("a red circle", []), ("seven", [picture])]
    ]
    solo.model.set_attn_implementation("eager")
    alone = [
        solo.model(
            input_ids=torch.tensor(d.input_ids)[None], pixel_values=torch.tensor(d.pixel_values)
        ).logits[0]
        for d in documents
    ]
    isolate_documents(solo.model)
    batch = collate(documents, 128, 0)
    packed = solo.model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[0]
    together = packed[: sum(map(len, documents))]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_unpacked_batch_is_rejected():
    states = torch.zeros(2, 1, 4, 8)
    with pytest.raises(ValueError, match="packed"):
        packed_attention(None, states, states, states, None)


@pytest.mark.parametrize(
    ("dtype", "size", "can"),
    [
        (torch.bfloat16, 64, True),
        (torch.float16, 256, True),
        (torch.float32, 64, False),
        (torch.bfloat16, 12, False),
        (torch.bfloat16, 264, False),
    ],
    ids=str,
)
def test_flash_attention_is_used_only_where_supported(dtype, size, can):
    query = SimpleNamespace(dtype=dtype, device=torch.device("cuda"), shape=(7, 4, size))
    assert _supports_flash(query) == can


def test_flash_attention_computes_in_autocast_dtype(monkeypatch):
    """Under autocast, rotary embeddings leave queries and keys in float32, while values are in bfloat16."""
    seen = []

    def varlen_attn(query, key, value, *args, **options):
        seen.extend(states.dtype for states in (query, key, value))
        return query

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    states = torch.zeros(4, 2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _flash(states, states, states.bfloat16(), torch.tensor([0, 4]).int(), 4, None, None)
    assert seen == [torch.bfloat16] * 3
