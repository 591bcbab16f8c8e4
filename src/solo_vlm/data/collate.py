"""Documents become one packed batch: concatenation, positions that restart, a fixed length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from solo_vlm.data.encode import IGNORE_INDEX, Document


class PackedBatch(TypedDict):
    """What a packed batch holds; every key is an argument of the model's `forward`.

    There is no `attention_mask`: `position_ids` that restart tell the documents apart.
    """

    input_ids: Tensor  # (1, length) int64
    labels: Tensor  # (1, length) int64, -100 where nothing is supervised
    position_ids: Tensor  # (1, length) int64, from 0 in every document
    pixel_values: Tensor  # (patches, 3072) uint8; (0, 0) for a model that reads text alone
    image_grid_thw: Tensor  # (images, 3) int64
    cu_seq_lens_q: Tensor  # (documents + 1,) int32, where documents begin and end
    cu_seq_lens_k: Tensor  # the same
    max_length_q: int  # length of the longest document
    max_length_k: int  # the same


def num_supervised_tokens(batches: Sequence[PackedBatch]) -> int:
    """Count tokens with a label; the first token of a row has none, because no token predicts it."""
    return sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)


def collate(
    documents: Sequence[Document], length: int, pad_token_id: int, patch_dim: int = 3072
) -> PackedBatch:
    """Concatenate documents into one row of exactly `length` tokens; the rest is padding without labels.

    Padding counts as a document of its own, so that no other sees it. No documents at all are padding alone.

    Args:
        documents: what goes into the row, in order.
        length: tokens of the row.
        pad_token_id: of the padding.
        patch_dim: width of `pixel_values` where there are no documents to tell it.

    Raises:
        ValueError: the documents are longer than `length` together.
    """
    lengths = [len(document) for document in documents]
    padding = length - sum(lengths)
    if padding < 0:
        raise ValueError(f"documents of {sum(lengths)} tokens do not fit into {length}")
    if padding:
        lengths.append(padding)
    input_ids = np.full(length, pad_token_id, dtype=np.int64)
    labels = np.full(length, IGNORE_INDEX, dtype=np.int64)
    ends = np.cumsum([0, *lengths], dtype=np.int32)
    for document, start in zip(documents, ends, strict=False):
        input_ids[start : start + len(document)] = document.input_ids
        labels[start : start + len(document)] = document.labels
    position_ids = np.arange(length, dtype=np.int64) - np.repeat(ends[:-1], lengths)
    cu_seq_lens = torch.from_numpy(ends)
    patches = [document.patches for document in documents] or [np.empty((0, patch_dim), np.uint8)]
    grids = [document.grids for document in documents] or [np.empty((0, 3), np.int64)]
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids)[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        pixel_values=torch.from_numpy(np.concatenate(patches)),
        image_grid_thw=torch.from_numpy(np.concatenate(grids)),
        cu_seq_lens_q=cu_seq_lens,
        cu_seq_lens_k=cu_seq_lens,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
    )
