"""Attention that is causal over a document and bidirectional inside an image, without a dense mask.

A patch sees the tokens before it, itself, and the later patches of its image. The first two are plain causal
attention. The last is causal attention too, over the patches of an image in reverse order: the one before the
last sees the last, and so on. The two results are merged by the logarithms of their softmax denominators, and
the gradient of each part follows from the merged result, as in ring attention (Liu et al. 2023, "Ring
Attention with Blockwise Transformers"; Dao et al. 2022, "FlashAttention", appendix B).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from solo_vlm.models.packed.groups import document_groups

logger = logging.getLogger(__name__)

_TOLERANCE = 0.02  # of values of size 1 in half precision


@dataclass(frozen=True)
class Part:
    """Causal attention of some tokens of a row to others, in segments of equal numbers of both.

    Attributes:
        queries: (n,) int64, indices of the querying tokens, segment by segment.
        keys: (n,) int64, indices of the tokens that they see: the i-th of a segment sees its first i + 1.
        bounds: (segments + 1,) int64, cumulative lengths of the segments.
    """

    queries: Tensor
    keys: Tensor
    bounds: Tensor


def later_patches(images: Tensor) -> Part:
    """Return the part of attention that reaches later patches of the same image.

    Args:
        images: (length,) int64, image of each patch, -1 for other tokens.
    """
    patches = (images >= 0).nonzero()[:, 0].flip(0)  # in reverse, images too
    own = images[patches]
    follows = own[1:] == own[:-1]  # not the last patch of its image
    lengths = torch.unique_consecutive(own[1:][follows], return_counts=True)[1]
    return Part(patches[1:][follows], patches[:-1][follows], F.pad(lengths.cumsum(0), (1, 0)))


def attend_with_images(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, images: Tensor, scaling: float
) -> Tensor:
    """Compute attention over a packed row of documents with images.

    Args:
        query: (length, num_heads, head_dim).
        key: (length, num_key_value_heads, head_dim).
        value: As `key`.
        bounds: (documents + 1,) int64, cumulative document lengths.
        images: (length,) int64, image of each patch, -1 for other tokens; none lies in two documents.
        scaling: Factor of the scores.

    Returns:
        (length, num_heads, head_dim).
    """
    everything = torch.arange(len(images), device=images.device)
    parts = [Part(everything, everything, bounds), later_patches(images)]
    attended: Tensor = _Merged.apply(query, key, value, parts, scaling)
    return attended


class _Merged(torch.autograd.Function):
    """Attention over the union of disjoint parts, the first of which has every token as a query."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: list[Part], scaling: float
    ) -> Tensor:
        attend = _attend_flash if query.is_cuda else _attend
        parts = [part for part in parts if len(part.queries)]
        output, total = attend(*_gathered(query, key, value, parts[0]), parts[0].bounds, scaling)
        for part in parts[1:]:
            more, log_sum = attend(*_gathered(query, key, value, part), part.bounds, scaling)
            before = total[part.queries]
            after = torch.logaddexp(before, log_sum)
            share = (log_sum - after).exp()[..., None]
            kept = output[part.queries]
            output[part.queries] = torch.lerp(kept.to(share), more.to(share), share).to(output.dtype)
            total[part.queries] = after
        ctx.save_for_backward(query, key, value, output, total)
        ctx.parts, ctx.scaling = parts, scaling
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, total = ctx.saved_tensors
        gradients = [torch.zeros_like(states) for states in (query, key, value)]
        attend_backward = _attend_flash_backward if query.is_cuda else _attend_backward
        for part in ctx.parts:
            rows, states = part.queries, _gathered(query, key, value, part)
            of_part = attend_backward(
                gradient[rows], *states, output[rows], total[rows], part.bounds, ctx.scaling
            )
            for sums, more, index in zip(
                gradients, of_part, (part.queries, part.keys, part.keys), strict=True
            ):
                sums.index_add_(0, index, more.to(sums.dtype))
        return (*gradients, None, None)


def _gathered(query: Tensor, key: Tensor, value: Tensor, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    return query[part.queries], key[part.keys], value[part.keys]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return attention within segments, (n, num_heads, head_dim), and its log-sum-exp, (n, num_heads)."""
    output = torch.empty_like(query)
    log_sum = output.new_empty(output.shape[:2], dtype=torch.promote_types(output.dtype, torch.float32))
    for index, valid in document_groups(bounds):
        attended, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_batch(query, key, value, index), 0.0, True, scale=scaling
        )
        output[index[valid]] = attended.transpose(1, 2)[valid]
        log_sum[index[valid]] = sums.transpose(1, 2)[valid].to(log_sum.dtype)
    return output, log_sum


def _attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    total: Tensor,
    bounds: Tensor,
    scaling: float,
) -> list[Tensor]:
    """Return the gradients of the queries, keys and values, given those of the merged output."""
    gradients = [torch.empty_like(states) for states in (query, key, value)]
    for index, valid in document_groups(bounds):
        # Padding has no weights: those by the sum of a token of another document could be infinite.
        sums = total[index].masked_fill(~valid[..., None], torch.inf)
        of_batch = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient[index].transpose(1, 2),
            *_batch(query, key, value, index),
            output[index].transpose(1, 2),
            sums.transpose(1, 2).contiguous(),
            0.0,
            True,
            scale=scaling,
        )
        for target, states in zip(gradients, of_batch, strict=True):
            own = states.unflatten(1, (target.shape[1], -1)).sum(2)  # (segments, own heads, longest, d)
            target[index[valid]] = own.transpose(1, 2)[valid]
    return gradients


def _batch(query: Tensor, key: Tensor, value: Tensor, index: Tensor) -> list[Tensor]:
    """Return (segments, num_heads, longest, head_dim) states; keys and values repeated for all heads."""
    repeats = query.shape[1] // key.shape[1]
    keys = [states[index].transpose(1, 2).repeat_interleave(repeats, 1) for states in (key, value)]
    return [query[index].transpose(1, 2), *keys]


def _attend_flash(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """See `_attend`; by variable-length flash attention on CUDA."""
    output, log_sum, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, *_segments(bounds), False, scale=scaling
    )
    return output, log_sum.transpose(0, 1)


def _attend_flash_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    total: Tensor,
    bounds: Tensor,
    scaling: float,
) -> list[Tensor]:
    """See `_attend_backward`."""
    unused = torch.empty(2, dtype=torch.uint64, device=query.device)  # the random state of dropout
    log_sum = total.transpose(0, 1).contiguous()
    states = (gradient, query, key, value, output, log_sum)
    return list(
        torch.ops.aten._flash_attention_backward(*states, *_segments(bounds), unused, unused, scale=scaling)
    )


def _segments(bounds: Tensor) -> tuple[Any, ...]:
    """Return the arguments of flash attention for causal segments without dropout."""
    longest = int(bounds.diff().max())
    return bounds.int(), bounds.int(), longest, longest, 0.0, True


@cache
def flash_is_exact(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether flash attention on a CUDA device equals a dense mask, in value and gradient.

    The kernels are internal to torch, so a small row is tried before they are used.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.full((96,), -1)
    images[5:30], images[40:70] = 0, 1
    states = [torch.randn(96, 2, head_dim, generator=generator) for _ in range(4)]
    outcomes = []
    try:
        for where, precision in ((torch.device("cpu"), torch.float64), (device, dtype)):
            q, k, v, weight = (part.to(where, precision).requires_grad_() for part in states)
            bounds = torch.tensor([0, 35, 96], device=where)
            output = attend_with_images(q, k, v, bounds, images.to(where), head_dim**-0.5)
            gradients = torch.autograd.grad((output * weight).sum(), (q, k, v))
            outcomes.append([part.detach().cpu().double() for part in (output, *gradients)])
    except (RuntimeError, TypeError) as error:
        logger.warning("flash attention for images is not available, using dense masks: %s", error)
        return False
    worst = max(float((one - other).abs().max()) for one, other in zip(*outcomes, strict=True))
    if worst > _TOLERANCE * 4:  # gradients reach sizes of 4
        logger.warning("flash attention for images differs by %.2g, using dense masks", worst)
        return False
    return True
