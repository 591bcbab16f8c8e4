"""Virtual streams: one order of packed sequences for any number of processes, with exact resume.

The data is divided among a fixed number S of streams: stream s owns every S-th shard of every source, plus an
equal part of the shards that do not divide evenly. Each stream mixes, shuffles and packs independently, and
packed sequence g comes from stream g mod S. Ranks and workers divide the streams: they affect which process
reads, never the order.

Documents wait in packers with their images compressed, and are decoded when their sequence is complete. The
state of a stream is numbers of draws, lengths and counters, a kilobyte or two; it travels with every packed
sequence, so prefetching does not affect it.
"""

from __future__ import annotations

import base64
import lzma
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from solo_vlm.data.encode import Document, Draft, fit_to_length
from solo_vlm.data.packing import Packer
from solo_vlm.data.row_order import Place, RowOrder, deal, fraction, open_bytes
from solo_vlm.data.sample import FilteredRow, Sample, SampleError, parse_sample
from solo_vlm.data.sources import Source
from solo_vlm.utils.errors import SoloError

State = dict[str, Any]
Key = tuple[int, int, int, int]  # source, shard, row, piece of a long text
Encode = Callable[[Sample], Draft]
WeightBy = Literal["samples", "tokens", "sequences"]

ORDER_VERSION = 6  # increased with the order that data and seed give, or the form of a state

LISTED = 20  # skipped samples that a stream lists; it counts all

_COUNTERS, _OPENED, _EVENTS = 5, 3, 5  # columns of the tables of `RowOrder.state`, with the source's number
# For bytes of unrelated numbers: no context, no alignment, no header. A seventh smaller than by zlib.
_FILTERS = [{"id": lzma.FILTER_LZMA1, "lc": 0, "lp": 0, "pb": 0, "dict_size": 2**16}]

_MAX_ERROR_LENGTH = 500  # characters kept of a skipped sample's error
_MIN_ROWS = 1000  # rows assumed when max_skipped is applied to fewer; also the limit of a series


@dataclass(frozen=True)
class MixtureItem:
    """Source with its weight in the mixture."""

    source: Source
    weight: float = 1.0


@dataclass(frozen=True)
class PackedSequence:
    """Documents of one packed sequence, their keys, and the stream's state after it.

    Attributes:
        skipped: Samples that were skipped since the sequence before, as far as they are listed.
    """

    documents: list[Document]
    keys: list[Key]
    state: State
    skipped: list[dict[str, str]]


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
        encode: Function that encodes a sample, without decoding its images.
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
        self._orders = []
        memory = open_bytes(streams, len(mixture))
        first = 0  # stream with the first part of a source's remainder
        for number, source in enumerate(self._sources):
            share, first = deal(len(source), index, streams, first)
            self._orders.append(RowOrder(source, share, f"{seed}/{number}", index, epochs, memory))
        self._phases = _phases(self._weights, index, str(seed))
        self._consumed = list(self._phases)
        numbers = range(len(mixture))
        groups = [[number] for number in numbers] if weight_by == "sequences" else [list(numbers)]
        self._groups = [_SourceGroup(numbers, Packer(length, buffer_size)) for numbers in groups]
        self._counts: Counter[str] = Counter()
        self._skipped: list[dict[str, str]] = []  # since the last packed sequence
        self._listed: list[dict[str, str]] = []  # by this object
        self._unusable_in_a_row = Counter(drawn=0, decoded=0)

    def __iter__(self) -> Iterator[PackedSequence]:
        while (pack := self._next_pack()) is not None:
            keys, documents = [key for key, _ in pack], [document for _, document in pack]
            self._counts["sequences"] += 1
            self._counts["documents"] += len(documents)
            self._counts["tokens"] += sum(map(len, documents))
            yield PackedSequence(documents, keys, self.state_dict(), self.take_skipped())

    def take_skipped(self) -> list[dict[str, str]]:
        """Return the samples that were skipped since the last packed sequence, as far as they are listed."""
        taken, self._skipped = self._skipped, []
        return taken

    def state_dict(self) -> State:
        """Return the position as plain lists, numbers and strings."""
        parts = [part for group in self._groups for part in group.parts()]
        held = [item for part in parts for item in part]
        oldest = [order.drawn for order in self._orders]
        for item in held:
            oldest[item.source] = min(item.draw, oldest[item.source])
        counters, opened, events = zip(*map(RowOrder.state, self._orders, oldest), strict=True)
        documents = _table(map(_Held.numbers, held), _Held.NUMBERS)
        # Draws of a source mostly follow one another, so their differences take almost no space.
        by_source = np.argsort(documents[:, 0], kind="stable")
        documents[by_source, 1] = np.diff(documents[by_source, 1], prepend=0)
        return {
            "position": _packed(
                _table(counters, _COUNTERS),
                _table(_numbered(opened), _OPENED),
                _table(_numbered(events), _EVENTS),
                _table(([len(part)] for part in parts), 1),
                documents,
            ),
            "consumed": list(self._consumed),
            "counts": dict(self._counts),
        }

    def load_state_dict(self, state: State) -> None:
        """Resume from a state; documents that the packers held are read when their sequence is complete."""
        columns = (_COUNTERS, _OPENED, _EVENTS, 1, _Held.NUMBERS)
        counters, opened, events, sizes, documents = _unpacked(state["position"], columns)
        for number, order in enumerate(self._orders):
            of_order = (table[table[:, 0] == number, 1:].tolist() for table in (opened, events))
            order.load_state(counters[number].tolist(), *of_order)
        by_source = np.argsort(documents[:, 0], kind="stable")
        documents[by_source, 1] = np.cumsum(documents[by_source, 1])
        held = (_Held(*numbers) for numbers in documents.tolist())
        size = iter(sizes[:, 0].tolist())
        for group in self._groups:
            group.restore(*(list(islice(held, next(size))) for _ in group.parts()))
        self._consumed = list(state["consumed"])
        self._counts = Counter(state["counts"])

    def _next_pack(self) -> list[tuple[Key, Document]] | None:
        """Return the documents of the next packed sequence; None at the end of all sources."""
        while True:
            for group in sorted(self._groups, key=lambda group: self._progress(group.sources[0])):
                if (held := self._fill(group)) is not None:
                    break
            else:
                return None
            self._read_again(group, held)
            if pack := list(self._decode(held)):
                if self._weight_by == "sequences":
                    self._consumed[group.sources[0]] += 1
                return pack

    def _fill(self, group: _SourceGroup) -> list[_Held] | None:
        """Draw samples for a group until a sequence is complete; return None at the end of its sources."""
        while group.pieces or self._draw(group):
            item = group.pieces.popleft()
            if (pack := group.packer.add(item, item.length)) is not None:
                return pack
        return group.packer.drain()

    def _decode(self, held: list[_Held]) -> Iterator[tuple[Key, Document]]:
        """Yield the documents of a complete sequence, without those that have a damaged image."""
        for item in held:
            assert item.content is not None
            key, draft, first_pass = item.content
            number, shard, row, _ = key
            try:
                yield key, draft.decode()
            except SampleError as error:
                # The source is behind again by what it did not give; only long texts have several pieces.
                self._consumed[number] -= {"samples": 1, "tokens": item.length}.get(self._weight_by, 0)
                self._skip(self._sources[number], shard, row, error, first_pass, "decoded")
            else:
                self._unusable_in_a_row["decoded"] = 0

    def _read_again(self, group: _SourceGroup, held: list[_Held]) -> None:
        """Read the documents of a sequence that a state only named, and all others of the same shards."""
        unread = [item for part in (held, *group.parts()) for item in part if item.content is None]
        for number in {item.source for item in held if item.content is None}:
            order, items = self._orders[number], [item for item in unread if item.source == number]
            places = order.places(min(item.draw for item in items))
            shard_of = {draw: order.shard_of(places[draw]) for draw in {item.draw for item in items}}
            for shard in {shard_of[item.draw] for item in held if item.source == number and not item.content}:
                rows = order.peek(shard)
                of_shard = (item for item in items if shard_of[item.draw] == shard)
                for draw, pieces in groupby(of_shard, key=lambda item: item.draw):
                    self._read_row(rows, shard, places[draw], list(pieces))

    def _read_row(
        self, rows: Sequence[dict[str, Any]], shard: int, place: Place, pieces: list[_Held]
    ) -> None:
        """Read the document of a row again, or pieces of it."""
        number, row = pieces[0].source, place.offset
        try:
            row = self._orders[number].row_of(place, len(rows))
            drafts = self.drafts_of(rows[row])
            for item in pieces:
                if len(draft := drafts[item.piece]) != item.length:
                    raise IndexError(f"{len(draft)} tokens instead of {item.length}")
                item.content = _Content((number, shard, row, item.piece), draft, place.epoch == 0)
        except (SampleError, IndexError) as error:
            where = self._sources[number].where(shard, row)
            raise SoloError(
                f"the data changed since the checkpoint: {where} cannot be read again ({error}); put "
                "it back, or start a new run"
            ) from error

    def _draw(self, group: _SourceGroup) -> bool:
        """Encode the group's next usable sample; return False if all its sources are exhausted."""
        while behind := [number for number in group.sources if not self._orders[number].exhausted]:
            number = min(behind, key=self._progress)
            first_pass = self._orders[number].epoch == 0
            draw = self._orders[number].drawn
            shard, row = self._orders[number].next_key()
            broken = None
            try:
                drafts = self.drafts_of(self._orders[number].row(shard, row))
            except FilteredRow:
                self._orders[number].filtered += 1
                self._counts.update(["filtered", f"filtered/{self._sources[number].name}"])
                continue
            except SampleError as error:
                broken = error
            self._counts["samples"] += 1
            self._counts["rows"] += first_pass
            if broken:
                self._skip(self._sources[number], shard, row, broken, first_pass, "drawn")
                continue
            self._unusable_in_a_row["drawn"] = 0
            if self._weight_by == "samples":
                self._consumed[number] += 1
            elif self._weight_by == "tokens":
                # Count a random part of the first document, so that streams do not run in phase.
                part = (self._phases[number] or 1) if self._consumed[number] < 1 else 1
                self._consumed[number] += part * sum(map(len, drafts))
            group.pieces.extend(
                _Held(
                    number, draw, piece, len(draft), _Content((number, shard, row, piece), draft, first_pass)
                )
                for piece, draft in enumerate(drafts)
            )
            return True
        return False

    def _progress(self, number: int) -> float:
        """Return the consumption of a source in units of its weight."""
        return self._consumed[number] / self._weights[number]

    def drafts_of(self, row: dict[str, Any]) -> list[Draft]:
        """Encode a row as one document, or as the pieces of one longer than a sequence.

        Raises:
            SampleError: The row is unusable.
        """
        return list(fit_to_length(self._encode(parse_sample(row)), self._length))

    def _skip(
        self, source: Source, shard: int, row: int, error: SampleError, first_pass: bool, found: str
    ) -> None:
        """Count an unusable sample, "drawn" or "decoded"; raise SoloError if there are too many.

        Only the first pass over a source counts towards the limit, except for an unbroken series.
        """
        self._counts["skipped"] += 1
        self._counts[f"skipped/{source.name}/{error.reason}"] += 1
        self._counts["unusable_rows"] += first_pass
        self._unusable_in_a_row[found] += 1
        if len(self._listed) < LISTED:
            entry = {
                "source": source.name,
                "where": source.where(shard, row),
                "reason": error.reason,
                "error": str(error)[:_MAX_ERROR_LENGTH],
            }
            self._listed.append(entry)
            if self._counts["skipped"] <= LISTED:
                self._skipped.append(entry)
        unusable, rows = self._counts["unusable_rows"], self._counts["rows"]
        too_many = unusable > self._max_skipped * max(rows, _MIN_ROWS)
        if too_many or self._unusable_in_a_row[found] > _MIN_ROWS:
            listed = "".join(f"\n  {entry['where']}: {entry['error']}" for entry in self._listed)
            raise SoloError(
                f"{unusable} of {rows} rows are unusable, more than data.max_skipped = {self._max_skipped:g} "
                f"allows:{listed}"
            )


class _Content(NamedTuple):
    """Content of a document that was read.

    Attributes:
        draft: Its tokens and compressed images.
        first_pass: Whether it was read in the first pass over its source.
    """

    key: Key
    draft: Draft
    first_pass: bool


@dataclass(eq=False)
class _Held:
    """Document that waits for its packed sequence.

    Attributes:
        source: Number of its source.
        draw: Number of the draw from the source.
        piece: Number of the piece of a long text.
        length: Number of tokens.
        content: None after a state was loaded, until the document is read again.
    """

    source: int
    draw: int
    piece: int
    length: int
    content: _Content | None = None

    NUMBERS = 4

    def numbers(self) -> tuple[int, ...]:
        return self.source, self.draw, self.piece, self.length


@dataclass
class _SourceGroup:
    """Sources whose documents are packed together, with their packer and the pieces read for it."""

    sources: list[int]
    packer: Packer[_Held]
    pieces: deque[_Held] = field(default_factory=deque)

    def parts(self) -> tuple[Sequence[_Held], ...]:
        return self.packer.open, self.packer.waiting, self.pieces

    def restore(self, in_open_pack: list[_Held], waiting: list[_Held], pieces: list[_Held]) -> None:
        self.packer.restore(*([(item, item.length) for item in part] for part in (in_open_pack, waiting)))
        self.pieces = deque(pieces)


def _table(rows: Iterable[Sequence[int]], columns: int) -> NDArray[np.int64]:
    return np.array(list(rows), "<i8").reshape(-1, columns)


def _numbered(by_source: Iterable[Iterable[Sequence[int]]]) -> Iterator[tuple[int, ...]]:
    """Yield the rows of all sources, each with the number of its source."""
    return ((number, *row) for number, rows in enumerate(by_source) for row in rows)


def _packed(*tables: NDArray[np.int64]) -> str:
    """Return tables of integers as text: column by column, byte by byte, compressed."""
    sizes = np.array([len(table) for table in tables], "<i8")
    numbers = np.concatenate([sizes, *(table.T.ravel() for table in tables)])
    planes = numbers.view(np.uint8).reshape(-1, 8).T
    return base64.b85encode(lzma.compress(planes.tobytes(), lzma.FORMAT_RAW, filters=_FILTERS)).decode()


def _unpacked(text: str, columns: Sequence[int]) -> list[NDArray[np.int64]]:
    planes = lzma.decompress(base64.b85decode(text), lzma.FORMAT_RAW, filters=_FILTERS)
    numbers = np.frombuffer(planes, np.uint8).reshape(8, -1).T.copy().view("<i8").ravel()
    sizes = numbers[: len(columns)].tolist()
    ends = np.cumsum([len(columns), *(size * width for size, width in zip(sizes, columns, strict=True))])
    parts = np.split(numbers, ends)[1:-1]
    return [part.reshape(width, -1).T.copy() for part, width in zip(parts, columns, strict=True)]


def _phases(weights: Sequence[float], stream: int, seed: str) -> list[float]:
    """Return the initial consumption of each source, as if the round-robin had been running before.

    One source, drawn by weight, is due at once; the others at a random time within their period. So streams
    are at different positions, and the first sequences of any few streams are a fair sample of the sources.
    """
    ends = np.cumsum(weights)
    # Multiples of the golden ratio cover [0, 1) evenly for any number of streams.
    place = (fraction(f"{seed}/due") + stream * (math.sqrt(5) - 1) / 2) % 1
    due = min(int(np.searchsorted(ends, place * ends[-1], side="right")), len(weights) - 1)
    return [
        0.0 if number == due else fraction(f"{seed}/{number}/{stream}/phase")
        for number in range(len(weights))
    ]
