"""Read, encode and sample rows without packing, to inspect or estimate the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from solo_vlm.data.encode import Document, Encoder, fit_to_length
from solo_vlm.data.sample import SampleError, parse_sample
from solo_vlm.data.sources import Source

OnProgress = Callable[[int, int], None]  # shards done, shards in all


@dataclass(frozen=True)
class ReadRow:
    """A row as training would see it.

    Attributes:
        where: Its place, for messages.
        images: How many images it has.
        documents: What it is encoded to; several where a long text is cut, none where it cannot be used.
        error: Why it cannot be used.
    """

    where: str
    images: int = 0
    documents: list[Document] = field(default_factory=list)
    error: SampleError | None = None


class ShardProgress:
    """Counts the shards that are done, over all sources, and passes the count on."""

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
    """Reads and encodes rows of a source.

    Args:
        source: Where they are.
        encoder: Makes a document of a sample.
        length: Tokens in a packed sequence.
        on_shard: Called when a shard is done.
    """

    source: Source
    encoder: Encoder
    length: int
    on_shard: Callable[[], None] = lambda: None

    def read_all(self) -> Iterator[ReadRow]:
        """Every row once, in order."""
        for shard in range(len(self.source)):
            rows = self.source.read(shard)
            yield from self.read(shard, rows, range(len(rows)))

    def read(self, shard: int, rows: Sequence[dict[str, Any]], chosen: Iterable[int]) -> Iterator[ReadRow]:
        """Chosen rows of a shard that is open already."""
        for row in chosen:
            where = self.source.where(shard, row)
            try:
                sample = parse_sample(rows[row])
                documents = list(fit_to_length(self.encoder(sample), self.length))
            except SampleError as error:
                yield ReadRow(where, error=error)
            else:
                yield ReadRow(where, len(sample.images), documents)
        self.on_shard()


_SHARDS = 64  # to read at most: reading a shard costs as much as encoding some of its rows
_NORMAL_95 = 1.96


class DrawnRows(NamedTuple):
    """A shard that was read, and the rows of it that were drawn."""

    shard: int
    rows: Sequence[dict[str, Any]]
    chosen: list[int]


def shards_to_read(shards: int, samples: int) -> int:
    """How many shards a sample of that many rows is drawn from: at least two rows from each."""
    return min(shards, _SHARDS, max(samples // 2, 1))


def draw_rows(source: Source, samples: int, generator: np.random.Generator) -> Iterator[DrawnRows]:
    """Draw about `samples` rows: one shard from each of equally long spans, equally many rows per shard.

    A shard that has fewer rows gives all it has.
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
    """Totals over all rows, and how far the truth may be off.

    Attributes:
        totals: One a figure.
        variances: Of the totals.
    """

    totals: NDArray[np.float64]
    variances: NDArray[np.float64]

    @property
    def margins(self) -> NDArray[np.float64]:
        """The truth lies this far from the total, or nearer, with a probability of about 95%."""
        return _NORMAL_95 * np.sqrt(self.variances)


def estimate_totals(shards: int, drawn: Sequence[tuple[int, NDArray[np.float64]]]) -> Estimate:
    """Totals from a sample in two stages (Cochran, Sampling Techniques, section 11.7).

    Args:
        shards: Of the source.
        drawn: For each shard that was read its number of rows, and the figures of the rows that were drawn,
            (rows drawn, figures).
    """
    scale = shards / len(drawn)
    shard_totals = np.stack([_scaled_sum(*shard) for shard in drawn])
    variances = scale * np.sum([_variance_within(*shard) for shard in drawn], axis=0)
    if len(drawn) > 1:
        between = shard_totals.var(axis=0, ddof=1)
        variances = variances + shards * scale * (1 - 1 / scale) * between
    return Estimate(scale * shard_totals.sum(axis=0), variances)


def _scaled_sum(count: int, figures: NDArray[np.float64]) -> NDArray[np.float64]:
    return figures.sum(axis=0) * (count / max(len(figures), 1))


def _variance_within(count: int, figures: NDArray[np.float64]) -> NDArray[np.float64]:
    """Variance of a shard's total, where not all of its rows were drawn."""
    drawn = len(figures)
    if drawn < 2 or drawn == count:
        return np.zeros(figures.shape[1])
    return count**2 * (1 - drawn / count) * figures.var(axis=0, ddof=1) / drawn
