"""A sample of a source's rows in two stages, units and rows in them, and what it says about all rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from solo_vlm.data.sources import Source

_UNITS = 64  # to read at most: reading a unit costs as much as encoding some of its rows
_NORMAL_95 = 1.96


class DrawnRows(NamedTuple):
    """A unit that was read, and the rows of it that were drawn."""

    unit: int
    rows: Sequence[dict[str, Any]]
    chosen: list[int]


def units_to_read(units: int, samples: int) -> int:
    """How many units a sample of that many rows is drawn from: at least two rows from each."""
    return min(units, _UNITS, max(samples // 2, 1))


def draw_rows(source: Source, samples: int, generator: np.random.Generator) -> Iterator[DrawnRows]:
    """About `samples` rows: a unit from each of equally long spans of them, and as many rows from each unit.

    A unit that has fewer rows gives all it has.
    """
    count = units_to_read(len(source), samples)
    borders = np.linspace(0, len(source), count + 1).astype(int)
    for number, (start, end) in enumerate(pairwise(borders)):
        unit = int(generator.integers(start, end))
        rows = source.read(unit)
        wanted = samples // count + (number < samples % count)
        chosen = generator.permutation(len(rows))[:wanted]
        yield DrawnRows(unit, rows, sorted(map(int, chosen)))


@dataclass(frozen=True)
class Estimate:
    """Totals over all rows, and how far the truth may be off.

    Attributes:
        totals: one a figure.
        variances: of the totals.
    """

    totals: NDArray[np.float64]
    variances: NDArray[np.float64]

    @property
    def margins(self) -> NDArray[np.float64]:
        """The truth lies this far from the total, or nearer, with a probability of about 95%."""
        return _NORMAL_95 * np.sqrt(self.variances)


def estimate_totals(units: int, drawn: Sequence[tuple[int, NDArray[np.float64]]]) -> Estimate:
    """Totals from a sample in two stages (Cochran, Sampling Techniques, section 11.7).

    Args:
        units: of the source.
        drawn: for each unit that was read its number of rows, and the figures of the rows that were drawn,
            (rows drawn, figures).
    """
    scale = units / len(drawn)
    unit_totals = np.stack([_scaled_sum(*unit) for unit in drawn])
    variances = scale * np.sum([_variance_within(*unit) for unit in drawn], axis=0)
    if len(drawn) > 1:
        between = unit_totals.var(axis=0, ddof=1)
        variances = variances + units * scale * (1 - 1 / scale) * between
    return Estimate(scale * unit_totals.sum(axis=0), variances)


def _scaled_sum(count: int, figures: NDArray[np.float64]) -> NDArray[np.float64]:
    return figures.sum(axis=0) * (count / max(len(figures), 1))


def _variance_within(count: int, figures: NDArray[np.float64]) -> NDArray[np.float64]:
    """Variance of a unit's total, where not all of its rows were drawn."""
    drawn = len(figures)
    if drawn < 2 or drawn == count:
        return np.zeros(figures.shape[1])
    return count**2 * (1 - drawn / count) * figures.var(axis=0, ddof=1) / drawn
