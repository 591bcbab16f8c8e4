"""Stateful loader of packed batches for one rank, with worker processes.

The packed sequences of a run are numbered slots in one order: slot g belongs to stream g mod S. Rank r of R
reads slots r, r + R, r + 2R, ... The slots of a stream that has ended stay empty, so no other sequence moves;
training consumes the filled slots in order, the same for any number of ranks and workers.
"""

from __future__ import annotations

import os
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
from solo_vlm.data.sources import Source, fingerprints, is_same_data
from solo_vlm.data.sources.hub import HubPath
from solo_vlm.data.sources.retries import is_read_failure
from solo_vlm.data.streams import ORDER_VERSION, Key, State, VirtualStream
from solo_vlm.data.workers import WORKER_ENDED, end_with, explain_worker_error, raise_open_files_limit
from solo_vlm.models.solo.processing_solo import num_vision_tokens
from solo_vlm.utils.errors import SoloError, first_line

MakeStream = Callable[[int], VirtualStream]
# (sequences of this rank, whether its data ended) -> (number of sequences per rank, whether all data ended)
AllReduce = Callable[[Sequence["LoadedSequence"], bool], tuple[list[int], bool]]


class PackedLoader:
    """Resumable loader of one rank's packed sequences, in an order independent of ranks and workers.

    Several ranks stay synchronized with `take_together`. Iteration is for a single rank, or endless data.

    Args:
        make_stream: Factory of stream number s, called in the worker that owns it.
        streams: Number of virtual streams, a multiple of `ranks * workers`.
        length: Tokens per batch.
        pad_token_id: Token ID of the padding.
        rank: Data-parallel rank of this process.
        ranks: Number of data-parallel ranks.
        workers: Number of worker processes that prefetch; 0 reads in this process.
        sources: Sources of the mixture, in order, to name samples and detect changed data.
        patch_dim: Width of `pixel_values` in a batch without documents; 0 for a plain LLM.
        threads: Threads per reading process, each filling the sequences of other streams. Every reading
            process turns off OpenCV's own threads.

    Raises:
        SoloError: `ranks * workers` does not divide the streams.
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
                f"{streams} streams cannot be divided among {ranks} ranks x {max(workers, 1)} workers: "
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
        self._skipped: dict[int, list[dict[str, str]]] = {}
        self._slots = 0  # slots of the run that have been consumed
        self._ended: set[int] = set()  # ended streams of this rank
        self._turns: Iterator[_Slot | SoloError] | None = None

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yield this rank's packed batches until its data ends; other ranks may end earlier or later."""
        while not self.ended:
            for sequence in self.take(self._ranks):
                yield sequence.batch

    @property
    def ended(self) -> bool:
        """Whether all streams of this rank have ended."""
        return len(self._ended) == len(self._own)

    def take_together(self, size: int, all_reduce: AllReduce) -> list[LoadedSequence | None]:
        """Consume the next `size` packed sequences of the run, together with all other ranks.

        Fewer than `size` are left only at the end of the data.

        Args:
            size: Number of sequences over all ranks.
            all_reduce: Collective over all ranks, called equally often on each.

        Returns:
            This rank's sequences, padded with None to the same length on all ranks.
        """
        mine: list[LoadedSequence | None] = []
        found = [0] * self._ranks
        while (missing := size - sum(found)) > 0:
            new = self.take(missing)
            mine += new
            of_ranks, all_ended = all_reduce(new, self.ended)
            found = [before + more for before, more in zip(found, of_ranks, strict=True)]
            if all_ended:
                break
        return mine + [None] * (max(found) - len(mine))

    def take(self, slots: int) -> list[LoadedSequence]:
        """Consume the next slots of the run; return this rank's packed sequences in them, in order."""
        first = self._slots + (self._rank - self._slots) % self._ranks
        self._slots += slots
        found = []
        for _ in range(first, self._slots, self._ranks):
            if self.ended:
                break
            if self._turns is None:
                self._turns = self._read(first)
            try:
                slot = next(self._turns)
            except (ConnectionError, EOFError) as error:  # readers yield their own errors
                raise SoloError(WORKER_ENDED) from error
            if isinstance(slot, SoloError):
                self.close()
                raise slot
            self._states[slot.stream] = slot.state
            if slot.skipped:
                self._skipped.setdefault(slot.stream, []).extend(slot.skipped)
            if slot.batch is None:
                self._ended.add(slot.stream)
            else:
                found.append(LoadedSequence(slot.batch, slot.keys))
        if self.ended:
            self.close()
        return found

    def close(self) -> None:
        """Stop the worker processes; the next `take` reads prefetched sequences again."""
        self._turns = None

    def _read(self, slot: int) -> Iterator[_Slot | SoloError]:
        """Yield the rank's slots endlessly, starting with this one."""
        turn = self._own.index(slot % self._streams)
        order = self._own[turn:] + self._own[:turn]
        dataset = _Slots(self._make_stream, self._form, order, dict(self._states), self._threads)
        if self._workers:
            raise_open_files_limit()
        loader: Any = DataLoader(
            dataset,
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=2 if self._workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        return iter(loader)

    def empty_batch(self) -> PackedBatch:
        """Return a batch of padding, for a rank that has no sequence while others do."""
        return collate([], **self._form)

    def names(self, sequence: LoadedSequence) -> list[str]:
        """Return the file and row of each document's sample."""
        return [self.sources[source].where(shard, row) for source, shard, row, _ in sequence.keys]

    def state_dict(self) -> State:
        """Return the position of this rank, prefetched sequences excluded.

        Keys: `slots` of the run consumed so far, states of this rank's `streams`, what they `skipped`, `data`
        to detect changes.
        """
        streams = {str(stream): state for stream, state in self._states.items()}
        skipped = {str(stream): list(entries) for stream, entries in self._skipped.items()}
        return {"slots": self._slots, "streams": streams, "skipped": skipped, "data": self._data}

    @staticmethod
    def merge(states: Sequence[State]) -> State:
        """Merge the states of all ranks into the state of the run.

        Raises:
            SoloError: The ranks have consumed different numbers of slots.
        """
        slots = [state["slots"] for state in states]
        if len(set(slots)) > 1:
            raise SoloError(f"ranks must be saved at the same position, not after {slots} slots")
        streams, skipped = (
            {stream: saved for state in states for stream, saved in state[part].items()}
            for part in ("streams", "skipped")
        )
        return {"slots": slots[0], "streams": streams, "skipped": skipped, "data": states[0]["data"]}

    def load_state_dict(self, state: State) -> None:
        """Resume after the last consumed slot of a run with any number of ranks and workers.

        Args:
            state: Merged state of the run, see `merge`.

        Raises:
            SoloError: The data has changed, or the state was written by another version.
        """
        _check_unchanged(state["data"], self._data)
        self._slots = state["slots"]
        self._states, self._skipped = (
            {s: state[part][str(s)] for s in self._own if str(s) in state[part]}
            for part in ("streams", "skipped")
        )
        self._ended, self._turns = set(), None

    def counts(self) -> dict[str, int]:
        """Return sums over the rank's streams: sequences, documents, tokens, samples, skipped, filtered."""
        totals: Counter[str] = Counter()
        for state in self._states.values():
            totals.update(state["counts"])
        return dict(totals)

    def skipped(self) -> list[dict[str, str]]:
        """Return skipped samples, the first `LISTED` of each of this rank's streams.

        Keys: `source`, `where` (file and row), `reason` and `error`, as in the report of `solo data verify`.
        """
        return [entry for entries in self._skipped.values() for entry in entries]


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
        return num_vision_tokens(self.batch["image_grid_thw"])

    @property
    def supervised_tokens(self) -> int:
        """Tokens with a label."""
        return num_supervised_tokens([self.batch])

    @property
    def tokens(self) -> int:
        """Tokens of the documents, without padding."""
        return int(self.batch["cu_seq_lens_q"][self.documents])


@dataclass(frozen=True)
class _Slot:
    """Slot of a stream with the stream's state after it; empty once the stream has ended."""

    stream: int
    state: State
    batch: PackedBatch | None = None
    keys: Sequence[Key] = ()
    skipped: Sequence[dict[str, str]] = ()

    def share_memory(self) -> _Slot:
        """Move the tensors to shared memory, where they are not yet."""
        for value in (self.batch or {}).values():
            if isinstance(value, Tensor):
                value.share_memory_()
        return self

    def pin_memory(self) -> _Slot:
        """Pin the tensors; called by DataLoader."""
        if self.batch is None:
            return self
        pinned: Any = {
            name: value.pin_memory() if isinstance(value, Tensor) else value
            for name, value in self.batch.items()
        }
        return replace(self, batch=pinned)


class _Slots(IterableDataset[_Slot | SoloError]):
    """Endless round-robin slots of some streams; each of n workers yields every n-th slot.

    A worker cannot tell when the others have ended, so the loader decides when to stop.
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
        # OpenCV's threads cost 50% more CPU time per photograph and save no time.
        cv2.setNumThreads(1)
        worker = get_worker_info()
        if worker:
            end_with(self._reader_for)
        mine = self._order[worker.id :: worker.num_workers] if worker else self._order
        slots = self._in_turn([self._slots_of(stream) for stream in mine])
        try:
            # Here, because DataLoader would do it in a thread whose errors nobody receives.
            yield from map(_Slot.share_memory, slots) if worker else slots
        except SoloError as error:  # raised by the loader: DataLoader would wrap it in a worker's traceback
            yield error
        except Exception as error:
            if is_read_failure(error):
                yield SoloError(
                    f"cannot read the data: {first_line(error)}; run the same command again to resume"
                )
            elif explained := explain_worker_error(error):
                yield explained
            else:
                raise

    def _in_turn(self, streams: list[Iterator[_Slot]]) -> Iterator[_Slot]:
        """Yield one slot per stream, round robin, with threads working on the next ones."""
        turns = cycle(streams)
        if self._threads == 1:
            yield from map(next, turns)
        # At most one slot per stream at a time, because each needs the state after the previous one.
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
            batch = collate(packed.documents, **self._form)
            yield _Slot(number, packed.state, batch, packed.keys, packed.skipped)
        ended = _Slot(number, stream.state_dict())
        yield replace(ended, skipped=stream.take_skipped())
        while True:
            yield ended


def _check_unchanged(before: State, now: State) -> None:
    """Reject the state of other data or of another version, which would refer to other samples."""
    if before.get("order") != now["order"]:
        raise SoloError(
            "the checkpoint has the position in the data of another version of solo-vlm: "
            "finish the run with that version, or start a new one"
        )
    if before["streams"] != now["streams"]:
        raise SoloError(
            f"the checkpoint has data.streams = {before['streams']}, not {now['streams']}: it cannot change"
        )
    if len(before["sources"]) != len(now["sources"]):
        raise SoloError(
            f"the data changed since the checkpoint: it has {len(before['sources'])} sources, "
            f"the mixture has {len(now['sources'])}"
        )
    for (old_name, old), (name, new) in zip(before["sources"], now["sources"], strict=True):
        if not is_same_data(old, new):
            was = "" if old_name == name else f" (then {old_name})"
            same = f"set its path to {old_name}" if HubPath.parse(old_name) else "put them back"
            raise SoloError(
                f"the data changed since the checkpoint: files of source {name}{was} were added, removed or "
                f"rewritten; {same}, or start a new run"
            )
