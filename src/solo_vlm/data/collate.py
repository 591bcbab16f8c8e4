"""Collation of documents into one packed batch of fixed length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import get_worker_info

from solo_vlm.data.encode import IGNORE_INDEX, Document
from solo_vlm.models.solo.positions_solo import image_layout

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class PackedBatch(TypedDict):
    """Packed batch; every key is an argument of the model's `forward`.

    There is no `attention_mask`: documents are separated by `position_ids`, which restart with each one.
    """

    input_ids: Tensor  # (1, length) int64
    labels: Tensor  # (1, length) int64, -100 where not supervised
    position_ids: Tensor  # (1, length) int64, from 0 in every document
    pixel_values: Tensor  # (num_patches, 3 * patch_size**2) uint8; (0, 0) for a plain LLM
    image_grid_thw: Tensor  # (num_images, 3) int64
    cu_seq_lens_q: Tensor  # (num_documents + 1,) int32, boundaries of the documents, padding included
    cu_seq_lens_k: Tensor  # the same
    max_length_q: int  # length of the longest document
    max_length_k: int  # the same


def num_supervised_tokens(batches: Sequence[PackedBatch]) -> int:
    """Count tokens with a label; the first token of a row has none, because no token predicts it."""
    return sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)


def collate(
    documents: Sequence[Document], length: int, pad_token_id: int, patch_dim: int = 3072
) -> PackedBatch:
    """Concatenate documents into one row of exactly `length` tokens, padded without labels.

    Padding is a separate document, so no other document attends to it.

    Args:
        documents: Documents of the row, in order; an empty sequence gives a row of padding.
        length: Tokens per row.
        pad_token_id: Token ID of the padding.
        patch_dim: Width of `pixel_values` for a row without documents.

    Raises:
        ValueError: The documents do not fit into the row.
    """
    lengths = [len(document) for document in documents]
    padding = length - sum(lengths)
    if padding < 0:
        raise ValueError(f"documents of {sum(lengths)} tokens do not fit into {length}")
    if padding:
        lengths.append(padding)
    input_ids = np.full(length, pad_token_id, dtype=np.int64)
    labels = np.full(length, IGNORE_INDEX, dtype=np.int64)
    boundaries = np.cumsum([0, *lengths], dtype=np.int32)
    for document, start in zip(documents, boundaries, strict=False):
        input_ids[start : start + len(document)] = document.input_ids
        labels[start : start + len(document)] = document.labels
    position_ids = np.arange(length, dtype=np.int64) - np.repeat(boundaries[:-1], lengths)
    cu_seq_lens = torch.from_numpy(boundaries)
    patches = [document.pixel_values for document in documents] or [np.empty((0, patch_dim), np.uint8)]
    pixel_values = _new_patches(sum(map(len, patches)), patches[0].shape[1])
    np.concatenate(patches, out=pixel_values.numpy())
    grids = [document.image_grid_thw for document in documents] or [np.empty((0, 3), np.int64)]
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids)[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        pixel_values=pixel_values,
        image_grid_thw=torch.from_numpy(np.concatenate(grids)),
        cu_seq_lens_q=cu_seq_lens,
        cu_seq_lens_k=cu_seq_lens,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
    )


def _new_patches(count: int, dim: int) -> Tensor:
    """Return a new tensor (count, dim) uint8; in a worker, in the shared memory that takes it to training.

    Moving it there later would write each of its pages a second time.
    """
    if get_worker_info() is None:
        return torch.from_numpy(np.empty((count, dim), np.uint8))  # of huge pages, unlike torch's
    storage = torch.UntypedStorage._new_shared(count * dim)  # as torch's own collation does
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(count, dim)


def model_inputs(
    model: PreTrainedModel, batch: PackedBatch, index: int = 0, count: int = 1
) -> dict[str, Any]:
    """Move a batch to the model's device; a plain LLM does not get the (empty) image inputs.

    Routers of experts add no auxiliary loss here: transformers' would count padding as tokens.

    Args:
        index: Slice of the row to take, of `count` equal ones.
    """
    is_balanced = getattr(model.config.get_text_config(), "output_router_logits", False)
    options = {"output_router_logits": False} if is_balanced else {}
    images = ("pixel_values", "image_grid_thw")
    is_solo = model.config.model_type == "solo"
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if is_solo or name not in images}
    if count > 1:
        inputs = _slice(inputs, model.config, index, count)
    return options | {
        name: value.to(model.device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def _slice(inputs: dict[str, Any], config: PreTrainedConfig, index: int, count: int) -> dict[str, Any]:
    """Return the inputs of one of `count` equal slices of a row; documents and images may lie across cuts."""
    ids, positions = inputs["input_ids"], inputs["position_ids"]
    size = ids.shape[1] // count
    own = slice(index * size, (index + 1) * size)
    targets = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    parts = {"input_ids": ids, "position_ids": positions, "labels": inputs["labels"], "shift_labels": targets}
    inputs = inputs | {name: values[:, own] for name, values in parts.items()}
    if "pixel_values" in inputs:
        del inputs["image_grid_thw"]  # of whole images
        patches = (ids[0] == config.image_token_id).cumsum(0)
        first, last = (int(patches[end - 1]) if end else 0 for end in (own.start, own.stop))
        inputs["pixel_values"] = inputs["pixel_values"][first:last]
        if config.locates_images:
            layout = image_layout(ids, config.vision_token_ids, positions)
            inputs["layout"] = layout[..., own]
            if config.image_attention == "bidirectional":
                inputs["image_index"] = layout[0]
    return inputs
