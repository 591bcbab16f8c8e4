"""Inspection of an image as the model sees it: size in patches and tokens, and a picture of the grid."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from PIL import Image, ImageDraw

from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor
from solo_vlm.models.solo.processing_solo import num_image_tokens

_LINE = (255, 64, 64)


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
