"""Files of every format: intact, broken, and on an unreliable disk."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import random
import string
import tarfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from tests.factories import png, tar_bytes

from solo_vlm.data.encode import encode
from solo_vlm.data.sample import SampleError, parse_sample
from solo_vlm.data.sources import is_same_data, open_source
from solo_vlm.data.sources.files import find_files
from solo_vlm.data.sources.parquet import write_samples
from solo_vlm.models.solo.image_loading_solo import image_suffixes
from solo_vlm.utils.errors import SoloError

ROWS = [{"messages": [{"role": "assistant", "content": f"row {i}"}]} for i in range(600)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
COMPRESS = {
    ".jsonl": lambda data: data,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": lambda data: arrow_compressed(data, "zstd"),
    ".jsonl.lz4": lambda data: arrow_compressed(data, "lz4"),
}


def arrow_compressed(data: bytes, codec: str) -> bytes:
    """Compress like the codec's own tool (lz4: the frame format)."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def texts(source) -> list[str]:
    samples = [parse_sample(row) for shard in range(len(source)) for row in source.read(shard)]
    return [sample.messages[0]["content"][-1]["text"] for sample in samples]


def parquet_bytes() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), buffer, row_group_size=100)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines_are_read_plain_and_compressed(tmp_path, suffix):
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
        "./a/0.txt": b"a caption",
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


def test_relative_image_paths_refer_to_the_folder_of_the_file(tmp_path):
    parts = [{"type": "image", "path": "p/1.png"}, {"type": "image"}, {"type": "image"}]
    row = {"messages": [{"role": "user", "content": parts}], "images": ["2.png", "https://x/3.png"]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    sample = parse_sample(open_source(tmp_path / "x.jsonl").read(0)[0])
    assert sample.images == [f"{tmp_path}/p/1.png", f"{tmp_path}/2.png", "https://x/3.png"]


def test_relative_image_paths_in_parquet_and_tar_refer_to_the_folder_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    turn = {"role": "user", "content": content}
    rows = [{"messages": [turn], "images": [{"bytes": None, "path": "1.png"}]}]
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows" / "x.parquet")
    chat = {"messages": [{"role": "user", "content": "What?"}], "image": "1.png"}
    (tmp_path / "rows" / "x.tar").write_bytes(tar_bytes({"0.json": json.dumps(chat).encode()}))
    for name in ("x.parquet", "x.tar"):
        sample = parse_sample(open_source(f"rows/{name}").read(0)[0])
        assert sample.images == [f"{tmp_path}/rows/1.png"]


def test_images_of_a_tar_row_are_in_natural_order(tmp_path):
    images = {f"1.{i}.png": bytes([i + 1]) for i in range(12)}
    parts = [{"type": "image"}] * 12
    chat = {"messages": [{"role": "user", "content": parts}]}
    members = dict(sorted(images.items())) | {"1.json": json.dumps(chat).encode()}
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    sample = parse_sample(open_source(tmp_path / "x.tar").read(0)[0])
    assert sample.images == [bytes([i + 1]) for i in range(12)]


COMMON_IMAGES = {
    "jpg",
    "jpeg",
    "jfif",
    "jpe",
    "png",
    "webp",
    "gif",
    "bmp",
    "tif",
    "tiff",
    "avif",
    "jp2",
    "heic",
}


def test_image_suffixes_cover_what_pillow_reads():
    assert {f".{suffix}" for suffix in COMMON_IMAGES} <= image_suffixes()
    Image.init()
    opened = {
        suffix for suffix, file_format in Image.registered_extensions().items() if file_format in Image.OPEN
    }
    assert opened <= image_suffixes()
    assert not image_suffixes() & {".txt", ".json", ".cls", ".npy"}


@pytest.mark.parametrize("suffix", sorted([*COMMON_IMAGES, "JPEG", "svg", "seg.png"]))
def test_tar_member_with_image_suffix_is_an_image(tmp_path, suffix):
    (tmp_path / "x.tar").write_bytes(tar_bytes({f"1.{suffix}": b"content", "1.txt": b"a cat"}))
    sample = parse_sample(open_source(tmp_path / "x.tar").read(0)[0])
    assert sample.images == [b"content"]
    assert sample.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "a cat"}]


@pytest.mark.parametrize("file_format", ["AVIF", "JPEG2000", "WEBP"])
def test_tar_image_is_read_or_its_row_is_skipped_and_counted(tmp_path, solo, file_format):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "image", file_format)
    suffix = {"AVIF": "avif", "JPEG2000": "jp2", "WEBP": "webp"}[file_format]
    data = (tmp_path / "image").read_bytes()
    members = {f"1.{suffix}": data, "1.txt": b"red", f"2.{suffix}": data[:40], "2.txt": b"red"}
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    rows = open_source(tmp_path / "x.tar").read(0)
    assert len(encode(parse_sample(rows[0]), solo.processor).pixel_values) == 4
    with pytest.raises(SampleError, match="image: ") as error:
        encode(parse_sample(rows[1]), solo.processor)
    assert error.value.reason == "image"


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"1.npy": b"\x93NUMPY\xff", "1.txt": b"a cat"}, "image"),
        ({"1.txt": b"\xef\xbb\xbf\r\n"}, "no-caption"),
        ({"1.png": b"x", "1.txt": b""}, "no-caption"),
        ({"1.png": b"x", "1.txt": b"\xff\xfea\0"}, "no-caption"),
        ({"1.png": b"x", "1.json": b"[]"}, "json"),
        ({"1.png": b"x", "1.json": b'"messages"'}, "json"),
        ({"1.png": b"x", "1.json": b"[" * 100_000}, "json"),
        ({"1.json": b'{"caption": "a cat", "url": "https://x/1.jpg"}'}, "image-column"),
        ({"1.png": b"", "1.txt": b"a cat"}, "schema"),
    ],
)
def test_caption_is_never_read_without_its_image(tmp_path, members, reason):
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    with pytest.raises(SampleError) as error:
        parse_sample(open_source(tmp_path / "x.tar").read(0)[0])
    assert error.value.reason == reason


def test_duplicate_tar_members_are_rejected(tmp_path):
    members = [("1.png", b"a"), ("1.txt", b"cat"), ("1.png", b"b"), ("1.txt", b"dog")]
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    with pytest.raises(SampleError, match="duplicate"):
        open_source(tmp_path / "x.tar").read(0)[0]


@pytest.mark.parametrize("caption", [b"\xef\xbb\xbfa cat\r\n", b"a cat\n", b"\xef\xbb\xbfa cat"])
def test_bom_and_line_ends_are_stripped_from_captions(tmp_path, caption):
    (tmp_path / "x.tar").write_bytes(tar_bytes({"1.png": b"x", "1.txt": caption}))
    sample = parse_sample(open_source(tmp_path / "x.tar").read(0)[0])
    assert sample.messages[0]["content"][1]["text"] == "a cat"


def test_tar_member_images_override_paths_in_json(tmp_path):
    chat = {
        "messages": [{"role": "user", "content": "<image>\nWhat?"}],
        "image": "1.png",
        "images": ["1.png"],
    }
    (tmp_path / "x.tar").write_bytes(tar_bytes({"1.png": b"x", "1.json": json.dumps(chat).encode()}))
    assert parse_sample(open_source(tmp_path / "x.tar").read(0)[0]).images == [b"x"]


@pytest.mark.parametrize("depth", [300, 3_000, 100_000])
@pytest.mark.parametrize("column", ["messages", "images", "image", "meta"])
def test_deeply_nested_json_affects_only_its_row(tmp_path, depth, column):
    turns = json.dumps({"messages": [{"role": "user", "content": "a"}]})
    deep = f'{turns[:-1]}, "{column}": {"[" * depth}{"]" * depth}}}'
    (tmp_path / "x.jsonl").write_text(f"{turns}\n{deep}\n{turns}\n")
    rows = open_source(tmp_path / "x.jsonl").read(0)
    assert [len(parse_sample(rows[row]).messages) for row in (0, 2)] == [1, 1]
    try:
        parse_sample(rows[1])
    except SampleError as error:
        assert error.reason in ("json", "schema")
    else:
        assert column == "meta"


def test_original_rows_keep_their_image(tmp_path):
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a cat"}]
    lines = [{"id": 1, "conversations": turns, "image": "a.png"}, {**turns[1], "image": "a.png"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = open_source(tmp_path / "x.jsonl").read(0)
    assert [parse_sample(rows[i]).images for i in range(2)] == [[f"{tmp_path}/a.png"]] * 2


def test_undecodable_value_affects_one_row_of_a_parquet_file(tmp_path):
    good, bad = (pa.array([text], pa.binary()).view(pa.string()) for text in (b"hello", b"\xff"))
    contents = pa.concat_arrays([good, bad])
    messages = pa.ListArray.from_arrays(
        pa.array([0, 1, 2], pa.int32()),
        pa.StructArray.from_arrays([pa.array(["user", "user"]), contents], ["role", "content"]),
    )
    table = pa.table(
        {
            "messages": messages,
            "id": pa.concat_arrays([bad, bad]),
            "date": pa.array([10**9] * 2, pa.date32()),  # beyond Python's
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    rows = open_source(tmp_path / "x.parquet").read(0)
    assert parse_sample(rows[0]).messages[0]["content"][0]["text"] == "hello"
    with pytest.raises(SampleError, match="column messages cannot be read"):
        rows[1]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".jsonl.lz4", ".tar"])
def test_truncated_shard_is_one_broken_row(tmp_path, suffix, picture):
    members = {f"{i}.png": png(picture(seed=i)) for i in range(3)} | {f"{i}.txt": b"x" for i in range(3)}
    data = tar_bytes(dict(sorted(members.items()))) if suffix == ".tar" else COMPRESS[suffix](LINES)
    (tmp_path / f"x{suffix}").write_bytes(data[: len(data) // 2])
    rows = open_source(tmp_path / f"x{suffix}").read(0)
    with pytest.raises(SampleError, match="broken-shard") as error:
        rows[len(rows) - 1]
    assert f"x{suffix}" in str(error.value)
    if suffix == ".tar":  # intact rows are kept
        assert parse_sample(rows[0]).images


def test_broken_row_group_does_not_affect_others(tmp_path):
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
        ("x.xml", b"<a>", "expected files of one of the formats"),
        (None, b"", "no data files"),
    ],
)
def test_unreadable_source_is_reported(tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SoloError, match=message):
        open_source(tmp_path / (name or "missing.parquet"))


def test_mixed_formats_in_a_folder_are_rejected(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet_bytes())
    (tmp_path / "b.jsonl").write_bytes(LINES)
    with pytest.raises(SoloError, match=r"several formats, \.jsonl, \.parquet: .* such as \*\.jsonl$"):
        open_source(tmp_path)


def test_unknown_protocol_is_reported():
    with pytest.raises(SoloError, match="nowhere"):
        open_source("nowhere://bucket/x.parquet")


class FlakyFileSystem(MemoryFileSystem):
    """File system whose first `failures` reads fail, like those of a network."""

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
def test_recovering_disk_is_retried(flaky, name):
    source = open_source(f"flaky://data/{name}")
    flaky.failures = 3
    assert texts(source) == [f"row {i}" for i in range(600)]
    assert flaky.failures == 0


class HubError(OSError):
    """OSError without errno, like huggingface_hub's."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "the network is down"),
        ConnectionError("the network is down"),
        HubError("503: the network is down"),
    ],
)
@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl"])
def test_permanent_disk_failure_is_raised_not_skipped(flaky, name, error, monkeypatch):
    monkeypatch.setattr(flaky, "error", error)
    source = open_source(f"flaky://data/{name}")
    flaky.failures = 10**6
    with pytest.raises(OSError, match="network is down"):
        source.read(0)


def test_fingerprint_changes_with_the_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    before = open_source(tmp_path).fingerprint()
    assert open_source(tmp_path).fingerprint() == before
    (tmp_path / "b.jsonl").write_bytes(LINES)
    assert open_source(tmp_path).fingerprint() != before


@pytest.mark.parametrize("size", [1000, 10**6])
def test_fingerprint_changes_with_the_contents_of_a_file(tmp_path, size):
    file = tmp_path / "a.jsonl"
    file.write_bytes(LINES + b" " * size)
    before = open_source(tmp_path).fingerprint()
    os.utime(file, (0, 0))
    assert open_source(tmp_path).fingerprint() == before
    file.write_bytes(LINES + b"\n" * size)
    now = open_source(tmp_path).fingerprint()
    assert not is_same_data(before, now)
    names_and_sizes = before.partition("-")[0]  # of an earlier version, or of remote files
    assert is_same_data(names_and_sizes, now)
    assert is_same_data(now, names_and_sizes)


def test_flipped_bit_in_a_written_parquet_page_breaks_its_shard(tmp_path):
    path = tmp_path / "a.parquet"
    text = "".join(random.Random(0).choices(string.ascii_letters, k=20_000))  # cannot be compressed
    message = {"role": "assistant", "content": [{"type": "text", "text": text}]}
    write_samples(path, [{"messages": [message]}])
    content = bytearray(path.read_bytes())
    content[content.index(text[10_000:10_100].encode())] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        SampleError, match="could not verify page integrity, CRC checksum verification failed"
    ):
        open_source(path).read(0)[0]


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_tar_links_are_resolved(tmp_path, kind):
    def write(target: str) -> None:
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for name, data in (("one/1.png", b"red"), ("two/2.txt", b"a cat")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            link = tarfile.TarInfo("two/2.png")
            link.type, link.linkname = kind, target
            tar.addfile(link)

    write("one/1.png" if kind == tarfile.LNKTYPE else "../one/1.png")
    rows = open_source(tmp_path / "x.tar").read(0)
    assert parse_sample(rows[1]).images == [b"red"]
    for target in ("/elsewhere/1.png", "two/2.png", "2.png"):  # outside, and the link itself
        write(target)
        with pytest.raises(SampleError, match="a link to a file that is not in the tar"):
            open_source(tmp_path / "x.tar").read(0)[1]


@pytest.mark.parametrize("fault", ["cut between members", "joined by cat"])
def test_truncated_tar_keeps_its_rows_and_is_reported(tmp_path, fault):
    data = tar_bytes({"1.txt": b"one", "2.txt": b"two"})
    (tmp_path / "x.tar").write_bytes(data[:2048] if fault == "cut between members" else data + data)
    rows = open_source(tmp_path / "x.tar").read(0)
    assert [parse_sample(rows[row]).messages[0]["content"][0]["text"] for row in (0, 1)] == ["one", "two"]
    assert len(rows) == 3
    with pytest.raises(SampleError, match=r"broken-shard.*(truncated|joined by cat)"):
        rows[2]


def test_suffix_is_case_insensitive(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.JSONL").write_bytes(LINES)
    (tmp_path / "c.JsonL.GZ").write_bytes(gzip.compress(LINES))
    source = open_source(tmp_path)
    assert sum(len(source.read(shard)) for shard in range(len(source))) == 3 * len(ROWS)


def test_folder_named_like_a_data_file_is_rejected(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").mkdir()
    (tmp_path / "b.jsonl" / "part.jsonl").write_bytes(LINES)
    with pytest.raises(SoloError, match=r"b\.jsonl is a folder among files"):
        open_source(tmp_path)
    assert len(open_source(tmp_path / "b.jsonl"))


def test_data_files_in_subfolders_are_reported(tmp_path):
    elsewhere = tmp_path.with_name("elsewhere")
    elsewhere.mkdir()
    for folder in (tmp_path, elsewhere, tmp_path / "more", tmp_path / ".hidden"):
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.table({"id": [folder.name]}), folder / "a.parquet")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    with pytest.raises(SoloError, match=r"more, a folder in .*, has data files, too: .*\*\*/\*"):
        open_source(tmp_path)
    assert len(open_source(tmp_path / "**" / "*.parquet")) == 2
    (tmp_path / "more" / "a.parquet").rename(tmp_path / "more" / "a.tar")
    with pytest.raises(SoloError, match=r"more, a folder in .*, has data files, too: .*/\*\*/\*\.tar,"):
        open_source(tmp_path)
    (tmp_path / "more").rename(tmp_path / ".more")
    assert len(open_source(tmp_path)) == 1
    (tmp_path / "linked").symlink_to(elsewhere)
    with pytest.raises(SoloError, match=r"linked, a folder in .*, has data files, too"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("size", "rows"), [(100, [256, 256, 88]), (100_000, [40] * 15), (5_000_000, [1] * 8)]
)
def test_row_groups_are_bounded_in_rows_and_bytes(tmp_path, size, rows):
    count = sum(rows)
    text = [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    samples = [
        {"id": str(number), "messages": text, "images": [{"bytes": bytes(size), "path": None}]}
        for number in range(count)
    ]
    assert write_samples(tmp_path / "a.parquet", iter(samples)) == count
    file = pq.ParquetFile(tmp_path / "a.parquet")
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == rows
    assert file.read(columns=["id"])["id"].to_pylist() == [str(number) for number in range(count)]


def test_pattern_finds_names_that_end_where_its_star_begins(tmp_path):
    """`a*.jsonl` is also a.jsonl; files that begin with a dot are hidden unless the pattern has the dot."""
    for name in ("a.jsonl", "a1.jsonl", ".a.jsonl", ".b/c.jsonl", "d/e.jsonl", "d/.f.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")

    def found(pattern: str) -> list[str]:
        files = find_files(str(tmp_path / pattern), (".jsonl",))
        return [file.url.removeprefix(f"{tmp_path}/") for file in files]

    assert found("a*.jsonl") == found("a*") == ["a.jsonl", "a1.jsonl"]
    assert found("*.jsonl") == ["a.jsonl", "a1.jsonl"]
    assert found(".a*.jsonl") == [".a.jsonl"]
    assert found("**/*.jsonl") == ["a.jsonl", "a1.jsonl", "d/e.jsonl"]
    assert found(".b/*.jsonl") == [".b/c.jsonl"]
    assert found("d*/e*.jsonl") == ["d/e.jsonl"]
