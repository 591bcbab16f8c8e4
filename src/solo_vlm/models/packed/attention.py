"""Attention within the documents of a packed batch, without a dense mask."""

from __future__ import annotations

from contextlib import nullcontext
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from solo_vlm.models.packed.groups import document_groups

_TINY = 64  # tokens; in bfloat16 on CPU, flash is several times slower than math for shorter documents


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
    """Compute causal attention within each document of a packed row (transformers' attention interface).

    Args:
        query: (1, num_heads, length, head_dim).
        key: (1, num_key_value_heads, length, head_dim).
        value: As `key`.
        attention_mask: Must be None, as in packed batches.
        scaling: Factor of the scores; default: 1 / sqrt(head_dim).
        sliding_window: Number of tokens visible to a query, including itself; None: all previous ones.
        cu_seq_lens_q: (documents + 1,) int32, cumulative document lengths.
        max_length_q: Length of the longest document.
        image_index: (1, length) int64, image of each patch, -1 for text: patches of an image attend to each
            other in both directions. None: purely causal.

    Returns:
        Attention output (1, length, num_heads, head_dim), and None in place of the attention weights.
    """
    if cu_seq_lens_q is None or attention_mask is not None or query.shape[0] != 1:
        raise ValueError(
            "packed attention requires a packed batch: cu_seq_lens_q, no attention_mask; use sdpa"
        )
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # (length, heads, d)
    if image_index is None and _supports_flash(q):
        return _flash(q, k, v, cu_seq_lens_q, max_length_q, scaling, sliding_window)[None], None
    images = image_index[0] if image_index is not None else None
    return _grouped(q, k, v, cu_seq_lens_q.long(), scaling, dropout, sliding_window, images)[None], None


def _supports_flash(query: Tensor) -> bool:
    """Return whether torch's flash attention supports a query's device, head_dim and dtype (not float32)."""
    head_dim = query.shape[-1]
    is_half = _compute_dtype(query) in (torch.bfloat16, torch.float16)
    return query.device.type == "cuda" and is_half and head_dim % 8 == 0 and head_dim <= 256


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int | None,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Return (length, num_heads, head_dim) by torch's variable-length flash attention."""
    from torch.nn.attention.varlen import varlen_attn  # registers CUDA kernels

    dtype = _compute_dtype(query)  # autocast does not cover this operator
    query, key, value = (states.to(dtype) for states in (query, key, value))
    longest = longest or int(bounds.diff().max())
    # Its window counts the tokens left of a query; ours includes the query itself.
    left = -1 if sliding_window is None else sliding_window - 1
    options: dict[str, Any] = {"scale": scaling, "window_size": (left, 0)}
    if "enable_gqa" in signature(varlen_attn).parameters:  # earlier versions always allow it
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
    """Return (length, num_heads, head_dim) by SDPA over batches of documents of similar length."""
    outputs, positions = [], []
    bfloat16_on_cpu = query.device.type == "cpu" and _compute_dtype(query) == torch.bfloat16
    for index, valid in document_groups(bounds):
        mask = _window_mask(index.shape[1], sliding_window, query.device)
        if images is not None:
            mask = _image_mask(images[index], mask)
        use_math = bfloat16_on_cpu and index.shape[1] <= _TINY
        with sdpa_kernel(SDPBackend.MATH) if use_math else nullcontext():
            attended = F.scaled_dot_product_attention(
                query[index].transpose(1, 2),  # (documents, num_heads, longest, head_dim)
                key[index].transpose(1, 2),
                value[index].transpose(1, 2),
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        outputs.append(attended.transpose(1, 2)[valid])
        positions.append(index[valid])
    return torch.cat(outputs)[torch.cat(positions).argsort()]


def _compute_dtype(states: Tensor) -> torch.dtype:
    """Return the dtype SDPA casts to; under autocast, rotary embeddings leave queries in float32."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return a (length, length) bool mask, True where attention is allowed; None if causality suffices."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def _image_mask(images: Tensor, mask: Tensor | None) -> Tensor:
    """Return a (documents, 1, length, length) bool mask that also allows attention within each image.

    Args:
        images: (documents, length), image of each patch, -1 for text; padding has no image.
        mask: (length, length), see `_window_mask`; None: causal.
    """
    if mask is None:
        mask = images.new_ones(images.shape[1], images.shape[1], dtype=torch.bool).tril()
    same = (images[:, :, None] == images[:, None, :]) & (images[:, :, None] >= 0)
    return (mask | same)[:, None]
