"""What SOLO costs in FLOPs, beside LLaVA with the same decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from solo_vlm.experiments.scaling.llava import ClipShape, LlavaFlops, LlavaShape
from solo_vlm.models.flops import Flops, ModelShape, forward_flops, image_flops, text_flops
from solo_vlm.models.solo.image_processing_solo import patch_grid
from solo_vlm.models.solo.processing_solo import num_image_tokens

IMAGE_SIZES = ((336, 336), (512, 384), (1024, 768), (1024, 1024))
LENGTHS = (2048, 8192, 32768)


@dataclass(frozen=True)
class SequenceCost:
    """A document of text, all of it supervised; the same for SOLO and LLaVA.

    Attributes:
        length: tokens.
        flops: of the forward pass.
    """

    length: int
    flops: Flops

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "length": self.length,
            "forward": self.flops.forward,
            "training": self.flops.training,
            "hardware_full_recompute": self.flops.hardware("full"),
            "attention_share": self.flops.attention / self.flops.forward,
            "forward_per_token": self.flops.forward / self.length,
            "training_per_token": self.flops.training / self.length,
            "parts": {part: flops for part, flops in asdict(self.flops).items() if part != "last"},
        }


@dataclass(frozen=True)
class ImageCost:
    """An image, and the text after it.

    Attributes:
        width, height: of the image in pixels.
        rows, columns: of its patches in SOLO.
        tokens: of the image in SOLO.
        solo: forward pass of the image alone.
        solo_document: of the image and the text.
        llava_tokens: of the image in LLaVA, which resizes it to its one size.
        llava: forward pass of the image alone.
        llava_document: of the image and the text.
    """

    width: int
    height: int
    rows: int
    columns: int
    tokens: int
    solo: Flops
    solo_document: Flops
    llava_tokens: int
    llava: LlavaFlops
    llava_document: LlavaFlops

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        solo, llava = self.solo, self.llava
        return {
            "width": self.width,
            "height": self.height,
            "rows": self.rows,
            "columns": self.columns,
            "solo": {
                "tokens": self.tokens,
                "forward": solo.forward,
                "patch_embedding": solo.patches,
                "decoder": solo.forward - solo.patches,
                "with_text_forward": self.solo_document.forward,
                "with_text_training": self.solo_document.training,
            },
            "llava": {
                "tokens": self.llava_tokens,
                "forward": llava.forward,
                "encoder": llava.encoder,
                "connector": llava.connector,
                "decoder": llava.decoder.forward,
                "with_text_forward": self.llava_document.forward,
                "with_text_training": self.llava_document.training,
            },
        }


@dataclass(frozen=True)
class Comparison:
    """A SOLO model beside LLaVA with CLIP-L/336 and the same decoder.

    Attributes:
        solo: shape of the SOLO model.
        llava: of LLaVA.
        text_tokens: after each image, supervised.
        sequences: of text alone.
        images: of several sizes.
    """

    solo: ModelShape
    llava: LlavaShape
    text_tokens: int
    sequences: list[SequenceCost]
    images: list[ImageCost]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        counts = self.solo.parameters
        return {
            "parameters": {
                "solo": counts.total,
                "llava": self.llava.parameters,
                "decoder": counts.total - counts.patch_embedding,
                "patch_embedding": counts.patch_embedding,
                "encoder": self.llava.encoder.parameters,
                "connector": self.llava.connector_parameters,
            },
            "text_tokens": self.text_tokens,
            "sequences": [sequence.as_dict() for sequence in self.sequences],
            "images": [image.as_dict() for image in self.images],
        }


def compare(
    config: Any,
    image_sizes: Sequence[tuple[int, int]] = IMAGE_SIZES,
    text_tokens: int = 256,
    lengths: Sequence[int] = LENGTHS,
) -> Comparison:
    """FLOPs of a SOLO model, and of LLaVA with its decoder.

    Args:
        config: a `SoloConfig`, or a decoder's: that of the SOLO model made of it, but for its new tokens.
        image_sizes: (width, height) in pixels.
        text_tokens: after each image, supervised.
        lengths: of text sequences.

    Raises:
        SoloError: the family of the decoder is not counted.
    """
    solo = ModelShape.of(config)
    side = getattr(config, "vision_patch_size", 32)
    solo = solo.with_patch(solo.patch or 3 * side**2)
    llava = LlavaShape(ClipShape(), solo.with_patch(0))
    return Comparison(
        solo=solo,
        llava=llava,
        text_tokens=text_tokens,
        sequences=[SequenceCost(length, text_flops(solo, length)) for length in lengths],
        images=[_image(solo, llava, side, size, text_tokens) for size in image_sizes],
    )


def _image(solo: ModelShape, llava: LlavaShape, side: int, size: tuple[int, int], text: int) -> ImageCost:
    width, height = size
    rows, columns = patch_grid(height, width, patch_size=side)
    tokens, llava_tokens = num_image_tokens(rows, columns), llava.encoder.patches
    return ImageCost(
        width=width,
        height=height,
        rows=rows,
        columns=columns,
        tokens=tokens,
        solo=image_flops(solo, rows, columns),
        solo_document=forward_flops(solo, [tokens + text], patches=rows * columns, predicted=text),
        llava_tokens=llava_tokens,
        llava=llava.flops([llava_tokens], images=1),
        llava_document=llava.flops([llava_tokens + text], images=1, predicted=text),
    )
