"""Isolation of the documents of a packed row in every layer of a decoder."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from inspect import getsource, signature
from typing import Any, Literal, TypeGuard

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from solo_vlm.models.packed.attention import packed_attention, packed_mask
from solo_vlm.models.packed.recurrence import CACHES, PackedRow, close_mask, compute_apart
from solo_vlm.models.packed.rotary import rotate_apart
from solo_vlm.models.solo.modeling_solo import NORMED_EMBEDDINGS, PACKED_ATTENTION, without_zeros
from solo_vlm.utils.errors import SoloError

_REPLACED = (None, "eager", "sdpa", PACKED_ATTENTION)

Isolation = Literal["packed attention", "document by document", "masks by document", "mask"]


def isolate_documents(model: PreTrainedModel) -> dict[str, Isolation]:
    """Make the decoder compute each document of a packed row as if it were alone, in place.

    Layers that need a cache in generation are those that look at other tokens. Each is treated by one of:

    - "packed attention": `packed_attention`: torch's flash attention on CUDA, batched SDPA
      elsewhere. Models loaded with flash-attn or flex attention keep these, which isolate documents by
      `position_ids`.
    - "document by document": the layer runs for groups of documents, see `compute_apart`: state-space,
      linear-attention and convolution layers.
    - "masks by document": the same with a dense mask for each group: attention that is more than one call of
      transformers' attention interface.
    - "mask": transformers' dense mask, closed between documents, where attention does not use the interface.

    Call it after the last change of the layers or their forward methods.

    Returns:
        The treatment of each such layer, by the name of its class.

    Raises:
        SoloError: The documents cannot be kept apart.
    """
    attention = model.config.get_text_config()._attn_implementation
    row: PackedRow | None = getattr(model, "packed_row", None)
    if row is None:
        row = _isolate(model, attention)
        model.packed_row = row  # type: ignore[assignment]
    if attention in _REPLACED and set(row.treatments.values()) != {"mask"}:
        AttentionInterface.register(PACKED_ATTENTION, packed_attention)
        AttentionMaskInterface.register(PACKED_ATTENTION, packed_mask)
        model.set_attn_implementation(PACKED_ATTENTION)
    return row.treatments


@contextmanager
def unpacked_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let an isolated model compute batches with padding and a cache meanwhile, as it did before."""
    row: PackedRow = model.packed_row  # type: ignore[assignment]
    packed = model.config.get_text_config()._attn_implementation
    if row.attention == packed:
        yield
        return
    model.set_attn_implementation(row.attention)
    try:
        yield
    finally:
        model.set_attn_implementation(packed)


def _isolate(model: PreTrainedModel, attention: str | None) -> PackedRow:
    """Change the layers that compute over tokens, in place, once they are all known to be exact."""
    family = model.config.get_text_config().model_type
    layers = list(dict.fromkeys(_mixers(model)))
    if not layers:
        raise SoloError(
            f"{family} models: no layer takes a cache, so it is not known which ones look at other tokens "
            "and have to keep packed documents apart; choose another model"
        )
    if _counts_positions(model):
        raise SoloError(
            f"{family} models take no position_ids, so positions cannot restart with each packed document; "
            "choose another model"
        )
    makes_masks = not all(
        part._can_set_attn_implementation() for part in model.modules() if isinstance(part, PreTrainedModel)
    )
    treatments = {layer: _treatment(layer, makes_masks) for layer in layers}
    for layer, treatment in treatments.items():
        if treatment == "masks by document" and attention not in _REPLACED:
            raise SoloError(
                f"{type(layer).__name__} cannot keep packed documents apart with {attention} attention; "
                'load the model with attn_implementation="sdpa" or "eager"'
            )

    names = {type(layer).__name__: treatment for layer, treatment in treatments.items()}
    row = PackedRow(names, model.config)
    for layer, treatment in treatments.items():
        if treatment == "packed attention":
            layer.packed_row = row  # type: ignore[assignment]
        elif treatment == "mask":
            close_mask(layer, row)
        else:
            dense = "sdpa" if attention == "sdpa" else "eager"
            has_mask = treatment == "masks by document"
            compute_apart(layer, row, dense if has_mask else None, pad=not _chooses_tokens(layer))
    for module in list(model.modules()):
        if hasattr(module, "rope_type"):
            rotate_apart(module, row)
    if model.config.model_type in NORMED_EMBEDDINGS:  # SOLO models do this themselves
        model.get_input_embeddings().register_forward_hook(_without_zeros)
    row.follow(model)
    return row


def _without_zeros(module: nn.Module, args: tuple[Any, ...], embeddings: Tensor) -> Tensor:
    return without_zeros(embeddings)


def _counts_positions(model: PreTrainedModel) -> bool:
    """Return whether the decoder embeds positions, but counts them itself."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    takes_positions = any("position_ids" in signature(part.forward).parameters for part in parts)
    return not takes_positions and any("position" in name for name, _ in model.named_modules())


def _mixers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost parts of decoder layers that compute over tokens, which a cache argument shows."""
    holds_layers = any(isinstance(part, GradientCheckpointingLayer) for part in module.modules())
    is_part = not (holds_layers or isinstance(module, PreTrainedModel))
    if is_part and CACHES & signature(module.forward).parameters.keys():
        yield module
    else:
        for child in module.children():
            yield from _mixers(child)


def _treatment(layer: nn.Module, makes_masks: bool) -> Isolation:
    """Return how to keep documents apart in a layer that computes over tokens.

    Args:
        makes_masks: Whether the model's attention does not use transformers' attention interface.
    """
    if makes_masks and "attention_mask" in signature(layer.forward).parameters:
        return "mask"
    has_parts = any(True for child in layer.children() for _ in _mixers(child))
    if _calls_interface(layer) and not has_parts and _only_attends(layer):
        return "packed attention"
    return "masks by document" if any(map(_calls_interface, layer.modules())) else "document by document"


def _calls_interface(layer: nn.Module) -> bool:
    return any(_is_interface_call(node) for node in ast.walk(_source(layer)))


def _only_attends(layer: nn.Module) -> bool:
    """Return whether tokens meet in the attention interface alone, and are known by their arguments.

    Otherwise the layer convolves too, counts tokens by itself, or uses the mask in other ways.
    """
    nodes = list(ast.walk(_source(layer)))
    calls = [node for node in nodes if _is_interface_call(node)]
    passed = {id(value) for call in calls for value in (*call.args, *(word.value for word in call.keywords))}
    uses_mask = any(
        isinstance(node, ast.Name)
        and node.id == "attention_mask"
        and isinstance(node.ctx, ast.Load)
        and id(node) not in passed
        for node in nodes
    )
    counts = any(isinstance(node, ast.Attribute) and node.attr == "arange" for node in nodes)
    convolves = any(isinstance(child, nn.Conv1d) for child in layer.children())
    return not (uses_mask or counts or convolves)


def _chooses_tokens(layer: nn.Module) -> bool:
    """Return whether a layer attends to the tokens with the highest scores, where padding can break ties."""
    kinds: set[Any] = {type(part) for part in layer.modules()}
    return any("topk" in _text(kind) for kind in kinds)


def _is_interface_call(node: ast.AST) -> TypeGuard[ast.Call]:
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("_interface")
    )


def _source(layer: nn.Module) -> ast.AST:
    """Return the syntax tree of a layer's forward."""
    return ast.parse(textwrap.dedent(_text(type(layer).forward)))


@cache  # finding a class parses its whole module
def _text(definition: Any) -> str:
    """Return the source of a class or function; empty where there is none."""
    try:
        return getsource(definition)
    except (OSError, TypeError):
        return ""
