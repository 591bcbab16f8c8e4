"""Mixture of images, texts and captions, and reader processes that may be killed at any time."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tests.factories import tar_bytes

from solo_vlm.data.collate import PackedBatch
from solo_vlm.data.encode import Encoder, load_encoder
from solo_vlm.data.loader import PackedLoader
from solo_vlm.data.sources import open_source
from solo_vlm.data.streams import MixtureItem, VirtualStream
from solo_vlm.utils.files import new_file

LAYOUTS = [(1, 0), (1, 2), (2, 1), (2, 2), (4, 1)]  # ranks, workers
STREAMS = 8
LENGTH = 96
EPOCHS = 2
SAVED_EVERY = 8  # slots of all ranks together
SOURCES = ("photos.parquet", "pages", "captions")
WORDS = ["red", "circle", "blue", "square", "seven", "what", "hello", "world"]


def write_run(folder: Path, solo) -> int:
    """Write a model and three sources with some broken rows; return the number of valid samples."""
    solo.save(folder / "model")
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS, count))

    def jpeg() -> bytes:
        height, width = rng.integers(20, 100, 2)
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(buffer, "JPEG")
        return buffer.getvalue()

    photos = [_chat(words(3), jpeg()) for _ in range(70)]
    for photo, kept in ((20, 200), (45, -200)):  # broken in its header, and at the end of its pixels
        photos[photo]["images"] = [photos[photo]["images"][0][:kept]]
    pq.write_table(pa.Table.from_pylist(photos), folder / "photos.parquet", row_group_size=4)
    (folder / "pages").mkdir()
    for file in range(STREAMS + 2):
        lines = [
            json.dumps({"messages": [{"role": "assistant", "content": words(n)}]})
            for n in rng.integers(3, 30, 5)
        ]
        lines[0] = "no JSON" if file == 3 else lines[0]
        (folder / "pages" / f"{file}.jsonl").write_text("\n".join(lines))
    (folder / "captions").mkdir()
    for file in range(STREAMS):
        members = {"a.jpg": jpeg(), "a.txt": words(4).encode(), "b.txt": b"hello"}
        (folder / "captions" / f"{file}.tar").write_bytes(tar_bytes(members))
    return 68 + (STREAMS + 2) * 5 - 1 + STREAMS * 2


@dataclass(frozen=True)
class Run:
    """Settings of a run, picklable for processes."""

    folder: Path
    weight_by: str = "tokens"
    threads: int = 1

    def loader(self, rank: int = 0, ranks: int = 1, workers: int = 0) -> PackedLoader:
        sources = [open_source(self.folder / name) for name in SOURCES]
        mixture = [MixtureItem(source, weight) for source, weight in zip(sources, (2, 1, 1), strict=True)]
        make_stream = partial(
            VirtualStream,
            streams=STREAMS,
            mixture=mixture,
            encode=_encoder(self.folder / "model").draft,
            length=LENGTH,
            seed=5,
            epochs=EPOCHS,
            weight_by=self.weight_by,
            buffer_size=6,
            max_skipped=0.5,
        )
        return PackedLoader(
            make_stream, STREAMS, LENGTH, 0, rank, ranks, workers, sources, threads=self.threads
        )


def digests(
    loader: PackedLoader, rank: int, ranks: int, slots: int, state: dict | None = None
) -> Iterator[tuple[int, str]]:
    """Yield each of a rank's slots up to `slots`, with a hash of its batch and of its stream's state."""
    first = 0
    if state is not None:
        loader.load_state_dict(state)
        first = state["slots"]
    for start in range(first, slots, ranks):
        found = loader.take(min(ranks, slots - start))
        slot = start + (rank - start) % ranks
        if slot >= slots:
            continue
        (sequence,) = found or [None]
        after = loader.state_dict()["streams"][str(slot % STREAMS)] if sequence else None
        yield slot, _digest(sequence.batch if sequence else loader.empty_batch(), after)


def steps(loaders: list[PackedLoader], size: int) -> list[list[tuple[str, ...]]]:
    """Return the sample names of each step of `size` packed sequences, with one thread per rank."""
    by_rank = [([], True)] * len(loaders)
    barrier = threading.Barrier(len(loaders))

    def read(rank: int) -> list[list[tuple[str, ...]]]:
        def add_up(found, ended):
            barrier.wait()
            by_rank[rank] = found, ended
            barrier.wait()
            return [len(of_rank) for of_rank, _ in by_rank], all(ended for _, ended in by_rank)

        loader, taken = loaders[rank], []
        while turns := loader.take_together(size, add_up):
            taken.append([tuple(loader.names(turn)) for turn in turns if turn])
        return taken

    with ThreadPoolExecutor(len(loaders)) as pool:
        of_ranks = list(pool.map(read, range(len(loaders))))
    return [sorted(chain.from_iterable(step)) for step in zip(*of_ranks, strict=True)]


def read_rank(
    run: Run, rank: int, ranks: int, workers: int, slots: int, state: dict | None, out: Path
) -> None:
    """Read a rank's slots; write a line per slot, and a state at intervals.

    Runs in a process that leads its own group, so that it can be killed together with its workers.
    """
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # workers need not import everything again
    torch.set_num_threads(1)
    loader = run.loader(rank, ranks, workers)
    with (out / f"{rank}.jsonl").open("w") as lines:
        for slot, digest in digests(loader, rank, ranks, slots, state):
            print(json.dumps([slot, digest]), file=lines, flush=True)
            done = loader.state_dict()["slots"]
            if done % SAVED_EVERY == 0:
                with new_file(out / f"state-{done}-{rank}.json") as partial_file:
                    partial_file.write_text(json.dumps(loader.state_dict()))


def last_state(out: Path, ranks: int) -> dict | None:
    """Return the newest state that all ranks have written, merged; None if there is none."""
    for done in sorted({int(file.name.split("-")[1]) for file in out.glob("state-*")}, reverse=True):
        files = [out / f"state-{done}-{rank}.json" for rank in range(ranks)]
        if all(file.exists() for file in files):
            return PackedLoader.merge([json.loads(file.read_text()) for file in files])
    return None


def lines_of(out: Path) -> dict[int, str]:
    """Return the digest of each slot that was read, ignoring a line truncated by a kill."""
    lines = [line for file in out.glob("*.jsonl") for line in file.read_text().split("\n")[:-1]]
    return dict(map(json.loads, lines))


@cache
def _encoder(model: Path) -> Encoder:
    return load_encoder(model)


def _digest(batch: PackedBatch, state: dict | None) -> str:
    hashed = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for name, value in batch.items():
        plain = value.numpy() if isinstance(value, torch.Tensor) else np.array(value)
        hashed.update(f"{name} {plain.dtype} {plain.shape}".encode() + plain.tobytes())
    return hashed.hexdigest()


def _chat(text: str, image: bytes) -> dict:
    parts = [{"type": "image", "text": None}, {"type": "text", "text": text}]
    return {"messages": [{"role": "assistant", "content": parts}], "images": [image]}
