"""Kernels that take a whole packed row: used once they are measured to keep its documents apart.

Plain functions stand in for the kernels, which need a GPU; they take the same arguments.
"""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType

import pytest
import torch
from tests.models.packed.test_isolation import LENGTHS, PADDING, documents, logits_alone, packed, reference
from tests.models.packed.test_recurrence import gradients
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

from solo_vlm.check.tiny import tiny_llm
from solo_vlm.models.packed.isolation import isolate_documents
from solo_vlm.models.packed.kernels import row_arguments
from solo_vlm.train.activation_checkpointing import prepare_layers

# Functions of the modeling file: name, position of the tokens in results, argument that tells of documents.
KERNELS = {
    "lfm2": [("causal_conv1d_fn", 2, "seq_idx")],
    "qwen3_next": [("causal_conv1d_fn", 2, "seq_idx"), ("torch_chunk_gated_delta_rule", 1, "cu_seqlens")],
    "qwen3_5": [("causal_conv1d_fn", 2, "seq_idx"), ("torch_chunk_gated_delta_rule", 1, "cu_seqlens")],
    "bamba": [("causal_conv1d_fn", 2, "seq_idx"), ("mamba2_chunk_scan", 1, "seq_idx")],
    "granitemoehybrid": [("causal_conv1d_fn", 2, "seq_idx"), ("mamba2_chunk_scan", 1, "seq_idx")],
    "nemotron_h": [("causal_conv1d_fn", 2, "seq_idx"), ("mamba2_chunk_scan", 1, "seq_idx")],
    "falcon_h1": [("causal_conv1d_fn", 2, "seq_idx"), ("mamba2_chunk_scan", 1, "seq_idx")],
    "mamba2": [("causal_conv1d_fn", 2, "seq_idx"), ("mamba2_chunk_scan", 1, "seq_idx")],
}


def plant(monkeypatch, family: str, deaf: str | None = None) -> list[int]:
    """Put stand-ins in the place of a family's kernels; return the lengths that they are called with.

    Args:
        deaf: Name of the kernel that takes the argument of documents, but ignores it.
    """
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    lengths: list[int] = []
    row_arguments_of_kernels = {"seq_idx", "cu_seqlens", *row_arguments(torch.tensor([0, 1]), 1)}
    for name, dim, argument in KERNELS[family]:
        kernel = getattr(module, name).__wrapped__  # the reference, without transformers' check

        def stand_in(first, *args, kernel=kernel, name=name, dim=dim, argument=argument, **kwargs):
            told = kwargs.get(argument)
            kwargs = {key: value for key, value in kwargs.items() if key not in row_arguments_of_kernels}
            length = first.shape[dim]
            lengths.append(length)
            if told is None or name == deaf:
                return kernel(first, *args, **kwargs)
            sizes = (told[0].unique(return_counts=True)[1] if argument == "seq_idx" else told.diff()).tolist()

            def split(value):
                along = torch.is_tensor(value) and value.ndim > dim and value.shape[dim] == length
                return value.split(sizes, dim) if along else [value] * len(sizes)

            parts = zip(*map(split, (first, *args)), strict=True)
            named = {key: split(value) for key, value in kwargs.items()}
            outputs = [
                kernel(*part, **{key: values[number] for key, values in named.items()})
                for number, part in enumerate(parts)
            ]
            if isinstance(outputs[0], tuple):  # with the last state
                return torch.cat([output for output, _ in outputs], dim), None
            return torch.cat(outputs, dim)

        monkeypatch.setattr(module, name, stand_in)
    if hasattr(module, "mamba2_split_conv1d_scan_combined"):
        monkeypatch.setattr(module, "mamba2_split_conv1d_scan_combined", lambda *args, **kwargs: None)
    return lengths


@torch.no_grad()
def check_rows(family: str, calls: list[int]) -> None:
    """Compare two packed rows with their documents alone; leave the calls of the second in `calls`."""
    model, rows = tiny_llm({"qwen3_5": "qwen3_5_text"}.get(family, family)), documents()
    expected = logits_alone(reference(model), rows)
    isolate_documents(model)
    for _ in range(2):
        calls.clear()
        torch.testing.assert_close(
            model(**packed(rows)).logits[0, : sum(LENGTHS)], expected, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("family", KERNELS)
def test_row_goes_through_kernels_once_they_are_measured(family, monkeypatch, caplog):
    calls = plant(monkeypatch, family)
    with caplog.at_level(logging.INFO):
        check_rows(family, calls)
    assert set(calls) == {sum(LENGTHS) + PADDING}
    assert caplog.text.count("in one pass of its kernels") == 1


@pytest.mark.parametrize(
    ("family", "deaf"), [(family, name) for family in KERNELS for name, *_ in KERNELS[family]]
)
def test_kernel_that_ignores_documents_is_found_out(family, deaf, monkeypatch, caplog):
    calls = plant(monkeypatch, family, deaf)
    with caplog.at_level(logging.INFO):
        check_rows(family, calls)
    assert sum(LENGTHS) + PADDING not in calls
    (fault,) = (message for message in caplog.messages if "let a document change the next by" in message)
    assert float(fault.split()[-1]) > 0.02  # more than rounding in 16 bits


def test_layer_without_kernels_stays_with_groups(caplog):
    with caplog.at_level(logging.INFO):
        check_rows("lfm2", [])
    assert caplog.text.count("Lfm2ShortConv computes packed rows document by document") == 1


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_gradients_are_the_same_before_and_after_kernels_are_measured(checkpointing, monkeypatch):
    """A checkpointed layer does again what it did, even if its kernels were measured since."""
    plant(monkeypatch, "qwen3_next")
    rows = documents(), documents(seed=1)[::-1]
    expected = []
    for planted in (False, True):
        model = tiny_llm("qwen3_next").train()
        prepare_layers(model, checkpointing)
        isolate_documents(model)
        if not planted:
            monkeypatch.setattr(type(model.packed_row), "has_kernels", lambda *args: False)
        expected.append(gradients(model, *rows))
        monkeypatch.undo()
        plant(monkeypatch, "qwen3_next")
    for name, gradient in expected[1].items():
        scale = float(expected[0][name].abs().max())
        torch.testing.assert_close(gradient, expected[0][name], atol=1e-4 * scale, rtol=0, msg=name)


def test_installed_kernels_are_for_gpus_only(monkeypatch):
    """transformers would call them on a CPU, too."""
    package = ModuleType("causal_conv1d")

    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
        raise RuntimeError("Expected x.is_cuda() to be true")

    package.causal_conv1d_fn = causal_conv1d_fn
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)
    module = importlib.import_module("transformers.models.lfm2.modeling_lfm2")
    decorate = use_kernel_func_from_hub_with_fallback("causal_conv1d_fn", "causal_conv1d")
    monkeypatch.setattr(module, "causal_conv1d_fn", decorate(module.causal_conv1d_fn.__wrapped__))
    check_rows("lfm2", [])


@pytest.mark.parametrize("family", ["lfm2", "qwen3_next", "bamba"])
def test_kernels_are_measured_in_16_bits_too(family, monkeypatch, caplog):
    plant(monkeypatch, family)
    model = tiny_llm(family).to(torch.bfloat16).train()
    isolate_documents(model)
    with caplog.at_level(logging.INFO):
        model(**packed(documents()))
    assert "in one pass of its kernels" in caplog.text


def test_row_arguments_number_the_documents():
    arguments = row_arguments(torch.tensor([0, 2, 3]), 3)
    assert arguments["seq_idx"].tolist() == [[0, 0, 1]]
    assert arguments["seq_idx"].dtype == torch.int32
    assert arguments["cu_seq_lens_q"].tolist() == [0, 2, 3]
