"""Reading, encoding and sampling of rows without packing, to inspect or estimate the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from solo_vlm.data.encode import Document, Encoder, fit_to_length
from solo_vlm.data.sample import FilteredRow, SampleError, parse_sample
from solo_vlm.data.sources import Source

OnProgress = Callable[[int, int], None]  # completed shards, total shards


@dataclass(frozen=True)
class ReadRow:
    """Row as training would see it.

    Attributes:
        where: File and row, for messages.
        images: Number of images.
        documents: Encoded documents: several if a long text was cut, none if the row is unusable.
        error: Reason why the row is unusable, or left out by a filter.
    """

    where: str
    images: int = 0
    documents: list[Document] = field(default_factory=list)
    error: SampleError | None = None

    @property
    def is_filtered(self) -> bool:
        """Whether the filter of the source leaves the row out."""
        return isinstance(self.error, FilteredRow)


class ShardProgress:
    """Counter of completed shards over all sources, which reports to `on_progress`."""

    def __init__(self, total: int, on_progress: OnProgress) -> None:
        self._done = 0
        self._total = total
        self._on_progress = on_progress
        on_progress(0, total)

    def __call__(self) -> None:
        self._done += 1
        self._on_progress(self._done, self._total)


@dataclass(frozen=True)
class RowReader:
    """Reader and encoder of a source's rows.

    Args:
        source: Source of the rows.
        encoder: Encoder of samples to documents.
        length: Tokens per packed sequence.
        on_shard: Called after each shard.
    """

    source: Source
    encoder: Encoder
    length: int
    on_shard: Callable[[], None] = lambda: None

    def read_all(self) -> Iterator[ReadRow]:
        """Yield every row once, in order."""
        for shard in range(len(self.source)):
            rows = self.source.read(shard)
            yield from self.read(shard, rows, range(len(rows)))

    def read(self, shard: int, rows: Sequence[dict[str, Any]], chosen: Iterable[int]) -> Iterator[ReadRow]:
        """Yield the chosen rows of a shard that is already open."""
        for row in chosen:
            where = self.source.where(shard, row)
            try:
                sample = parse_sample(rows[row])
                drafts = fit_to_length(self.encoder.draft(sample), self.length)
                documents = [draft.decode() for draft in drafts]
            except SampleError as error:
                yield ReadRow(where, error=error)
            else:
                yield ReadRow(where, len(sample.images), documents)
        self.on_shard()


_MAX_SHARDS = 64  # reading a shard costs as much as encoding some of its rows
_NORMAL_95 = 1.96


class DrawnRows(NamedTuple):
    """Rows sampled from one shard."""

    shard: int
    rows: Sequence[dict[str, Any]]
    chosen: list[int]


def shards_to_read(shards: int, samples: int) -> int:
    """Return the number of shards to draw that many rows from, at least two rows from each."""
    return min(shards, _MAX_SHARDS, max(samples // 2, 1))


def draw_rows(source: Source, samples: int, generator: np.random.Generator) -> Iterator[DrawnRows]:
    """Draw about `samples` rows: one shard from each of equally long ranges, and equally many rows per shard.

    A shard with fewer rows contributes all of them.
    """
    count = shards_to_read(len(source), samples)
    borders = np.linspace(0, len(source), count + 1).astype(int)
    for number, (start, end) in enumerate(pairwise(borders)):
        shard = int(generator.integers(start, end))
        rows = source.read(shard)
        wanted = samples // count + (number < samples % count)
        chosen = generator.permutation(len(rows))[:wanted]
        yield DrawnRows(shard, rows, sorted(map(int, chosen)))


@dataclass(frozen=True)
class Estimate:
    """Estimated totals over all rows.

    Attributes:
        totals: (columns,), estimated sum of each column.
        variances: (columns,), variance of each total.
    """

    totals: NDArray[np.float64]
    variances: NDArray[np.float64]

    @property
    def margins(self) -> NDArray[np.float64]:
        """Half-widths of the approximate 95% confidence intervals of the totals."""
        return _NORMAL_95 * np.sqrt(self.variances)


def estimate_totals(shards: int, drawn: Sequence[tuple[int, NDArray[np.float64]]]) -> Estimate:
    """Estimate totals from a two-stage sample (Cochran, Sampling Techniques, section 11.7).

    Args:
        shards: Number of shards of the source.
        drawn: Per sampled shard, its number of rows, and the values of the sampled rows,
            (sampled rows, columns).
    """
    scale = shards / len(drawn)
    shard_totals = np.stack([_scaled_sum(*shard) for shard in drawn])
    variances = scale * np.sum([_variance_within(*shard) for shard in drawn], axis=0)
    if len(drawn) > 1:
        between = shard_totals.var(axis=0, ddof=1)
        variances = variances + shards * scale * (1 - 1 / scale) * between
    return Estimate(scale * shard_totals.sum(axis=0), variances)


def _scaled_sum(count: int, values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values.sum(axis=0) * (count / max(len(values), 1))


def _variance_within(count: int, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the variance of a shard's total that sampling its rows causes."""
    drawn = len(values)
    if drawn < 2 or drawn == count:
        return np.zeros(values.shape[1])
    return count**2 * (1 - drawn / count) * values.var(axis=0, ddof=1) / drawn
