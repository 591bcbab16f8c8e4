"""Floating-point operations of a packed batch, counted as they are needed: attention causally, no recompute.

A multiplication with an addition counts as two. What is counted is matrix products; norms, activations,
softmax and rotary embeddings are left out, as is usual (Hoffmann et al. 2022, appendix F; Chowdhery et al.
2022, appendix B) and as `torch.utils.flop_counter` does it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from solo_vlm.models.shape import ModelShape
from solo_vlm.models.solo.processing_solo import num_image_tokens

Lengths = Sequence[int] | NDArray[np.integer[Any]]
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward pass, by part.

    Attributes:
        projections: to queries, keys and values, and from their result, in all layers.
        mlp: in all layers.
        attention: scores, and sums of values weighted by them, of the pairs that causality, the borders of
            documents and the sliding window leave.
        patches: the patch embedding.
        head: of language modelling, where it is run.
    """

    projections: int
    mlp: int
    attention: int
    patches: int
    head: int

    def __add__(self, other: Flops) -> Flops:
        return Flops(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, other: Flops) -> Flops:
        return Flops(*map(operator.sub, astuple(self), astuple(other)))

    @property
    def layers(self) -> int:
        """Matrix products with the weights of the decoder's layers."""
        return self.projections + self.mlp

    @property
    def forward(self) -> int:
        """Of the forward pass."""
        return sum(astuple(self))

    @property
    def training(self) -> int:
        """Of forward and backward pass.

        The backward pass takes twice the forward pass: one product for the gradient of the weights, one for
        that of the inputs (Hoffmann et al. 2022, appendix F). Pixels need no gradient: the patch embedding
        takes one. This is the count that model FLOPs utilisation (MFU) is made of; what is computed again is
        no part of it (Chowdhery et al. 2022, appendix B).
        """
        return 3 * (self.layers + self.attention + self.head) + 2 * self.patches

    @property
    def training_frozen(self) -> int:
        """As `training`, where the decoder's weights and the head get no gradient, as under LoRA.

        Their inputs still do, for the sake of the patch embedding and the adapters; what the adapters
        themselves compute, about 1% at rank 16 in a 7B model, is left out.
        """
        return 2 * (self.layers + self.head + self.patches) + 3 * self.attention

    def hardware(self, recompute: Recompute = "none") -> int:
        """As `training`, with what activation checkpointing computes again.

        The chunked loss always computes the logits twice. Under "selective" the results of matrix products
        and of attention are kept, so nothing that is counted here is computed again. Under "full" all but
        the last product of each layer is: PyTorch stops where no result is needed any more.
        """
        again = self.layers + self.attention - self.mlp // 3 if recompute == "full" else 0
        return self.training + self.head + again


def forward_flops(
    shape: ModelShape, document_lengths: Lengths, patches: int = 0, predicted: int = 0
) -> Flops:
    """FLOPs of a packed batch.

    Args:
        shape: of the model.
        document_lengths: (documents,) tokens of each, text and vision alike.
        patches: image patches (`<vpatch>` tokens).
        predicted: positions where the head is run: in training those with a label.
    """
    lengths = np.asarray(document_lengths, np.int64)
    pairs = sum(count * _visible_pairs(lengths, window) for window, count in Counter(shape.windows).items())
    tokens = int(lengths.sum())
    return Flops(
        projections=2 * shape.layers * shape.projection_weights * tokens,
        mlp=2 * shape.layers * shape.mlp_weights * tokens,
        attention=4 * shape.query * pairs,
        patches=2 * shape.patch * shape.hidden * patches,
        head=2 * shape.hidden * shape.vocabulary * predicted,
    )


def training_flops(
    config: Any, document_lengths: Lengths, patches: int, supervised_tokens: int, frozen: bool = False
) -> int:
    """FLOPs of a training step on a packed batch, forward and backward (see `Flops.training`).

    Args:
        config: of transformers: a `SoloConfig`, or a decoder's.
        document_lengths: (documents,) tokens of each, text and vision alike.
        patches: image patches (`<vpatch>` tokens).
        supervised_tokens: positions with a label.
        frozen: whether the decoder's weights get no gradient (see `Flops.training_frozen`).

    Raises:
        SoloError: the family of the decoder is not one that is counted here.
    """
    flops = forward_flops(ModelShape.of(config), document_lengths, patches, supervised_tokens)
    return flops.training_frozen if frozen else flops.training


def image_flops(shape: ModelShape, rows: int, columns: int, before: int = 0) -> Flops:
    """FLOPs that an image adds to a document; the head is not run on it.

    Args:
        shape: of the model.
        rows: of patches.
        columns: of patches.
        before: tokens of the document before the image.
    """
    return _span(shape, num_image_tokens(rows, columns), before, patches=rows * columns)


def text_flops(shape: ModelShape, tokens: int, before: int = 0) -> Flops:
    """FLOPs that so many text tokens, all of them supervised, add to a document.

    Args:
        shape: of the model.
        tokens: their number.
        before: tokens of the document before them.
    """
    return _span(shape, tokens, before, predicted=tokens)


def _span(shape: ModelShape, tokens: int, before: int, patches: int = 0, predicted: int = 0) -> Flops:
    whole = forward_flops(shape, [before + tokens], patches, predicted)
    context = forward_flops(shape, [before])
    return whole - context


def _visible_pairs(lengths: NDArray[np.int64], window: int | None) -> int:
    """Sum over all positions of the tokens that a query there sees, itself included."""
    seen = lengths if window is None else np.minimum(lengths, window)
    return int((seen * (seen + 1) // 2 + (lengths - seen) * seen).sum())
