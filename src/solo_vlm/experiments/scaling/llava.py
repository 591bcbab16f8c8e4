"""LLaVA, to compare with: a CLIP encoder and a connector of two layers before the decoder.

Source: Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning" (LLaVA-1.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from solo_vlm.models.flops import Flops, ModelShape, forward_flops


@dataclass(frozen=True)
class ClipShape:
    """A CLIP vision encoder. The defaults are ViT-L/14 at 336 pixels (Radford et al. 2021), LLaVA-1.5's.

    Attributes:
        image: side of its square images in pixels.
        patch: side of a patch.
        hidden: size of the hidden states.
        mlp: size inside the MLP.
        layers: their number; all are run, though LLaVA takes the output of the last but one.
    """

    image: int = 336
    patch: int = 14
    hidden: int = 1024
    mlp: int = 4096
    layers: int = 24

    @property
    def patches(self) -> int:
        """Patches of an image, and so the image tokens of LLaVA."""
        return (self.image // self.patch) ** 2

    @property
    def parameters(self) -> int:
        """Weights, biases, positions and norms."""
        positions = (self.patches + 1) * self.hidden
        embeddings = 3 * self.patch**2 * self.hidden + self.hidden + positions
        layer = self._layer_matrices + 9 * self.hidden + self.mlp  # biases, and two norms
        return embeddings + self.layers * layer + 4 * self.hidden  # and the norms before and after them

    @property
    def flops(self) -> int:
        """Of the encoder on one image: every token sees every other."""
        tokens = self.patches + 1  # and that of the class
        attention = 4 * self.hidden * tokens**2
        layers = self.layers * (2 * self._layer_matrices * tokens + attention)
        return 2 * 3 * self.patch**2 * self.hidden * self.patches + layers

    @property
    def _layer_matrices(self) -> int:
        return 4 * self.hidden**2 + 2 * self.hidden * self.mlp


@dataclass(frozen=True)
class LlavaFlops:
    """FLOPs of a forward pass, by part.

    Attributes:
        encoder: CLIP on all images.
        connector_first: the connector's first layer.
        connector_second: its second one.
        decoder: the language model on text and image tokens.
    """

    encoder: int
    connector_first: int
    connector_second: int
    decoder: Flops

    @property
    def connector(self) -> int:
        """Both layers."""
        return self.connector_first + self.connector_second

    @property
    def forward(self) -> int:
        """Of the forward pass."""
        return self.encoder + self.connector + self.decoder.forward

    @property
    def training(self) -> int:
        """Of forward and backward pass, the encoder frozen as in LLaVA; see `Flops.training`."""
        return self.encoder + 2 * self.connector_first + 3 * self.connector_second + self.decoder.training


@dataclass(frozen=True)
class LlavaShape:
    """Encoder, connector and decoder.

    Attributes:
        encoder: of images.
        decoder: without a patch embedding.
    """

    encoder: ClipShape
    decoder: ModelShape

    @property
    def connector_parameters(self) -> int:
        """Two linear layers with biases."""
        hidden = self.decoder.hidden
        return hidden * (self.encoder.hidden + hidden) + 2 * hidden

    @property
    def parameters(self) -> int:
        """Of all three."""
        return self.encoder.parameters + self.connector_parameters + self.decoder.parameters.total

    def flops(self, document_lengths: Any, images: int = 0, predicted: int = 0) -> LlavaFlops:
        """FLOPs of a forward pass over a packed batch.

        Args:
            document_lengths: (documents,) tokens of each, image tokens (`encoder.patches` an image) among
                them.
            images: in all documents.
            predicted: positions where the head is run.
        """
        tokens, hidden = images * self.encoder.patches, self.decoder.hidden
        return LlavaFlops(
            encoder=images * self.encoder.flops,
            connector_first=2 * tokens * self.encoder.hidden * hidden,
            connector_second=2 * tokens * hidden**2,
            decoder=forward_flops(self.decoder, document_lengths, predicted=predicted),
        )
