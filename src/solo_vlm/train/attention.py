"""Attention in packed batches, document by document: cost is the sum of squares, no S x S mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel

from solo_vlm.models.solo.image_attention_solo import PACKED_ATTENTION

_REPLACED = (None, "eager", "sdpa", PACKED_ATTENTION)

_SHORT = 256  # tokens; longer documents gain nothing from company
_TINY = 64  # tokens; so short, torch's CPU kernel takes several times longer than products in bfloat16


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let the decoder attend document by document: torch's flash attention on CUDA, groups of sdpa elsewhere.

    Models that cap attention scores (Gemma 2), which neither can do, keep transformers' own attention, and so
    do those that were loaded with flash-attn or flex attention. It isolates documents by `position_ids`.
    """
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) or config._attn_implementation not in _REPLACED:
        return
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    model.set_attn_implementation(PACKED_ATTENTION)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    image_index: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document of a packed row; the signature is transformers'.

    Args:
        module: the attention layer.
        query: (1, heads, length, head_dim).
        key: (1, key heads, length, head_dim).
        value: likewise.
        attention_mask: must be None: packed batches have none.
        scaling: of the scores; default 1 / sqrt(head_dim).
        dropout: probability.
        sliding_window: tokens that a query sees, itself included; None: all before it.
        cu_seq_lens_q: (documents + 1,) int32, where documents begin and end.
        max_length_q: length of the longest document.
        image_index: (1, length) int64, which image a patch belongs to, -1 for text: patches of one image see
            each other in both directions. None: all is causal.
        **kwargs: other arguments of transformers' interface, not needed here.

    Returns:
        (1, length, heads, head_dim), and None for the attention weights.

    Raises:
        ValueError: the batch is not packed.
    """
    if cu_seq_lens_q is None or attention_mask is not None or query.shape[0] != 1:
        raise ValueError("packed attention is for packed training batches; use sdpa for anything else")
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # (length, heads, d)
    if image_index is None and _flash_can(q):
        return _flash(q, k, v, cu_seq_lens_q, max_length_q, scaling, sliding_window)[None], None
    images = image_index[0] if image_index is not None else None
    return _grouped(q, k, v, cu_seq_lens_q.long(), scaling, dropout, sliding_window, images)[None], None


def _flash_can(query: Tensor) -> bool:
    """Whether torch's flash attention takes such queries; float32, as in recipes for `fp32`, it does not."""
    size = query.shape[-1]
    halves = _computed_in(query) in (torch.bfloat16, torch.float16)
    return query.device.type == "cuda" and halves and size % 8 == 0 and size <= 256


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int | None,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """(length, heads, d) by torch's variable-length flash attention."""
    from torch.nn.attention.varlen import varlen_attn  # it registers CUDA kernels

    computed_in = _computed_in(query)  # autocast does not know this operation
    query, key, value = (states.to(computed_in) for states in (query, key, value))
    longest = longest or int(bounds.diff().max())
    # Its window counts the tokens to the left of a query, ours includes the query itself.
    left = -1 if sliding_window is None else sliding_window - 1
    options: dict[str, Any] = {"scale": scaling, "window_size": (left, 0)}
    if "enable_gqa" in signature(varlen_attn).parameters:  # earlier versions do it unasked
        options["enable_gqa"] = True
    attended: Any = varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)
    return attended


def _grouped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    images: Tensor | None,
) -> Tensor:
    """(length, heads, d) by sdpa over documents of about the same length."""
    outputs, places = [], []
    bfloat16_on_cpu = query.device.type == "cpu" and _computed_in(query) == torch.bfloat16
    for index, valid in _groups(bounds):
        mask = _window_mask(index.shape[1], sliding_window, query.device)
        if images is not None:
            mask = _image_mask(images[index], mask)
        by_products = bfloat16_on_cpu and index.shape[1] <= _TINY
        with sdpa_kernel(SDPBackend.MATH) if by_products else nullcontext():
            attended = F.scaled_dot_product_attention(
                query[index].transpose(1, 2),  # (documents, heads, longest, d)
                key[index].transpose(1, 2),
                value[index].transpose(1, 2),
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        outputs.append(attended.transpose(1, 2)[valid])
        places.append(index[valid])
    return torch.cat(outputs)[torch.cat(places).argsort()]


def _computed_in(states: Tensor) -> torch.dtype:
    """What sdpa will make of them: rotary embeddings leave them in float32 under autocast."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _groups(bounds: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Documents of about the same length together: (documents, longest) token indices, and which count.

    One call for many short documents saves most of the time on a CPU. Lengths in a group differ by less
    than a factor of two; the filling comes after a document's own tokens, where causality hides it. A
    long document is a group of its own.
    """
    starts, lengths = bounds[:-1], bounds.diff()
    group = torch.log2(lengths.double()).ceil()
    alone = lengths > _SHORT
    group[alone] = -1.0 - torch.arange(int(alone.sum()), dtype=group.dtype, device=bounds.device)
    for number in group.unique():
        members = group == number
        offset = torch.arange(int(lengths[members].max()), device=bounds.device)
        valid = offset < lengths[members, None]  # (documents, longest)
        index = (starts[members, None] + offset).clamp(max=int(bounds[-1]) - 1)
        yield index, valid


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """(length, length) bool, True where a query may look; None where plain causality is enough."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def _image_mask(images: Tensor, mask: Tensor | None) -> Tensor:
    """(documents, 1, length, length) bool: a mask, or causality, opened between the patches of an image.

    Args:
        images: (documents, length), which image a patch belongs to, -1 for text. What fills a document up
            is of no image of its own.
        mask: (length, length), see `_window_mask`.
    """
    if mask is None:
        mask = images.new_ones(images.shape[1], images.shape[1], dtype=torch.bool).tril()
    same = (images[:, :, None] == images[:, None, :]) & (images[:, :, None] >= 0)
    return (mask | same)[:, None]
