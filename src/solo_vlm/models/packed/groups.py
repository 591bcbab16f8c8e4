"""Groups of documents of similar length, cut out of a packed row to be computed as one batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_SHORT = 256  # tokens; longer documents do not benefit from batching


def document_groups(bounds: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Group documents of similar length; yield (documents, longest) token indices and their validity.

    One call for many short documents saves most of the time on CPU. Lengths in a group differ by less than a
    factor of two; padding follows a document's own tokens, where causality hides it. Long documents are
    separate groups.
    """
    starts, lengths = bounds[:-1], bounds.diff()
    group = torch.log2(lengths.double()).ceil()
    is_long = lengths > _SHORT
    group[is_long] = -1.0 - torch.arange(int(is_long.sum()), dtype=group.dtype, device=bounds.device)
    for number in group.unique():
        members = group == number
        offset = torch.arange(int(lengths[members].max()), device=bounds.device)
        valid = offset < lengths[members, None]  # (documents, longest)
        index = (starts[members, None] + offset).clamp(max=int(bounds[-1]) - 1)
        yield index, valid
