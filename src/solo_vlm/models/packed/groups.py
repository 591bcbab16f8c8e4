"""Groups of documents of similar length, cut out of a packed row to be computed as one batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from solo_vlm.utils.errors import SoloError

_SHORT = 256  # tokens; longer documents do not benefit from batching


class IsolationError(SoloError, ValueError):
    """The documents of a packed row cannot be kept apart."""


def document_groups(bounds: Tensor, pad: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
    """Group documents of similar length; yield (documents, longest) token indices and their validity.

    One call for many short documents saves most of the time on CPU. Lengths in a group differ by less than a
    factor of two; padding follows a document's own tokens, where causality hides it. Long documents are
    separate groups.

    Args:
        bounds: (documents + 1,) int64, cumulative document lengths.
        pad: Whether documents of a group may differ in length.
    """
    starts, lengths = bounds[:-1], bounds.diff()
    group = torch.log2(lengths.double()).ceil() if pad else lengths.double()
    is_long = lengths > _SHORT
    group[is_long] = -1.0 - torch.arange(int(is_long.sum()), dtype=group.dtype, device=bounds.device)
    for number in group.unique():
        members = group == number
        offset = torch.arange(int(lengths[members].max()), device=bounds.device)
        valid = offset < lengths[members, None]  # (documents, longest)
        index = (starts[members, None] + offset).clamp(max=int(bounds[-1]) - 1)
        yield index, valid


def split_documents(bounds: Tensor, size: int) -> Tensor:
    """Return the bounds of the chunks of documents: `size` tokens, the last of each document fewer."""
    chunks = (bounds.diff() + size - 1) // size
    first = torch.repeat_interleave(chunks.cumsum(0) - chunks, chunks)  # number of a document's first chunk
    offset = (torch.arange(len(first), device=bounds.device) - first) * size
    starts = torch.repeat_interleave(bounds[:-1], chunks) + offset
    return torch.cat([starts, bounds[-1:]]).to(bounds.dtype)
