"""Attention in packed batches, document by document: cost is the sum of squares, no S x S mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

PACKED_ATTENTION = "solo_packed"

_SHORT = 256  # tokens; longer documents gain nothing from company


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
    queries, keys, values = (
        states[0].transpose(0, 1) for states in (query, key, value)
    )  # (length, heads, d)
    outputs, places = [], []
    for index, valid in _groups(cu_seq_lens_q.long()):
        window = _window_mask(index.shape[1], sliding_window, query.device)
        attended = F.scaled_dot_product_attention(
            queries[index].transpose(1, 2),  # (documents, heads, longest, d)
            keys[index].transpose(1, 2),
            values[index].transpose(1, 2),
            attn_mask=window,
            dropout_p=dropout,
            is_causal=window is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(attended.transpose(1, 2)[valid])
        places.append(index[valid])
    in_order = torch.cat(places).argsort()
    return torch.cat(outputs)[in_order][None], None


def _groups(bounds: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Documents of about the same length together: (documents, longest) token indices, and which count.

    One call for many short documents saves most of the time on a CPU. Lengths in a group differ by less
    than a factor of two; the filling comes after a document's own tokens, where causality hides it. A
    long document is a group of its own.
    """
    starts, lengths = bounds[:-1], bounds.diff()
    group = torch.log2(lengths.double()).ceil()
    alone = lengths > _SHORT
    group[alone] = -1.0 - torch.arange(int(alone.sum()), dtype=group.dtype)
    for number in group.unique():
        members = group == number
        offset = torch.arange(int(lengths[members].max()))
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
