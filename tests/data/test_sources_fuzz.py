"""Any JSONL, tar or parquet file gives samples or errors that name it, and no image outside its folder."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solo_vlm.data.sample import SampleError, parse_sample
from solo_vlm.data.sources import open_source
from solo_vlm.data.sources.files import Limits
from solo_vlm.utils.errors import SoloError

pytestmark = pytest.mark.fuzz

LIMITS = Limits(max_row_bytes=4096, max_shard_bytes=1 << 20)
PATHS = [
    "/etc/passwd",
    "../x.png",
    "x.png",
    "link/x.png",
    "file:///etc/passwd",
    "file:..",
    "s3://a/b",
    "http://a/b",
]
PATHS += [
    "data:image/png;base64,AAAA",
    "zip://a::b",
    "~/x",
    "x\0",
    "\ud800",
    "",
    ".",
    "/",
    "A" * 50,
    "A" * 5000,
]
NAMES = [
    "messages",
    "conversations",
    "role",
    "content",
    "type",
    "text",
    "image",
    "images",
    "image_url",
    "url",
    "path",
]
NAMES += ["bytes", "base64", "id", "caption"]
WORDS = st.sampled_from([*NAMES, *PATHS, "user", "assistant", "system", "<image>", "NaN"]) | st.text(
    max_size=9
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)
IMAGE = st.fixed_dictionaries(
    {"type": st.sampled_from(["image", "image_url"])},
    optional={
        name: st.sampled_from(PATHS) | ANYTHING for name in ("image", "path", "url", "base64", "image_url")
    },
)
PART = st.fixed_dictionaries({"type": st.just("text"), "text": WORDS}) | IMAGE | ANYTHING
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": WORDS | st.lists(PART, max_size=3)},
    optional={"image": ANYTHING, "images": st.lists(ANYTHING, max_size=2)},
)
ROW = st.fixed_dictionaries(
    {"messages": st.lists(TURN, min_size=1, max_size=3)},
    optional={name: st.sampled_from(PATHS) | ANYTHING for name in ("image", "images", "id", "photo")},
)


@st.composite
def mutated(draw, contents):
    """Draw bytes with a few of them replaced, removed or repeated."""
    content = bytearray(draw(contents))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, max(len(content) - 1, 0)))
        size = draw(st.sampled_from([0, 1, 1, 8, 100]))
        piece = draw(
            st.binary(max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 12, b'"', b"[" * 999, b"\n"])
        )
        content[start : start + size] = piece
    return bytes(content)


def lines(values):
    return b"".join(json.dumps(value).encode(errors="surrogatepass") + b"\n" for value in values)


KINDS = [
    tarfile.REGTYPE,
    tarfile.AREGTYPE,
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
]
KINDS += [tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE]
KINDS += [tarfile.XGLTYPE, b"Z"]
PAX = [
    b"30 GNU.sparse.major=1\n",
    b"12 size=9999\n",
    b"99 path=x\n",
    b"22 GNU.sparse.size=x\n",
    b"x",
    b"9" * 99,
]


@st.composite
def members(draw):
    name = draw(st.sampled_from(["a.png", "a.json", "a.txt", "../a.png", "/etc/passwd", "b.1.png", "9" * 90]))
    content = draw(st.sampled_from([b"text", *PAX]) | lines_of_rows() | st.binary(max_size=99))
    member = tarfile.TarInfo(name)
    member.type = draw(st.sampled_from(KINDS))
    member.linkname = draw(st.sampled_from(["", "a.png", "../a.png", "/etc/passwd"]))
    member.size = draw(st.just(len(content)) | st.sampled_from([0, 511, 10**6, 8**11 - 1]))
    return member.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def lines_of_rows():
    return st.lists(ROW | ANYTHING, max_size=3).map(lines)


@st.composite
def parquet_files(draw):
    rows = draw(st.integers(1, 3))
    texts = draw(st.lists(WORDS.filter(lambda text: text.isascii()), min_size=rows, max_size=rows))
    table = {
        "messages": [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in texts],
        "image": texts,
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(table), sink, compression=draw(st.sampled_from(["none", "snappy"])))
    return sink.getvalue().to_pybytes()


def read(suffix, content):
    """Read all rows; return the samples."""
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "data"
        folder.mkdir()
        (folder / "link").symlink_to("/etc")
        (folder / f"x{suffix}").write_bytes(content)
        samples = []
        try:
            source = open_source(folder / f"x{suffix}", LIMITS)
            for shard in range(len(source)):
                rows = source.read(shard)
                for number in range(len(rows)):
                    source.where(shard, number)
                    try:
                        samples.append(parse_sample(rows[number]))
                    except SampleError as error:
                        assert str(error)
        except SoloError as error:
            assert str(error)
        for image in (image for sample in samples for image in sample.images if isinstance(image, str)):
            if not image.lower().startswith(("http:", "https:", "data:")):
                path = image[len("file://") :] if image.lower().startswith("file://") else image
                assert os.path.realpath(path).startswith(os.path.realpath(folder))
        return samples


@given(lines_of_rows() | mutated(lines_of_rows()))
def test_jsonl(content):
    read(".jsonl", content)


@given(mutated(st.lists(members(), max_size=5).map(b"".join).map(lambda tar: tar + bytes(1024))))
def test_tar(content):
    read(".tar", content)


@given(mutated(parquet_files()))
def test_parquet(content):
    read(".parquet", content)


def test_inputs_are_mostly_readable():
    """An input that is always rejected would prove nothing."""
    row = {"messages": [{"role": "assistant", "content": [{"type": "image", "path": "x.png"}]}]}
    assert len(read(".jsonl", lines([row, row]))) == 2
