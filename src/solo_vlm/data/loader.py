"""Packed batches for one rank, from worker processes, with a state that says what comes next.

The packed sequences of a run stand in slots, in one order: slot g is that of stream g mod S. Rank r of R
takes slots r, r + R, r + 2R and so on. A stream that has ended leaves its slots empty, so that the others
keep theirs.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from solo_vlm.data.collate import PackedBatch, collate
from solo_vlm.data.sources import Source, fingerprints
from solo_vlm.data.streams import Key, State, VirtualStream
from solo_vlm.errors import SoloError

MakeStream = Callable[[int], VirtualStream]


class PackedLoader:
    """Iterates over the packed batches of one rank.

    The order depends neither on ranks nor on workers; their product must divide the number of streams. An
    iteration goes on from where the state stands, and ends with the last batch of the rank's own streams.
    Before that, a stream that has ended gives empty batches when it would be its turn.

    Args:
        make_stream: builds stream number s; called in the worker that owns it.
        streams: number of virtual streams of the run.
        length: tokens in a batch.
        pad_token_id: fills the rest of a sequence.
        rank: of this process.
        ranks: how many there are.
        workers: processes that read ahead; 0 reads in this process.
        sources: of the mixture, in its order: to name samples, and to notice that the data have changed.
        patch_dim: width of `pixel_values`, for batches without documents; 0 where the model reads text alone.
        threads: in each process that reads; they fill sequences of different streams: the order stays. OpenCV
            keeps to the thread that calls it wherever a loader reads, also in this process.

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
        sources: Sequence[Source] = (),
        patch_dim: int = 3072,
        threads: int = 1,
    ) -> None:
        if streams % (ranks * max(workers, 1)):
            raise SoloError(
                f"{streams} streams cannot be shared by {ranks} ranks with {max(workers, 1)} workers each: "
                "set data.streams to a multiple of their product"
            )
        self._make_stream = make_stream
        self._form = {"length": length, "pad_token_id": pad_token_id, "patch_dim": patch_dim}
        self._own = list(range(rank, streams, ranks))
        self._ranks = ranks
        self._workers = workers
        self._threads = threads
        self.sources = sources
        self._data = {"streams": streams, "sources": [list(pair) for pair in fingerprints(sources)]}
        self._states: dict[int, State] = {}
        self._slots = 0  # that this rank has consumed
        self._last_keys: list[Key] = []

    def __iter__(self) -> Iterator[PackedBatch]:
        turn = self._slots % len(self._own)
        order = self._own[turn:] + self._own[:turn]
        dataset = _Slots(self._make_stream, self._form, order, dict(self._states), self._threads)
        loader: Any = DataLoader(
            dataset,
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=2 if self._workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        ended: dict[int, State] = {}
        empty = 0  # slots that are held back until a batch follows them
        for slot in loader:
            if isinstance(slot, SoloError):
                raise slot
            if slot.batch is None:
                ended[slot.stream] = slot.state
                if len(ended) == len(self._own):
                    break
                empty += 1
                continue
            while empty:
                empty -= 1
                yield self.empty_batch()
            self._slots += 1
            self._states[slot.stream], self._last_keys = slot.state, slot.keys
            yield slot.batch
        self._states |= ended  # they count what was skipped after the last batch

    def empty_batch(self) -> PackedBatch:
        """Consume a slot without documents: what a rank whose iteration has ended takes while others go on.

        All padding, no labels, no patches.
        """
        self._slots += 1
        self._last_keys = []
        return collate([], **self._form)

    def last_samples(self) -> list[str]:
        """Names of the samples in the last batch, one a document: file and place."""
        return [self.sources[source].where(unit, row) for source, unit, row, _ in self._last_keys]

    def state_dict(self) -> State:
        """Where this rank stands, without what workers have read ahead.

        `slots` that the rank has consumed, and the states of its `streams`; `data` says of what.
        """
        streams = {str(stream): state for stream, state in self._states.items()}
        return {"slots": self._slots, "streams": streams, "data": self._data}

    @staticmethod
    def merge(states: Sequence[State]) -> State:
        """One state of a run from the states of all its ranks. That of a single process is one already.

        Raises:
            SoloError: the ranks have not consumed equally many slots.
        """
        slots = [state["slots"] for state in states]
        if len(set(slots)) > 1:
            raise SoloError(f"ranks must be saved at the same place of the data, not after {slots} batches")
        streams = {stream: saved for state in states for stream, saved in state["streams"].items()}
        return {"slots": sum(slots), "streams": streams, "data": states[0]["data"]}

    def load_state_dict(self, state: State) -> None:
        """Go on from the state of a run, of whatever ranks and workers: with the slot after it.

        Args:
            state: what `merge` returned.

        Raises:
            SoloError: the data have changed, or the ranks do not divide the slots that are done.
        """
        _check_unchanged(state["data"], self._data)
        self._slots, rest = divmod(state["slots"], self._ranks)
        if rest:
            raise SoloError(
                f"the run stopped after {state['slots']} packed sequences: {self._ranks} ranks cannot go on "
                "together from there; use a number of ranks that divides it"
            )
        self._states = {s: state["streams"][str(s)] for s in self._own if str(s) in state["streams"]}
        self._last_keys = []

    def counts(self) -> dict[str, int]:
        """Sums over the rank's streams: sequences, documents, tokens, samples, and skipped ones by reason."""
        totals: Counter[str] = Counter()
        for state in self._states.values():
            totals.update(state["counts"])
        return dict(totals)

    def skipped(self) -> list[dict[str, str]]:
        """Samples that could not be used, the first `LISTED` of each of this rank's streams.

        Each has `source`, `where` (file and place), `reason` and `error`, as in the report of
        `solo data verify`.
        """
        return [entry for state in self._states.values() for entry in state["skipped"]]


@dataclass(frozen=True)
class _Slot:
    """What a stream gives at its turn: a batch, or none where it has ended; and its state after it."""

    stream: int
    state: State
    batch: PackedBatch | None = None
    keys: Sequence[Key] = ()

    def pin_memory(self) -> _Slot:
        """What the DataLoader calls to make copies to a GPU fast."""
        if self.batch is None:
            return self
        pinned: Any = {
            name: value.pin_memory() if isinstance(value, Tensor) else value
            for name, value in self.batch.items()
        }
        return replace(self, batch=pinned)


class _Slots(IterableDataset[_Slot | SoloError]):
    """The slots of streams in turn, without end; a worker gives every workers-th of them.

    A worker cannot know when the others are done, so the loader decides when to stop.
    """

    def __init__(
        self,
        make_stream: MakeStream,
        form: dict[str, int],
        order: list[int],
        states: dict[int, State],
        threads: int,
    ) -> None:
        self._make_stream = make_stream
        self._form = form
        self._order = order
        self._states = states
        self._threads = threads
        self._reader_for = os.getpid()

    def __iter__(self) -> Iterator[_Slot | SoloError]:
        # On a photograph its own threads take half as much processor time again, and save nothing.
        cv2.setNumThreads(1)
        worker = get_worker_info()
        if worker:
            _end_with(self._reader_for)
        mine = self._order[worker.id :: worker.num_workers] if worker else self._order
        try:
            yield from self._in_turn([self._slots_of(stream) for stream in mine])
        except SoloError as error:  # as it is: the DataLoader would wrap it into a worker's traceback
            yield error

    def _in_turn(self, streams: list[Iterator[_Slot]]) -> Iterator[_Slot]:
        """One slot of each stream, round after round; threads work on those that come next."""
        turns = cycle(streams)
        if self._threads == 1:
            yield from map(next, turns)
        # Never two slots of one stream at a time: its second needs the state after its first.
        count = min(self._threads, len(streams))
        with ThreadPoolExecutor(count) as pool:
            ahead: deque[Future[_Slot]] = deque(pool.submit(next, slots) for slots in islice(turns, count))
            while True:
                slot = ahead.popleft().result()
                ahead.append(pool.submit(next, next(turns)))
                yield slot

    def _slots_of(self, number: int) -> Iterator[_Slot]:
        stream = self._make_stream(number)
        if number in self._states:
            stream.load_state_dict(self._states[number])
        for packed in stream:
            yield _Slot(number, packed.state, collate(packed.documents, **self._form), packed.keys)
        ended = _Slot(number, stream.state_dict())
        while True:
            yield ended


def _end_with(owner: int) -> None:
    """Let this process end when another one says so or is gone, and not by signals to all processes of a run.

    Those are for the owner, which goes on reading until it has saved.
    """
    signals = {signal.SIGTERM, signal.SIGINT}
    if not hasattr(signal, "sigtimedwait"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:
        while is_alive():
            sent = signal.sigtimedwait(signals, 5.0)
            if sent and sent.si_pid == owner:
                break
        os._exit(0)

    def is_alive() -> bool:
        try:
            os.kill(owner, 0)
        except ProcessLookupError:
            return False
        return True

    threading.Thread(target=wait, daemon=True).start()


def _check_unchanged(before: State, now: State) -> None:
    """Refuse a state of other data: keys in it would name other samples."""
    if before["streams"] != now["streams"]:
        raise SoloError(
            f"the checkpoint has data.streams = {before['streams']}, not {now['streams']}: it cannot change"
        )
    if len(before["sources"]) != len(now["sources"]):
        raise SoloError(
            f"the data changed since the checkpoint: it knows {len(before['sources'])} sources, "
            f"the mixture has {len(now['sources'])}"
        )
    for (old_name, old), (name, new) in zip(before["sources"], now["sources"], strict=True):
        if old != new:
            was = "" if old_name == name else f" (then {old_name})"
            raise SoloError(
                f"the data changed since the checkpoint: files of source {name}{was} were added, removed or "
                "rewritten; put them back, or start a new run"
            )
