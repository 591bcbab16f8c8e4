"""Shapes in grids of cells, with questions that need rows and columns.

The quickstart's scenes hardly ask for positions, and never for both a row and a column of several. Studies of
positions use these instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product

import numpy as np
from PIL import Image

from .scenes import Page, Question, Thing, random_thing
from .vocabulary import NUMBERS, with_article

_SIZES = (3, 4)  # rows and columns
_AXES = ("row", "column")
_SIDES = (
    ("at the top", "at the bottom"),
    ("on the left", "on the right"),
)  # by the axis along which cells differ

Cell = tuple[int, int]  # (row, column)
Grid = tuple[Image.Image, list[Question]]


def placed_object(rng: np.random.Generator) -> Grid:
    """Draw one shape in any cell, and ask for its row and column."""
    size = _size(rng)
    row, column = rng.integers(size).tolist()
    thing = random_thing(rng)
    answer = f"row {NUMBERS[row + 1]}, column {NUMBERS[column + 1]}"
    return _page(rng, size, [((row, column), thing)]), [("Where is it?", answer)]


def objects_in_line(rng: np.random.Generator) -> Grid:
    """Draw three different shapes into a row or a column, and ask for the first, the middle and the last."""
    size = _size(rng)
    axis = int(rng.integers(2))
    line = int(rng.integers(size[1 - axis]))
    things: list[Thing] = []
    while len(things) < 3:
        thing = random_thing(rng)
        things += [thing] * (thing not in things)
    places = sorted(rng.permutation(size[axis])[:3].tolist())
    cells = [(line, place) if axis else (place, line) for place in places]
    first, last = _SIDES[axis]
    questions = [
        (f"What is {place}?", with_article(" ".join(thing)))
        for place, thing in zip((first, "in the middle", last), things, strict=True)
    ]
    drawn = list(zip(cells, things, strict=True))
    return _page(rng, size, [drawn[index] for index in rng.permutation(3)]), questions


def counted_lines(rng: np.random.Generator) -> Grid:
    """Draw equal shapes into some of the cells, and ask how many are in a row or a column."""
    size = _size(rng)
    thing = random_thing(rng)
    cells = list(product(*map(range, size)))
    count = int(rng.integers(len(cells) // 3, 2 * len(cells) // 3 + 1))
    chosen = [cells[index] for index in rng.permutation(len(cells))[:count]]
    questions = [
        (f"How many are in {name} {NUMBERS[line + 1]}?", NUMBERS[sum(cell[axis] == line for cell in chosen)])
        for axis, name in enumerate(_AXES)
        for line in range(size[axis])
    ]
    return _page(rng, size, [(cell, thing) for cell in chosen]), questions


# Sampling probabilities in training; held-out questions have equal shares.
GRIDS: dict[Callable[[np.random.Generator], Grid], float] = {
    placed_object: 0.5,
    objects_in_line: 0.4,
    counted_lines: 0.1,
}


def _size(rng: np.random.Generator) -> list[int]:
    """Return the number of rows and of columns."""
    return rng.choice(_SIZES, size=2).tolist()


def _page(rng: np.random.Generator, size: list[int], drawn: Iterable[tuple[Cell, Thing]]) -> Image.Image:
    page = Page(rng, *size)
    for (row, column), (color, shape) in drawn:
        page.shape(shape, color, row, column)
    return page.image
