"""Packed rows through every family of decoders against each document alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from solo_vlm.check.tiny import WINDOW, text_families, tiny_llm
from solo_vlm.models.packed.isolation import isolate_documents
from solo_vlm.utils.errors import SoloError

# Shorter than a convolution, longer than windows and chunks, and two that share a group.
LENGTHS = [1, 13, 2, 3 * WINDOW + 6, 21]
PADDING = 9

REFUSED = {"openai-gpt"}  # has no cache, so its attention is not recognized


def documents(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (length,), generator=generator) for length in LENGTHS]


def packed(rows: list[Tensor]) -> dict[str, Any]:
    """Return the model's inputs for a row of documents and padding, as `collate` makes it."""
    rows = [*rows, torch.full((PADDING,), 2)]
    lengths = [len(row) for row in rows]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "use_cache": False,
    }


def reference(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model with its family's own eager attention."""
    alone = copy.deepcopy(model)
    if alone._can_set_attn_implementation():
        alone.set_attn_implementation("eager")
    return alone


def logits_alone(model: PreTrainedModel, rows: list[Tensor]) -> Tensor:
    return torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])


def next_token_loss(logits: Tensor, rows: list[Tensor]) -> Tensor:
    """Return the mean over all documents' tokens but the first of each."""
    pieces = zip(logits.split(LENGTHS), rows, strict=True)
    losses = [F.cross_entropy(piece[:-1], row[1:], reduction="sum") for piece, row in pieces if len(row) > 1]
    return torch.stack(losses).sum() / sum(length - 1 for length in LENGTHS)


def padded_gradients(family: str) -> dict[str, Tensor]:
    """Return the gradients of a row filled with EOS, in a model whose padding token has no embedding."""
    model = tiny_llm(family).train()
    model.get_input_embeddings().weight.data[0] = 0.0
    isolate_documents(model)
    batch = packed(documents())
    labels = batch["input_ids"].clone()
    labels[:, -PADDING:] = -100
    model(**batch, labels=labels).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text", "llama"])
def test_gradients_of_padded_rows_are_finite(family):
    assert all(gradient.isfinite().all() for gradient in padded_gradients(family).values())


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(text_families()) - REFUSED))
def test_gradients_of_padded_rows_are_finite_in_every_family(family):
    assert all(gradient.isfinite().all() for gradient in padded_gradients(family).values())


@pytest.mark.parametrize("family", text_families())
def test_packed_documents_equal_each_alone(family):
    """Logits, loss and gradients; and no document changes with another one."""
    model = tiny_llm(family)
    if family in REFUSED:
        with pytest.raises(SoloError, match=family):
            isolate_documents(model)
        return
    rows, alone = documents(), reference(model)
    expected = logits_alone(alone, rows)
    isolate_documents(model)
    output = model(**packed(rows)).logits[0, : sum(LENGTHS)]
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
    loss, expected_loss = next_token_loss(output, rows), next_token_loss(expected, rows)
    torch.testing.assert_close(loss, expected_loss, atol=1e-4, rtol=1e-4)

    # Weights of about one per logit show more than the gradient of the loss.
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None or not ours.grad.any(), name
            continue
        size = theirs.grad.abs().max().clamp(min=1.0)
        torch.testing.assert_close(ours.grad / size, theirs.grad / size, atol=2e-4, rtol=0, msg=name)

    start, stop = LENGTHS[0], sum(LENGTHS[:2])
    rows[1] = documents(seed=1)[1]
    with torch.no_grad():
        change = (model(**packed(rows)).logits[0, : sum(LENGTHS)] - output).abs().amax(-1)
    assert change[start:stop].min() > 1e-3
    assert max(change[:start].max(), change[stop:].max()) < 1e-5


def test_plain_llm_trains_at_an_embedding_of_zeros():
    """Gemma 3n divides by the norms of embeddings."""
    model = tiny_llm("gemma3n_text")
    row = torch.arange(5, 17)
    with torch.no_grad():
        model.get_input_embeddings().weight[[2, 9]] = 0.0  # padding of a row, and a token
    expected = logits_alone(model, [row])
    isolate_documents(model)
    logits = model(**packed([row])).logits[0, :12]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    F.cross_entropy(logits[:-1], row[1:]).backward()
    assert all(each.grad.isfinite().all() for each in model.parameters() if each.grad is not None)
