"""Outputs of every decoder layer, and the layer where two runs of a model first part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from solo_vlm.check.tiny import WINDOW
from solo_vlm.models.load import decoder_layers
from solo_vlm.models.packed.isolation import isolate_documents

_WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "swa_window_size",
    "attention_chunk_size",
    "attention_window_size",
    "window_size",
)
_MASKED = 1e30  # logits beyond it are masked tokens


@dataclass(frozen=True)
class Parting:
    """Place where two runs differ first.

    Attributes:
        layer: Name of the layer: "embeddings", "layer 3 (LlamaDecoderLayer)", "logits".
        difference: Largest difference of the logits, relative to their largest value.
    """

    layer: str
    difference: float

    def __str__(self) -> str:
        return f"differs from {self.layer} on; logits by {self.difference:.2g}"


@dataclass(frozen=True)
class Trace:
    """States of one forward pass.

    Attributes:
        states: (batch, length, ...) or (..., batch, length, hidden) per layer, in order, from "embeddings" to
            "logits".
        length: Tokens per row.
    """

    states: dict[str, Tensor]
    length: int

    @property
    def logits(self) -> Tensor:
        return self.states["logits"]

    def part(self, row: int = 0, start: int = 0, stop: int | None = None) -> Trace:
        """Return the states of some tokens of a row."""
        tokens = slice(start, self.length if stop is None else stop)
        states = {}
        for name, values in self.states.items():
            # Some families keep several streams: (streams, batch, length, hidden), or after the length.
            dim = 1 if values.shape[1] == self.length else values.dim() - 2
            states[name] = values.narrow(dim - 1, row, 1).narrow(
                dim, tokens.start, tokens.stop - tokens.start
            )
        return Trace(states, tokens.stop - tokens.start)


def trace(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Trace:
    """Run a model without gradients or cache; record what enters the decoder and leaves its layers."""
    states: dict[str, Tensor] = {}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = args[0] if args else kwargs.get("hidden_states")
        if isinstance(values, Tensor):
            states["embeddings"] = values

    def leave(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            states[name] = output if isinstance(output, Tensor) else output[0]

        return record

    layers = decoder_layers(model)
    handles = [
        layer.register_forward_hook(leave(f"layer {number} ({type(layer).__name__})"))
        for number, layer in enumerate(layers)
    ]
    handles += [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers[:1]]
    try:
        with torch.no_grad():
            output = model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    states["logits"] = output.logits
    length = inputs["input_ids"].shape[1]
    # Where layers run document by document, the last group is not the row.
    whole = {name: values for name, values in states.items() if length in (values.shape[1], values.shape[-2])}
    return Trace({name: values.float() for name, values in whole.items()}, length)


def first_parting(trace: Trace, reference: Trace, tolerance: float) -> Parting | None:
    """Return where a run leaves its reference by more than the tolerance, or None."""
    for name, values in trace.states.items():
        if name in reference.states and difference(values, reference.states[name]) > tolerance:
            return Parting(name, difference(trace.logits, reference.logits))
    return None


def difference(values: Tensor, reference: Tensor) -> float:
    """Return the largest difference relative to the reference's largest value; infinite for NaN."""
    if values.shape != reference.shape:
        raise ValueError(f"shapes {list(values.shape)} and {list(reference.shape)} differ")
    values, reference = values.double(), reference.double()
    finite = reference.abs() < _MASKED
    if bool(reference.isnan().any()) or not bool((finite == (values.abs() < _MASKED)).all()):
        return float("inf")
    values, reference = values[finite], reference[finite]
    if not values.numel():
        return 0.0
    scale = reference.abs().max().clamp(min=1e-12)
    return float((values - reference).abs().max() / scale)


@contextmanager
def narrow_windows(model: PreTrainedModel, width: int = WINDOW) -> Iterator[None]:
    """Shorten attention windows and chunks, so that short documents reach beyond them."""
    holders: dict[int, Any] = {}
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            if holder is not None:
                holders[id(holder)] = holder
    changed = [
        (vars(holder), name, value)
        for holder in holders.values()
        for name in _WINDOWS
        if type(value := vars(holder).get(name)) is int and value > width
    ]
    for settings, name, _ in changed:
        settings[name] = width
    try:
        yield
    finally:
        for settings, name, value in changed:
            settings[name] = value


@contextmanager
def attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Use another attention implementation, if the model's family can."""
    with _restored(model):
        model.set_attn_implementation(implementation)
        yield


@contextmanager
def isolated(model: PreTrainedModel) -> Iterator[None]:
    """Keep the documents of a packed row apart, as training does; afterwards, nothing of it is left."""
    before = [(module, dict(vars(module)), dict(module._forward_hooks)) for module in model.modules()]
    try:
        with _restored(model):
            isolate_documents(model)
            yield
    finally:
        for module, attributes, hooks in before:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks)


@contextmanager
def _restored(model: PreTrainedModel) -> Iterator[None]:
    before = model.config.get_text_config()._attn_implementation
    try:
        yield
    finally:
        if model.config.get_text_config()._attn_implementation != before:
            model.set_attn_implementation(before)
