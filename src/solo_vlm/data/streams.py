"""Virtual streams: one order of packed sequences for any number of processes, with exact resume.

The data is divided among a fixed number S of streams: stream s owns every S-th shard of every source, plus an
equal part of the shards that do not divide evenly. Each stream mixes, shuffles and packs independently, and
packed sequence g comes from stream g mod S. Ranks and workers divide the streams: they affect which process
reads, never the order. The state of a stream is keys and counters, a few kilobytes; it travels with every
packed sequence, so prefetching does not affect it.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np

from solo_vlm.data.encode import Document, fit_to_length
from solo_vlm.data.packing import Packer
from solo_vlm.data.sample import FilteredRow, Sample, SampleError, parse_sample
from solo_vlm.data.sources import Source
from solo_vlm.utils.errors import SoloError

State = dict[str, Any]
Key = tuple[int, int, int, int]  # source, shard, row, piece of a long text
Held = tuple[Key, Document]
Encode = Callable[[Sample], Document]
WeightBy = Literal["samples", "tokens", "sequences"]

ORDER_VERSION = 3  # increased if the same data and seed give another order; older states are rejected

LISTED = 20  # skipped samples that a stream lists; it counts all

_OPEN_SHARDS = 4  # shards per stream from which rows are drawn at a time
_MAX_ERROR_LENGTH = 500  # characters kept of a skipped sample's error
_MIN_ROWS = 1000  # rows assumed when max_skipped is applied to fewer; also the limit of a series
_MIN_PART_ROWS = 64  # shards with smaller parts are not divided: each stream reads all of them


@dataclass(frozen=True)
class MixtureItem:
    """Source with its weight in the mixture."""

    source: Source
    weight: float = 1.0


@dataclass(frozen=True)
class PackedSequence:
    """Documents of one packed sequence, their keys, and the stream's state after it."""

    documents: list[Document]
    keys: list[Key]
    state: State


class VirtualStream:
    """Stream that draws samples from its part of a mixture and packs them.

    Sources alternate by weighted round-robin: the source furthest behind its weight is next, so proportions
    are exact at any time. An exhausted source (`epochs`) leaves the mixture. Weights count samples or
    tokens, with documents of all sources in one sequence; or packed sequences, each of a single source. Every
    stream starts at its own phase of the round-robin, so the sequences of one step are a fair draw from the
    mixture.

    Args:
        index: Number of this stream, from 0.
        streams: Number of streams.
        mixture: Sources with weights.
        encode: Function that encodes a sample as a document.
        length: Tokens per packed sequence.
        seed: Seed of the order.
        epochs: Number of passes over each source. Default: endless.
        weight_by: Unit of the weights: "samples", "tokens" or "sequences".
        buffer_size: Documents that a packer may hold; with "sequences", every source has its own packer.
        max_skipped: Fraction of samples that may be unusable before the run stops.
    """

    def __init__(
        self,
        index: int,
        streams: int,
        mixture: Sequence[MixtureItem],
        encode: Encode,
        length: int,
        seed: int = 0,
        epochs: int | None = None,
        weight_by: WeightBy = "tokens",
        buffer_size: int = 128,
        max_skipped: float = 0.01,
    ) -> None:
        self._sources = [item.source for item in mixture]
        self._weights = [item.weight for item in mixture]
        self._encode = encode
        self._length = length
        self._weight_by = weight_by
        self._max_skipped = max_skipped
        self._cursors = []
        first = 0  # stream with the first part of a source's remainder
        for number, source in enumerate(self._sources):
            share, first = deal(len(source), index, streams, first)
            self._cursors.append(_Cursor(source, share, f"{seed}/{number}", index, epochs))
        self._phases = _phases(self._weights, index, str(seed))
        self._consumed = list(self._phases)
        numbers = range(len(mixture))
        groups = [[number] for number in numbers] if weight_by == "sequences" else [list(numbers)]
        self._groups = [_SourceGroup(numbers, Packer(length, buffer_size)) for numbers in groups]
        self._counts: Counter[str] = Counter()
        self._skipped: list[dict[str, str]] = []
        self._unusable_in_a_row = 0

    def __iter__(self) -> Iterator[PackedSequence]:
        while (pack := self._next_pack()) is not None:
            keys, documents = [key for key, _ in pack], [document for _, document in pack]
            self._counts["sequences"] += 1
            self._counts["documents"] += len(documents)
            self._counts["tokens"] += sum(map(len, documents))
            yield PackedSequence(documents, keys, self.state_dict())

    def state_dict(self) -> State:
        """Return the position as plain lists, numbers and strings."""
        return {
            "cursors": [cursor.state_dict() for cursor in self._cursors],
            "consumed": list(self._consumed),
            "packers": [group.state_dict() for group in self._groups],
            "counts": dict(self._counts),
            "skipped": list(self._skipped),
        }

    def load_state_dict(self, state: State) -> None:
        """Resume from a state; documents that the packers held are read again."""
        for cursor, saved in zip(self._cursors, state["cursors"], strict=True):
            cursor.load_state_dict(saved)
        self._consumed = list(state["consumed"])
        for group, keys in zip(self._groups, state["packers"], strict=True):
            group.restore(*(self._read_again(keys[part]) for part in ("open", "waiting", "pieces")))
        self._counts = Counter(state["counts"])
        self._skipped = list(state["skipped"])

    def _next_pack(self) -> list[Held] | None:
        for group in sorted(self._groups, key=lambda group: self._progress(group.sources[0])):
            if (pack := self._fill(group)) is not None:
                if self._weight_by == "sequences":
                    self._consumed[group.sources[0]] += 1
                return pack
        return None

    def _fill(self, group: _SourceGroup) -> list[Held] | None:
        """Draw samples for a group until a sequence is complete; return None at the end of its sources."""
        while group.pieces or self._draw(group):
            key, document = group.pieces.popleft()
            if (pack := group.packer.add((key, document), len(document))) is not None:
                return pack
        return group.packer.drain()

    def _draw(self, group: _SourceGroup) -> bool:
        """Encode the group's next usable sample; return False if all its sources are exhausted."""
        while behind := [number for number in group.sources if not self._cursors[number].exhausted]:
            number = min(behind, key=self._progress)
            first_pass = self._cursors[number].epoch == 0
            shard, row = self._cursors[number].next_key()
            broken = None
            try:
                pieces = self._pieces_of(number, shard, row)
            except FilteredRow:
                self._cursors[number].filtered += 1
                self._counts.update(["filtered", f"filtered/{self._sources[number].name}"])
                continue
            except SampleError as error:
                broken = error
            self._counts["samples"] += 1
            self._counts["rows"] += first_pass
            if broken:
                self._skip(self._sources[number], shard, row, broken, first_pass)
                continue
            self._unusable_in_a_row = 0
            if self._weight_by == "samples":
                self._consumed[number] += 1
            elif self._weight_by == "tokens":
                # Count a random part of the first document, so that streams do not run in phase.
                part = (self._phases[number] or 1) if self._consumed[number] < 1 else 1
                self._consumed[number] += part * sum(map(len, pieces))
            group.pieces.extend(((number, shard, row, piece), doc) for piece, doc in enumerate(pieces))
            return True
        return False

    def _progress(self, number: int) -> float:
        """Return the consumption of a source in units of its weight."""
        return self._consumed[number] / self._weights[number]

    def _pieces_of(self, number: int, shard: int, row: int) -> list[Document]:
        return self.documents_of(self._cursors[number].row(shard, row))

    def documents_of(self, row: dict[str, Any]) -> list[Document]:
        """Encode a row as one document, or as the pieces of one longer than a sequence.

        Raises:
            SampleError: The row is unusable.
        """
        return list(fit_to_length(self._encode(parse_sample(row)), self._length))

    def _skip(self, source: Source, shard: int, row: int, error: SampleError, first_pass: bool) -> None:
        """Count an unusable sample; raise SoloError if there are too many.

        Only the first pass over a source counts towards the limit, except for an unbroken series.
        """
        self._counts["skipped"] += 1
        self._counts[f"skipped/{source.name}/{error.reason}"] += 1
        self._counts["unusable_rows"] += first_pass
        self._unusable_in_a_row += 1
        if len(self._skipped) < LISTED:
            self._skipped.append(
                {
                    "source": source.name,
                    "where": source.where(shard, row),
                    "reason": error.reason,
                    "error": str(error)[:_MAX_ERROR_LENGTH],
                }
            )
        unusable, rows = self._counts["unusable_rows"], self._counts["rows"]
        too_many = unusable > self._max_skipped * max(rows, _MIN_ROWS)
        if too_many or self._unusable_in_a_row > _MIN_ROWS:
            listed = "".join(f"\n  {entry['where']}: {entry['error']}" for entry in self._skipped)
            raise SoloError(
                f"{unusable} of {rows} rows are unusable, more than data.max_skipped = {self._max_skipped:g} "
                f"allows:{listed}"
            )

    def _read_again(self, keys: Sequence[Sequence[int]]) -> list[Held]:
        held: list[Held] = []
        for (number, shard, row), of_sample in groupby(keys, key=lambda key: key[:3]):
            try:
                pieces = self._pieces_of(number, shard, row)
            except SampleError as error:
                where = self._sources[number].where(shard, row)
                raise SoloError(
                    f"the data changed since the checkpoint: {where} cannot be read again ({error}); put it "
                    "back, or start a new run"
                ) from error
            held += [((number, shard, row, piece), pieces[piece]) for *_, piece in of_sample]
        return held


@dataclass
class _SourceGroup:
    """Sources whose documents are packed together, with their packer and the pieces read for it."""

    sources: list[int]
    packer: Packer[Held]
    pieces: deque[Held] = field(default_factory=deque)

    def state_dict(self) -> State:
        held = {"open": self.packer.open, "waiting": self.packer.waiting, "pieces": self.pieces}
        return {part: [list(key) for key, _ in documents] for part, documents in held.items()}

    def restore(self, in_open_pack: list[Held], waiting: list[Held], pieces: list[Held]) -> None:
        self.packer.restore(*([(held, len(held[1])) for held in part] for part in (in_open_pack, waiting)))
        self.pieces = deque(pieces)


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


class _Cursor:
    """Position of a stream in one source: its open pieces, and the rows read of each.

    A piece is a shard or a part of one, numbered within the stream's share. No shard is opened before the
    first row is asked for, because a state may be loaded first.
    """

    def __init__(self, source: Source, share: Share, seed: str, stream: int, epochs: int | None) -> None:
        self._source = source
        self._share = share
        self._pieces = len(share.whole) + len(share.parts)
        self._reads_all = False
        self._shard_seed = seed  # the same in all streams, which must agree on the parts of a shard
        self._seed = f"{seed}/{stream}"
        self._epochs = epochs
        self.epoch = 0
        self._opened = 0  # pieces opened in this epoch
        self._drawn = 0  # rows drawn in all epochs
        self.filtered = 0  # those of them that the source's filter leaves out
        self._open: list[list[int]] = []  # [piece, rows read]
        self._cache: dict[int, Sequence[dict[str, Any]]] = {}
        self._row_orders: dict[int, np.ndarray] = {}

    @property
    def exhausted(self) -> bool:
        """Whether all passes are done; if not, `epoch` is the epoch of the next sample."""
        self._fill()
        return not self._open

    def next_key(self) -> tuple[int, int]:
        """Return (shard, row) of the next sample, in the shuffled order of the epoch."""
        self._fill()
        chosen = _chance(f"{self._seed}/{self._drawn}") % len(self._open)
        piece, done = self._open[chosen]
        order = self._row_order(piece)
        row = int(order[done])
        self._drawn += 1
        self._open[chosen][1] += 1
        if done + 1 == len(order):
            self._open.pop(chosen)
            self._row_orders.pop(piece)
        return self._piece(piece)[0], row

    def row(self, shard: int, row: int) -> dict[str, Any]:
        """Read the raw sample of a key.

        Raises:
            SampleError: The row is broken.
        """
        return self._rows(shard)[row]

    def state_dict(self) -> State:
        return {
            "epoch": self.epoch,
            "opened": self._opened,
            "drawn": self._drawn,
            "filtered": self.filtered,
            "open": [list(piece) for piece in self._open],
            "reads_all": self._reads_all,
        }

    def load_state_dict(self, state: State) -> None:
        if state.get("reads_all"):
            self._read_all()
        self.epoch, self._opened, self._drawn = state["epoch"], state["opened"], state["drawn"]
        self.filtered = state.get("filtered", 0)
        self._open = [list(piece) for piece in state["open"]]
        self._row_orders.clear()

    def _fill(self) -> None:
        """Keep enough pieces open; start the next epoch at the end of this one."""
        while self._pieces and len(self._open) < _OPEN_SHARDS:
            if self._opened == self._pieces:
                last = self._epochs is not None and self.epoch + 1 >= self._epochs
                if self._open or last:
                    return
                if self._drawn > self.filtered or self._epochs is not None:
                    self.epoch, self._opened = self.epoch + 1, 0
                elif not self._reads_all:
                    self._read_all()
                else:
                    left_out = " that its filter keeps" if self.filtered else ""
                    raise SoloError(f"{self._source.name} has no rows{left_out}")
            piece = int(self._order("units", self._pieces)[self._opened])
            self._opened += 1
            if len(self._row_order(piece)):
                self._open.append([piece, 0])

    def _read_all(self) -> None:
        """Read all shards of an endless source whose share for this stream has no rows."""
        self._reads_all = True
        self._share = Share(range(len(self._source)), [])
        self._pieces, self._opened = len(self._source), 0
        self._row_orders.clear()

    def _piece(self, piece: int) -> tuple[int, int, int]:
        """Return (shard, part, parts) of a piece."""
        whole, shared = self._share
        return (whole[piece], 0, 1) if piece < len(whole) else shared[piece - len(whole)]

    def _row_order(self, piece: int) -> np.ndarray:
        """Return the rows of a piece in the order of this epoch."""
        if piece not in self._row_orders:
            shard, part, parts = self._piece(piece)
            rows = np.arange(len(self._rows(shard)))
            # An endless source does not count passes, so all streams may read a shard too small to divide.
            if parts > 1 and (self._epochs is not None or len(rows) >= _MIN_PART_ROWS * parts):
                chance = np.random.default_rng(_chance(f"{self._shard_seed}/parts/{shard}"))
                rows = chance.permutation(rows)[part::parts]
            self._row_orders[piece] = rows[self._order(f"rows/{shard}/{part}", len(rows))]
        return self._row_orders[piece]

    def _order(self, what: str, count: int) -> np.ndarray:
        generator = np.random.default_rng(_chance(f"{self._seed}/{what}/{self.epoch}"))
        return generator.permutation(count)

    def _rows(self, shard: int) -> Sequence[dict[str, Any]]:
        """Return the rows of a shard; open shards and the previous one stay in memory."""
        if (rows := self._cache.pop(shard, None)) is None:
            while len(self._cache) > _OPEN_SHARDS:
                self._cache.pop(next(iter(self._cache)))
            rows = self._source.read(shard)
        self._cache[shard] = rows  # least recently used first
        return rows


def _phases(weights: Sequence[float], stream: int, seed: str) -> list[float]:
    """Return the initial consumption of each source, as if the round-robin had been running before.

    One source, drawn by weight, is due at once; the others at a random time within their period. So streams
    are at different positions, and the first sequences of any few streams are a fair sample of the sources.
    """
    ends = np.cumsum(weights)
    # Multiples of the golden ratio cover [0, 1) evenly for any number of streams.
    place = (_fraction(f"{seed}/due") + stream * (math.sqrt(5) - 1) / 2) % 1
    due = min(int(np.searchsorted(ends, place * ends[-1], side="right")), len(weights) - 1)
    return [
        0.0 if number == due else _fraction(f"{seed}/{number}/{stream}/phase")
        for number in range(len(weights))
    ]


def _fraction(name: str) -> float:
    """Return a reproducible random number in [0, 1)."""
    return _chance(name) / 2**64


def _chance(name: str) -> int:
    """Return a reproducible random 64-bit integer derived from a name, without generator state."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
