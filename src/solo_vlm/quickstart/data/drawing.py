"""A page of square cells and what can be drawn in one: a shape, a letter, a bar."""

from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .vocabulary import COLOURS

PATCH = 32  # pixels: one cell of a page becomes one patch of the model
TALLEST_BAR = 5
_OVERSAMPLING = 4
_SHADE = 12  # greatest change of a colour channel from one drawing to the next
_INK = (30, 30, 40)

RGB = tuple[int, int, int]


class Page:
    """A light page of `rows` x `columns` cells; `image` is RGB uint8.

    A cell is PATCH pixels wide, or in one page out of four a little less, so that the page must be
    resized (with its aspect kept) to fill whole patches.
    """

    def __init__(self, rng: np.random.Generator, rows: int, columns: int) -> None:
        self.rng = rng
        self.cell = int(rng.integers(PATCH - 4, PATCH)) if rng.random() < 0.25 else PATCH
        red, green, blue = rng.integers(236, 256, size=3).tolist()
        self.background: RGB = (red, green, blue)
        self.image = Image.new("RGB", (columns * self.cell, rows * self.cell), self.background)

    def shape(self, shape: str, colour: str, row: int, column: int) -> None:
        """Draws a shape, two thirds to five sixths of a cell wide, near the middle of a cell."""
        size = int(self.rng.integers(self.cell * 2 // 3, self.cell * 5 // 6 + 1))
        slack = (self.cell - size) // 2
        reach = min(slack, 2)
        dx, dy = self.rng.integers(-reach, reach + 1, size=2).tolist()
        corner = (column * self.cell + slack + dx, row * self.cell + slack + dy)
        self.image.paste(self._shade(COLOURS[colour]), corner, shape_mask(shape, size))

    def letters(self, word: str, row: int = 0) -> None:
        """Writes a word on one base line, a letter to a cell."""
        colour = self._shade(_INK)
        size = int(self.rng.integers(self.cell * 3 // 4, self.cell * 7 // 8 + 1))
        lift = int(self.rng.integers(-1, 2))
        for column, letter in enumerate(word):
            dx = int(self.rng.integers(-1, 2))
            corner = (column * self.cell + dx, row * self.cell + lift)
            self.image.paste(colour, corner, letter_mask(letter, size, self.cell))

    def bars(self, heights: list[tuple[str, int]]) -> None:
        """Draws one bar to a column, (colour, 1 to TALLEST_BAR), over faint lines at each unit."""
        draw = ImageDraw.Draw(self.image)
        right, bottom = self.image.width - 1, self.image.height - 2
        unit = bottom / (TALLEST_BAR + 0.25)
        line: RGB = tuple(channel - 22 for channel in self.background)  # type: ignore[assignment]
        for step in range(1, TALLEST_BAR + 1):
            y = round(bottom - step * unit)
            draw.line((0, y, right, y), fill=line)
        width = int(self.rng.integers(self.cell // 2, self.cell * 3 // 4 + 1))
        for column, (colour, height) in enumerate(heights):
            x = column * self.cell + (self.cell - width) // 2 + int(self.rng.integers(-1, 2))
            box = (x, round(bottom - height * unit), x + width - 1, bottom)
            draw.rectangle(box, fill=self._shade(COLOURS[colour]))
        draw.line((0, bottom + 1, right, bottom + 1), fill=_INK)

    def _shade(self, colour: RGB) -> RGB:
        change = self.rng.integers(-_SHADE, _SHADE + 1, size=3)
        red, green, blue = np.clip(np.add(colour, change), 0, 255).tolist()
        return red, green, blue


@cache
def shape_mask(shape: str, size: int) -> Image.Image:
    """How much of each pixel a shape covers: an "L" image of `size` x `size` pixels."""
    large = size * _OVERSAMPLING
    mask = Image.new("L", (large, large))
    draw = ImageDraw.Draw(mask)
    end = large - 1
    if shape == "circle":
        draw.ellipse((0, 0, end, end), fill=255)
    elif shape == "square":
        inset = large // 16  # about the area of the circle
        draw.rectangle((inset, inset, end - inset, end - inset), fill=255)
    elif shape == "triangle":
        draw.polygon(((end / 2, 0), (end, end), (0, end)), fill=255)
    elif shape == "cross":
        near, far = large * 0.34, large * 0.66
        draw.rectangle((near, 0, far, end), fill=255)
        draw.rectangle((0, near, end, far), fill=255)
    elif shape == "ring":
        hole = large * 0.26
        draw.ellipse((0, 0, end, end), fill=255)
        draw.ellipse((hole, hole, end - hole, end - hole), fill=0)
    else:
        raise ValueError(f"no such shape: {shape!r}")
    return mask.reduce(_OVERSAMPLING)


@cache
def letter_mask(letter: str, size: int, cell: int) -> Image.Image:
    """How much of each pixel of a cell a letter covers: "L", `cell` x `cell` pixels."""
    mask = Image.new("L", (cell, cell))
    base_line = cell * 0.72  # leaves room for the tails of g, j, p and y
    font = _font(size)
    ImageDraw.Draw(mask).text((cell / 2, base_line), letter, fill=255, font=font, anchor="ms")
    return mask


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
