"""Batches with one sample per row, padded to the longest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from solo_vlm.data.encode import IGNORE_INDEX

Item = TypeVar("Item")
Ids = NDArray[np.int64]


def in_batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def padded(rows: Sequence[tuple[Ids, Ids]]) -> dict[str, Tensor]:
    """Return right-padded token IDs and labels, (rows, longest), and the attention mask."""
    ids, labels = ([torch.from_numpy(values) for values in column] for column in zip(*rows, strict=True))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }
