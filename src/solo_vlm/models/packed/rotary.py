"""Rotary embeddings whose frequencies depend on a document's length (LongRoPE, dynamic NTK)."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from solo_vlm.models.packed.groups import IsolationError
from solo_vlm.models.packed.recurrence import PackedRow


def rotate_apart(rotary: nn.Module, row: PackedRow) -> None:
    """Make a rotary module choose the frequencies of each document of a packed row by its own length.

    transformers chooses them once, by the longest. Modules with fixed frequencies stay as they are.
    """
    if not depends_on_length(rotary):
        return
    forward = rotary.forward

    @wraps(forward)
    def apart(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer_type = kwargs.get("layer_type", args[0] if args else None)
        limit = _limit(rotary, layer_type)
        if row.documents is None or limit is None:
            return forward(x, position_ids, *args, **kwargs)
        lengths = row.documents.bounds.diff()
        # As transformers does: by positions, which are fewer than tokens where images have 2-D positions.
        longest = torch.segment_reduce(position_ids[0].double(), "max", lengths=lengths)
        is_long = longest >= limit
        if not is_long.any():
            return forward(x, position_ids, *args, **kwargs)
        if "dynamic" in _rope_type(rotary, layer_type):
            raise IsolationError(
                f"dynamic RoPE rotates documents of more than {limit} tokens by their own lengths, which "
                "packed training does not support; shorten data.sequence_length"
            )
        in_long = torch.repeat_interleave(is_long, lengths)
        by_long = forward(x, position_ids, *args, **kwargs)
        by_short = forward(x, position_ids.masked_fill(in_long, 0), *args, **kwargs)
        chosen = in_long[:, None]  # (length, 1)
        if isinstance(by_long, Tensor):
            return torch.where(chosen, by_long, by_short)
        return tuple(torch.where(chosen, one, other) for one, other in zip(by_long, by_short, strict=True))

    rotary.forward = apart  # type: ignore[method-assign]


def depends_on_length(module: nn.Module) -> bool:
    """Return whether a module is rotary and chooses its frequencies by the length of a document."""
    kinds: Any = getattr(module, "rope_type", None)
    each = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(kind in str(rope_type) for rope_type in each for kind in ("longrope", "dynamic"))


def _rope_type(rotary: Any, layer_type: str | None) -> str:
    return str(rotary.rope_type[layer_type] if layer_type else rotary.rope_type)


def _limit(rotary: Any, layer_type: str | None) -> int | None:
    """Return the longest document with the original frequencies; None if all lengths share them."""
    rope_type = _rope_type(rotary, layer_type)
    if "longrope" in rope_type:
        settings = rotary.config.rope_parameters
        settings = settings[layer_type] if layer_type else settings
        return int(settings["original_max_position_embeddings"])
    return int(rotary.original_max_seq_len) if "dynamic" in rope_type else None
