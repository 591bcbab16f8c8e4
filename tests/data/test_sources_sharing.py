"""Sources that one process opens for all others."""

from __future__ import annotations

import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.factories import png, tar_bytes

from solo_vlm.data.sources import fingerprints, open_source
from solo_vlm.data.sources.files import hash_content
from solo_vlm.data.sources.sharing import pack_sources, unpack_sources
from solo_vlm.utils.errors import SoloError

NAMES = ("rows", "lines.jsonl", "pairs.tar", "photos")


@pytest.fixture
def root(tmp_path, picture):
    root = tmp_path / "first"
    (root / "rows").mkdir(parents=True)
    row = {"messages": [{"role": "assistant", "content": "text"}]}
    for number in range(5):
        pq.write_table(pa.Table.from_pylist([row]), root / "rows" / f"{number}.parquet")
    (root / "lines.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "image": "photos/a.png"}))
    (root / "pairs.tar").write_bytes(tar_bytes({"a.png": png(picture()), "a.txt": b"a"}))
    (root / "photos").mkdir()
    (root / "photos" / "a.png").write_bytes(png(picture()))
    (root / "photos" / "a.txt").write_text("a")
    return root


def opened(root) -> list:
    return [open_source(root / name, format="auto") for name in NAMES]


def rows_of(sources) -> list:
    return [list(source.read(shard)) for source in sources for shard in range(len(source))]


def test_shared_sources_are_read_below_the_own_root_without_indexing(root, monkeypatch):
    first = opened(root)
    packed, prints = pack_sources(first, str(root)), fingerprints(first)
    other = root.parent / "other"
    shutil.copytree(root, other, copy_function=shutil.copyfile)  # with other times
    expected = json.dumps(rows_of(opened(other)), default=repr)
    shutil.move(root, root.parent / "elsewhere")
    hash_content.cache_clear()
    indexed = []
    for name in ("parquet._read_metadata", "jsonl._lines", "image_folder._list"):
        monkeypatch.setattr(f"solo_vlm.data.sources.{name}", lambda *_: indexed.append(_))
    compared = []
    monkeypatch.setattr("solo_vlm.data.sources.files.hash_blocks", lambda *_: compared.append(_) or "")
    with pytest.raises(SoloError, match="another file"):
        unpack_sources(packed, str(other), 2, 99)
    shared = unpack_sources(packed, str(other), 98, 99)
    assert fingerprints(shared) == prints
    assert json.dumps(rows_of(shared), default=repr) == expected
    assert not indexed
    assert len(compared) == 1  # its own part of the comparison


@pytest.mark.parametrize("change", ["missing", "size", "content"])
def test_other_files_are_rejected(root, change):
    packed = pack_sources(opened(root), str(root))
    file = root / "rows" / "3.parquet"
    if change == "missing":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[10] ^= 255
        file.write_bytes(data + b"x" * (change == "size"))
        os.utime(file, ns=(0, 0))
    with pytest.raises(SoloError, match=r"rows/3\.parquet is missing or another file than for process 0"):
        for part in range(3):
            unpack_sources(packed, str(root), part, 3)
