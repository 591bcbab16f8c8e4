"""Files of every format, whole, broken and behind an unreliable disk."""

from __future__ import annotations

import errno
import gzip
import io
import json
import tarfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from solo_vlm.data.schema import SampleError, parse_sample
from solo_vlm.data.sources import open_source
from solo_vlm.errors import SoloError
from tiny import png

ROWS = [{"messages": [{"role": "assistant", "content": f"row {i}"}]} for i in range(600)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
COMPRESS = {
    ".jsonl": lambda data: data,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": lambda data: arrow_compressed(data, "zstd"),
    ".jsonl.lz4": lambda data: arrow_compressed(data, "lz4"),
}


def arrow_compressed(data: bytes, codec: str) -> bytes:
    """A stream as the codec's own tool writes it (lz4: the frame format)."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def texts(source) -> list[str]:
    samples = [parse_sample(row) for unit in range(len(source)) for row in source.read(unit)]
    return [sample.messages[0]["content"][-1]["text"] for sample in samples]


def parquet_bytes() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), buffer, row_group_size=100)
    return buffer.getvalue()


def tar_bytes(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines_plain_and_compressed(tmp_path, suffix):
    (tmp_path / f"x{suffix}").write_bytes(COMPRESS[suffix](LINES))
    source = open_source(tmp_path / f"x{suffix}")
    assert texts(source) == [f"row {i}" for i in range(600)]
    assert len(source) == (3 if suffix == ".jsonl" else 1)


def test_parquet_in_a_folder_by_glob_and_by_name(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.parquet").write_bytes(parquet_bytes())
    (tmp_path / "notes.txt").write_text("not data")
    for path, count in ((tmp_path, 1200), (tmp_path / "*.parquet", 1200), (tmp_path / "a.parquet", 600)):
        source = open_source(path)
        assert len(texts(source)) == count
        assert len(source) == count // 100
    assert "a.parquet, row group 2, row 7" in open_source(tmp_path).where(2, 7)


def test_webdataset_captions_and_chats(tmp_path, picture):
    chat = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
                         {"role": "assistant", "content": "noise"}]}  # fmt: skip
    members = {
        "a/0.jpg": png(picture()),
        "a/0.txt": b"a caption",
        "a/1.png": png(picture()),
        "a/1.json": b'{"caption": "from json"}',
        "b/0.json": json.dumps(chat).encode(),
        "b/0.png": png(picture()),
        "b/1.png": png(picture()),
    }
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    rows = open_source(tmp_path / "x.tar").read(0)
    samples = [parse_sample(rows[i]) for i in range(3)]
    assert [sample.messages[-1]["content"][-1]["text"] for sample in samples] == [
        "a caption",
        "from json",
        "noise",
    ]
    assert [len(sample.images) for sample in samples] == [1, 1, 1]
    with pytest.raises(SampleError, match="no-caption"):
        rows[3]


def test_relative_images_count_from_the_file(tmp_path):
    parts = [{"type": "image", "path": "p/1.png"}, {"type": "image"}, {"type": "image"}]
    row = {"messages": [{"role": "user", "content": parts}], "images": ["2.png", "https://x/3.png"]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    sample = parse_sample(open_source(tmp_path / "x.jsonl").read(0)[0])
    assert sample.images == [f"{tmp_path}/p/1.png", f"{tmp_path}/2.png", "https://x/3.png"]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".jsonl.lz4", ".tar"])
def test_a_truncated_shard_is_one_broken_row(tmp_path, suffix, picture):
    members = {f"{i}.png": png(picture(seed=i)) for i in range(3)} | {f"{i}.txt": b"x" for i in range(3)}
    data = tar_bytes(dict(sorted(members.items()))) if suffix == ".tar" else COMPRESS[suffix](LINES)
    (tmp_path / f"x{suffix}").write_bytes(data[: len(data) // 2])
    rows = open_source(tmp_path / f"x{suffix}").read(0)
    with pytest.raises(SampleError, match="broken-shard") as error:
        rows[len(rows) - 1]
    assert f"x{suffix}" in str(error.value)
    if suffix == ".tar":  # what is whole is kept
        assert parse_sample(rows[0]).images


def test_a_broken_row_group_does_not_take_the_others_along(tmp_path):
    data = bytearray(parquet_bytes())
    start = pq.read_metadata(io.BytesIO(data)).row_group(1).column(0)
    offset = start.dictionary_page_offset or start.data_page_offset
    data[offset : offset + 40] = b"\xff" * 40
    (tmp_path / "x.parquet").write_bytes(data)
    source = open_source(tmp_path / "x.parquet")
    assert len(source.read(0)) == 100
    broken = source.read(1)
    with pytest.raises(SampleError, match=r"broken-shard.*row group 1"):
        broken[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.parquet", b"PAR1 not really", "not a readable parquet file"),
        ("x.csv", b"a,b", "expected files of one of the formats"),
        (None, b"", "no data files"),
    ],
)
def test_what_cannot_be_opened_is_said(tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SoloError, match=message):
        open_source(tmp_path / (name or "missing.parquet"))


def test_mixed_formats_in_a_folder_are_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet_bytes())
    (tmp_path / "b.jsonl").write_bytes(LINES)
    with pytest.raises(SoloError, match="one of the formats"):
        open_source(tmp_path)


def test_a_protocol_that_is_unknown_is_said():
    with pytest.raises(SoloError, match="nowhere"):
        open_source("nowhere://bucket/x.parquet")


class FlakyFileSystem(MemoryFileSystem):
    """Fails the first `failures` times that a file is read, as a network does."""

    protocol = "flaky"
    store: dict = {}  # noqa: RUF012 (as in the class it derives from)
    failures = 0
    error: OSError = OSError(errno.EIO, "the network is down")

    def _open(self, *arguments, **options):
        self._fail()
        return super()._open(*arguments, **options)

    def cat_file(self, *arguments, **options):
        self._fail()
        return super().cat_file(*arguments, **options)

    def _fail(self) -> None:
        if type(self).failures > 0:
            type(self).failures -= 1
            raise self.error


@pytest.fixture
def flaky(monkeypatch):
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    FlakyFileSystem.failures = 0
    system = fsspec.filesystem("flaky")
    contents = {"x.parquet": parquet_bytes(), "x.jsonl": LINES, "x.jsonl.gz": gzip.compress(LINES)}
    for name, data in contents.items():
        system.pipe(f"flaky://data/{name}", data)
    return FlakyFileSystem


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl", "x.jsonl.gz"])
def test_a_disk_that_recovers_loses_nothing(flaky, name):
    source = open_source(f"flaky://data/{name}")
    flaky.failures = 3
    assert texts(source) == [f"row {i}" for i in range(600)]
    assert flaky.failures == 0


class HubError(OSError):
    """As huggingface_hub's: an OSError without a number."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "the network is down"),
        ConnectionError("the network is down"),
        HubError("503: the network is down"),
    ],
)
@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl"])
def test_a_disk_that_does_not_recover_is_an_error_and_no_skipped_sample(flaky, name, error, monkeypatch):
    monkeypatch.setattr(flaky, "error", error)
    source = open_source(f"flaky://data/{name}")
    flaky.failures = 10**6
    with pytest.raises(OSError, match="network is down"):
        source.read(0)


def test_a_fingerprint_changes_with_the_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    before = open_source(tmp_path).fingerprint()
    assert open_source(tmp_path).fingerprint() == before
    (tmp_path / "b.jsonl").write_bytes(LINES)
    assert open_source(tmp_path).fingerprint() != before
