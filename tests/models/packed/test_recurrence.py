"""Layers that run document by document: checkpointing, caches, images, unpacked batches."""

from __future__ import annotations

import pytest
import torch
from tests.factories import make_solo
from tests.models.packed.test_isolation import LENGTHS, documents, logits_alone, packed, reference

from solo_vlm.check.probe import Probe
from solo_vlm.check.tiny import tiny_llm
from solo_vlm.models.packed.isolation import isolate_documents
from solo_vlm.train.activation_checkpointing import prepare_layers
from solo_vlm.utils.errors import SoloError


def isolated(family, checkpointing="none"):
    model = tiny_llm(family).train()
    prepare_layers(model, checkpointing)
    isolate_documents(model)
    return model


def gradients(model, *rows):
    """Return the gradients of several packed rows, from one backward pass."""
    outputs = [model(**packed(row)).logits for row in rows]
    sum(
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() for output in outputs
    ).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", ["nemotron_h", "llama4_text", "bloom", "gpt_oss"])
def test_checkpointed_layers_run_again_with_the_documents_of_their_row(family):
    """The second row is computed before the backward pass of the first."""
    rows = documents(), documents(seed=1)[::-1]
    expected = gradients(isolated(family), *rows)
    for name, gradient in gradients(isolated(family, "full"), *rows).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_selective_checkpointing_finds_the_same_operations():
    """Outside compiled code as well: no layer does more than the others."""
    rows = documents()
    expected = gradients(isolated("nemotron_h"), rows)
    for name, gradient in gradients(isolated("nemotron_h", "selective"), rows).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_of_transformers_changes_nothing(use_reentrant):
    rows = documents(), documents(seed=1)[::-1]
    expected = gradients(isolated("nemotron_h"), *rows)
    model = isolated("nemotron_h")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for name, gradient in gradients(model, *rows).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_reentrant_checkpointing_around_a_whole_layer_is_rejected():
    """It computes layers without gradients, so a layer cannot restore its documents in the backward pass."""
    model, batch = isolated("nemotron_h"), packed(documents())
    states = model.get_input_embeddings()(batch.pop("input_ids"))
    with torch.no_grad(), pytest.raises(SoloError, match="use_reentrant=False"):
        model(inputs_embeds=states, **batch)


@pytest.mark.parametrize("family", ["nemotron_h", "bloom", "llama"])
def test_positions_that_restart_mark_documents(family):
    model = isolated(family).eval()
    batch = packed(documents())
    positions_only = {name: batch[name] for name in ("input_ids", "position_ids")}
    torch.testing.assert_close(model(**positions_only).logits, model(**batch).logits)


@pytest.mark.parametrize("family", ["hy_v4", "minimax", "xlstm"])
def test_documents_may_have_as_many_tokens_as_there_are_heads(family):
    """Weights of attention and states, by document and head, are then shaped as if by token."""
    rows = [document[:length] for document, length in zip(documents()[3:], (17, 4), strict=True)]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    with torch.no_grad():
        expected = logits_alone(reference(tiny_llm(family)), rows)
        found = isolated(family).eval()(torch.cat(rows)[None], position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["mamba", "rwkv", "bloom"])
def test_unpacked_batches_are_computed_as_before(family):
    model = tiny_llm(family)
    tokens = torch.stack([documents()[3], documents(seed=1)[3]])
    with torch.no_grad():
        before = model(tokens).logits
        isolate_documents(model)
        model(**packed(documents()))
        torch.testing.assert_close(model(tokens).logits, before)


def test_several_packed_rows_are_rejected():
    batch = packed(documents())
    with pytest.raises(SoloError, match="only one"):
        isolated("mamba")(batch["input_ids"].expand(2, -1), position_ids=batch["position_ids"].expand(2, -1))


def test_cache_is_rejected_in_packed_rows():
    with pytest.raises(SoloError, match="use_cache=False"):
        isolated("nemotron_h").eval()(**{**packed(documents()), "use_cache": True})


def test_patches_of_an_image_see_each_other_in_attention_that_runs_document_by_document():
    """GPT-2's attention: its mask, opened within images, is the reference."""
    model = tiny_llm("gpt2")
    alone, rows = reference(model), documents()
    assert isolate_documents(model) == {"GPT2Attention": "masks by document"}
    batch = packed(rows)
    image = torch.full(batch["input_ids"].shape, -1)
    start = sum(LENGTHS[:3])
    image[0, start + 4 : start + 12] = 0
    output = model(**batch, image_index=image).logits[0, start : start + LENGTHS[3]]
    allowed = torch.ones(LENGTHS[3], LENGTHS[3]).tril()
    allowed[4:12, 4:12] = 1
    mask = torch.where(allowed.bool(), 0.0, torch.finfo(torch.float32).min)[None, None]
    torch.testing.assert_close(
        output, alone(rows[3][None], attention_mask=mask).logits[0], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["nemotron", "stablelm", "falcon", "gptj", "mpt"])
def test_layers_that_are_not_told_of_images_see_them_in_both_directions(family, checkpointing):
    """Their decoders pass no arguments on to layers, or make masks by themselves."""
    solo = make_solo(family)
    solo.model.config.image_attention = "bidirectional"
    probe = Probe(solo.model)
    solo.model.set_attn_implementation("eager")
    weights = solo.model.model.embed_vision_patch.weight, solo.model.lm_head.weight
    expected = [solo.model(**probe.inputs(row), use_cache=False).logits[0] for row in probe.documents]
    wanted = torch.autograd.grad(torch.cat(expected).square().mean(), weights)
    isolate_documents(solo.model)
    if checkpointing:
        solo.model.train().gradient_checkpointing_enable({"use_reentrant": False})
    batch = probe.packed(probe.documents)
    del batch["labels"]
    expected = torch.cat(expected)
    logits = solo.model(**batch).logits[0, : len(expected)]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    found = torch.autograd.grad(logits.square().mean(), weights)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


def test_isolation_is_done_once():
    model = isolated("nemotron_h")
    forward = model.forward
    assert isolate_documents(model) == isolate_documents(model)
    assert model.forward is forward
