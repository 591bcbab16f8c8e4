"""Fill of packed sequences and cost of packing, compared with simpler packers.

    python benchmarks/packing.py [--json]

Documents are synthetic: photographs of about 500 x 375 with a caption (204 to 209 tokens of image), web
texts, and short captions. Fill excludes the last two sequences, which contain the remainder. "moved" is the
maximum number of places by which a document is packed later than it arrived. Collation makes one sequence of
32,768 tokens, 54% of them vision tokens, from encoded documents; its peak memory is what it allocates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import tracemalloc
from bisect import bisect_right, insort

import numpy as np
from environment import environment

from solo_vlm.data.collate import collate
from solo_vlm.data.encode import Document
from solo_vlm.data.packing import pack


def next_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Pack in order of arrival; a document that does not fit opens a new one, like the original code."""
    packs: list[list[int]] = [[]]
    room = capacity
    for index, length in enumerate(lengths):
        if length > room:
            packs.append([])
            room = capacity
        packs[-1].append(index)
        room -= length
    return packs


def first_fit(lengths: list[int], capacity: int, opened: int = 16) -> list[list[int]]:
    """Pack into the first of up to 16 open sequences that has room; close the oldest for a new one."""
    packs: list[list[int]] = []
    rooms: list[int] = []
    for index, length in enumerate(lengths):
        start = max(0, len(packs) - opened)
        at = next((i for i in range(start, len(packs)) if rooms[i] >= length), None)
        if at is None:
            packs.append([])
            rooms.append(capacity)
            at = len(packs) - 1
        packs[at].append(index)
        rooms[at] -= length
    return packs


def longest_first(lengths: list[int], capacity: int, buffer_size: int = 128) -> list[list[int]]:
    """Pack the longest waiting document that fits; if none does, it opens the next sequence."""
    packs: list[list[int]] = [[]]
    room = capacity
    waiting: list[tuple[int, int]] = []
    for place in range(len(lengths) + buffer_size):
        if place < len(lengths):
            insort(waiting, (lengths[place], -place))
        if place < buffer_size or not waiting:
            continue
        if waiting[0][0] > room:
            packs.append([])
            room = capacity
        length, index = waiting.pop(bisect_right(waiting, (room, 0)) - 1)
        packs[-1].append(-index)
        room -= length
    return packs


def mixtures(rng: np.random.Generator) -> dict[str, tuple[int, list[int]]]:
    """Return (capacity, lengths) by name."""
    photographs = rng.integers(204, 210, 20_000) + rng.integers(10, 120, 20_000)
    texts = rng.geometric(1 / 1200, 4_000)
    captions = rng.integers(10, 60, 20_000)
    long = np.concatenate([photographs, texts.clip(1, 32_768)])
    short = np.concatenate([photographs, captions])
    return {
        "32k": (32_768, rng.permutation(long).tolist()),
        "4k": (4_096, rng.permutation(short).tolist()),
        "256": (256, rng.permutation(captions).tolist()),
    }


def fill(packs: list[list[int]], lengths: list[int], capacity: int) -> float:
    """Return the mean share of non-padding tokens in a sequence."""
    return statistics.mean(sum(lengths[i] for i in items) / capacity for items in packs[:-2])


def moved(packs: list[list[int]]) -> int:
    """Return the maximum number of places by which a document is packed later than it arrived."""
    return max(place - index for place, index in enumerate(index for items in packs for index in items))


def documents_of_one_sequence(rng: np.random.Generator, length: int = 32_768) -> list[Document]:
    """Return photographs of 12 x 16 patches with texts that fill one sequence with 54% vision tokens."""
    image, documents, room = 12 * 16 + 12 + 1, [], length
    text = round(image * 0.46 / 0.54)
    while room:
        size = min(image + text, room)
        patches = rng.integers(0, 256, (12 * 16 if size > image else 0, 3072), dtype=np.uint8)
        ids = rng.integers(0, 32_000, size)
        documents.append(Document(ids, ids.copy(), patches, np.array([[1, 12, 16]])[: len(patches)]))
        room -= size
    return documents


def collation(rng: np.random.Generator) -> dict[str, float]:
    """Return median milliseconds and peak megabytes of collating one sequence."""
    documents = documents_of_one_sequence(rng)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        collate(documents, 32_768, 0)
        times.append(time.perf_counter() - started)
    tracemalloc.start()
    collate(documents, 32_768, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"collate_32k_ms": 1e3 * statistics.median(times), "collate_32k_peak_mb": peak / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    results: dict[str, float] = {}
    for name, (capacity, lengths) in mixtures(rng).items():
        started = time.perf_counter()
        packs = pack(lengths, capacity)
        results[f"documents_per_second_{name}"] = len(lengths) / (time.perf_counter() - started)
        results[f"fill_{name}"] = fill(packs, lengths, capacity)
        results[f"moved_{name}"] = moved(packs)
        for packer in (longest_first, first_fit, next_fit):
            packs = packer(lengths, capacity)
            results[f"fill_{name}_{packer.__name__}"] = fill(packs, lengths, capacity)
            results[f"moved_{name}_{packer.__name__}"] = moved(packs)
    results |= collation(rng)
    if arguments.json:
        print(json.dumps({**results, "environment": environment()}))
        return
    for name, value in results.items():
        print(f"{name:32} {value:12,.4f}")


if __name__ == "__main__":
    main()
