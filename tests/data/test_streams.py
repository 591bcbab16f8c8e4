"""Order of packed sequences: every sample once per epoch, in proportion, and exact resume."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import replace
from itertools import combinations, islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from solo_vlm.data.collate import collate
from solo_vlm.data.encode import Document, Draft, fit_to_length
from solo_vlm.data.loader import PackedLoader
from solo_vlm.data.sample import Sample, SampleError
from solo_vlm.data.sources import open_source
from solo_vlm.data.sources.parquet import ParquetSource
from solo_vlm.data.streams import MixtureItem, VirtualStream
from solo_vlm.utils.errors import SoloError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores

LENGTH = 64
ROWS = {"a": 300, "b": 120}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of two sources; a sample's text names it, and its number of words is its length."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in ROWS.items():
        rng = np.random.default_rng(count)
        rows = [
            {
                "messages": [
                    {"role": "assistant", "content": " ".join([f"{name}{i}"] * int(rng.integers(1, 40)))}
                ]
            }
            for i in range(count)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet", row_group_size=10)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def encode(sample: Sample) -> Draft:
    """Encode each word as one token, whose ID identifies the sample."""
    words = sample.messages[0]["content"][0]["text"].split()
    if words[0] == "bad":
        raise SampleError("image", "broken")
    ids = np.array([1000 * (word[0] == "b") + int(word[1:]) for word in words])
    return Draft(ids.astype(np.int32), np.ones(len(ids), bool))


class MakeStream:
    def __init__(
        self, folder, streams=4, epochs=None, weights=(1.0, 1.0), weight_by="tokens", suffix="parquet"
    ):
        self.arguments = (folder, streams, epochs, weights, weight_by, suffix)

    def __call__(self, index: int) -> VirtualStream:
        folder, streams, epochs, weights, weight_by, suffix = self.arguments
        mixture = [
            MixtureItem(open_source(folder / f"{name}.{suffix}"), weight)
            for name, weight in zip(ROWS, weights, strict=True)
        ]
        return VirtualStream(index, streams, mixture, encode, LENGTH, 3, epochs, weight_by, buffer_size=16)


def load(make, count, rank=0, ranks=1, workers=0, state=None, streams=4):
    loader = PackedLoader(make, streams, LENGTH, 9999, rank, ranks, workers)
    if state:
        loader.load_state_dict(json.loads(json.dumps(state)))
    batches = []
    for batch in loader:
        batches.append(batch["input_ids"][0].tolist())
        if len(batches) == count:
            break
    return batches, loader.state_dict()


# 64 streams exceed a source's row groups; 4 exceed its blocks of lines.
@pytest.mark.parametrize(("suffix", "streams"), [("parquet", 4), ("parquet", 64), ("jsonl", 4)])
@pytest.mark.parametrize("epochs", [1, 2])
def test_each_epoch_yields_every_sample_once(folder, epochs, suffix, streams):
    batches, _ = load(MakeStream(folder, streams, epochs, suffix=suffix), 10**6, streams=streams)
    make = MakeStream(folder, 1, 1, suffix=suffix)
    once = Counter(token for pack in make(0) for document in pack.documents for token in document.input_ids)
    seen = Counter(token for batch in batches for token in batch if token != 9999)
    assert seen == Counter({token: epochs * count for token, count in once.items()})
    assert len(once) == sum(ROWS.values())


def test_ranks_and_workers_do_not_change_the_order(folder):
    make = MakeStream(folder)
    expected, _ = load(make, 24)
    for ranks, workers in [(1, 2), (2, 1), (2, 2), (4, 1), (4, 0), (1, 4)]:
        parts = [load(make, 24 // ranks, rank, ranks, workers)[0] for rank in range(ranks)]
        interleaved = [part[i] for i in range(24 // ranks) for part in parts]
        assert interleaved == expected, (ranks, workers)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.sampled_from([None, 2]))
def test_resume_at_any_slot_matches_uninterrupted_run(folder, cut, epochs):
    make = MakeStream(folder, epochs=epochs)
    whole, _ = load(make, 60)
    first, state = load(make, cut)
    rest, _ = load(make, 60 - cut, state=state)
    assert first + rest == whole


def test_workers_may_change_on_resume(folder):
    make = MakeStream(folder)
    whole, _ = load(make, 20)
    _, state = load(make, 7, workers=2)
    assert load(make, 13, workers=4, state=state)[0] == whole[7:]
    assert load(make, 13, workers=0, state=state)[0] == whole[7:]


def test_sequence_weights_keep_their_proportions(folder):
    """Data sets are packed separately, and their sequences are mixed by number, as in the paper."""
    stream = MakeStream(folder, 1, weights=(3.0, 1.0), weight_by="sequences", suffix="jsonl")(0)
    order = []
    for _, pack in zip(range(200), stream, strict=False):
        (name,) = {"b" if document.input_ids[0] >= 1000 else "a" for document in pack.documents}
        assert {key[0] for key in pack.keys} == {"ab".index(name)}
        order.append(name)
    for start, end in combinations(range(0, 201, 8), 2):  # within one at any time
        assert abs(order[start:end].count("b") - (end - start) / 4) < 1


def test_exhausted_source_leaves_its_share_to_the_others(folder):
    stream = MakeStream(folder, 1, epochs=1, weights=(1.0, 9.0), weight_by="sequences")(0)
    order = [pack.keys[0][0] for pack in stream]
    assert order[-20:] == [0] * 20


@pytest.mark.parametrize("weight_by", ["tokens", "samples"])
def test_mixture_keeps_its_proportions(folder, weight_by):
    stream = MakeStream(folder, 1, weights=(3.0, 1.0), weight_by=weight_by)(0)
    counts = Counter()
    for _, pack in zip(range(300), stream, strict=False):
        for document in pack.documents:
            name = "b" if document.input_ids[0] >= 1000 else "a"
            counts[name] += len(document) if weight_by == "tokens" else 1
    assert abs(counts["a"] / counts["b"] - 3.0) < 0.1


def test_order_is_shuffled_and_differs_between_epochs(folder):
    stream = MakeStream(folder, 1, epochs=2, weights=(1.0, 1.0))(0)
    order = [int(document.input_ids[0]) for pack in stream for document in pack.documents]
    samples = [token for token in order if token < 1000]
    first, second = samples[: ROWS["a"] - 20], samples[-ROWS["a"] + 20 :]
    assert first != sorted(first)
    assert first[:100] != second[:100]


def test_endless_source_with_few_shards_is_read_by_all_streams(tmp_path):
    rows = [{"messages": [{"role": "assistant", "content": f"a{i}"}]} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for streams in (7, 64):
        seen = Counter()
        for index in range(streams):
            stream = VirtualStream(
                index, streams, [MixtureItem(open_source(tmp_path / "a.parquet"))], encode, 8
            )
            for _, pack in zip(range(30), stream, strict=False):
                seen.update(row for _, _, row, _ in pack.keys)
        assert set(seen) == set(range(40))
        assert max(seen.values()) < 2 * min(seen.values())


PAPER_STAGE_2 = {  # packed sequences per data set, from the paper's Table 1
    "CapFusion": 204_978,
    "WebSight": 71_579,
    "CC3M": 32_760,
    "Detailed Captions": 6_225,
    "LLaVAR": 3_602,
    "DVQA": 2_917,
    "OCR-VQA": 1_593,
    "FigureQA": 1_526,
    "SlimPajama": 120_385,
}


@pytest.mark.parametrize("batch", [8, 128])
def test_mixture_of_a_step_varies_at_most_like_random_draws(tmp_path, batch):
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "a1"}]}))
    source = open_source(tmp_path / "x.jsonl")
    mixture = [MixtureItem(source, weight) for weight in PAPER_STAGE_2.values()]
    streams = [
        iter(VirtualStream(index, 64, mixture, encode, 1, 0, None, "sequences", 1)) for index in range(64)
    ]
    rounds = 24
    order = [next(stream).keys[0][0] for _ in range(rounds) for stream in streams]
    steps = np.array(order).reshape(-1, batch)
    weights = np.array(list(PAPER_STAGE_2.values())) / sum(PAPER_STAGE_2.values())
    for number, weight in enumerate(weights):
        shares = (steps == number).mean(1)
        of_random_draws = np.sqrt(weight * (1 - weight) / batch)
        assert shares.std() < 1.25 * of_random_draws, (number, shares.std(), of_random_draws)
        assert abs(shares.mean() - weight) < 0.01


def test_token_weighted_streams_have_different_phases(folder):
    """A rare source of long documents is due in another round in each stream, after the first document."""
    rounds = Counter()
    for index in range(16):
        stream = MakeStream(folder, 16, weights=(0.97, 0.03))(index)
        for turn, pack in zip(range(40), stream, strict=False):
            rounds.update([turn] if turn > 1 and any(number == 1 for number, *_ in pack.keys) else [])
    assert len(rounds) > 15
    assert max(rounds.values()) < 8


def test_repeated_broken_row_counts_once(tmp_path):
    rows = [{"messages": [{"role": "assistant", "content": text}]} for text in ["bad", *(["a1"] * 39)]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    stream = VirtualStream(0, 1, [MixtureItem(open_source(tmp_path / "a.parquet"))], encode, 8)
    for _, pack in zip(range(500), stream, strict=False):
        counts = pack.state["counts"]
    assert counts["skipped"] > 0.01 * counts["samples"] > 10
    assert (counts["unusable_rows"], counts["rows"]) == (1, 40)


def test_resume_reads_and_encodes_nothing_until_a_sequence_is_complete(folder, monkeypatch):
    make = MakeStream(folder)
    whole, _ = load(make, 31)
    _, state = load(make, 30)
    reads, drafts = [], []
    read = ParquetSource.read
    monkeypatch.setattr(
        ParquetSource, "read", lambda self, shard: reads.append((self.name[-9], shard)) or read(self, shard)
    )
    drafts_of = VirtualStream.drafts_of
    monkeypatch.setattr(
        VirtualStream, "drafts_of", lambda self, row: drafts.append(row) or drafts_of(self, row)
    )
    streams = {int(number): saved for number, saved in json.loads(json.dumps(state))["streams"].items()}
    for number, saved in streams.items():
        stream = make(number)
        stream.load_state_dict(saved)
        assert stream.state_dict() == saved
        assert not reads
        assert not drafts
    stream = make(2)
    stream.load_state_dict(streams[2])
    assert sum(map(len, next(iter(stream)).documents)) == sum(token != 9999 for token in whole[30])
    # Once for its held documents, and once to draw more rows.
    assert max(Counter(reads).values()) <= 2


def test_state_is_small(folder):
    """Twice 128 documents: the packer is full, and the open sequence, of short ones, has as many."""
    items = [MixtureItem(open_source(folder / f"{name}.parquet")) for name in ROWS]
    stream = VirtualStream(0, 1, items, encode, 2560, 3, buffer_size=128)
    for pack in islice(stream, 5):
        assert len(json.dumps(pack.state)) < 1000


def test_unusable_samples_are_skipped_and_counted(tmp_path):
    rows = [{"messages": [{"role": "assistant", "content": text}]} for text in ["a1 a1", "bad", "a2"]]
    (tmp_path / "x.jsonl").write_text("not json\n" + "".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(tmp_path / "x.jsonl")
    stream = VirtualStream(0, 1, [MixtureItem(source)], encode, LENGTH, epochs=1)
    (pack,) = list(stream)
    assert sorted(int(document.input_ids[0]) for document in pack.documents) == [1, 2]
    skipped = {
        key.rsplit("/", 1)[1]: n for key, n in pack.state["counts"].items() if key.startswith("skipped/")
    }
    assert skipped == {"image": 1, "json": 1}


def test_unusable_data_stops_the_run_with_the_reasons(tmp_path):
    row = {"messages": [{"role": "assistant", "content": "bad"}]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    stream = VirtualStream(0, 1, [MixtureItem(open_source(tmp_path / "x.jsonl"))], encode, LENGTH)
    with pytest.raises(SoloError, match="1 of 1 rows are unusable") as error:
        next(iter(stream))
    assert "x.jsonl, block at byte 0, row 0: image: broken" in str(error.value)


def test_indivisible_layouts_are_rejected(folder):
    with pytest.raises(SoloError, match="4 streams cannot be divided among 3 ranks"):
        PackedLoader(MakeStream(folder), 4, LENGTH, 0, ranks=3)


def test_long_texts_are_cut_but_images_never():
    ids = np.arange(150)
    text = Draft(ids.astype(np.int32), np.ones(len(ids), bool))
    pieces = [piece.decode() for piece in fit_to_length(text, LENGTH)]
    assert [len(piece) for piece in pieces] == [64, 64, 22]
    assert np.concatenate([piece.input_ids for piece in pieces]).tolist() == ids.tolist()
    assert all(piece.labels[0] == -100 and (piece.labels[1:] >= 0).all() for piece in pieces)
    image = replace(text, image_grid_thw=np.array([[1, 1, 1]]))
    with pytest.raises(SampleError, match="too-long"):
        list(fit_to_length(image, LENGTH))


def test_collated_batch_has_document_boundaries():
    def document(*ids: int) -> Document:
        tokens = np.array(ids)
        return Document(tokens, tokens.copy(), np.zeros((1, 3072), np.uint8), np.array([[1, 1, 1]]))

    batch = collate([document(5, 6, 7), document(8, 9)], length=8, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7, 8, 9, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 8]
    assert batch["max_length_q"] == 3
    assert batch["pixel_values"].shape == (2, 3072)
    with pytest.raises(ValueError, match="do not fit"):
        collate([document(*range(9))], length=8, pad_token_id=0)


@pytest.mark.parametrize("layout", ["blank block", "empty files"])
def test_endless_stream_with_an_empty_share_reads_all_shards(tmp_path, layout):
    lines = "".join(
        json.dumps({"messages": [{"role": "assistant", "content": f"a{i}"}]}) + "\n" for i in range(256)
    )
    if layout == "blank block":
        (tmp_path / "a.jsonl").write_text(lines + "\n" * 256)
    else:
        for number in range(4):
            (tmp_path / f"{number}.jsonl.gz").write_bytes(gzip.compress(b"" if number else lines.encode()))
    source = open_source(tmp_path)
    streams = len(source)

    def stream() -> VirtualStream:
        return VirtualStream(streams - 1, streams, [MixtureItem(source)], encode, LENGTH, buffer_size=4)

    def ids(packs) -> list[list[int]]:
        return [
            np.concatenate([document.input_ids for document in pack.documents]).tolist() for pack in packs
        ]

    whole = list(islice(stream(), 9))
    seen = Counter(id for pack in ids(whole) for id in pack)
    assert set(seen) == set(range(256))
    assert max(seen.values()) - min(seen.values()) <= 1
    again = stream()
    again.load_state_dict(json.loads(json.dumps(whole[2].state)))
    assert ids(islice(again, 6)) == ids(whole[3:])


def test_endless_source_without_rows_is_rejected(tmp_path):
    (tmp_path / "blank.jsonl").write_text("\n" * 600)
    source = open_source(tmp_path / "blank.jsonl")
    with pytest.raises(SoloError, match=r"blank\.jsonl has no rows"):
        next(iter(VirtualStream(1, 2, [MixtureItem(source)], encode, LENGTH)))


def test_resume_with_an_unreadable_held_document_is_rejected(tmp_path):
    lines = [json.dumps({"messages": [{"role": "assistant", "content": f"a{i}"}]}) for i in range(90)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))

    def stream() -> VirtualStream:
        return VirtualStream(0, 1, [MixtureItem(open_source(tmp_path / "a.jsonl"))], encode, 8, epochs=1)

    state = next(iter(stream())).state
    (tmp_path / "a.jsonl").write_text(
        "\n".join(line.replace('"content": "a', '"content": "bad a') for line in lines)
    )
    with pytest.raises(
        SoloError,
        match=r"the data changed since the checkpoint: .*a\.jsonl.*row \d+ cannot be read again .image",
    ):
        again = stream()
        again.load_state_dict(state)
        list(again)


def write_rated(folder, count: int, good: set[int]) -> None:
    rows = [
        {"messages": [{"role": "assistant", "content": f"a{i}"}], "stars": 5 if i in good else 1}
        for i in range(count)
    ]
    (folder / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("good", [set(range(0, 300, 3)), {7, 290}])
def test_filtered_rows_are_never_read_nor_skipped_and_resume_is_exact(tmp_path, good):
    write_rated(tmp_path, 300, good)
    source = open_source(tmp_path / "rated.jsonl", format="auto", filter="stars >= 3")

    def stream(index: int, epochs: int | None) -> VirtualStream:
        return VirtualStream(index, 4, [MixtureItem(source)], encode, 8, epochs=epochs, buffer_size=4)

    once = [pack for index in range(4) for pack in stream(index, epochs=1)]
    ids = [int(id) for pack in once for document in pack.documents for id in document.input_ids]
    assert sorted(ids) == sorted(good)
    # Endless streams whose own part has no row that passes read the whole source.
    for index in range(4):
        endless = list(islice(stream(index, epochs=None), 9))
        assert {int(id) for pack in endless for doc in pack.documents for id in doc.input_ids} <= good
        counts = endless[-1].state["counts"]
        assert counts["filtered"] == counts[f"filtered/{source.name}"] > 0
        assert "skipped" not in counts
        again = stream(index, epochs=None)
        again.load_state_dict(json.loads(json.dumps(endless[3].state)))
        assert [pack.keys for pack in islice(again, 5)] == [pack.keys for pack in endless[4:]]


def test_filter_that_keeps_no_row_is_rejected(tmp_path):
    write_rated(tmp_path, 300, set())
    source = open_source(tmp_path / "rated.jsonl", format="auto", filter="stars >= 3")
    with pytest.raises(SoloError, match=r"rated\.jsonl has no rows that its filter keeps"):
        next(iter(VirtualStream(0, 4, [MixtureItem(source)], encode, 8)))
    assert not list(VirtualStream(0, 4, [MixtureItem(source)], encode, 8, epochs=1))
