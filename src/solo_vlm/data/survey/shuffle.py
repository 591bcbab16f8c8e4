"""Quality of the shuffle of a source: from how many of its shards the documents of a sequence come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, lgamma
from typing import Any

from solo_vlm.data.row_order import RowOrder, deal, open_bytes
from solo_vlm.data.sources import Source, SourceView

_STREAMS, _ROWS = 4, 4096  # streams that are simulated, and rows of each


def shuffle_quality(
    source: Source, rows: Mapping[int, int], documents: int, streams: int, sources: int = 1, seed: int = 0
) -> float:
    """Return how many shards a packed sequence draws from, divided by how many a perfect shuffle would give.

    1.0 is ideal. A low value matters if similar rows are neighbors in the files, as in tars of one class.

    Args:
        source: Source, of which nothing is read.
        rows: Number of rows of some or all shards.
        documents: Documents per packed sequence.
        streams: Number of virtual streams.
        sources: Number of sources of the mixture.
        seed: Seed of the order.
    """
    counted = _CountedRows(source, rows)
    sizes = [len(counted.read(shard)) for shard in range(len(source))]
    found = expected = 0.0
    for stream in range(min(streams, _STREAMS)):
        share, _ = deal(len(source), stream, streams)
        order = RowOrder(counted, share, str(seed), stream, 1, open_bytes(streams, sources))
        shards: list[int] = []
        while len(shards) < _ROWS and not order.exhausted:
            shards.append(order.next_key()[0])
        together = min(documents, len(shards)) or 1
        perfect = _distinct_shards(sizes, together)
        for start in range(0, len(shards) - together + 1, together):
            found += len(set(shards[start : start + together]))
            expected += perfect
    return min(found / expected, 1.0) if expected else 1.0


def _distinct_shards(sizes: Sequence[int], drawn: int) -> float:
    """Return the expected number of shards of rows that are drawn at random."""
    total = sum(sizes)

    def choices(count: int) -> float:
        return lgamma(count + 1) - lgamma(count - drawn + 1)

    return sum(
        1 - (exp(choices(total - size) - choices(total)) if total - size >= drawn else 0) for size in sizes
    )


class _CountedRows(SourceView):
    """Source of which only the number of rows of each shard is known, or estimated by the mean of others."""

    def __init__(self, source: Source, rows: Mapping[int, int]) -> None:
        super().__init__(source)
        self._rows = rows
        self._mean = round(sum(rows.values()) / max(len(rows), 1))

    def read(self, shard: int) -> Sequence[Any]:
        return range(self._rows.get(shard, self._mean))
