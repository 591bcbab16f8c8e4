"""Shapes in grids, with questions that need rows and columns.

They are for studies of positions: the quickstart's scenes hardly need them.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from .scenes import Page, Question, Scene, Thing, random_thing
from .vocabulary import NUMBERS, with_article

_SIZES = (3, 4)  # rows and columns
_SIDES = (("at the top", "at the bottom"), ("on the left", "on the right"))  # by axis


def placed_object(rng: np.random.Generator) -> Scene:
    """Draw one shape in any cell, and ask for its row and column."""
    grid = rng.choice(_SIZES, size=2)
    row, column = rng.integers(grid).tolist()
    color, shape = random_thing(rng)
    answer = f"row {NUMBERS[row + 1]}, column {NUMBERS[column + 1]}"
    return _scene(rng, grid, [((row, column), (color, shape))], [("Where is it?", answer)])


def objects_in_line(rng: np.random.Generator) -> Scene:
    """Draw three different shapes into a row or a column, and ask for the first, the middle and the last."""
    grid = rng.choice(_SIZES, size=2)
    axis = int(rng.integers(2))  # along which they differ
    line = int(rng.integers(grid[1 - axis]))
    things: list[Thing] = []
    while len(things) < 3:
        thing = random_thing(rng)
        things += [thing] * (thing not in things)
    places = sorted(rng.permutation(grid[axis])[:3].tolist())
    cells = [(line, place) if axis else (place, line) for place in places]
    names = (_SIDES[axis][0], "in the middle", _SIDES[axis][1])
    questions = [
        (f"What is {name}?", with_article(" ".join(thing))) for name, thing in zip(names, things, strict=True)
    ]
    drawn = list(zip(cells, things, strict=True))
    return _scene(rng, grid, [drawn[index] for index in rng.permutation(3)], questions)


def counted_lines(rng: np.random.Generator) -> Scene:
    """Draw equal shapes into a third to two thirds of the cells, and ask for their number in rows and columns."""
    grid = rng.choice(_SIZES, size=2)
    thing = random_thing(rng)
    cells = list(product(*map(range, grid)))
    count = int(rng.integers(len(cells) // 3, 2 * len(cells) // 3 + 1))
    chosen = [cells[index] for index in rng.permutation(len(cells))[:count]]
    questions = [
        (f"How many are in {name} {NUMBERS[line + 1]}?", NUMBERS[sum(cell[axis] == line for cell in chosen)])
        for axis, name in enumerate(("row", "column"))
        for line in range(grid[axis])
    ]
    return _scene(rng, grid, [(cell, thing) for cell in chosen], questions)


def _scene(rng, grid, drawn, questions) -> Scene:
    page = Page(rng, *grid.tolist())
    for (row, column), (color, shape) in drawn:
        page.shape(shape, color, row, column)
    return Scene(page.image, "", "", tuple(questions))


GRIDS = (placed_object, objects_in_line, counted_lines)
