"""Attention within the documents of a packed batch, without a dense mask."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from solo_vlm.models.packed.groups import IsolationError, document_groups, split_documents
from solo_vlm.models.packed.images import attend_with_images, flash_is_exact

_TINY = 64  # tokens; in bfloat16 on CPU, flash is several times slower than math for shorter documents
_SCORES = 2**26  # scores that capped attention holds at a time
_SINK_SIZE = 8  # width that a sink adds to queries and keys; flash attention requires multiples of 8

# Arguments of the interface that do not change causal attention over a row: sizes that repeat ours, and
# options of other layers and of the model's output, which decoders pass to every layer.
_HARMLESS = {
    "cu_seq_lens_k",
    "max_length_k",
    "seq_idx",
    "position_ids",
    "cache_position",
    "use_cache",
    "num_items_in_batch",
    "shift_labels",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
}


@dataclass(frozen=True)
class PackedMask:
    """Mask of attention within documents, in place of a dense one: what it allows besides causality.

    Attributes:
        window: Number of tokens visible to a query, including itself; None: all previous ones.
        chunk: Tokens per chunk of a document; queries see their own chunk. None: the whole document.
    """

    window: int | None = None
    chunk: int | None = None

    def __getitem__(self, index: Any) -> PackedMask:
        """Select queries: a decoder may drop some from its last layers; `packed_attention` needs all."""
        return self

    def dense(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, images: Tensor | None = None
    ) -> Tensor:
        """Return the mask of a group of documents as attention of transformers takes it.

        Args:
            shape: Number of documents, and their length.
            dtype: `torch.bool` for sdpa, the dtype of the scores for eager attention, which adds it to them.
            images: (documents, length), image of each patch, -1 for text; see `packed_attention`.

        Returns:
            (documents, 1, length, length): True or 0 where attention is allowed, False or the lowest number
            elsewhere.
        """
        position = torch.arange(shape[1], device=device)
        allowed = _allowed(position, position, self.window)
        if self.chunk is not None:
            chunk = position // self.chunk
            allowed &= chunk[:, None] == chunk[None]
        allowed = allowed[None, None] if images is None else _image_mask(images, allowed)
        mask = allowed
        if dtype != torch.bool:
            mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
            mask = mask.masked_fill(~allowed, torch.finfo(dtype).min)
        return mask.expand(shape[0], -1, -1, -1)


def packed_mask(
    batch_size: int,
    q_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> PackedMask:
    """Describe a mask of transformers (its mask interface) instead of building it.

    Raises:
        IsolationError: The batch is not packed, or attention is not causal.
    """
    if batch_size != 1 or (attention_mask is not None and not attention_mask.all()):
        raise IsolationError("packed attention requires a packed batch: one row, no attention_mask; use sdpa")

    def sees(distance: int) -> Tensor:
        """Return whether tokens see the one that many tokens before them, (q_length - distance,) bool."""
        query = torch.arange(max(distance, 0), q_length + min(distance, 0), device=device)
        zero = torch.zeros_like(query)
        return mask_function(zero, zero, query, query - distance)

    if use_vmap or sees(-1).any():
        raise IsolationError("packed attention is causal; this model's mask is not, use sdpa")
    if local_size is None:
        return PackedMask()
    if getattr(config, "attention_chunk_size", None) is None:  # also in a slice, shorter than its row
        return PackedMask(window=local_size)
    if q_length <= local_size:
        return PackedMask()
    # In a window, consecutive tokens can see as far back as it reaches; in a chunk, only its last token can.
    far = sees(local_size - 1)
    is_window = (far[1:] & far[:-1]).any()
    return PackedMask(window=local_size) if is_window else PackedMask(chunk=local_size)


def packed_attention(
    module: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PackedMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    image_index: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each document of a packed row (transformers' attention interface).

    Args:
        module: Attention layer; its `packed_row` replaces a missing `cu_seq_lens_q` or `image_index`.
        query: (1, num_heads, length, head_dim).
        key: (1, num_key_value_heads, length, head_dim).
        value: (1, num_key_value_heads, length, value_dim).
        attention_mask: Window or chunk, see `packed_mask`.
        scaling: Factor of the scores; default: 1 / sqrt(head_dim).
        dropout: Probability of dropping an attention weight.
        sliding_window: As `PackedMask.window`; the mask wins.
        softcap: Bound of the scores: softcap * tanh(scores / softcap).
        s_aux: (num_heads,), attention sinks: scores of a key without a value that every query sees.
        is_causal: Must not be False.
        cu_seq_lens_q: (documents + 1,) int32, cumulative document lengths.
        max_length_q: Length of the longest document.
        image_index: (1, length) int64, image of each patch, -1 for text: patches of an image attend to each
            other in both directions. None: purely causal.
        **kwargs: Other arguments of the interface that do not change attention, or are None.

    Returns:
        Attention output (1, length, num_heads, value_dim), and None in place of the attention weights.

    Raises:
        IsolationError: The batch is not packed, or an argument is unknown: ignoring it could be wrong.
    """
    if unknown := sorted(name for name in kwargs.keys() - _HARMLESS if kwargs[name] is not None):
        raise IsolationError(
            f"packed attention does not know the argument {unknown[0]} of this model's attention"
        )
    if is_causal is False:
        raise IsolationError("packed attention is causal; this model asks for is_causal = False")
    row = getattr(module, "packed_row", None)
    bounds = cu_seq_lens_q if cu_seq_lens_q is not None or row is None else row.bounds
    image_index = image_index if image_index is not None or row is None else row.images
    is_dense = isinstance(attention_mask, Tensor)
    if bounds is None or is_dense or query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise IsolationError(
            "packed attention requires a packed batch: cu_seq_lens_q, no attention_mask; use sdpa"
        )
    if attention_mask is None:
        attention_mask = PackedMask(window=sliding_window)
    window, chunk = attention_mask.window, attention_mask.chunk
    if image_index is not None and chunk is not None:
        raise IsolationError("bidirectional attention within images does not work with chunked attention")
    if chunk is not None:
        bounds, max_length_q = split_documents(bounds, chunk), min(chunk, max_length_q or chunk)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # (length, heads, d)
    images = image_index[0] if image_index is not None else None
    attend = partial(_attend, bounds, max_length_q, scaling, dropout, window, softcap, images)
    if row is not None and row.attend_across is not None:
        return row.attend_across(attend, q, k, v, s_aux)[None], None
    return attend(q, k, v, s_aux)[None], None


def _attend(
    bounds: Tensor,
    longest: int | None,
    scaling: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    images: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
) -> Tensor:
    """Return (length, num_heads, value_dim), see `packed_attention`; states are (length, heads, dim)."""
    q, k, v = query, key, value
    if softcap is not None:
        return _capped(q, k, v, bounds.long(), scaling, dropout, window, softcap, sinks, images)
    if sinks is not None:
        q, k, v, bounds, places = _prepend_sinks(q, k, v, bounds, sinks, scaling)
        longest = longest + 1 if longest else None
        if images is not None:
            images = images.new_full((len(q),), -1).index_copy(0, places, images)
    width = max(q.shape[-1], v.shape[-1])  # latent attention has other values than queries; kernels do not
    q, k, v = (F.pad(states, (0, width - states.shape[-1])) for states in (q, k, v))
    is_sunk_window = sinks is not None and window is not None
    if images is None and not dropout and not is_sunk_window and _supports_flash(q):
        attended = _flash(q, k, v, bounds.int(), longest, scaling, window)
    elif images is not None and not dropout and _merges_images(q, bounds, window):
        q, k, v = (part.to(_compute_dtype(q)) for part in (q, k, v))
        attended = attend_with_images(q, k, v, bounds.long(), images, scaling)
    else:
        sees_first = sinks is not None
        attended = _grouped(q, k, v, bounds.long(), scaling, dropout, window, images, sees_first)
    if sinks is not None:
        attended = attended[places]
    return attended[..., : value.shape[-1]]


def _merges_images(query: Tensor, bounds: Tensor, window: int | None) -> bool:
    """Return whether `attend_with_images` can compute a row: no window hides part of a document."""
    if window is not None and int(bounds.diff().max()) > window:
        return False
    if query.device.type == "cpu":
        return True
    return _supports_flash(query) and flash_is_exact(query.device, _compute_dtype(query), query.shape[-1])


def _supports_flash(query: Tensor) -> bool:
    """Return whether torch's flash attention supports a query's device, head_dim and dtype (not float32).

    On the meta device, what layers keep is measured (`estimate/activations.py`): as fused kernels do it.
    """
    head_dim = query.shape[-1]
    if query.device.type == "meta":
        return True
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
    scaling: float,
    dropout: float,
    window: int | None,
    images: Tensor | None,
    sees_first: bool,
) -> Tensor:
    """Return (length, num_heads, head_dim) by SDPA over batches of documents of similar length.

    Args:
        sees_first: Whether every query sees the first token of its document, a sink.
    """
    outputs, positions = [], []
    bfloat16_on_cpu = query.device.type == "cpu" and _compute_dtype(query) == torch.bfloat16
    for index, valid in document_groups(bounds):
        mask = _window_mask(index.shape[1], window, query.device)
        if mask is not None and sees_first:
            mask[:, 0] = True
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


def _prepend_sinks(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, sinks: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Give each document a first token whose score is the sink of the head, and whose value is zero.

    Any causal kernel then computes attention with sinks, and their gradients. A further feature of queries
    holds the sink, and only the first key has that feature.

    Returns:
        Queries, keys and values with (length + documents) tokens, their bounds, and the places of the
        original tokens among them.
    """
    length, documents = len(query), len(bounds) - 1
    document = torch.bucketize(torch.arange(length, device=query.device), bounds[1:], right=True)
    places = torch.arange(1, length + 1, device=query.device) + document
    heads = sinks.to(query.dtype).expand(length, -1)[..., None]  # (length, num_heads, 1)
    query = F.pad(torch.cat([query, heads], -1), (0, _SINK_SIZE - 1))
    key = F.pad(key, (0, _SINK_SIZE))
    first = F.pad(
        key.new_full((*key.shape[1:-1], 1), 1 / scaling), (key.shape[-1] - _SINK_SIZE, _SINK_SIZE - 1)
    )
    rows = [states.new_zeros(length + documents, *states.shape[1:]) for states in (query, key, value)]
    rows[1] = rows[1] + first
    query, key, value = (
        row.index_copy(0, places, own) for row, own in zip(rows, (query, key, value), strict=True)
    )
    return query, key, value, bounds + torch.arange(documents + 1, device=bounds.device), places


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    scaling: float,
    dropout: float,
    window: int | None,
    softcap: float,
    sinks: Tensor | None,
    images: Tensor | None,
) -> Tensor:
    """Return (length, num_heads, value_dim) by attention with capped scores, which no fused kernel computes.

    A limited number of scores exists at a time; the backward pass computes them again.
    """
    outputs, positions = [], []
    repeats = query.shape[1] // key.shape[1]
    for index, valid in document_groups(bounds):
        k, v = (states[index].transpose(1, 2).repeat_interleave(repeats, 1) for states in (key, value))
        position = torch.arange(index.shape[1], device=query.device)
        step = max(1, _SCORES // (k.shape[0] * k.shape[1] * k.shape[2]))
        parts = []
        for first in range(0, len(position), step):
            part = position[first : first + step]
            end = first + len(part)
            start = 0 if window is None else max(0, first + 1 - window)
            shown = None
            if images is not None:  # which can reach beyond, and behind a window
                start, end = 0, len(position)
                shown = (images[index[:, part]], images[index])
            states = (query[index[:, part]].transpose(1, 2), k[:, :, start:end], v[:, :, start:end])
            options = (part, position[start:end], window, scaling, dropout, softcap, sinks, shown)
            parts.append(checkpoint(_capped_part, *states, *options, use_reentrant=False))
        outputs.append(torch.cat(parts, 2).transpose(1, 2)[valid])
        positions.append(index[valid])
    return torch.cat(outputs)[torch.cat(positions).argsort()]


def _capped_part(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    window: int | None,
    scaling: float,
    dropout: float,
    softcap: float,
    sinks: Tensor | None,
    images: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Return (documents, num_heads, queries, value_dim) for some queries and the keys they can see."""
    scores = torch.tanh(query @ key.transpose(-1, -2) * scaling / softcap) * softcap
    allowed = _allowed(query_position, key_position, window)
    if images is not None:
        of_queries, of_keys = images[0][:, None, :, None], images[1][:, None, None, :]
        allowed = allowed | (of_queries == of_keys) & (of_queries >= 0)
    scores = scores.float().masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return F.dropout(weights, dropout).to(value.dtype) @ value


def _compute_dtype(states: Tensor) -> torch.dtype:
    """Return the dtype SDPA casts to; under autocast, rotary embeddings leave queries in float32."""
    device = states.device.type
    if device == "meta":  # which has no autocast
        return states.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _allowed(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Return a (queries, keys) bool mask of positions, True where attention is allowed."""
    distance = query[:, None] - key[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return a (length, length) bool mask, True where attention is allowed; None if causality suffices."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    return _allowed(position, position, window)


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
