"""Unusable data is skipped, and counted by source and reason."""

from __future__ import annotations

import copy
import gzip
import json
import struct
import zlib
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.factories import png, tar_bytes

from solo_vlm.data.encode import Encoder
from solo_vlm.data.loader import PackedLoader
from solo_vlm.data.sources import open_source
from solo_vlm.data.streams import LISTED, MixtureItem, VirtualStream
from solo_vlm.utils.errors import SoloError

LENGTH = 128
# As in the templates of many LLMs.
ALTERNATE = """{%- for message in messages if not loop.first and message.role == loop.previtem.role -%}
  {{- raise_exception('roles must alternate') -}}
{%- endfor -%}"""


def bomb() -> bytes:
    """Return a PNG of a hundred bytes that declares 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def caption(*images: bytes, parts: int | None = None) -> dict:
    content = [{"type": "image", "text": None}] * (len(images) if parts is None else parts)
    content = [*content, {"type": "text", "text": "a red circle"}]
    return {"messages": [{"role": "assistant", "content": content}], "images": list(images)}


def line(text: str, **row) -> str:
    return json.dumps({"messages": [{"role": "assistant", "content": text}], **row})


def write_parquet(path, picture) -> Counter:
    good = png(picture())
    rows = [
        caption(good),
        caption(good[: len(good) // 2]),
        caption(b"<html>not found</html>"),
        caption(bomb()),
        caption(png(Image.new("RGB", (4000, 3)))),
        caption(png(picture(1024, 1024))),
        caption(good, parts=2),
        caption(good, good, parts=1),
        {"messages": [], "images": []},
        *(caption(good) for _ in range(10)),
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=len(rows))
    return Counter({"image": 4, "too-long": 1, "image-count": 2, "schema": 1})


def write_broken_row_group(path, picture) -> Counter:
    pq.write_table(pa.Table.from_pylist([caption(png(picture()))] * 20), path, row_group_size=10)
    data, column = bytearray(path.read_bytes()), pq.read_metadata(path).row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    return Counter({"broken-shard": 1})


def write_lines(path, picture) -> Counter:
    bad_turns = [{"role": role, "content": "hello"} for role in ("user", "user")]
    chat = json.dumps({"messages": bad_turns})
    rows = [line("good"), "no JSON", '"a string"', '{"text": "no chat"}', line("bad", messages=3), chat]
    path.write_text("\n".join(rows))
    return Counter({"json": 2, "schema": 2, "chat-template": 1})


def write_cut_lines(path, picture) -> Counter:
    data = gzip.compress("\n".join(line(f"text {i}") for i in range(500)).encode())
    path.write_bytes(data[: len(data) // 2])
    return Counter({"broken-shard": 1})


def write_tar(path, picture) -> Counter:
    good = png(picture())
    members = {
        "a.png": good,
        "a.txt": b"good",
        "b.png": good,
        "c.json": b"{",
        "d.png": b"no image",
        "d.txt": b"x",
    }
    path.write_bytes(tar_bytes(members))
    return Counter({"no-caption": 1, "json": 1, "image": 1})


def write_cut_tar(path, picture) -> Counter:
    data = tar_bytes({f"{i}.txt": b"x" * 1000 for i in range(10)})
    path.write_bytes(data[: len(data) // 2])
    return Counter({"broken-shard": 1})


def skipped(stream: VirtualStream) -> list[dict[str, str]]:
    """Read a stream to its end; return the skipped samples that it lists."""
    return [*(entry for pack in stream for entry in pack.skipped), *stream.take_skipped()]


WRITERS = {
    "pictures.parquet": write_parquet,
    "groups.parquet": write_broken_row_group,
    "lines.jsonl": write_lines,
    "cut.jsonl.gz": write_cut_lines,
    "pairs.tar": write_tar,
    "cut.tar": write_cut_tar,
}


def test_each_fault_is_counted_by_source_and_reason(tmp_path, picture, solo):
    expected = {name: write(tmp_path / name, picture) for name, write in WRITERS.items()}
    sources = [open_source(tmp_path / name) for name in WRITERS]
    mixture = [MixtureItem(source) for source in sources]
    strict = copy.copy(solo.processor)
    strict.chat_template = ALTERNATE + strict.chat_template

    def make_stream(index: int) -> VirtualStream:
        return VirtualStream(index, 1, mixture, Encoder(strict).draft, LENGTH, epochs=1, max_skipped=0.5)

    loader = PackedLoader(make_stream, 1, LENGTH, 0, sources=sources)
    for _ in loader:
        pass
    counts = loader.counts()
    for source, (name, reasons) in zip(sources, expected.items(), strict=True):
        for reason, count in reasons.items():
            assert counts.pop(f"skipped/{source.name}/{reason}") == count, (name, reason)
    assert not [key for key in counts if key.startswith("skipped/")]
    assert counts["skipped"] == sum(reasons.total() for reasons in expected.values())
    listed = loader.skipped()
    assert {entry["source"] for entry in listed} == {source.name for source in sources}
    for entry in listed:
        assert entry["where"].startswith(entry["source"])
        assert entry["error"].startswith(f"{entry['reason']}: ")


def test_invalid_text_is_skipped_and_an_invalid_id_ignored(tmp_path, solo):
    rows = [line("half a pair \ud83d"), "[" * 3000 + "]" * 3000, line("odd id", id=float("nan"))]
    rows += [line("lost", photo="a.png"), line("missing", image="\udce9.png"), line("good")]
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    mixture = [MixtureItem(open_source(tmp_path / "x.jsonl"))]
    stream = VirtualStream(0, 1, mixture, Encoder(solo.processor).draft, LENGTH, epochs=1, max_skipped=0.5)
    listed = skipped(stream)
    state = stream.state_dict()
    assert state["counts"]["documents"] == 2
    reasons = Counter(entry["reason"] for entry in listed)
    assert reasons == {"schema": 1, "json": 1, "image-column": 1, "image": 1}
    json.dumps([state, listed], ensure_ascii=False).encode()  # manifests and checkpoints can store it


@pytest.mark.parametrize("bad", [LISTED + 5, 2])
def test_first_skipped_samples_are_listed_and_all_are_counted(tmp_path, bad, solo):
    (tmp_path / "x.jsonl").write_text("\n".join([line("good")] * 200 + ["no JSON"] * bad))
    mixture = [MixtureItem(open_source(tmp_path / "x.jsonl"))]
    stream = VirtualStream(0, 1, mixture, Encoder(solo.processor).draft, LENGTH, epochs=1, max_skipped=0.5)
    assert len(skipped(stream)) == min(bad, LISTED)
    assert stream.state_dict()["counts"]["skipped"] == bad


def test_too_many_skipped_samples_stop_the_run_with_a_list(tmp_path, solo):
    (tmp_path / "x.jsonl").write_text("\n".join([line("good"), "no JSON"] * 100))
    source = open_source(tmp_path / "x.jsonl")

    def make_stream(index: int) -> VirtualStream:
        return VirtualStream(
            index, 1, [MixtureItem(source)], Encoder(solo.processor).draft, LENGTH, epochs=1, max_skipped=0.02
        )

    with pytest.raises(SoloError, match=r"^21 of \d+ rows are unusable, .*max_skipped = 0.02") as error:
        list(PackedLoader(make_stream, 1, LENGTH, 0))
    assert str(error.value).count("x.jsonl, block at byte 0, row ") == LISTED
