"""Grids of shapes, with questions that only a reader who knows rows and columns can answer.

They are for studies of positions: the scenes of the quickstart have up to three columns and hardly need them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image

from .scenes import Page, Question
from .vocabulary import COLORS, NUMBERS, SHAPES

_SIZES = (3, 4)  # rows and columns
_COLOR_NAMES = tuple(COLORS)
_DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}

Cell = tuple[int, int]  # (row, column)


@dataclass(frozen=True, slots=True)
class Grid:
    """Page with one shape of each color in different cells, and the color in each of these."""

    image: Image.Image
    rows: int
    columns: int
    color_at: dict[Cell, str]

    def lines(self, down: int, right: int) -> Iterator[tuple[str, str, str]]:
        """Yield the colors of any three cells in a row from the first, in steps of `down` and `right`."""
        for (row, column), color in self.color_at.items():
            second, third = (row + down, column + right), (row + 2 * down, column + 2 * right)
            if {second, third} <= self.color_at.keys():
                yield color, self.color_at[second], self.color_at[third]


def draw_grid(rng: np.random.Generator) -> Grid:
    """Draw one shape of each color on a page of three or four rows and columns."""
    rows, columns = rng.choice(_SIZES, size=2).tolist()
    page = Page(rng, rows, columns)
    cells = list(product(range(rows), range(columns)))
    chosen = [cells[index] for index in rng.permutation(len(cells))[: len(_COLOR_NAMES)]]
    color_at = dict(zip(chosen, _COLOR_NAMES, strict=True))
    for (row, column), color in color_at.items():
        page.shape(SHAPES[rng.integers(len(SHAPES))], color, row, column)
    return Grid(page.image, rows, columns, color_at)


def ask_place(rng: np.random.Generator, grid: Grid) -> Question | None:
    """Ask for the row, or the column, of a color."""
    cell, color = _one(rng, grid.color_at.items())
    axis = int(rng.integers(2))
    return f"Which {('row', 'column')[axis]} is {color} in?", NUMBERS[cell[axis] + 1]


def ask_count(rng: np.random.Generator, grid: Grid) -> Question | None:
    """Ask how many shapes are in a row, or in a column."""
    axis = int(rng.integers(2))
    line = int(rng.integers((grid.rows, grid.columns)[axis]))
    count = sum(cell[axis] == line for cell in grid.color_at)
    return f"How many shapes are in {('row', 'column')[axis]} {NUMBERS[line + 1]}?", NUMBERS[count]


def ask_neighbor(rng: np.random.Generator, grid: Grid) -> Question | None:
    """Ask for the color left of, right of, above or below another."""
    relation, (down, right) = _one(rng, _DIRECTIONS.items())
    pairs = [
        (color, grid.color_at[cell[0] + down, cell[1] + right])
        for cell, color in grid.color_at.items()
        if (cell[0] + down, cell[1] + right) in grid.color_at
    ]
    if not pairs:
        return None
    color, neighbor = _one(rng, pairs)
    return f"Which colour is {relation} {color}?", neighbor


def ask_between(rng: np.random.Generator, grid: Grid) -> Question | None:
    """Ask for the color between two others in a row or in a column."""
    lines = [*grid.lines(0, 1), *grid.lines(1, 0)]
    if not lines:
        return None
    first, middle, last = _one(rng, lines)
    return f"Which colour is between {first} and {last}?", middle


ASK: tuple[Callable[[np.random.Generator, Grid], Question | None], ...] = (
    *(ask_place, ask_count, ask_neighbor, ask_between),
)


def _one(rng, choices):
    choices = tuple(choices)
    return choices[rng.integers(len(choices))]
