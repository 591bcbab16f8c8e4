"""Inspection of an image as the model sees it: patches, tokens, positions, and what a patch attends to."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from PIL import Image, ImageDraw, ImageEnhance

from solo_vlm.models.solo.configuration_solo import SoloConfig
from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor
from solo_vlm.models.solo.positions_solo import image_layout
from solo_vlm.models.solo.processing_solo import num_image_tokens

_LINE = (255, 64, 64)
_CELL = 64  # pixels, room for three numbers
_DIMMED = 0.25  # brightness of patches that are not seen


@dataclass(frozen=True)
class ImageSummary:
    """Sizes and token counts of an image.

    Attributes:
        original: (width, height) of the image in pixels.
        resized: (width, height) in pixels after resizing.
        rows: Rows of patches.
        columns: Columns of patches.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    rows: int
    columns: int

    @property
    def patches(self) -> int:
        """Number of patches."""
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        """Number of tokens of the whole image layout."""
        return num_image_tokens(self.rows, self.columns)

    def as_dict(self) -> dict[str, object]:
        """Return all values for JSON."""
        return {**asdict(self), "patches": self.patches, "tokens": self.tokens, "layout": self.describe()}

    def describe(self) -> str:
        """Return the token layout in one line."""
        row = f"{self.columns} x <vpatch>"
        if self.rows == 1:
            return f"<vision> {row} </vision>"
        return f"<vision> {row} ({self.rows - 1} x: <vrow_sep> {row}) </vision>"


def summarize_image(image: Image.Image, image_processor: SoloImageProcessor) -> ImageSummary:
    """Return the sizes and token counts of an image."""
    rows, columns = image_processor.get_patch_grid(image.height, image.width)
    side = image_processor.patch_size
    return ImageSummary(image.size, (columns * side, rows * side), rows, columns)


def draw_patch_grid(image: Image.Image, image_processor: SoloImageProcessor) -> Image.Image:
    """Resize an image like the processor and draw its patch borders; small images are magnified."""
    layout = summarize_image(image, image_processor)
    resized = image.resize(layout.resized, Image.Resampling.BILINEAR)
    return draw_grid(resized, layout.rows, layout.columns)


def draw_grid(image: Image.Image, rows: int, columns: int) -> Image.Image:
    """Draw patch borders over an image that is already resized."""
    zoom = max(1, 512 // max(image.size))
    side = image.width // columns * zoom
    picture = image.resize((columns * side + 1, rows * side + 1), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for column in range(columns + 1):
        draw.line([(column * side, 0), (column * side, picture.height)], fill=_LINE)
    for row in range(rows + 1):
        draw.line([(0, row * side), (picture.width, row * side)], fill=_LINE)
    return picture


def draw_visibility(
    image: Image.Image, image_processor: SoloImageProcessor, config: SoloConfig
) -> Image.Image:
    """Draw what the middle patch of an image attends to, with the position of each patch.

    Patches that it does not see are dark. Positions are the index of the token, or text, row and column;
    `<vision>` has index 0. Layers with an attention window see less of a large image.
    """
    layout = summarize_image(image, image_processor)
    positions, places = _positions(layout, config)
    middle = layout.rows // 2 * layout.columns + layout.columns // 2
    size = layout.columns * _CELL, layout.rows * _CELL
    picture = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    dark = ImageEnhance.Brightness(picture).enhance(_DIMMED)
    draw = ImageDraw.Draw(picture)
    for patch, (position, place) in enumerate(zip(positions, places, strict=True)):
        row, column = divmod(patch, layout.columns)
        left, top = column * _CELL, row * _CELL
        box = (left, top, left + _CELL, top + _CELL)
        if config.image_attention == "causal" and place > places[middle]:
            picture.paste(dark.crop(box), box[:2])
        draw.rectangle(box, outline=_LINE, width=4 if patch == middle else 1)
        text = ", ".join(map(str, position))
        draw.text((left + 5, top + 4), text, fill="white", stroke_width=2, stroke_fill="black")
    return picture


def _positions(layout: ImageSummary, config: SoloConfig) -> tuple[list[tuple[int, ...]], list[int]]:
    """Return the position of each patch, and its index among the tokens of the image."""
    patch, start, separator, end = config.vision_token_ids
    tokens = [start]
    for row in range(layout.rows):
        tokens += [separator] * (row > 0) + [patch] * layout.columns
    places = [index for index, token in enumerate(tokens) if token == patch]
    if config.image_positions == "1d":
        return [(place,) for place in places], places
    shift, rows, columns = image_layout(torch.tensor([[*tokens, end]]), config.vision_token_ids)[
        1:, 0
    ].tolist()
    return [(place + shift[place], rows[place], columns[place]) for place in places], places
