"""Packed batches for one rank, from worker processes, with a state that says what comes next.

The packed sequences of a run stand in slots, in one order: slot g is that of stream g mod S. Rank r of R
reads slots r, r + R, r + 2R and so on. A stream that has ended leaves its slots empty, so that the others
keep theirs; what is trained on is the sequence of filled slots, the same for any ranks and workers.
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

from solo_vlm.data.collate import PackedBatch, collate, num_supervised_tokens
from solo_vlm.data.sources import Source, fingerprints
from solo_vlm.data.streams import ORDER_VERSION, Key, State, VirtualStream
from solo_vlm.models.solo.processing_solo import num_image_tokens
from solo_vlm.utils.errors import SoloError

MakeStream = Callable[[int], VirtualStream]
# What this rank has found, and whether its data have ended -> what each rank has found, and whether all have.
AddUp = Callable[[Sequence["LoadedSequence"], bool], tuple[list[int], bool]]


class PackedLoader:
    """Reads the packed sequences of one rank, each with its documents' keys.

    The order depends neither on ranks nor on workers; their product must divide the number of streams.
    Reading resumes where the state stands. Several ranks keep together by `take_together`; iterating is for
    one rank, or for data without an end.

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
        self._streams = streams
        self._own = list(range(rank, streams, ranks))
        self._rank = rank
        self._ranks = ranks
        self._workers = workers
        self._threads = threads
        self.sources = sources
        self._data = {
            "order": ORDER_VERSION,
            "streams": streams,
            "sources": [list(pair) for pair in fingerprints(sources)],
        }
        self._states: dict[int, State] = {}
        self._slots = 0  # of the run that are consumed
        self._ended: set[int] = set()  # streams of this rank
        self._turns: Iterator[_Slot | SoloError] | None = None

    def __iter__(self) -> Iterator[PackedBatch]:
        """This rank's packed batches to the end of its data. Ranks need not end together."""
        while not self.ended:
            for sequence in self.take(self._ranks):
                yield sequence.batch

    @property
    def ended(self) -> bool:
        """Whether nothing is left in any stream of this rank."""
        return len(self._ended) == len(self._own)

    def take_together(self, size: int, add_up: AddUp) -> list[LoadedSequence | None]:
        """Consume the next packed sequences of the run, with all ranks at once; return this rank's part.

        Which sequences these are depends neither on ranks nor on workers. There are fewer than `size` only
        where the data end, none after their end.

        Args:
            size: sequences for all ranks together.
            add_up: tells all ranks what each has found; called equally often by all.

        Returns:
            Equally many turns for every rank; None in a turn in which others have a sequence and it has not.
        """
        mine: list[LoadedSequence | None] = []
        found = [0] * self._ranks
        while (missing := size - sum(found)) > 0:
            new = self.take(missing)
            mine += new
            of_ranks, all_ended = add_up(new, self.ended)
            found = [before + more for before, more in zip(found, of_ranks, strict=True)]
            if all_ended:
                break
        return mine + [None] * (max(found) - len(mine))

    def take(self, slots: int) -> list[LoadedSequence]:
        """Consume the next slots of the run; return this rank's packed sequences among them, in order.

        Streams that have ended leave their slots empty.
        """
        first = self._slots + (self._rank - self._slots) % self._ranks
        self._slots += slots
        found = []
        for _ in range(first, self._slots, self._ranks):
            if self.ended:
                break
            if self._turns is None:
                self._turns = self._read(first)
            slot = next(self._turns)
            if isinstance(slot, SoloError):
                self.close()
                raise slot
            self._states[slot.stream] = slot.state
            if slot.batch is None:
                self._ended.add(slot.stream)
            else:
                found.append(LoadedSequence(slot.batch, slot.keys))
        if self.ended:
            self.close()
        return found

    def close(self) -> None:
        """End the worker processes; what they have read ahead is read again by the next `take`."""
        self._turns = None

    def _read(self, slot: int) -> Iterator[_Slot | SoloError]:
        """What the rank's streams give from a slot on, turn by turn, without end."""
        turn = self._own.index(slot % self._streams)
        order = self._own[turn:] + self._own[:turn]
        dataset = _Slots(self._make_stream, self._form, order, dict(self._states), self._threads)
        loader: Any = DataLoader(
            dataset,
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=2 if self._workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        return iter(loader)

    def empty_batch(self) -> PackedBatch:
        """Padding alone, no labels, no patches: for a rank that has no sequence while others have one."""
        return collate([], **self._form)

    def names(self, sequence: LoadedSequence) -> list[str]:
        """File and place of each document's sample."""
        return [self.sources[source].where(unit, row) for source, unit, row, _ in sequence.keys]

    def state_dict(self) -> State:
        """Where the run stands, without what workers have read ahead.

        `slots` of the run that are consumed, and the states of this rank's `streams`; `data` says of what.
        """
        streams = {str(stream): state for stream, state in self._states.items()}
        return {"slots": self._slots, "streams": streams, "data": self._data}

    @staticmethod
    def merge(states: Sequence[State]) -> State:
        """One state of a run from the states of all its ranks. That of a single process is one already.

        Raises:
            SoloError: the ranks do not stand at the same slot.
        """
        slots = [state["slots"] for state in states]
        if len(set(slots)) > 1:
            raise SoloError(f"ranks must be saved at the same place of the data, not after {slots} slots")
        streams = {stream: saved for state in states for stream, saved in state["streams"].items()}
        return {"slots": slots[0], "streams": streams, "data": states[0]["data"]}

    def load_state_dict(self, state: State) -> None:
        """Resume from the state of a run, of whatever ranks and workers: with the slot after it.

        Args:
            state: what `merge` returned.

        Raises:
            SoloError: the data have changed, or the state is of a version that orders them differently.
        """
        _check_unchanged(state["data"], self._data)
        self._slots = state["slots"]
        self._states = {s: state["streams"][str(s)] for s in self._own if str(s) in state["streams"]}
        self._ended, self._turns = set(), None

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
class LoadedSequence:
    """A packed sequence with its token counts and the keys of its documents."""

    batch: PackedBatch
    keys: Sequence[Key]

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.keys)

    @property
    def document_lengths(self) -> list[int]:
        """Tokens per document, without padding."""
        return self.batch["cu_seq_lens_q"].diff()[: self.documents].tolist()

    @property
    def vision_tokens(self) -> int:
        """Tokens of all image layouts."""
        return sum(
            num_image_tokens(rows, columns) for _, rows, columns in self.batch["image_grid_thw"].tolist()
        )

    @property
    def supervised_tokens(self) -> int:
        """Tokens with a label."""
        return num_supervised_tokens([self.batch])

    @property
    def tokens(self) -> int:
        """Tokens of the documents, without the padding behind them."""
        return int(self.batch["cu_seq_lens_q"][self.documents])


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
    """Refuse a state of other data or of another order: keys in it would name other samples."""
    if before.get("order") != now["order"]:
        raise SoloError(
            "the checkpoint was written by a version of solo-vlm that reads data in another order: "
            "finish the run with that version, or start a new one"
        )
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
