"""Loader: the same order for any number of ranks and workers, to the end and after any kill."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from itertools import islice

import cv2
import pytest
import torch
from tests.data.packed_runs import (
    EPOCHS,
    LAYOUTS,
    LENGTH,
    STREAMS,
    Run,
    digests,
    last_state,
    lines_of,
    read_rank,
    steps,
    write_run,
)

from solo_vlm.data.encode import IGNORE_INDEX
from solo_vlm.data.loader import PackedLoader
from solo_vlm.data.streams import VirtualStream
from solo_vlm.utils.errors import SoloError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores

KILLS = 20


@pytest.fixture(scope="module")
def written(tmp_path_factory, solo):
    """Return the folder of a run, and the number of valid samples in its sources."""
    folder = tmp_path_factory.mktemp("run")
    return folder, write_run(folder, solo)


@pytest.fixture(scope="module", params=["tokens", "sequences"])
def run(written, request):
    return Run(written[0], request.param)


@pytest.fixture(scope="module")
def whole(run):
    """Return digests of the uninterrupted run in one process, with empty batches until all streams end."""
    loader = run.loader()
    for _ in loader:
        pass
    return dict(digests(run.loader(), 0, 1, loader.state_dict()["slots"]))


def is_empty(batch) -> bool:
    return bool((batch["labels"] == IGNORE_INDEX).all())


def test_two_epochs_yield_every_sample_twice(written, run):
    loader, seen = run.loader(), Counter()
    while not loader.ended:
        for sequence in loader.take(3):
            assert not is_empty(sequence.batch)
            assert sequence.documents == len(loader.names(sequence)) > 0
            seen.update(loader.names(sequence))
    assert len(seen) == written[1]
    assert set(seen.values()) == {EPOCHS}
    skipped = loader.skipped()
    assert Counter(entry["reason"] for entry in skipped) == {"image": 2 * EPOCHS, "json": EPOCHS}
    assert loader.counts()["samples"] == EPOCHS * written[1] + len(skipped)


@pytest.mark.parametrize("size", [1, 3, 6, 16])
def test_steps_are_full_and_equal_for_any_layout(run, size):
    expected = steps([run.loader()], size)
    assert all(len(step) == size for step in expected[:-1])
    total = sum(len(step) for step in expected)
    assert total == sum(1 for _ in run.loader())
    for ranks in (2, 4, 8):
        assert steps([run.loader(rank, ranks) for rank in range(ranks)], size) == expected


@pytest.mark.parametrize(
    ("run", "ranks", "workers"),
    [*(("tokens", *layout) for layout in LAYOUTS), ("sequences", 1, 2)],
    indirect=["run"],
)
def test_order_is_independent_of_ranks_and_workers(run, whole, ranks, workers):
    read = {}
    for rank in range(ranks):
        read |= digests(run.loader(rank, ranks, workers), rank, ranks, len(whole))
    assert read == whole


@pytest.mark.parametrize(
    ("run", "workers"), [("tokens", 0), ("sequences", 0), ("tokens", 2)], indirect=["run"]
)
@pytest.mark.parametrize("threads", [3, 99])
def test_threads_do_not_change_the_order(run, whole, workers, threads):
    threaded = replace(run, threads=threads)
    assert dict(digests(threaded.loader(workers=workers), 0, 1, len(whole))) == whole


def test_ended_streams_leave_empty_slots(run):
    """The slots of a stream do not depend on when others end."""
    loader, filled = run.loader(), Counter()
    holes = 0
    while not loader.ended:
        slot = loader.state_dict()["slots"]
        if not loader.take(1):
            holes += 1
            continue
        assert slot // STREAMS == filled[slot % STREAMS]
        filled[slot % STREAMS] += 1
    assert holes > STREAMS  # otherwise the test would be vacuous
    assert filled.total() == loader.counts()["sequences"] == sum(1 for _ in run.loader())
    assert loader.take(STREAMS) == []


def test_empty_batch_is_padding_only(run):
    batch = run.loader().empty_batch()
    assert batch["input_ids"].tolist() == [[0] * LENGTH]
    assert batch["labels"].tolist() == [[IGNORE_INDEX] * LENGTH]
    assert batch["pixel_values"].shape == (0, 3072)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["image_grid_thw"].shape == (0, 3)
    assert batch["cu_seq_lens_q"].tolist() == [0, LENGTH]


def test_resume_at_any_slot_with_other_ranks_matches_uninterrupted_run(run, whole):
    """Runs without processes, which `test_resume_after_sigkill_matches_uninterrupted_run` adds."""
    chance = random.Random(run.weight_by)
    for _ in range(4):
        ranks, later_ranks = chance.choices([1, 2, 4], k=2)
        cut = chance.randrange(len(whole))
        read, states = {}, []
        for rank in range(ranks):
            loader = run.loader(rank, ranks)
            read |= digests(loader, rank, ranks, cut)
            states.append(loader.state_dict())
        state = json.loads(json.dumps(PackedLoader.merge(states)))
        for rank in range(later_ranks):
            read |= digests(run.loader(rank, later_ranks), rank, later_ranks, len(whole), state)
        assert read == whole, (ranks, cut, later_ranks)


@pytest.mark.distributed
@pytest.mark.parametrize("run", ["tokens"], indirect=True)
def test_resume_after_sigkill_matches_uninterrupted_run(run, whole, tmp_path):
    """Ranks are processes; they and their workers are killed at any time, also while writing."""
    chance = random.Random(0)
    killed = 0
    for trial in range(3 * KILLS):  # some end before they are killed
        before, after = chance.choices(LAYOUTS, k=2)
        first, second = tmp_path / f"{trial}-killed", tmp_path / f"{trial}-resumed"
        run = replace(run, threads=chance.choice([1, 3]))
        killed += kill_at(chance.randrange(len(whole)), start(run, before, len(whole), None, first), first)
        state = last_state(first, before[0])
        for process in start(run, after, len(whole), state, second):
            process.join()
            assert process.exitcode == 0
        slots = state["slots"] if state else 0
        resumed = lines_of(second)
        assert resumed == {slot: digest for slot, digest in whole.items() if slot >= slots}, (before, after)
        assert lines_of(first).items() <= whole.items()
        assert set(lines_of(first)) >= set(range(slots))
        if killed == KILLS:
            break
    assert killed == KILLS


def start(run, layout, slots, state, out) -> list:
    """Start one process per rank."""
    out.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["solo_vlm.data.loader", "solo_vlm.models.solo.processing_solo"])
    ranks, workers = layout
    processes = [
        context.Process(target=read_rank, args=(run, rank, ranks, workers, slots, state, out))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def kill_at(lines: int, processes: list, out) -> bool:
    """Kill all processes shortly after they have written some lines; return False if all had ended."""
    while len(lines_of(out)) < lines and any(process.is_alive() for process in processes):
        time.sleep(0.01)
    time.sleep(random.Random(lines).uniform(0, 0.05))
    alive = any(process.is_alive() for process in processes)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # it has ended, or does not lead its group yet
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    return alive


def test_state_excludes_prefetched_sequences(run, whole):
    loader = run.loader(workers=2)
    iterator = iter(loader)
    for _ in islice(iterator, 5):
        pass
    time.sleep(0.2)  # workers continue to prefetch
    assert loader.state_dict()["slots"] == 5
    assert len(loader.state_dict()["streams"]) == 5
    assert dict(digests(run.loader(), 0, 1, 6, loader.state_dict())) == {5: whole[5]}


def test_incompatible_states_are_rejected(run):
    one, other = run.loader(0, 2), run.loader(1, 2)
    one.take(2)
    with pytest.raises(SoloError, match="same position"):
        PackedLoader.merge([one.state_dict(), other.state_dict()])
    other.take(2)
    merged = PackedLoader.merge([one.state_dict(), other.state_dict()])
    assert merged["slots"] == 2
    merged["data"].pop("order")  # as in states from before order versions
    with pytest.raises(SoloError, match="has the position in the data of another version of solo-vlm"):
        run.loader(0, 4).load_state_dict(merged)


def test_changed_data_is_rejected_by_source_name(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    copy = Run(folder, run.weight_by)
    state = json.loads(json.dumps(run.loader().state_dict()))
    copy.loader().load_state_dict(state)  # elsewhere, but the same
    (folder / "pages" / "0.jsonl").rename(folder / "pages" / "another.jsonl")
    with pytest.raises(SoloError, match=r"data changed since the checkpoint: files of source \S+/pages "):
        copy.loader().load_state_dict(state)
    loader = PackedLoader(VirtualStream, STREAMS, LENGTH, 0, sources=copy.loader().sources[:2])
    with pytest.raises(SoloError, match="it has 3 sources, the mixture has 2"):
        loader.load_state_dict(state)
    loader = PackedLoader(VirtualStream, STREAMS // 2, LENGTH, 0, sources=copy.loader().sources)
    with pytest.raises(SoloError, match="streams = 8, not 4"):
        loader.load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 1])
def test_user_error_in_a_worker_is_raised_unchanged(workers):
    loader = PackedLoader(_refuse, STREAMS, LENGTH, 0, workers=workers)
    with pytest.raises(SoloError, match=r"\Astream 0 is closed\Z"):
        next(iter(loader))


def _refuse(index: int) -> VirtualStream:
    raise SoloError(f"stream {index} is closed")


@pytest.mark.parametrize("workers", [0, 1])
def test_opencv_threads_are_disabled_in_readers(workers):
    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    try:
        loader = PackedLoader(_report_threads, STREAMS, LENGTH, 0, workers=workers)
        with pytest.raises(SoloError, match=r"\A1 thread\Z"):
            next(iter(loader))
    finally:
        cv2.setNumThreads(before)


def _report_threads(index: int) -> VirtualStream:
    raise SoloError(f"{cv2.getNumThreads()} thread")
