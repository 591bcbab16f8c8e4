"""Virtual streams: one fixed order of packed sequences for any number of processes, resumable exactly.

The data are dealt to a fixed number of streams: stream s owns every S-th unit of every source. Each stream
mixes, shuffles and packs on its own; packed sequence g comes from stream g mod S. Ranks and workers only
share out streams, so they change who reads, never what comes next. A stream's state is keys and counters,
a few kilobytes, and travels with every packed sequence, so that prefetching cannot skew it.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import numpy as np

from solo_vlm.data.encode import Document, fit_to_length
from solo_vlm.data.packing import Packer
from solo_vlm.data.schema import Sample, SampleError, parse_sample
from solo_vlm.data.sources import Source
from solo_vlm.errors import SoloError

State = dict[str, Any]
Key = tuple[int, int, int, int]  # source, unit, row, piece of a long text
Held = tuple[Key, Document]
Encode = Callable[[Sample], Document]
Weigh = Literal["samples", "tokens", "sequences"]

LISTED = 20  # skipped samples that a stream names; it counts all

_SHUFFLED_UNITS = 4  # units that a stream reads from at a time, a row from either by chance
_MESSAGE = 500  # characters of a skipped sample's error that are kept
_TOLERATED_FROM = 1000  # samples: with fewer, a fraction of them says little


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
    each of one source alone.

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

    Raises:
        SoloError: a source has fewer units than there are streams, and `epochs` is None.
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
        self._cursors = [
            _Cursor(source, index, streams, f"{seed}/{number}", epochs)
            for number, source in enumerate(self._sources)
        ]
        self._served = [0] * len(mixture)
        numbers = range(len(mixture))
        groups = [[number] for number in numbers] if weigh == "sequences" else [list(numbers)]
        self._lanes = [_Lane(group, Packer(length, buffer_size)) for group in groups]
        self._counts: Counter[str] = Counter()
        self._skipped: list[dict[str, str]] = []

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
            unit, row = self._cursors[number].next_key()
            self._counts["samples"] += 1
            try:
                pieces = self._pieces_of(number, unit, row)
            except SampleError as error:
                self._skip(self._sources[number], unit, row, error)
                continue
            if self._weigh != "sequences":
                self._served[number] += sum(map(len, pieces)) if self._weigh == "tokens" else 1
            lane.pieces.extend(((number, unit, row, piece), doc) for piece, doc in enumerate(pieces))
            return True
        return False

    def _deficit(self, number: int) -> float:
        """How much of a source has been served for its weight: the smaller, the further it is behind."""
        return self._served[number] / self._weights[number]

    def _pieces_of(self, number: int, unit: int, row: int) -> list[Document]:
        sample = parse_sample(self._cursors[number].row(unit, row))
        return list(fit_to_length(self._encode(sample), self._length))

    def _skip(self, source: Source, unit: int, row: int, error: SampleError) -> None:
        """Count a sample that cannot be used; stop the run where there are too many."""
        self._counts["skipped"] += 1
        self._counts[f"skipped/{source.name}/{error.reason}"] += 1
        if len(self._skipped) < LISTED:
            self._skipped.append(
                {
                    "source": source.name,
                    "where": source.where(unit, row),
                    "reason": error.reason,
                    "error": str(error)[:_MESSAGE],
                }
            )
        skipped, samples = self._counts["skipped"], self._counts["samples"]
        if skipped > self._max_skipped * max(samples, _TOLERATED_FROM):
            listed = "".join(f"\n  {entry['where']}: {entry['error']}" for entry in self._skipped)
            raise SoloError(
                f"{skipped} of {samples} samples cannot be used, more than data.max_skipped = "
                f"{self._max_skipped:g} allows:{listed}"
            )

    def _read_again(self, keys: Sequence[Sequence[int]]) -> list[Held]:
        held: list[Held] = []
        for (number, unit, row), of_sample in groupby(keys, key=lambda key: key[:3]):
            pieces = self._pieces_of(number, unit, row)
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


class _Cursor:
    """A stream's place in one source: which units are open, and how far each is read."""

    def __init__(self, source: Source, stream: int, streams: int, seed: str, epochs: int | None) -> None:
        self._own = range(stream, len(source), streams)
        if not self._own and epochs is None:  # with epochs, other streams read a small source to its end
            raise SoloError(
                f"{source.name} has {len(source)} units (row groups), too few for {streams} streams: "
                "set data.streams lower, or data.epochs, or write the data with smaller row groups"
            )
        self._source = source
        self._seed = f"{seed}/{stream}"
        self._epochs = epochs
        self._epoch = 0
        self._opened = 0  # units opened in this epoch
        self._drawn = 0  # rows drawn in all
        self._open: list[list[int]] = []  # [unit, rows read]
        self._cache: dict[int, Sequence[dict[str, Any]]] = {}
        self._row_orders: dict[int, np.ndarray] = {}
        self._fill()

    @property
    def exhausted(self) -> bool:
        return not self._open

    def next_key(self) -> tuple[int, int]:
        """(unit, row) of the next sample; the rows of an epoch come in a shuffled order, each once."""
        chosen = _chance(f"{self._seed}/{self._drawn}") % len(self._open)
        unit, done = self._open[chosen]
        count = len(self._rows(unit))
        if unit not in self._row_orders:
            self._row_orders[unit] = self._order(f"rows/{unit}", count)
        row = int(self._row_orders[unit][done])
        self._drawn += 1
        self._open[chosen][1] += 1
        if done + 1 == count:
            self._open.pop(chosen)
            self._row_orders.pop(unit)
            self._fill()
        return unit, row

    def row(self, unit: int, row: int) -> dict[str, Any]:
        """The raw sample of a key.

        Raises:
            SampleError: the file is broken there.
        """
        return self._rows(unit)[row]

    def state_dict(self) -> State:
        return {
            "epoch": self._epoch,
            "opened": self._opened,
            "drawn": self._drawn,
            "open": [list(unit) for unit in self._open],
        }

    def load_state_dict(self, state: State) -> None:
        self._epoch, self._opened, self._drawn = state["epoch"], state["opened"], state["drawn"]
        self._open = [list(unit) for unit in state["open"]]
        self._row_orders.clear()

    def _fill(self) -> None:
        """Open units until enough are open; begin the next epoch when this one is read to the end."""
        while self._own and len(self._open) < _SHUFFLED_UNITS:
            if self._opened == len(self._own):
                last = self._epochs is not None and self._epoch + 1 >= self._epochs
                if self._open or last:
                    return
                if not self._drawn:
                    raise SoloError(f"{self._source.name} has no rows")
                self._epoch, self._opened = self._epoch + 1, 0
            unit = self._own[self._order("units", len(self._own))[self._opened]]
            self._opened += 1
            if len(self._rows(unit)):
                self._open.append([unit, 0])

    def _order(self, what: str, count: int) -> np.ndarray:
        generator = np.random.default_rng(_chance(f"{self._seed}/{what}/{self._epoch}"))
        return generator.permutation(count)

    def _rows(self, unit: int) -> Sequence[dict[str, Any]]:
        """Rows of a unit; those of the open units and of the one before stay in memory."""
        if (rows := self._cache.pop(unit, None)) is None:
            while len(self._cache) > _SHUFFLED_UNITS:
                self._cache.pop(next(iter(self._cache)))
            rows = self._source.read(unit)
        self._cache[unit] = rows  # the one that was used last comes last
        return rows


def _chance(name: str) -> int:
    """A reproducible random number from a name: no generator state to keep."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
