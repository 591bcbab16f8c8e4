"""Where an answer looked: the attention of its tokens to the patches of the images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from solo_vlm.data.encode import IGNORE_INDEX, Document
from solo_vlm.models.solo.modeling_solo import SoloForConditionalGeneration

_ROWS = 32  # attention of so many tokens is held at once, of all layers and heads


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of each token of an answer to each patch, averaged over heads.

    A token's attention is that of the step that chose it: the query stands at the token before.

    Attributes:
        token_ids: (tokens,) int64, of the answer, its end included.
        weights: (layers, tokens, patches) float32. Of one layer and token, all patches together have at most
            1; the rest went to text.
        grids: (images, 3) int64: 1, rows, columns.
    """

    token_ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    grids: NDArray[np.int64]

    def of(self, tokens: slice, layer: int | None = None) -> list[NDArray[np.float32]]:
        """One (rows, columns) map an image.

        Args:
            tokens: which of the answer; their mean is taken.
            layer: one of them; default: the mean of all.
        """
        layers = self.weights[:, tokens].mean(axis=1)  # (layers, patches)
        weights = layers.mean(axis=0) if layer is None else layers[layer]
        sizes = self.grids.prod(axis=1)
        images = np.split(weights, sizes.cumsum()[:-1]) if len(sizes) else []
        return [
            image.reshape(rows, columns) for image, (_, rows, columns) in zip(images, self.grids, strict=True)
        ]


@torch.inference_mode()
def attention_maps(model: SoloForConditionalGeneration, document: Document) -> AttentionMaps:
    """Read a chat once more and keep how its last answer attended to the patches.

    The prompt is read with the model's own attention, and only the answer with "eager", the one that returns
    its weights: no square of the prompt's length is ever held.

    Args:
        model: in evaluation mode.
        document: a chat that ends with the assistant's turn.
    """
    start, end = _last_answer(document)
    ids = torch.from_numpy(document.input_ids)[None].to(model.device)  # (1, length)
    is_patch = ids[0] == model.config.image_token_id
    cache = DynamicCache()  # without sliding windows' shorter memory, so that all columns stay in place
    vision: dict[str, Any] = {}
    if len(document.patches):
        vision = {
            "pixel_values": torch.from_numpy(document.patches).to(model.device),
            "image_grid_thw": torch.from_numpy(document.grids).to(model.device),
        }
    model.model(input_ids=ids[:, : start - 1], past_key_values=cache, use_cache=True, **vision)
    rows = []
    with _eager(model):
        for first in range(start - 1, end - 1, _ROWS):
            last = min(first + _ROWS, end - 1)
            output = model.model(
                input_ids=ids[:, first:last], past_key_values=cache, use_cache=True, output_attentions=True
            )
            columns = is_patch[:last]
            layers = [layer[0].float().mean(0)[:, columns] for layer in output.attentions]
            rows.append(torch.stack(layers).cpu().numpy())  # (layers, rows, patches)
    return AttentionMaps(document.input_ids[start:end], np.concatenate(rows, axis=1), document.grids)


def _last_answer(document: Document) -> tuple[int, int]:
    """Where the last run of supervised tokens begins and ends."""
    supervised = document.labels != IGNORE_INDEX
    edges = np.flatnonzero(np.diff(np.concatenate([[False], supervised, [False]]).astype(np.int8)))
    return int(edges[-2]), int(edges[-1])


@contextmanager
def _eager(model: SoloForConditionalGeneration) -> Iterator[None]:
    decoder = model.model.language_model  # its own way may differ from the whole model's
    usual = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        decoder.set_attn_implementation(usual)
