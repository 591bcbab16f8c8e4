"""Packed attention against dense attention with a mask."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.factories import LLM_CONFIGS, ask, make_solo, png
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from solo_vlm.check.tiny import tiny_llm
from solo_vlm.data.collate import collate
from solo_vlm.data.encode import Encoder
from solo_vlm.data.sample import parse_sample
from solo_vlm.models.packed.attention import PackedMask, _flash, _supports_flash, packed_attention
from solo_vlm.models.packed.isolation import isolate_documents
from solo_vlm.utils.errors import SoloError

ANSWER = [{"role": "assistant", "content": [{"type": "text", "text": "a blue square"}]}]


def dense(query, key, value, bounds, window=None, chunk=None, softcap=None, sinks=None):
    """Return attention by a dense mask: same document, causal, within the window or chunk."""
    length = query.shape[2]
    document = torch.bucketize(torch.arange(length), bounds[1:], right=True)
    position = torch.arange(length) - bounds[document]
    distance = position[:, None] - position[None]
    mask = (document[:, None] == document[None]) & (distance >= 0)
    if window:
        mask &= distance < window
    if chunk:
        mask &= position[:, None] // chunk == position[None] // chunk
    repeats = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(repeats, 1).transpose(-1, -2) * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(1, -1, length, 1)], -1)
    output = scores.softmax(-1)[..., :length] @ value.repeat_interleave(repeats, 1)
    return output.transpose(1, 2)


def assert_equal_with_gradients(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    weight = torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((theirs * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


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
    assert_equal_with_gradients(packed, dense(*states, bounds, window), states)


KINDS = {
    "chunk": {"chunk": 5},
    "capped": {"softcap": 0.7},
    "capped window": {"softcap": 0.7, "window": 5},
    "sinks": {"with_sinks": True},
    "sinks and window": {"with_sinks": True, "window": 5},
    "sinks and chunk": {"with_sinks": True, "chunk": 5},
    "sinks and capped": {"with_sinks": True, "softcap": 0.7, "window": 5},
}
BOUNDS = torch.tensor([0, 1, 3, 20, 36, 66, 366])


def make_states(value_dim=8):
    torch.manual_seed(0)
    shapes = [(4, 8), (2, 8), (2, value_dim)]
    return [torch.randn(1, heads, int(BOUNDS[-1]), dim, requires_grad=True) for heads, dim in shapes]


def attend(states, window=None, chunk=None, softcap=None, sinks=None):
    mask = PackedMask(window, chunk)
    return packed_attention(
        None, *states, mask, scaling=0.3, softcap=softcap, s_aux=sinks, cu_seq_lens_q=BOUNDS.int()
    )[0]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_attention_equals_its_definition(kind, monkeypatch):
    monkeypatch.setattr("solo_vlm.models.packed.attention._SCORES", 5000)  # several parts
    options = dict(KINDS[kind])
    states = make_states()
    sinks = torch.randn(4, requires_grad=True) if options.pop("with_sinks", False) else None
    inputs = states if sinks is None else [*states, sinks]
    ours = attend(states, sinks=sinks, **options)
    assert_equal_with_gradients(ours, dense(*states, BOUNDS, sinks=sinks, **options), inputs)


def test_capped_attention_opens_images(monkeypatch):
    """A high cap changes nothing, so plain attention with images is the reference."""
    monkeypatch.setattr("solo_vlm.models.packed.attention._SCORES", 5000)
    states, images = make_states(), torch.full((1, int(BOUNDS[-1])), -1)
    images[0, 5:15], images[0, 100:130] = 0, 1
    options = {"image_index": images, "scaling": 0.3, "cu_seq_lens_q": BOUNDS.int()}
    for mask in (PackedMask(), PackedMask(window=5)):
        capped, plain = (
            packed_attention(None, *states, mask, softcap=cap, **options)[0] for cap in (1e4, None)
        )
        assert_equal_with_gradients(capped, plain, states)


@pytest.mark.parametrize("value_dim", [4, 12])
def test_values_may_have_another_size_than_keys(value_dim):
    states = make_states(value_dim)
    assert_equal_with_gradients(attend(states), dense(*states, BOUNDS), states)


def test_flash_attention_takes_sinks_as_tokens(monkeypatch):
    """The kernel sees plain causal attention, of head sizes that it supports."""
    monkeypatch.setattr("solo_vlm.models.packed.attention._supports_flash", lambda query: True)

    def varlen_attn(query, key, value, bounds, _, longest, *args, scale, **options):
        assert query.shape[-1] % 8 == 0 and longest == bounds.diff().max()
        states = [x.transpose(0, 1)[None] for x in (query / 0.3 * scale, key, value)]
        return dense(*states, bounds.long())[0]

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    states, sinks = make_states(), torch.randn(4, requires_grad=True)
    assert_equal_with_gradients(
        attend(states, sinks=sinks), dense(*states, BOUNDS, sinks=sinks), [*states, sinks]
    )


def test_capped_attention_never_holds_all_scores():
    """A document of 4,096 tokens has 16.8 million scores per head, 268 MB for four heads."""
    torch.manual_seed(0)
    states = [torch.randn(1, 4, 4096, 8, requires_grad=True) for _ in range(3)]
    sizes = []

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        packed_attention(None, *states, None, softcap=5.0, cu_seq_lens_q=torch.tensor([0, 4096]).int())
    assert max(sizes) < 4096 * 4096


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"is_causal": False}, "is_causal"),
    ],
)
def test_arguments_that_would_be_ignored_are_errors(arguments, message):
    with pytest.raises(SoloError, match=message):
        packed_attention(None, *make_states(), None, cu_seq_lens_q=BOUNDS.int(), **arguments)


def test_arguments_without_effect_are_accepted():
    packed_attention(
        None, *make_states(), None, cu_seq_lens_q=BOUNDS.int(), position_bias=None, use_cache=False
    )


@pytest.mark.parametrize(
    ("create", "expected"),
    [
        (create_causal_mask, PackedMask()),
        (create_sliding_window_causal_mask, PackedMask(window=8)),
        (create_chunked_causal_mask, PackedMask(chunk=8)),
    ],
)
def test_masks_of_transformers_are_described(create, expected):
    model = tiny_llm("llama4_text", sliding_window=8)
    isolate_documents(model)
    positions = torch.cat([torch.arange(n) for n in (3, 20, 9)])[None]
    embeds = torch.zeros(1, 32, 4)
    mask = create(model.config, embeds, attention_mask=None, past_key_values=None, position_ids=positions)
    assert mask == expected


def test_masks_that_show_the_future_are_rejected():
    model = tiny_llm("llama")
    isolate_documents(model)
    with pytest.raises(SoloError, match="causal"):
        create_bidirectional_mask(model.config, torch.zeros(1, 32, 4), None)


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
