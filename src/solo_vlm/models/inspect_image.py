"""What the model sees of an image: the resized picture, cut into patches, and its tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from PIL import Image, ImageDraw

from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor
from solo_vlm.models.solo.processing_solo import num_image_tokens

_LINE = (255, 64, 64)


@dataclass(frozen=True)
class ImageLayout:
    """Sizes in pixels (width, height), and the tokens of an image."""

    original: tuple[int, int]
    resized: tuple[int, int]
    rows: int
    columns: int

    @property
    def patches(self) -> int:
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        """`<vision>`, patches, `<vrow_sep>` between rows, `</vision>`."""
        return num_image_tokens(self.rows, self.columns)

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return {**asdict(self), "patches": self.patches, "tokens": self.tokens, "layout": self.describe()}

    def describe(self) -> str:
        """The token layout in one line."""
        row = f"{self.columns} x <vpatch>"
        if self.rows == 1:
            return f"<vision> {row} </vision>"
        return f"<vision> {row} ({self.rows - 1} x: <vrow_sep> {row}) </vision>"


def image_layout(image: Image.Image, image_processor: SoloImageProcessor) -> ImageLayout:
    """How an image enters the model."""
    rows, columns = image_processor.get_patch_grid(image.height, image.width)
    side = image_processor.patch_size
    return ImageLayout(image.size, (columns * side, rows * side), rows, columns)


def draw_patch_grid(image: Image.Image, image_processor: SoloImageProcessor) -> Image.Image:
    """The resized image with the borders of its patches; small ones are enlarged to be seen."""
    layout = image_layout(image, image_processor)
    seen = image.resize(layout.resized, Image.Resampling.BILINEAR)
    return draw_grid(seen, layout.rows, layout.columns)


def draw_grid(seen: Image.Image, rows: int, columns: int) -> Image.Image:
    """An image that is resized already, with the borders of its patches."""
    zoom = max(1, 512 // max(seen.size))
    side = seen.width // columns * zoom
    picture = seen.resize((columns * side + 1, rows * side + 1), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for column in range(columns + 1):
        draw.line([(column * side, 0), (column * side, picture.height)], fill=_LINE)
    for row in range(rows + 1):
        draw.line([(0, row * side), (picture.width, row * side)], fill=_LINE)
    return picture
