"""Virtual streams: one fixed order of packed sequences for any number of processes, resumable exactly.

The data are dealt to a fixed number of streams: stream s owns every S-th unit of every source, and an equal
part of the units that are left over. Each stream mixes, shuffles and packs on its own; packed sequence g
comes from stream g mod S. Ranks and workers only share out streams, so they change who reads, never what
comes next. A stream's state is keys and counters, a few kilobytes, and travels with every packed sequence, so
that prefetching cannot skew it.
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
from solo_vlm.data.sample import Sample, SampleError, parse_sample
from solo_vlm.data.sources import Source
from solo_vlm.utils.errors import SoloError

State = dict[str, Any]
Key = tuple[int, int, int, int]  # source, unit, row, piece of a long text
Held = tuple[Key, Document]
Encode = Callable[[Sample], Document]
Weigh = Literal["samples", "tokens", "sequences"]

ORDER_VERSION = 2  # raised whenever the same data and seed give another order: older states are refused

LISTED = 20  # skipped samples that a stream names; it counts all

_SHUFFLED_UNITS = 4  # units that a stream reads from at a time, a row from either by chance
_MESSAGE = 500  # characters of a skipped sample's error that are kept
_TOLERATED_FROM = 1000  # rows: with fewer, a fraction of them says little
_SHARED_ROWS = 64  # a part of a unit has at least so many, or else all of them


@dataclass(frozen=True)
class MixtureItem:
    """A source and its share of the mixture."""

    source: Source
    weight: float = 1.0


@dataclass(frozen=True)
class PackedSequence:
    """Documents that go into one sequence, with their keys, and the stream's state after it."""

    documents: list[Document]
    keys: list[Key]
    state: State


class VirtualStream:
    """One of S streams: draws samples from its share of a mixture and packs them.

    Sources are interleaved by deficit: next comes the source that is furthest behind its weight. So
    proportions are exact at any time, and a source that has run out (`epochs`) leaves the mixture. Weights
    count samples or tokens, and documents of all sources share sequences; or they count packed sequences,
    each of one source alone. Every stream starts at a phase of its own, so that the sequences of one step are
    a fair draw from the mixture instead of all coming from one source.

    Args:
        index: which stream, 0 to `streams` - 1.
        streams: how many there are.
        mixture: sources with weights.
        encode: makes a document of a sample.
        length: tokens in a packed sequence.
        seed: of the order.
        epochs: passes over each source; None: without end.
        weigh: what weights count, "samples", "tokens" or "sequences".
        buffer_size: documents that a packer may hold back; with "sequences" every source has a packer.
        max_skipped: fraction of samples that may be unusable before the run stops.
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
        weigh: Weigh = "tokens",
        buffer_size: int = 128,
        max_skipped: float = 0.01,
    ) -> None:
        self._sources = [item.source for item in mixture]
        self._weights = [item.weight for item in mixture]
        self._encode = encode
        self._length = length
        self._weigh = weigh
        self._max_skipped = max_skipped
        self._cursors = []
        first = 0  # stream that gets the first left-over part: sources take turns
        for number, source in enumerate(self._sources):
            share, first = deal(len(source), index, streams, first)
            self._cursors.append(_Cursor(source, share, f"{seed}/{number}", index, epochs))
        self._phases = _phases(self._weights, index, str(seed))
        self._served = list(self._phases)
        numbers = range(len(mixture))
        groups = [[number] for number in numbers] if weigh == "sequences" else [list(numbers)]
        self._lanes = [_Lane(group, Packer(length, buffer_size)) for group in groups]
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
        """What is needed to go on from here: plain lists, numbers and strings."""
        return {
            "cursors": [cursor.state_dict() for cursor in self._cursors],
            "served": list(self._served),
            "lanes": [lane.state_dict() for lane in self._lanes],
            "counts": dict(self._counts),
            "skipped": list(self._skipped),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from a state; documents that were held back are read again."""
        for cursor, saved in zip(self._cursors, state["cursors"], strict=True):
            cursor.load_state_dict(saved)
        self._served = list(state["served"])
        for lane, keys in zip(self._lanes, state["lanes"], strict=True):
            lane.restore(*(self._read_again(keys[part]) for part in ("open", "waiting", "pieces")))
        self._counts = Counter(state["counts"])
        self._skipped = list(state["skipped"])

    def _next_pack(self) -> list[Held] | None:
        for lane in sorted(self._lanes, key=lambda lane: self._deficit(lane.sources[0])):
            if (pack := self._fill(lane)) is not None:
                if self._weigh == "sequences":
                    self._served[lane.sources[0]] += 1
                return pack
        return None

    def _fill(self, lane: _Lane) -> list[Held] | None:
        """Draw samples for a lane until it has a sequence; None where it has none left."""
        while lane.pieces or self._draw(lane):
            key, document = lane.pieces.popleft()
            if (pack := lane.packer.add((key, document), len(document))) is not None:
                return pack
        return lane.packer.drain()

    def _draw(self, lane: _Lane) -> bool:
        """Encode the next sample of a lane that can be used; False where all its sources have run out."""
        while behind := [number for number in lane.sources if not self._cursors[number].exhausted]:
            number = min(behind, key=self._deficit)
            first_pass = self._cursors[number].epoch == 0
            unit, row = self._cursors[number].next_key()
            self._counts["samples"] += 1
            self._counts["rows"] += first_pass
            try:
                pieces = self._pieces_of(number, unit, row)
            except SampleError as error:
                self._skip(self._sources[number], unit, row, error, first_pass)
                continue
            self._unusable_in_a_row = 0
            if self._weigh == "samples":
                self._served[number] += 1
            elif self._weigh == "tokens":
                # Of a first document a random part, as if it had begun before: streams are then out of step.
                part = (self._phases[number] or 1) if self._served[number] < 1 else 1
                self._served[number] += part * sum(map(len, pieces))
            lane.pieces.extend(((number, unit, row, piece), doc) for piece, doc in enumerate(pieces))
            return True
        return False

    def _deficit(self, number: int) -> float:
        """How much of a source has been served for its weight: the smaller, the further it is behind."""
        return self._served[number] / self._weights[number]

    def _pieces_of(self, number: int, unit: int, row: int) -> list[Document]:
        return self.documents_of(self._cursors[number].row(unit, row))

    def documents_of(self, row: dict[str, Any]) -> list[Document]:
        """The document of a row, or the pieces of one that is longer than a sequence.

        Raises:
            SampleError: the row cannot be used.
        """
        return list(fit_to_length(self._encode(parse_sample(row)), self._length))

    def _skip(self, source: Source, unit: int, row: int, error: SampleError, first_pass: bool) -> None:
        """Count a sample that cannot be used; stop the run where there are too many.

        Later passes over the same rows tell nothing new, unless nothing else comes.
        """
        self._counts["skipped"] += 1
        self._counts[f"skipped/{source.name}/{error.reason}"] += 1
        self._counts["unusable_rows"] += first_pass
        self._unusable_in_a_row += 1
        if len(self._skipped) < LISTED:
            self._skipped.append(
                {
                    "source": source.name,
                    "where": source.where(unit, row),
                    "reason": error.reason,
                    "error": str(error)[:_MESSAGE],
                }
            )
        unusable, rows = self._counts["unusable_rows"], self._counts["rows"]
        too_many = unusable > self._max_skipped * max(rows, _TOLERATED_FROM)
        if too_many or self._unusable_in_a_row > _TOLERATED_FROM:
            listed = "".join(f"\n  {entry['where']}: {entry['error']}" for entry in self._skipped)
            raise SoloError(
                f"{unusable} of {rows} rows cannot be used, more than data.max_skipped = "
                f"{self._max_skipped:g} allows:{listed}"
            )

    def _read_again(self, keys: Sequence[Sequence[int]]) -> list[Held]:
        held: list[Held] = []
        for (number, unit, row), of_sample in groupby(keys, key=lambda key: key[:3]):
            try:
                pieces = self._pieces_of(number, unit, row)
            except SampleError as error:
                where = self._sources[number].where(unit, row)
                raise SoloError(
                    f"the data changed since the checkpoint: {where} cannot be read again ({error}); put it "
                    "back, or start a new run"
                ) from error
            held += [((number, unit, row, piece), pieces[piece]) for *_, piece in of_sample]
        return held


@dataclass
class _Lane:
    """Sources whose documents share sequences, and what has been read for them."""

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
    """A stream's share of a source's units.

    Attributes:
        whole: units that the stream reads alone.
        parts: (unit, part, parts) of units that it shares with other streams.
    """

    whole: range
    parts: list[tuple[int, int, int]]


def deal(units: int, stream: int, streams: int, first: int = 0) -> tuple[Share, int]:
    """Deal the units of a source to streams so evenly that they end nearly together.

    Each stream gets equally many whole units. Those that are left over, fewer than there are streams, are cut
    into as few parts as give every stream one, and some a second.

    Args:
        units: number of units of the source.
        stream: the stream whose share is wanted.
        streams: number of streams.
        first: stream that gets the first part.

    Returns:
        The share, and the stream that gets the first part of the next source.
    """
    rest = units % streams
    whole = range(stream, units - rest, streams)
    if not rest:
        return Share(whole, []), first
    parts = math.ceil(streams / rest)
    numbers = range((stream - first) % streams, rest * parts, streams)
    shared = [(units - rest + number % rest, number // rest, parts) for number in numbers]
    return Share(whole, shared), (first + rest * parts) % streams


class _Cursor:
    """A stream's place in one source: which of its pieces are open, and how far each is read.

    A piece is a unit or a part of one; pieces are numbered within the stream's share. Nothing is opened
    before the first row is asked for: a state may come first.
    """

    def __init__(self, source: Source, share: Share, seed: str, stream: int, epochs: int | None) -> None:
        self._source = source
        self._share = share
        self._pieces = len(share.whole) + len(share.parts)
        self._reads_all = False
        self._unit_seed = seed  # alike in all streams: they agree on the parts of a unit
        self._seed = f"{seed}/{stream}"
        self._epochs = epochs
        self.epoch = 0
        self._opened = 0  # pieces opened in this epoch
        self._drawn = 0  # rows drawn in all
        self._open: list[list[int]] = []  # [piece, rows read]
        self._cache: dict[int, Sequence[dict[str, Any]]] = {}
        self._row_orders: dict[int, np.ndarray] = {}

    @property
    def exhausted(self) -> bool:
        """Whether all passes are done; if not, `epoch` is that of the next sample."""
        self._fill()
        return not self._open

    def next_key(self) -> tuple[int, int]:
        """(unit, row) of the next sample; the rows of an epoch come in a shuffled order, each once."""
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

    def row(self, unit: int, row: int) -> dict[str, Any]:
        """The raw sample of a key.

        Raises:
            SampleError: the file is broken there.
        """
        return self._rows(unit)[row]

    def state_dict(self) -> State:
        return {
            "epoch": self.epoch,
            "opened": self._opened,
            "drawn": self._drawn,
            "open": [list(piece) for piece in self._open],
            "reads_all": self._reads_all,
        }

    def load_state_dict(self, state: State) -> None:
        if state.get("reads_all"):
            self._read_all()
        self.epoch, self._opened, self._drawn = state["epoch"], state["opened"], state["drawn"]
        self._open = [list(piece) for piece in state["open"]]
        self._row_orders.clear()

    def _fill(self) -> None:
        """Open pieces until enough are open; begin the next epoch when this one is read to the end."""
        while self._pieces and len(self._open) < _SHUFFLED_UNITS:
            if self._opened == self._pieces:
                last = self._epochs is not None and self.epoch + 1 >= self._epochs
                if self._open or last:
                    return
                if self._drawn or self._epochs is not None:
                    self.epoch, self._opened = self.epoch + 1, 0
                elif not self._reads_all:
                    self._read_all()
                else:
                    raise SoloError(f"{self._source.name} has no rows")
            piece = int(self._order("units", self._pieces)[self._opened])
            self._opened += 1
            if len(self._row_order(piece)):
                self._open.append([piece, 0])

    def _read_all(self) -> None:
        """Take every unit: the stream's own have no rows, and without an end it needs some."""
        self._reads_all = True
        self._share = Share(range(len(self._source)), [])
        self._pieces, self._opened = len(self._source), 0
        self._row_orders.clear()

    def _piece(self, piece: int) -> tuple[int, int, int]:
        """(unit, part, parts) of a piece."""
        whole, shared = self._share
        return (whole[piece], 0, 1) if piece < len(whole) else shared[piece - len(whole)]

    def _row_order(self, piece: int) -> np.ndarray:
        """Rows of a piece in this epoch's order."""
        if piece not in self._row_orders:
            unit, part, parts = self._piece(piece)
            rows = np.arange(len(self._rows(unit)))
            # Without an end there are no passes to keep count of: rows too few to share are read by all.
            if parts > 1 and (self._epochs is not None or len(rows) >= _SHARED_ROWS * parts):
                chance = np.random.default_rng(_chance(f"{self._unit_seed}/parts/{unit}"))
                rows = chance.permutation(rows)[part::parts]
            self._row_orders[piece] = rows[self._order(f"rows/{unit}/{part}", len(rows))]
        return self._row_orders[piece]

    def _order(self, what: str, count: int) -> np.ndarray:
        generator = np.random.default_rng(_chance(f"{self._seed}/{what}/{self.epoch}"))
        return generator.permutation(count)

    def _rows(self, unit: int) -> Sequence[dict[str, Any]]:
        """Rows of a unit; those of the open units and of the one before stay in memory."""
        if (rows := self._cache.pop(unit, None)) is None:
            while len(self._cache) > _SHUFFLED_UNITS:
                self._cache.pop(next(iter(self._cache)))
            rows = self._source.read(unit)
        self._cache[unit] = rows  # the one that was used last comes last
        return rows


def _phases(weights: Sequence[float], stream: int, seed: str) -> list[float]:
    """What each source of a stream has been served at the start, as if the mixture had been running before.

    One source, drawn by weight, is due at once, the others at a random time within their period. So streams
    are not all at the same turn, and any few of them in a row draw the sources in proportion.
    """
    ends = np.cumsum(weights)
    # Multiples of the golden ratio are spread evenly over [0, 1), however many streams there are.
    place = (_fraction(f"{seed}/due") + stream * (math.sqrt(5) - 1) / 2) % 1
    due = min(int(np.searchsorted(ends, place * ends[-1], side="right")), len(weights) - 1)
    return [
        0.0 if number == due else _fraction(f"{seed}/{number}/{stream}/phase")
        for number in range(len(weights))
    ]


def _fraction(name: str) -> float:
    """A reproducible random number in [0, 1)."""
    return _chance(name) / 2**64


def _chance(name: str) -> int:
    """A reproducible random number from a name: no generator state to keep."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
