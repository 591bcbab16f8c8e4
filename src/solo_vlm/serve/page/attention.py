"""Attention of an answer's tokens to the patches of the images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from solo_vlm.generate import GenerationPipeline
from solo_vlm.models.solo.modeling_solo import SoloForConditionalGeneration
from solo_vlm.serve.engine import INCOMPLETE, Prompt, merge_prompts

_ROWS = 32  # query tokens per pass, whose attention over all layers and heads is held in memory


class WordAttention:
    """Attention of a word in an answer. Caches the maps of the latest answer for its other words."""

    def __init__(self) -> None:
        self._key: tuple[bytes, ...] = ()
        self._maps: AttentionMaps | None = None

    def __call__(
        self,
        pipeline: GenerationPipeline,
        prompt: Prompt,
        answer: str,
        start: int,
        end: int,
        layer: int | None,
    ) -> dict[str, Any]:
        """Return how the steps that generated a word attended to each patch.

        Args:
            prompt: Chat that ends with the answer.
            start, end: Character range of the word in the answer.
            layer: Single layer; None averages over all.

        Returns:
            `images`: for each `rows`, `columns`, `weights` (rows * columns shares of the word's attention)
            and `share`, their sum. `text_share` is the rest.
        """
        key = (prompt.input_ids.tobytes(), *(image.digest for image in prompt.images))
        if self._maps is None or key != self._key:
            self._key, self._maps = key, attention_maps(pipeline.model, prompt)
        tokens = tokens_of_span(start, end, answer, self._maps.token_ids, pipeline.processor.tokenizer)
        images: list[dict[str, Any]] = [
            {
                "rows": len(weights),
                "columns": len(weights[0]),
                "weights": weights.ravel().tolist(),
                "share": float(weights.sum()),
            }
            for weights in self._maps.mean_over(tokens, layer)
        ]
        return {"images": images, "text_share": 1.0 - sum(image["share"] for image in images)}


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of each token of an answer to each patch, averaged over heads.

    The attention of a token is that of the step that generated it: the query is the token before.

    Attributes:
        token_ids: (num_tokens,) int64, the answer with its end token.
        weights: (num_layers, num_tokens, num_patches) float32. For one layer and token, the patches sum to at
            most 1; the rest is attention to text.
        grids: (num_images, 3) int64, each (1, rows, columns).
    """

    token_ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    grids: NDArray[np.int64]

    def mean_over(self, tokens: slice, layer: int | None = None) -> list[NDArray[np.float32]]:
        """Return one (rows, columns) map per image, averaged over tokens.

        `layer` selects a single layer; None averages over all.
        """
        layers = self.weights[:, tokens].mean(axis=1)  # (num_layers, num_patches)
        weights = layers.mean(axis=0) if layer is None else layers[layer]
        sizes = self.grids.prod(axis=1)
        images = np.split(weights, sizes.cumsum()[:-1]) if len(sizes) else []
        return [
            image.reshape(rows, columns) for image, (_, rows, columns) in zip(images, self.grids, strict=True)
        ]


@torch.inference_mode()
def attention_maps(model: SoloForConditionalGeneration, prompt: Prompt) -> AttentionMaps:
    """Compute how the last answer of a chat attended to the patches, in one more forward pass.

    The chat before the answer runs with the model's own attention implementation; only the answer runs with
    "eager", which returns its weights. So nothing quadratic in the prompt's length is held in memory.

    Args:
        prompt: Chat that ends with the assistant's turn.
    """
    start, end = last_answer(prompt.supervised)
    inputs = {name: value.to(model.device) for name, value in merge_prompts([prompt], 0).items()}
    del inputs["attention_mask"]
    ids = inputs.pop("input_ids")  # (1, length)
    is_patch = ids[0] == model.config.image_token_id
    cache = DynamicCache()  # at full length also where layers have sliding windows: columns stay in place
    model.model(input_ids=ids[:, : start - 1], past_key_values=cache, use_cache=True, **inputs)
    rows = []
    with _eager_attention(model):
        for first in range(start - 1, end - 1, _ROWS):
            last = min(first + _ROWS, end - 1)
            output = model.model(
                input_ids=ids[:, first:last], past_key_values=cache, use_cache=True, output_attentions=True
            )
            columns = is_patch[:last]
            layers = [layer[0].float().mean(0)[:, columns] for layer in output.attentions]
            rows.append(torch.stack(layers).cpu().numpy())  # (num_layers, rows, num_patches)
    grids = [image.image_grid_thw for image in prompt.images]
    return AttentionMaps(
        prompt.input_ids[start:end],
        np.concatenate(rows, axis=1),
        np.stack(grids) if grids else np.empty((0, 3), np.int64),
    )


def tokens_of_span(start: int, end: int, text: str, token_ids: NDArray[Any], tokenizer: Any) -> slice:
    """Return the tokens that spell `text[start:end]`, or a part of it.

    Args:
        start, end: Non-empty character range of the text.
        text: Text of the tokens, stripped of surrounding white space.
        token_ids: (num_tokens,) int64, the text and possibly special tokens after it.
    """
    read = [
        tokenizer.decode(token_ids[: count + 1], skip_special_tokens=True) for count in range(len(token_ids))
    ]
    # Templates and tokenizers may put white space before the text.
    offset = max(read[-1].find(text[:end]), 0)
    begun = [len(so_far) for so_far in read]
    complete = [len(so_far.rstrip(INCOMPLETE)) for so_far in read]
    return slice(_first_above(start + offset, begun), _first_above(end - 1 + offset, complete) + 1)


def _first_above(position: int, lengths: list[int]) -> int:
    """Return the first token after which the text is longer than a position; the last if none is."""
    return next((token for token, length in enumerate(lengths) if length > position), len(lengths) - 1)


def last_answer(supervised: NDArray[np.bool_]) -> tuple[int, int]:
    """Return start and end of the last run of supervised tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], supervised, [False]]).astype(np.int8)))
    return int(edges[-2]), int(edges[-1])


@contextmanager
def _eager_attention(model: SoloForConditionalGeneration) -> Iterator[None]:
    decoder = model.model.language_model  # its implementation may differ from the whole model's
    usual = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        decoder.set_attn_implementation(usual)
