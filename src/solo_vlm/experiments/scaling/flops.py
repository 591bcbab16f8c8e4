"""FLOPs and parameters of SOLO, next to LLaVA-1.5 with the same decoder.

LLaVA-1.5 has a CLIP encoder and a connector of two layers before the decoder (Liu et al. 2023, "Improved
Baselines with Visual Instruction Tuning").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel

from solo_vlm.models.flops import Flops, ModelShape, forward_flops, image_flops, text_flops
from solo_vlm.models.solo.image_processing_solo import patch_grid
from solo_vlm.models.solo.processing_solo import num_image_tokens

IMAGE_SIZES = ((336, 336), (512, 384), (1024, 768), (1024, 1024))
LENGTHS = (2048, 8192, 32768)


@dataclass(frozen=True)
class ClipShape:
    """A CLIP vision encoder; the defaults are LLaVA-1.5's ViT-L/14 at 336 pixels (Radford et al. 2021).

    Attributes:
        image: Edge of its square images in pixels.
        patch: Edge of a patch in pixels.
        hidden: Size of the hidden states.
        mlp: Width inside the MLP.
        layers: Number of layers. All of them run, although LLaVA uses the output of the second to last.
    """

    image: int = 336
    patch: int = 14
    hidden: int = 1024
    mlp: int = 4096
    layers: int = 24

    @property
    def patches(self) -> int:
        """Patches per image, which is LLaVA's number of image tokens."""
        return (self.image // self.patch) ** 2

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self._counts[0]

    @property
    def flops(self) -> int:
        """FLOPs of the forward pass on one image."""
        return self._counts[1]

    @cached_property
    def _counts(self) -> tuple[int, int]:
        """Parameters, and FLOPs per image, counted on the meta device."""
        config = CLIPVisionConfig(
            image_size=self.image,
            patch_size=self.patch,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=max(self.hidden // 64, 1),  # counts do not depend on it
        )
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model = CLIPVisionModel._from_config(config, attn_implementation="eager")
            model(torch.empty(1, 3, self.image, self.image))
        return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops()


@dataclass(frozen=True)
class LlavaFlops:
    """FLOPs of a forward pass of LLaVA: CLIP on all images, layers of the connector, decoder."""

    encoder: int
    connector_first: int
    connector_second: int
    decoder: Flops

    @property
    def connector(self) -> int:
        """Both layers of the connector."""
        return self.connector_first + self.connector_second

    @property
    def forward(self) -> int:
        """FLOPs of the forward pass."""
        return self.encoder + self.connector + self.decoder.forward

    @property
    def training(self) -> int:
        """FLOPs of forward and backward pass with a frozen encoder, as in LLaVA; see `Flops.training`."""
        return self.encoder + 2 * self.connector_first + 3 * self.connector_second + self.decoder.training


@dataclass(frozen=True)
class LlavaShape:
    """LLaVA: encoder, connector, and a decoder without patch embedding."""

    encoder: ClipShape
    decoder: ModelShape

    @property
    def connector_parameters(self) -> int:
        """Parameters of the connector: two linear layers with biases."""
        hidden = self.decoder.hidden
        return hidden * (self.encoder.hidden + hidden) + 2 * hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.encoder.parameters + self.connector_parameters + self.decoder.parameters.total

    def flops(self, document_lengths: Any, images: int = 0, predicted: int = 0) -> LlavaFlops:
        """Count the FLOPs of a forward pass over a packed batch.

        Args:
            document_lengths: Tokens of each document, (documents,), including `encoder.patches` image tokens
                per image.
            images: Number of images in all documents.
            predicted: Number of positions on which the head runs.
        """
        tokens, hidden = images * self.encoder.patches, self.decoder.hidden
        return LlavaFlops(
            encoder=images * self.encoder.flops,
            connector_first=2 * tokens * self.encoder.hidden * hidden,
            connector_second=2 * tokens * hidden**2,
            decoder=forward_flops(self.decoder, document_lengths, predicted=predicted),
        )


def compare(
    config: Any,
    image_sizes: Sequence[tuple[int, int]] = IMAGE_SIZES,
    text_tokens: int = 256,
    lengths: Sequence[int] = LENGTHS,
) -> dict[str, Any]:
    """Compare the FLOPs of a SOLO model with those of LLaVA with CLIP-L/336 and the same decoder.

    Args:
        config: `SoloConfig`, or the configuration of a decoder, which stands for the SOLO model made from it
            (without its new tokens).
        image_sizes: (width, height) in pixels.
        text_tokens: Number of supervised text tokens after each image.
        lengths: Lengths of text-only sequences, all supervised.

    Returns:
        Plain values, for JSON: `parameters`, `text_tokens`, `sequences` and `images`.
    """
    solo = ModelShape.of(config)
    side = getattr(config, "vision_patch_size", 32)
    solo = solo.with_patch(solo.patch or 3 * side**2)
    llava = LlavaShape(ClipShape(), solo.with_patch(0))
    counts = solo.parameters
    return {
        "parameters": {
            "solo": counts.total,
            "llava": llava.parameters,
            "decoder": counts.total - counts.patch_embedding,
            "patch_embedding": counts.patch_embedding,
            "encoder": llava.encoder.parameters,
            "connector": llava.connector_parameters,
        },
        "text_tokens": text_tokens,
        "sequences": [_sequence_cost(length, text_flops(solo, length)) for length in lengths],
        "images": [_image_cost(solo, llava, side, size, text_tokens) for size in image_sizes],
    }


def _sequence_cost(length: int, flops: Flops) -> dict[str, Any]:
    """Return the cost of a text document, which is the same for SOLO and LLaVA."""
    return {
        "length": length,
        "forward": flops.forward,
        "training": flops.training,
        "hardware_full_recompute": flops.hardware(recomputed=1),
        "attention_share": flops.attention / flops.forward,
        "forward_per_token": flops.forward / length,
        "training_per_token": flops.training / length,
        "parts": {part: value for part, value in asdict(flops).items() if part != "last"},
    }


def _image_cost(
    solo: ModelShape, llava: LlavaShape, side: int, size: tuple[int, int], text: int
) -> dict[str, Any]:
    """Return the cost of an image alone, and of a document of the image and text."""
    width, height = size
    rows, columns = patch_grid(height, width, patch_size=side)
    tokens, llava_tokens = num_image_tokens(rows, columns), llava.encoder.patches
    alone = image_flops(solo, rows, columns)
    document = forward_flops(solo, [tokens + text], patches=rows * columns, predicted=text)
    llava_alone = llava.flops([llava_tokens], images=1)
    llava_document = llava.flops([llava_tokens + text], images=1, predicted=text)
    return {
        "width": width,
        "height": height,
        "rows": rows,
        "columns": columns,
        "solo": {
            "tokens": tokens,
            "forward": alone.forward,
            "patch_embedding": alone.patches,
            "decoder": alone.forward - alone.patches,
            "with_text_forward": document.forward,
            "with_text_training": document.training,
        },
        "llava": {
            "tokens": llava_tokens,
            "forward": llava_alone.forward,
            "encoder": llava_alone.encoder,
            "connector": llava_alone.connector,
            "decoder": llava_alone.decoder.forward,
            "with_text_forward": llava_document.forward,
            "with_text_training": llava_document.training,
        },
    }
