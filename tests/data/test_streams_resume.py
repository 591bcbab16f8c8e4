"""Any mixture, with rows that break when they are drawn or decoded: every row once, and exact resume."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solo_vlm.data.encode import Document, Draft
from solo_vlm.data.loader import PackedLoader
from solo_vlm.data.sample import Sample, SampleError
from solo_vlm.data.streams import MixtureItem, PackedSequence, VirtualStream
from solo_vlm.utils.errors import SoloError

LENGTH = 24


@dataclass(frozen=True)
class Rows:
    """Source of rows in memory: (length, fate) by shard."""

    name: str
    shards: tuple[tuple[tuple[int, str], ...], ...]
    size: int = 2**24

    def __len__(self) -> int:
        return len(self.shards)

    def read(self, shard: int) -> list[dict]:
        return [
            {"messages": [{"role": "assistant", "content": f"{fate} {length}"}]}
            for length, fate in self.shards[shard]
        ]

    def memory(self, shard: int) -> int:
        return self.size * (1 + shard % 3)

    def where(self, shard: int, row: int) -> str:
        return f"{self.name}/{shard}/{row}"

    def fingerprint(self) -> str:
        return self.name


class Undecodable(Draft):
    """Draft with an image whose pixels are damaged."""

    def decode(self) -> Document:
        raise SampleError("image", "damaged pixels")


def encode(sample: Sample) -> Draft:
    fate, length = sample.messages[0]["content"][0]["text"].split()
    if fate == "header":
        raise SampleError("image", "damaged header")
    kind = Undecodable if fate == "pixels" else Draft
    return kind(np.arange(int(length), dtype=np.int32), np.ones(int(length), bool))


_ROW = st.tuples(st.integers(1, 2 * LENGTH), st.sampled_from(["good"] * 4 + ["header", "pixels"]))
_ROW_OF_IMAGE = _ROW.map(lambda row: (min(row[0], LENGTH), row[1]))  # images are never cut
_SOURCE = st.lists(st.lists(_ROW_OF_IMAGE, max_size=12).map(tuple), min_size=1, max_size=6).map(tuple)
_LONG_TEXTS = st.lists(st.lists(_ROW.map(lambda row: (row[0], "good")), max_size=6).map(tuple), min_size=1)


@st.composite
def mixtures(draw) -> list[MixtureItem]:
    sources = draw(st.lists(st.one_of(_SOURCE, _LONG_TEXTS.map(tuple)), min_size=1, max_size=3))
    return [
        MixtureItem(Rows(f"s{number}", shards), draw(st.sampled_from([0.3, 1.0, 5.0])))
        for number, shards in enumerate(sources)
    ]


def packs_of(stream: VirtualStream) -> list[tuple]:
    return [(pack.keys, [len(d) for d in pack.documents], pack.state, pack.skipped) for pack in stream]


@settings(max_examples=60, deadline=None)
@given(
    mixtures(),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(["tokens", "samples", "sequences"]),
    st.integers(0, 12),
    st.integers(0, 99),
)
def test_every_row_is_read_once_per_epoch_and_resume_is_exact(
    mixture, streams, epochs, weight_by, buffer_size, seed
):
    def make(index: int) -> VirtualStream:
        return VirtualStream(
            index, streams, mixture, encode, LENGTH, seed, epochs, weight_by, buffer_size, max_skipped=1
        )

    keys, lost = Counter(), Counter()
    for index in range(streams):
        stream = make(index)
        whole = packs_of(stream)
        keys.update(key for pack in whole for key in pack[0])
        lost.update(stream.state_dict()["counts"])
        assert all(pack[0] for pack in whole)  # no empty sequence
        for cut in {0, len(whole) // 2, len(whole) - 1} & set(range(len(whole))):
            again = make(index)
            again.load_state_dict(json.loads(json.dumps(whole[cut][2])))
            assert packs_of(again) == whole[cut + 1 :]
    fates = Counter()
    for number, item in enumerate(mixture):
        for shard, rows in enumerate(item.source.shards):
            for row, (length, fate) in enumerate(rows):
                fates[fate] += epochs
                pieces = -(-length // LENGTH) if fate == "good" else 0
                for piece in range(pieces):
                    assert keys.pop((number, shard, row, piece)) == epochs
    assert not keys
    assert lost["skipped"] == fates["header"] + fates["pixels"]
    assert lost["samples"] == fates.total()


@pytest.mark.parametrize("size", [2**24, 2**10], ids=["few open shards", "64 open shards"])
def test_state_of_eight_full_packers_of_photographs_is_below_two_kilobytes(size):
    rng = np.random.default_rng(0)

    def photographs() -> tuple[tuple[int, str], ...]:
        grids = rng.integers((15, 11), (18, 14), (256, 2))  # about 500 x 375 pixels
        return tuple((int(rows * columns + columns + 30), "good") for columns, rows in grids)

    mixture = [
        MixtureItem(Rows(f"s{number}", tuple(photographs() for _ in range(80)), size)) for number in range(8)
    ]

    def make() -> VirtualStream:
        return VirtualStream(0, 1, mixture, encode, 8192, weight_by="sequences")

    packs = list(islice(make(), 48))
    assert max(len(json.dumps(pack.state)) for pack in packs) < 2000
    again = make()
    again.load_state_dict(json.loads(json.dumps(packs[40].state)))
    assert [(pack.keys, pack.state) for pack in islice(again, 7)] == [
        (pack.keys, pack.state) for pack in packs[41:]
    ]


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 8),
    st.sampled_from([1, 8, 64]),
    st.sampled_from([2**10, 2**24]),
    st.sampled_from(["tokens", "samples", "sequences"]),
    st.sampled_from([4, 128]),
    st.integers(0, 99),
)
def test_state_takes_a_few_bytes_per_waiting_document_and_open_shard(
    sources, rows, size, weight_by, buffer_size, seed
):
    rng = np.random.default_rng(seed)
    shards = [[tuple((int(n), "good") for n in rng.integers(1, 2000, rows)) for _ in range(40)]] * sources
    mixture = [MixtureItem(Rows(f"s{n}", tuple(of_source), size)) for n, of_source in enumerate(shards)]
    stream = VirtualStream(
        0, 1, mixture, encode, 4000, seed, None, weight_by=weight_by, buffer_size=buffer_size
    )
    packers = sources if weight_by == "sequences" else 1
    for pack in islice(stream, 30):
        documents, opened = packers * (buffer_size + 1), 64 * sources
        assert len(json.dumps(pack.state)) < 300 + 60 * sources + 4 * documents + 2 * opened


@settings(max_examples=20, deadline=None)
@given(mixtures(), st.sampled_from(["tokens", "samples", "sequences"]), st.data())
def test_ranks_may_change_at_any_slot(mixture, weight_by, data):
    def load(rank: int, ranks: int) -> PackedLoader:
        return PackedLoader(
            lambda index: VirtualStream(index, 4, mixture, encode, LENGTH, 1, 2, weight_by, 5, max_skipped=1),
            4,
            LENGTH,
            0,
            rank,
            ranks,
        )

    def take(loaders: list[PackedLoader], slots: int) -> list:
        taken = [[sequence.keys for sequence in loader.take(slots)] for loader in loaders]
        return sorted(map(tuple, (keys for of_rank in taken for keys in of_rank)))

    whole = load(0, 1)
    slots = 0
    while not whole.ended:
        whole.take(4)
        slots += 4
    cut = 4 * data.draw(st.integers(0, slots // 4))
    before, after = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([1, 2, 4]))
    first = [load(rank, before) for rank in range(before)]
    second = [load(rank, after) for rank in range(after)]
    read = take(first, cut)
    state = json.loads(json.dumps(PackedLoader.merge([loader.state_dict() for loader in first])))
    for loader in second:
        loader.load_state_dict(state)
    assert sorted(read + take(second, slots - cut)) == take([load(0, 1)], slots)
    assert sum((Counter(loader.counts()) for loader in second), Counter()) == Counter(whole.counts())
    listed = [entry["where"] for loader in second for entry in loader.skipped()]
    assert sorted(listed) == sorted(entry["where"] for entry in whole.skipped())


def test_source_whose_images_are_all_damaged_stops_the_run():
    rows = Rows("bad", (tuple((5, "pixels") for _ in range(5)),))
    with pytest.raises(SoloError, match=r"unusable.*\n  bad/0/\d: image: damaged pixels"):
        next(iter(VirtualStream(0, 1, [MixtureItem(rows)], encode, LENGTH, max_skipped=1)))


@pytest.mark.parametrize("weight_by", ["tokens", "samples"])
def test_damaged_images_do_not_cost_their_source_its_share(weight_by):
    half_bad = Rows("half", (tuple((5, fate) for fate in ("good", "pixels") * 50),))
    good = Rows("good", (tuple((5, "good") for _ in range(100)),))
    stream = VirtualStream(
        0, 1, [MixtureItem(half_bad), MixtureItem(good)], encode, LENGTH, 0, None, weight_by, 8, max_skipped=1
    )
    packs: list[PackedSequence] = list(islice(stream, 200))
    sources = Counter(key[0] for pack in packs for key in pack.keys)
    assert abs(sources[0] - sources[1]) < 16
