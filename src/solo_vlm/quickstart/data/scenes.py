"""Families of small drawn scenes, each with its one caption and its questions and answers."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .drawing import TALLEST_BAR, Page
from .vocabulary import COLOURS, LETTERS, NUMBERS, SHAPES, WORDS, plural, with_article

_COLOUR_NAMES = tuple(COLOURS)
_RESERVED_SHARE = 10  # one pair out of so many is reserved

Question = tuple[str, str]
Thing = tuple[str, str]  # (colour, shape)


@dataclass(frozen=True, slots=True)
class Scene:
    """A drawn image (RGB uint8), the only right caption of it, its class name, its questions."""

    image: Image.Image
    caption: str
    name: str
    questions: tuple[Question, ...]


def single_object(rng: np.random.Generator) -> Scene:
    """One shape, alone on a page of one cell or in some cell of a page of up to 2 x 2."""
    colour, shape = _thing(rng)
    rows, columns = (1, 1) if rng.random() < 0.7 else rng.integers(1, 3, size=2).tolist()
    page = Page(rng, rows, columns)
    page.shape(shape, colour, int(rng.integers(rows)), int(rng.integers(columns)))
    return _one_of(page, colour, shape)


def two_objects(rng: np.random.Generator, reserved: bool = False) -> Scene:
    """Two different shapes, the first left of or above the second.

    The pairs for which `is_reserved` holds are drawn with `reserved` and never without.
    """
    while True:
        first, second, beside = _thing(rng), _thing(rng), bool(rng.random() < 0.5)
        caption = pair_caption(first, second, beside)
        if first != second and is_reserved(caption) == reserved:
            break
    page = Page(rng, *((1, 2) if beside else (2, 1)))
    page.shape(first[1], first[0], 0, 0)
    page.shape(second[1], second[0], *((0, 1) if beside else (1, 0)))
    places = ("on the left", "on the right") if beside else ("at the top", "at the bottom")
    questions: list[Question] = [("How many shapes are there?", "two")]
    for thing, place, other in zip((first, second), places, (second, first), strict=True):
        colour, shape = thing
        questions.append((f"What is {place}?", with_article(f"{colour} {shape}")))
        questions.append((f"Where is the {colour} {shape}?", place))
        if shape != other[1]:
            questions.append((f"What colour is the {shape}?", colour))
        if colour != other[0]:
            questions.append((f"What shape is {colour}?", shape))
    return Scene(page.image, caption, caption, tuple(questions))


def pair_caption(first: Thing, second: Thing, beside: bool) -> str:
    """The caption of two things: "a red circle left of a blue square"."""
    relation = "left of" if beside else "above"
    return f"{with_article(' '.join(first))} {relation} {with_article(' '.join(second))}"


def is_reserved(caption: str) -> bool:
    """Whether a pair's caption is one of the tenth that only held-out data may hold."""
    return zlib.crc32(caption.encode()) % _RESERVED_SHARE == 0


def counted_objects(rng: np.random.Generator) -> Scene:
    """One to five equal shapes in the cells of a page of 3 columns and 2 or 3 rows."""
    colour, shape = _thing(rng)
    count, rows, columns = int(rng.integers(1, 6)), int(rng.integers(2, 4)), 3
    page = Page(rng, rows, columns)
    for cell in sorted(rng.permutation(rows * columns)[:count].tolist()):
        page.shape(shape, colour, *divmod(cell, columns))
    if count == 1:
        return _one_of(page, colour, shape)
    number, shapes = NUMBERS[count], plural(shape)
    questions = (
        ("How many shapes are there?", number),
        (f"How many {shapes} are there?", number),
        ("What colour are they?", colour),
        ("What shape are they?", shapes),
    )
    caption = f"{number} {colour} {shapes}"
    return Scene(page.image, caption, caption, questions)


def written_word(rng: np.random.Generator) -> Scene:
    """A word of three letters, a letter to a cell."""
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
    """A single letter on a page of one cell."""
    letter = LETTERS[rng.integers(len(LETTERS))]
    page = Page(rng, 1, 1)
    page.letters(letter)
    name = f"the letter {letter}"
    return Scene(page.image, name, letter, (("Which letter is this?", letter),))


def bar_chart(rng: np.random.Generator) -> Scene:
    """Three bars of different colours, one to a column, of height 1 to TALLEST_BAR."""
    colours = [_COLOUR_NAMES[index] for index in rng.permutation(len(_COLOUR_NAMES))[:3]]
    heights = rng.integers(1, TALLEST_BAR + 1, size=3).tolist()
    page = Page(rng, 1, 3)
    page.bars(list(zip(colours, heights, strict=True)))
    questions: list[Question] = []
    for colour, height in zip(colours, heights, strict=True):
        questions.append((f"How high is the {colour} bar?", NUMBERS[height]))
    for word, height in (("tallest", max(heights)), ("shortest", min(heights))):
        if heights.count(height) == 1:
            questions.append((f"Which bar is the {word}?", colours[heights.index(height)]))
    questions.append(("Which bar is on the left?", colours[0]))
    questions.append(("Which bar is on the right?", colours[-1]))
    caption = chart_caption(colours, heights)
    return Scene(page.image, caption, caption, tuple(questions))


def chart_caption(colours: list[str], heights: list[int]) -> str:
    """The caption of a chart: "a bar chart: red two, green five, blue three"."""
    bars = (f"{colour} {NUMBERS[height]}" for colour, height in zip(colours, heights, strict=True))
    return f"a bar chart: {', '.join(bars)}"


# What held-out captions and questions are drawn from, in equal shares.
FAMILIES: dict[str, Callable[[np.random.Generator], Scene]] = {
    "single": single_object,
    "pair": two_objects,
    "count": counted_objects,
    "word": written_word,
    "chart": bar_chart,
}


def _thing(rng: np.random.Generator) -> Thing:
    return _COLOUR_NAMES[rng.integers(len(_COLOUR_NAMES))], SHAPES[rng.integers(len(SHAPES))]


def _one_of(page: Page, colour: str, shape: str) -> Scene:
    questions = (
        ("What colour is it?", colour),
        ("What shape is it?", shape),
        ("How many shapes are there?", "one"),
    )
    name = f"{colour} {shape}"
    return Scene(page.image, with_article(name), name, questions)
