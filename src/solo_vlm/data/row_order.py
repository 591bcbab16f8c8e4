"""Order in which a stream reads the rows of one source."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from solo_vlm.data.sources import Source
from solo_vlm.utils.errors import SoloError

OPEN_BYTES = 2**26  # memory of the open shards of a stream
MIN_OPEN, MAX_OPEN = 2, 64  # shards of a source from which a stream draws rows at a time
_FIRST_OPEN = 4
_ROWS_PER_OPENING = 8  # rows drawn per shard that is opened in the beginning, so that a run starts soon
_MIN_PART_ROWS = 64  # shards with smaller parts are not divided: each stream reads all of them


def open_bytes(streams: int, sources: int) -> int:
    """Return the memory for open shards of each source in a stream.

    That of a run grows neither with streams beyond 64 nor, up to four, with sources.
    """
    return OPEN_BYTES * 64 // max(streams, 64) // min(sources, 4)


class Share(NamedTuple):
    """A stream's share of the shards of a source.

    Attributes:
        whole: Shards that only this stream reads.
        parts: (shard, part, parts) for each part of a shard that several streams divide by rows.
    """

    whole: range
    parts: list[tuple[int, int, int]]


def deal(shards: int, stream: int, streams: int, first: int = 0) -> tuple[Share, int]:
    """Divide the shards of a source so evenly that all streams end at nearly the same time.

    Every stream gets the same number of whole shards. The remaining shards, fewer than streams, are divided
    into the smallest number of parts that gives every stream one, and some streams a second one.

    Args:
        shards: Number of shards of the source.
        stream: Stream whose share is returned.
        streams: Number of streams.
        first: Stream that gets the first part.

    Returns:
        The share, and the stream that gets the first part of the next source.
    """
    rest = shards % streams
    whole = range(stream, shards - rest, streams)
    if not rest:
        return Share(whole, []), first
    parts = math.ceil(streams / rest)
    numbers = range((stream - first) % streams, rest * parts, streams)
    shared = [(shards - rest + number % rest, number // rest, parts) for number in numbers]
    return Share(whole, shared), (first + rest * parts) % streams


class Place(NamedTuple):
    """Place of a row in the order of a source.

    Attributes:
        epoch: Epoch in which it is drawn.
        piece: Number of its piece in the order in which the epoch opens them.
        offset: Offset in the order of the piece's rows.
    """

    epoch: int
    piece: int
    offset: int


class _Event(NamedTuple):
    """Opening of a piece before a draw (no rows), or its end after a draw.

    Attributes:
        draw: Number of the draw.
        epoch, piece: See `Place`.
        rows: Number of rows of a piece that has ended.
    """

    draw: int
    epoch: int
    piece: int
    rows: int = 0


class RowOrder:
    """Position of a stream in one source: its open pieces, and the rows read of each.

    A piece is a shard or a part of one, numbered in the order in which the epoch opens them. No shard is
    opened before the first row is asked for, because a state may be loaded first.

    Which open piece a row is drawn from follows from the number of the draw. So draws can be undone without
    reading, given when pieces were opened and ended: the number of a draw is enough to find its row again.

    Args:
        source: Source of the rows.
        share: Part of the source that this stream reads.
        seed: Seed of the order.
        stream: Number of the stream.
        epochs: Number of passes. Default: endless.
        memory: Bytes up to which shards are opened, `MIN_OPEN` to `MAX_OPEN` of them.
    """

    def __init__(
        self,
        source: Source,
        share: Share,
        seed: str,
        stream: int,
        epochs: int | None,
        memory: int = OPEN_BYTES,
    ) -> None:
        self._source = source
        self._memory = memory
        self._share = share
        self._pieces = len(share.whole) + len(share.parts)
        self._units: tuple[int, NDArray[np.int64]] | None = None  # epoch, its order of pieces
        self._reads_all = False
        self._shard_seed = seed  # the same in all streams, which must agree on the parts of a shard
        self._seed = f"{seed}/{stream}"
        self._epochs = epochs
        self.epoch = 0
        self._opened = 0  # pieces opened in this epoch
        self.drawn = 0  # rows drawn in all epochs
        self.filtered = 0  # those of them that the source's filter leaves out
        self._open: list[list[int]] = []  # [piece, rows read]
        self._events: list[_Event] = []
        self._cache: dict[int, Sequence[dict[str, Any]]] = {}
        self._row_orders: dict[int, NDArray[np.int64]] = {}

    @property
    def exhausted(self) -> bool:
        """Whether all passes are done; if not, `epoch` is the epoch of the next sample."""
        self._fill()
        return not self._open

    def next_key(self) -> tuple[int, int]:
        """Return (shard, row) of the next sample, in the shuffled order of the epoch."""
        self._fill()
        chosen = self._choice(self.drawn, len(self._open))
        piece, done = self._open[chosen]
        order = self._row_order(piece)
        row = int(order[done])
        self._open[chosen][1] += 1
        if done + 1 == len(order):
            self._open.pop(chosen)
            self._row_orders.pop(piece)
            self._events.append(_Event(self.drawn, self.epoch, piece, len(order)))
        self.drawn += 1
        return self._piece(self.epoch, piece)[0], row

    def row(self, shard: int, row: int) -> dict[str, Any]:
        """Read the raw sample of a key.

        Raises:
            SampleError: The row is broken.
        """
        return self._rows(shard)[row]

    def peek(self, shard: int) -> Sequence[dict[str, Any]]:
        """Return the rows of a shard that need not be open, and do not keep them."""
        return self._cache.get(shard) or self._source.read(shard)

    def places(self, oldest: int) -> dict[int, Place]:
        """Return the places of the rows drawn since a draw, by the number of theirs, without reading."""
        events, epoch = self._events.copy(), self.epoch
        opened = [list(piece) for piece in self._open]
        places = {}
        for draw in reversed(range(oldest, self.drawn)):
            while events and events[-1].draw > draw:
                events.pop()
                opened.pop()
            if events and events[-1].draw == draw and events[-1].rows:
                _, epoch, *ended = events.pop()
                opened.insert(self._choice(draw, len(opened) + 1), ended)
            drawn_from = opened[self._choice(draw, len(opened))]
            drawn_from[1] -= 1
            places[draw] = Place(epoch, *drawn_from)
        return places

    def shard_of(self, place: Place) -> int:
        """Return the shard of a row."""
        return self._piece(place.epoch, place.piece)[0]

    def row_of(self, place: Place, rows: int) -> int:
        """Return the number of a row in its shard, which has this number of rows.

        Raises:
            IndexError: The shard had more.
        """
        return int(self._order_of(place.epoch, place.piece, rows)[place.offset])

    def state(self, oldest: int) -> tuple[list[int], list[list[int]], list[list[int]]]:
        """Return the position.

        Args:
            oldest: Draw down to which `places` will be asked for, now and later.

        Returns:
            Counters; (piece, rows read) of each open piece; events since the oldest draw, by their age.
        """
        self._events = [event for event in self._events if event.draw >= oldest]
        counters = [self.epoch, self._opened, self.drawn, self.filtered, int(self._reads_all)]
        events = [[self.drawn - event.draw, *event[1:]] for event in self._events]
        return counters, [list(piece) for piece in self._open], events

    def load_state(
        self,
        counters: Sequence[int],
        open_pieces: Sequence[Sequence[int]],
        events: Sequence[Sequence[int]],
    ) -> None:
        """Continue from a state."""
        *_, reads_all = counters
        if reads_all:
            self._read_all()
        self.epoch, self._opened, self.drawn, self.filtered, _ = counters
        self._open = [list(piece) for piece in open_pieces]
        self._events = [_Event(self.drawn - age, *event) for age, *event in events]
        self._row_orders.clear()

    def _fill(self) -> None:
        """Keep enough pieces open; start the next epoch at the end of this one."""
        while self._pieces and len(self._open) < min(MAX_OPEN, _FIRST_OPEN + self.drawn // _ROWS_PER_OPENING):
            if self._opened == self._pieces:
                last = self._epochs is not None and self.epoch + 1 >= self._epochs
                if self._open or last:
                    return
                if self.drawn > self.filtered or self._epochs is not None:
                    self.epoch, self._opened = self.epoch + 1, 0
                    self._row_orders.clear()
                elif not self._reads_all:
                    self._read_all()
                else:
                    left_out = " that its filter keeps" if self.filtered else ""
                    raise SoloError(f"{self._source.name} has no rows{left_out}")
            piece = self._opened
            if len(self._open) >= MIN_OPEN and self._memory_with(piece) > self._memory:
                return
            self._opened += 1
            if len(self._row_order(piece)):
                self._open.append([piece, 0])
                self._events.append(_Event(self.drawn, self.epoch, piece))

    def _memory_with(self, piece: int) -> int:
        """Return the memory of the open pieces and another one."""
        pieces = (piece, *(opened for opened, _ in self._open))
        shards = {self._piece(self.epoch, number)[0] for number in pieces}
        return sum(map(self._source.memory, shards))

    def _read_all(self) -> None:
        """Read all shards of an endless source whose share for this stream has no rows."""
        self._reads_all = True
        self._share = Share(range(len(self._source)), [])
        self._pieces, self._opened, self._units = len(self._source), 0, None
        self._row_orders.clear()

    def _choice(self, draw: int, opened: int) -> int:
        """Return which of the open pieces a draw is from."""
        return chance(f"{self._seed}/{draw}") % opened

    def _piece(self, epoch: int, piece: int) -> tuple[int, int, int]:
        """Return (shard, part, parts) of a piece."""
        if self._units is None or self._units[0] != epoch:
            self._units = epoch, self._order("units", epoch, self._pieces)
        unit = int(self._units[1][piece])
        whole, shared = self._share
        return (whole[unit], 0, 1) if unit < len(whole) else shared[unit - len(whole)]

    def _row_order(self, piece: int) -> NDArray[np.int64]:
        """Return the rows of a piece in the order of this epoch."""
        if piece not in self._row_orders:
            rows = len(self._rows(self._piece(self.epoch, piece)[0]))
            self._row_orders[piece] = self._order_of(self.epoch, piece, rows)
        return self._row_orders[piece]

    def _order_of(self, epoch: int, piece: int, count: int) -> NDArray[np.int64]:
        """Return the rows of a piece in the order of an epoch, given the number of its shard's rows."""
        shard, part, parts = self._piece(epoch, piece)
        rows = np.arange(count)
        # An endless source does not count passes, so all streams may read a shard too small to divide.
        if parts > 1 and (self._epochs is not None or len(rows) >= _MIN_PART_ROWS * parts):
            generator = np.random.default_rng(chance(f"{self._shard_seed}/parts/{shard}"))
            rows = generator.permutation(rows)[part::parts]
        return rows[self._order(f"rows/{shard}/{part}", epoch, len(rows))]

    def _order(self, what: str, epoch: int, count: int) -> NDArray[np.int64]:
        generator = np.random.default_rng(chance(f"{self._seed}/{what}/{epoch}"))
        return generator.permutation(count)

    def _rows(self, shard: int) -> Sequence[dict[str, Any]]:
        """Return the rows of a shard; open shards and the last one stay in memory."""
        if shard not in self._cache:
            in_use = {self._piece(self.epoch, piece)[0] for piece, _ in self._open}
            self._cache = {number: rows for number, rows in self._cache.items() if number in in_use}
            self._cache[shard] = self._source.read(shard)
        return self._cache[shard]


def fraction(name: str) -> float:
    """Return a reproducible random number in [0, 1)."""
    return chance(name) / 2**64


def chance(name: str) -> int:
    """Return a reproducible random 64-bit integer derived from a name, without generator state."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
