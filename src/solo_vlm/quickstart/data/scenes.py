"""Synthetic scenes and real handwritten digits, each with a caption, questions and answers."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .vocabulary import COLORS, LETTERS, NUMBERS, SHAPES, WORDS, plural, with_article

PATCH = 32  # pixels: one cell of a page becomes one patch of the model
TALLEST_BAR = 5
_OVERSAMPLING = 4
_SHADE = 12  # maximum jitter of a color channel
_INK = (30, 30, 40)

RGB = tuple[int, int, int]


class Page:
    """Light page of `rows` x `columns` cells; `image` is RGB uint8.

    Cells are PATCH pixels wide, and slightly smaller in one of four pages, which the processor must resize to
    whole patches.
    """

    def __init__(self, rng: np.random.Generator, rows: int, columns: int) -> None:
        self.rng = rng
        self.cell = int(rng.integers(PATCH - 4, PATCH)) if rng.random() < 0.25 else PATCH
        red, green, blue = rng.integers(236, 256, size=3).tolist()
        self.background: RGB = (red, green, blue)
        self.image = Image.new("RGB", (columns * self.cell, rows * self.cell), self.background)

    def shape(self, shape: str, color: str, row: int, column: int) -> None:
        """Draw a shape of two thirds to five sixths of a cell's width near the center of a cell."""
        size = int(self.rng.integers(self.cell * 2 // 3, self.cell * 5 // 6 + 1))
        slack = (self.cell - size) // 2
        reach = min(slack, 2)
        dx, dy = self.rng.integers(-reach, reach + 1, size=2).tolist()
        corner = (column * self.cell + slack + dx, row * self.cell + slack + dy)
        self.image.paste(self._shade(COLORS[color]), corner, shape_mask(shape, size))

    def letters(self, word: str, row: int = 0) -> None:
        """Write a word on one baseline, one letter per cell."""
        color = self._shade(_INK)
        size = int(self.rng.integers(self.cell * 3 // 4, self.cell * 7 // 8 + 1))
        lift = int(self.rng.integers(-1, 2))
        for column, letter in enumerate(word):
            dx = int(self.rng.integers(-1, 2))
            corner = (column * self.cell + dx, row * self.cell + lift)
            self.image.paste(color, corner, letter_mask(letter, size, self.cell))

    def bars(self, heights: list[tuple[str, int]]) -> None:
        """Draw one bar per column, (color, 1 to TALLEST_BAR), over faint lines at each unit."""
        draw = ImageDraw.Draw(self.image)
        right, bottom = self.image.width - 1, self.image.height - 2
        unit = bottom / (TALLEST_BAR + 0.25)
        line: RGB = tuple(channel - 22 for channel in self.background)  # type: ignore[assignment]
        for step in range(1, TALLEST_BAR + 1):
            y = round(bottom - step * unit)
            draw.line((0, y, right, y), fill=line)
        width = int(self.rng.integers(self.cell // 2, self.cell * 3 // 4 + 1))
        for column, (color, height) in enumerate(heights):
            x = column * self.cell + (self.cell - width) // 2 + int(self.rng.integers(-1, 2))
            box = (x, round(bottom - height * unit), x + width - 1, bottom)
            draw.rectangle(box, fill=self._shade(COLORS[color]))
        draw.line((0, bottom + 1, right, bottom + 1), fill=_INK)

    def _shade(self, color: RGB) -> RGB:
        change = self.rng.integers(-_SHADE, _SHADE + 1, size=3)
        red, green, blue = np.clip(np.add(color, change), 0, 255).tolist()
        return red, green, blue


@cache
def shape_mask(shape: str, size: int) -> Image.Image:
    """Return the coverage of each pixel by a shape, as an "L" image of `size` x `size` pixels."""
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
    """Return the coverage of each pixel by a letter, as an "L" image of `cell` x `cell` pixels."""
    mask = Image.new("L", (cell, cell))
    baseline = cell * 0.72  # leaves room for the descenders of g, j, p and y
    font = _font(size)
    ImageDraw.Draw(mask).text((cell / 2, baseline), letter, fill=255, font=font, anchor="ms")
    return mask


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


_COLOR_NAMES = tuple(COLORS)
_RESERVED_MODULUS = 10  # one of this many pairs is reserved

Question = tuple[str, str]
Thing = tuple[str, str]  # (color, shape)


@dataclass(frozen=True, slots=True)
class Scene:
    """Synthetic RGB image with its only correct caption, its class name and its questions."""

    image: Image.Image
    caption: str
    name: str
    questions: tuple[Question, ...]


def single_object(rng: np.random.Generator) -> Scene:
    """Draw one shape, on a page of one cell or in a random cell of a page of up to 2 x 2."""
    color, shape = random_thing(rng)
    rows, columns = (1, 1) if rng.random() < 0.7 else rng.integers(1, 3, size=2).tolist()
    page = Page(rng, rows, columns)
    page.shape(shape, color, int(rng.integers(rows)), int(rng.integers(columns)))
    return _one_of(page, color, shape)


def two_objects(rng: np.random.Generator, reserved: bool = False) -> Scene:
    """Draw two different shapes, the first left of or above the second.

    Pairs for which `is_reserved` is true are drawn only with `reserved`, and only they are.
    """
    while True:
        first, second, side_by_side = random_thing(rng), random_thing(rng), bool(rng.random() < 0.5)
        caption = pair_caption(first, second, side_by_side)
        if first != second and is_reserved(caption) == reserved:
            break
    page = Page(rng, *((1, 2) if side_by_side else (2, 1)))
    page.shape(first[1], first[0], 0, 0)
    page.shape(second[1], second[0], *((0, 1) if side_by_side else (1, 0)))
    places = ("on the left", "on the right") if side_by_side else ("at the top", "at the bottom")
    questions: list[Question] = [("How many shapes are there?", "two")]
    for thing, place, other in zip((first, second), places, (second, first), strict=True):
        color, shape = thing
        questions.append((f"What is {place}?", with_article(f"{color} {shape}")))
        questions.append((f"Where is the {color} {shape}?", place))
        if shape != other[1]:
            questions.append((f"What colour is the {shape}?", color))
        if color != other[0]:
            questions.append((f"What shape is {color}?", shape))
    return Scene(page.image, caption, caption, tuple(questions))


def pair_caption(first: Thing, second: Thing, side_by_side: bool) -> str:
    """Return the caption of two objects: "a red circle left of a blue square"."""
    relation = "left of" if side_by_side else "above"
    return f"{with_article(' '.join(first))} {relation} {with_article(' '.join(second))}"


def is_reserved(caption: str) -> bool:
    """Return whether a pair's caption is among the tenth that is reserved for held-out data."""
    return zlib.crc32(caption.encode()) % _RESERVED_MODULUS == 0


def counted_objects(rng: np.random.Generator) -> Scene:
    """Draw one to five equal shapes in the cells of a page of 3 columns and 2 or 3 rows."""
    color, shape = random_thing(rng)
    count, rows, columns = int(rng.integers(1, 6)), int(rng.integers(2, 4)), 3
    page = Page(rng, rows, columns)
    for cell in sorted(rng.permutation(rows * columns)[:count].tolist()):
        page.shape(shape, color, *divmod(cell, columns))
    if count == 1:
        return _one_of(page, color, shape)
    number, shapes = NUMBERS[count], plural(shape)
    questions = (
        ("How many shapes are there?", number),
        (f"How many {shapes} are there?", number),
        ("What colour are they?", color),
        ("What shape are they?", shapes),
    )
    caption = f"{number} {color} {shapes}"
    return Scene(page.image, caption, caption, questions)


def written_word(rng: np.random.Generator) -> Scene:
    """Draw a word of three letters, one per cell."""
    word = WORDS[rng.integers(len(WORDS))]
    page = Page(rng, 1, len(word))
    page.letters(word)
    questions = (
        ("What does it say?", word),
        ("What is the first letter?", word[0]),
        ("What is the last letter?", word[-1]),
    )
    return Scene(page.image, f"the word {word}", word, questions)


def written_letter(rng: np.random.Generator) -> Scene:
    """Draw a single letter on a page of one cell."""
    letter = LETTERS[rng.integers(len(LETTERS))]
    page = Page(rng, 1, 1)
    page.letters(letter)
    name = f"the letter {letter}"
    return Scene(page.image, name, letter, (("Which letter is this?", letter),))


def bar_chart(rng: np.random.Generator) -> Scene:
    """Draw three bars of different colors and heights of 1 to TALLEST_BAR, one per column."""
    colors = [_COLOR_NAMES[index] for index in rng.permutation(len(_COLOR_NAMES))[:3]]
    heights = rng.integers(1, TALLEST_BAR + 1, size=3).tolist()
    page = Page(rng, 1, 3)
    page.bars(list(zip(colors, heights, strict=True)))
    questions: list[Question] = []
    for color, height in zip(colors, heights, strict=True):
        questions.append((f"How high is the {color} bar?", NUMBERS[height]))
    for word, height in (("tallest", max(heights)), ("shortest", min(heights))):
        if heights.count(height) == 1:
            questions.append((f"Which bar is the {word}?", colors[heights.index(height)]))
    questions.append(("Which bar is on the left?", colors[0]))
    questions.append(("Which bar is on the right?", colors[-1]))
    caption = chart_caption(colors, heights)
    return Scene(page.image, caption, caption, tuple(questions))


def chart_caption(colors: list[str], heights: list[int]) -> str:
    """Return the caption of a chart: "a bar chart: red two, green five, blue three"."""
    bars = (f"{color} {NUMBERS[height]}" for color, height in zip(colors, heights, strict=True))
    return f"a bar chart: {', '.join(bars)}"


# Scene families of held-out captions and questions, in equal shares.
FAMILIES: dict[str, Callable[[np.random.Generator], Scene]] = {
    "single": single_object,
    "pair": two_objects,
    "count": counted_objects,
    "word": written_word,
    "chart": bar_chart,
}


def random_thing(rng: np.random.Generator) -> Thing:
    """Choose a color and a shape."""
    return _COLOR_NAMES[rng.integers(len(_COLOR_NAMES))], SHAPES[rng.integers(len(SHAPES))]


def _one_of(page: Page, color: str, shape: str) -> Scene:
    questions = (
        ("What colour is it?", color),
        ("What shape is it?", shape),
        ("How many shapes are there?", "one"),
    )
    name = f"{color} {shape}"
    return Scene(page.image, with_article(name), name, questions)


HELD_OUT_DIGITS = 300
DIGIT_QUESTION = "Which digit is this?"
_SPLIT_SEED = 0
_SCAN = 8  # side in pixels
_FULL_INK = 16  # the scans' largest value


@dataclass(frozen=True, slots=True)
class DigitSplit:
    """Scans (n, 8, 8) uint8, dark on white, and labels (n,) of 0 to 9."""

    scans: NDArray[np.uint8]
    labels: NDArray[np.int64]


@cache
def digit_splits() -> tuple[DigitSplit, DigitSplit]:
    """Return the fixed training and held-out splits, stratified by label."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    train, held_out = train_test_split(
        np.arange(len(data.target)),
        test_size=HELD_OUT_DIGITS,
        stratify=data.target,
        random_state=_SPLIT_SEED,
    )
    scans = (255 - data.images * (255 / _FULL_INK)).round().astype(np.uint8)
    return (
        DigitSplit(scans[train], data.target[train]),
        DigitSplit(scans[held_out], data.target[held_out]),
    )


def training_digit(rng: np.random.Generator) -> Scene:
    """Draw a digit of the training split, slightly shifted, rotated and scaled."""
    split, _ = digit_splits()
    index = int(rng.integers(len(split.labels)))
    angle, scale = rng.uniform(-0.1, 0.1), rng.uniform(0.95, 1.05)
    shift = rng.uniform(-0.5, 0.5, size=2)
    return _scene(split, index, angle, scale, (shift[0], shift[1]))


def held_out_digit(index: int) -> Scene:
    """Draw the held-out digit number `index` unchanged."""
    _, split = digit_splits()
    return _scene(split, index, 0.0, 1.0, (0.0, 0.0))


def _scene(split: DigitSplit, index: int, angle: float, scale: float, shift: tuple[float, float]) -> Scene:
    """Build one patch from a scan that is rotated (radians), scaled (factor) and shifted (scan pixels)."""
    name = NUMBERS[split.labels[index]]
    parity = "odd" if split.labels[index] % 2 else "even"
    step = _SCAN / PATCH / scale  # scan pixels per drawn pixel
    cos, sin = step * np.cos(angle), step * np.sin(angle)
    center, middle = _SCAN / 2, PATCH / 2
    placing = (
        *(cos, -sin, center - shift[0] - (cos - sin) * middle),
        *(sin, cos, center - shift[1] - (sin + cos) * middle),
    )
    image = Image.fromarray(split.scans[index]).transform(
        (PATCH, PATCH),
        Image.Transform.AFFINE,
        placing,
        resample=Image.Resampling.BICUBIC,
        fillcolor=255,
    )
    questions = ((DIGIT_QUESTION, name), ("Is the digit odd or even?", parity))
    return Scene(image.convert("RGB"), f"the digit {name}", name, questions)
