"""Packed batches for one rank, from worker processes, with a state that says what comes next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from solo_vlm.data.collate import PackedBatch, collate
from solo_vlm.data.streams import PackedSequence, State, VirtualStream
from solo_vlm.errors import SoloError

MakeStream = Callable[[int], VirtualStream]


class LoadedBatch(NamedTuple):
    """A packed batch, and the stream it came from with its state after it."""

    batch: PackedBatch
    stream: int
    state: State


class PackedLoader:
    """Iterates over the packed batches of one rank.

    Packed sequence g of the whole run comes from stream g mod `streams`, whatever the number of ranks and
    workers; those must divide the number of streams. Iterating goes on from where the state stands.

    Args:
        make_stream: builds stream number s; called in the worker that owns it.
        streams: number of virtual streams of the run.
        length: tokens in a batch.
        pad_token_id: fills the rest of a sequence.
        rank: of this process.
        ranks: how many there are.
        workers: processes that read ahead; 0 reads in this process.

    Raises:
        SoloError: ranks and workers do not divide the streams.
    """

    def __init__(
        self,
        make_stream: MakeStream,
        streams: int,
        length: int,
        pad_token_id: int,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
    ) -> None:
        if streams % (ranks * max(workers, 1)):
            raise SoloError(
                f"{streams} streams cannot be shared by {ranks} ranks with {max(workers, 1)} workers each: "
                "set data.streams to a multiple of their product"
            )
        self._make_stream = make_stream
        self._length = length
        self._pad_token_id = pad_token_id
        self._own = list(range(rank, streams, ranks))
        self._workers = workers
        self._states: dict[int, State] = {}
        self._last: int | None = None

    def __iter__(self) -> Iterator[PackedBatch]:
        after = 0 if self._last is None else self._own.index(self._last) + 1
        dataset = _PackedDataset(
            self._make_stream,
            self._length,
            self._pad_token_id,
            order=self._own[after:] + self._own[:after],
            states=dict(self._states),
        )
        loader: Any = DataLoader(
            dataset,
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=2 if self._workers else None,
        )
        for loaded in loader:
            self._states[loaded.stream] = loaded.state
            self._last = loaded.stream
            yield loaded.batch

    def state_dict(self) -> State:
        """States of this rank's streams, and the stream that was read last."""
        return {"last": self._last, "streams": {str(s): state for s, state in self._states.items()}}

    def load_state_dict(self, state: State) -> None:
        """Go on from a state: the next iteration begins with the sequence after it."""
        self._last = state["last"]
        self._states = {int(s): stream for s, stream in state["streams"].items()}

    def counts(self) -> dict[str, int]:
        """Sums over streams: sequences, documents, tokens, samples and skipped samples by reason."""
        totals: dict[str, int] = {}
        for state in self._states.values():
            for name, count in state["counts"].items():
                totals[name] = totals.get(name, 0) + count
        return totals

    def skipped(self) -> list[dict[str, str]]:
        """Samples that could not be used, the first of each stream: where they are, and what is wrong."""
        return [entry for state in self._states.values() for entry in state["skipped"]]


class _PackedDataset(IterableDataset[LoadedBatch]):
    """Reads its streams in turn; a worker reads every workers-th of them."""

    def __init__(
        self,
        make_stream: MakeStream,
        length: int,
        pad_token_id: int,
        order: list[int],
        states: dict[int, State],
    ) -> None:
        self._make_stream = make_stream
        self._length = length
        self._pad_token_id = pad_token_id
        self._order = order
        self._states = states

    def __iter__(self) -> Iterator[LoadedBatch]:
        worker = get_worker_info()
        mine = self._order[worker.id :: worker.num_workers] if worker else self._order
        streams = [iter(self._start(number)) for number in mine]
        while streams:
            running = []
            for stream in streams:
                if (packed := next(stream, None)) is not None:
                    yield self._collate(packed)
                    running.append(stream)
            streams = running

    def _start(self, number: int) -> VirtualStream:
        stream = self._make_stream(number)
        if number in self._states:
            stream.load_state_dict(self._states[number])
        return stream

    def _collate(self, packed: PackedSequence) -> LoadedBatch:
        batch = collate(packed.documents, self._length, self._pad_token_id)
        return LoadedBatch(batch, packed.stream, packed.state)
