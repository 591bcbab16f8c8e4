"""Reading rows in file order, for a look at the data: what became of each, instead of a stream of packs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from solo_vlm.data.encode import Document, Encoder, fit_to_length
from solo_vlm.data.sample import SampleError, parse_sample
from solo_vlm.data.sources import Source

OnProgress = Callable[[int, int], None]  # shards done, shards in all


@dataclass(frozen=True)
class ReadRow:
    """A row as training would see it.

    Attributes:
        where: its place, for messages.
        images: how many images it has.
        documents: what it is encoded to; several where a long text is cut, none where it cannot be used.
        error: why it cannot be used.
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
        source: where they are.
        encoder: makes a document of a sample.
        length: tokens in a packed sequence.
        on_shard: called when a shard is done.
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
