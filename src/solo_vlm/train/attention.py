"""Attention in packed batches, document by document: cost is the sum of squares, no S x S mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

PACKED_ATTENTION = "solo_packed"


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let the decoder attend document by document where that is the fastest correct way (on CPU).

    Elsewhere the model keeps its own attention; transformers' isolates documents by `position_ids`.
    """
    if model.device.type == "cpu":
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
        **kwargs: other arguments of transformers' interface, not needed here.

    Returns:
        (1, length, heads, head_dim), and None for the attention weights.

    Raises:
        ValueError: the batch is not packed.
    """
    if cu_seq_lens_q is None or attention_mask is not None or query.shape[0] != 1:
        raise ValueError("packed attention is for packed training batches; use sdpa for anything else")
    bounds = cu_seq_lens_q.tolist()
    outputs = []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        window = _window_mask(end - start, sliding_window, query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                attn_mask=window,
                dropout_p=dropout,
                is_causal=window is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """(length, length) bool, True where a query may look; None where plain causality is enough."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)
