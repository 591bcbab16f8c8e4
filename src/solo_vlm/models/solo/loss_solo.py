"""Next-token loss that touches only supervised positions and never holds all logits at once."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
CHUNK_SIZE = 1024  # supervised positions whose logits exist at a time


def supervised_cross_entropy(
    hidden_states: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    num_items_in_batch: Tensor | int | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Cross entropy of the next token, at positions that carry a label.

    The hidden states that predict a label are gathered first; the head then runs over chunks of them and
    its logits are recomputed in the backward pass, so that memory holds `chunk_size * vocabulary` logits
    whatever the sequence length. The value equals the usual loss over all logits.

    Args:
        hidden_states: (batch, length, hidden), the decoder's output.
        labels: (batch, length) int64; `labels[:, t]` is the token at t, or -100 where none is supervised.
        head: maps (n, hidden) to logits (n, vocabulary).
        num_items_in_batch: supervised tokens of the whole (global) batch; the sum of losses is divided by
            it. Default: those of this call, which makes the result a mean.
        chunk_size: supervised positions a chunk.

    Returns:
        A scalar float32 tensor; zero, with a gradient of zero, where nothing is supervised.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE_INDEX
    hidden = hidden_states[:, :-1][supervised]  # (n, hidden)
    targets = targets[supervised]  # (n,)
    total = hidden.sum().float() * 0.0
    for chunk, target in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True):
        total = total + checkpoint(_chunk_loss, chunk, target, head, use_reentrant=False)
    if num_items_in_batch is None:
        num_items_in_batch = max(targets.numel(), 1)
    return total / num_items_in_batch


def _chunk_loss(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


__all__ = ["supervised_cross_entropy"]
