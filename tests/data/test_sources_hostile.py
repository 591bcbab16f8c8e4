"""Untrusted and damaged data sets: outside paths, false sizes and damage are rejected with the name."""

from __future__ import annotations

import gzip
import json
import os
import struct
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.factories import (
    image_rows,
    make_solo,
    png,
    run_recipe,
    run_settings,
    tar_bytes,
    text_rows,
    write_training_data,
)

from solo_vlm.data.mixture import DataSettings, Mixture
from solo_vlm.data.sample import SampleError, parse_sample
from solo_vlm.data.sources import open_source
from solo_vlm.data.sources.files import Limits
from solo_vlm.data.values import natural_key
from solo_vlm.models.solo.image_loading_solo import ImageMissingError, load_image
from solo_vlm.train import trainer
from solo_vlm.utils.errors import SoloError

RED = png(Image.new("RGB", (8, 8), "red"))


def chat(image=None):
    content = [*([{"type": "image", "path": image}] if image else []), {"type": "text", "text": "What?"}]
    answer = [{"type": "text", "text": "This."}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reasons(source):
    """Return the reason why each row is unusable; None for a usable one."""
    found = []
    for shard in range(len(source)):
        rows = source.read(shard)
        for number in range(len(rows)):
            try:
                parse_sample(rows[number])
                found.append(None)
            except SampleError as error:
                found.append(error.reason)
    return found


# ------------------------------------------------------------------------------- outside the folder


@pytest.fixture
def folder(tmp_path):
    """Return a data set with an image and links to an image and to a folder outside."""
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    for path in (folder / "in.png", folder / "sub" / "in.png", tmp_path / "secret" / "out.png"):
        path.write_bytes(RED)
    (folder / "link.png").symlink_to(tmp_path / "secret" / "out.png")
    (folder / "links").symlink_to(tmp_path / "secret")
    (folder / "inner.png").symlink_to("sub/in.png")
    return folder


INSIDE = [
    "in.png",
    "sub/in.png",
    "sub/../in.png",
    "inner.png",
    "{folder}/in.png",
    "file:in.png",
    "file://{folder}/in.png",
]
OUTSIDE = [
    "/etc/passwd",
    "../secret/out.png",
    "sub/../../secret/out.png",
    "link.png",
    "links/out.png",
    "file:///etc/passwd",
    "file:../secret/out.png",
    "FILE:%2e%2e/secret/out.png",
    "local:///etc/passwd",
    "memory://x.png",
    "s3://bucket/x.png",
    "zip://x.png::file:///etc/x.zip",
    "{folder}-secret/x.png",
    "x\0.png",
]


@pytest.mark.parametrize("name", INSIDE)
def test_images_in_the_folder_of_the_source_are_read(folder, name):
    write_jsonl(folder / "x.jsonl", [chat(name.format(folder=folder))])
    assert reasons(open_source(folder)) == [None]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_images_outside_the_folder_need_a_setting(folder, name, kind):
    row = chat(name.format(folder=folder))
    if kind == "jsonl":
        write_jsonl(folder / "x.jsonl", [row])
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), folder / "x.parquet")
    else:
        (folder / "x.tar").write_bytes(tar_bytes({"a.json": json.dumps(row).encode()}))
    assert reasons(open_source(folder)) == ["outside-path"]
    assert reasons(open_source(folder, Limits(allow_outside_paths=True))) == [None]


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret/out.png"])
def test_paths_in_all_fields_are_checked(folder, name):
    text = [{"type": "text", "text": "What?"}]
    answer = {"role": "assistant", "content": "This."}
    rows = [
        {"messages": [{"role": "user", "content": "What?"}, answer], "image": name},
        {"messages": [{"role": "user", "content": "What?"}, answer], "images": [{"path": name}]},
        {"messages": [{"role": "user", "content": "What?", "images": [name]}, answer]},
        *(
            {"messages": [{"role": "user", "content": [{"type": "image", **part}, *text]}, answer]}
            for part in (
                {"image": name},
                {"url": name},
                {"image_url": {"url": name}},
                {"image": {"path": name, "bytes": None}},
                {"image": {"bytes": None}, "path": name},
            )
        ),
    ]
    write_jsonl(folder / "x.jsonl", rows)
    assert reasons(open_source(folder)) == ["outside-path"] * len(rows)


def test_path_of_an_image_with_bytes_is_ignored(folder):
    row = {**chat(), "images": [{"bytes": RED, "path": "/home/somebody/x.png"}]}
    row["messages"][0]["content"].insert(0, {"type": "image", "text": None})
    pq.write_table(pa.Table.from_pylist([row]), folder / "x.parquet")
    assert reasons(open_source(folder)) == [None]


def test_links_in_the_hub_cache_are_inside(tmp_path):
    snapshot, blobs = tmp_path / "datasets--a--b" / "snapshots" / "123", tmp_path / "datasets--a--b" / "blobs"
    (snapshot / "images").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "ff").write_bytes(RED)
    (snapshot / "images" / "x.png").symlink_to("../../../blobs/ff")
    write_jsonl(blobs / "ee", [chat("images/x.png")])
    (snapshot / "x.jsonl").symlink_to("../../blobs/ee")
    assert reasons(open_source(snapshot)) == [None]


def test_setting_of_the_mixture_reaches_the_rows(folder):
    write_jsonl(folder / "x.jsonl", [chat("link.png")])
    settings = DataSettings.parse({"sources": [{"path": "x.jsonl"}], "allow_outside_paths": True})
    (source,) = Mixture(root=str(folder), model="any", data=settings).open_sources()
    assert reasons(source) == [None]


def test_names_of_tar_members_are_harmless(tmp_path):
    members = {"../../etc/a.png": RED, "../../etc/a.txt": b"one", "/etc/b.png": RED, "/etc/b.txt": b"two"}
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    rows = open_source(tmp_path / "x.tar").read(0)
    assert [parse_sample(row).images for row in rows] == [[RED], [RED]]


# ------------------------------------------------------------------------------------ false sizes


def header(name, size, kind=tarfile.REGTYPE, **fields):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    for field, value in fields.items():
        setattr(member, field, value)
    return member.tobuf(format=tarfile.GNU_FORMAT)


def with_negative_size(name):
    block = bytearray(header(name, 0))
    block[124:136] = b"\xff" * 8 + struct.pack(">i", -1024)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


HOSTILE_TARS = {
    "member beyond the end": header("a.png", 10**12),
    "member of negative size": with_negative_size("a.png"),
    "header of a terabyte": header("././@PaxHeader", 10**12, tarfile.XHDTYPE),
    "name of a megabyte": header("././@LongLink", 2**21, tarfile.GNUTYPE_LONGNAME) + bytes(2**21),
    "names of names": header("././@LongLink", 512, tarfile.GNUTYPE_LONGNAME) * 1 + bytes(512),
    "endless names": (header("././@LongLink", 1, tarfile.GNUTYPE_LONGNAME) + b"a".ljust(512, b"\0")) * 3000,
}


@pytest.mark.parametrize("kind", HOSTILE_TARS)
def test_hostile_tar_is_a_broken_shard(tmp_path, kind):
    good = tar_bytes({"good.png": RED, "good.txt": b"one"})[: 512 * 4]
    (tmp_path / "x.tar").write_bytes(good + HOSTILE_TARS[kind] + bytes(10240))
    assert reasons(open_source(tmp_path / "x.tar"))[-1] == "broken-shard"


def test_sparse_member_is_rejected(tmp_path):
    """The content of a sparse member is not where that of a regular member would be."""
    sparse = header("a.png", 512, tarfile.GNUTYPE_SPARSE) + RED.ljust(512, b"\0")
    (tmp_path / "x.tar").write_bytes(sparse + tar_bytes({"a.txt": b"one", "b.png": RED, "b.txt": b"two"}))
    assert reasons(open_source(tmp_path / "x.tar")) == ["image", None]


def test_large_rows_are_skipped_by_reason(tmp_path):
    limits = Limits(max_row_bytes=1000)
    write_jsonl(tmp_path / "x.jsonl", [chat(), {**chat(), "note": "x" * 2000}, chat(), chat()])
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress((tmp_path / "x.jsonl").read_bytes()))
    assert reasons(open_source(tmp_path / "x.jsonl", limits)) == [None, "row-size", None, None]
    assert reasons(open_source(tmp_path / "y.jsonl.gz", limits)) == [None, "row-size", None, None]
    (tmp_path / "x.tar").write_bytes(tar_bytes({"a.txt": b"x" * 2000, "b.txt": b"one"}))
    assert reasons(open_source(tmp_path / "x.tar", limits)) == ["row-size", None]


def test_blocks_of_lines_are_bounded_and_complete(tmp_path):
    rows = [{**chat(), "note": "x" * (37 * n % 700)} for n in range(600)]
    write_jsonl(tmp_path / "x.jsonl", rows)
    source = open_source(tmp_path / "x.jsonl", Limits(max_row_bytes=2000))
    blocks = [source.read(shard) for shard in range(len(source))]
    assert len(blocks) > 600 / 256
    assert [row["note"] for block in blocks for row in block] == [row["note"] for row in rows]
    whole = open_source(tmp_path / "x.jsonl")
    assert [len(whole.read(shard)) for shard in range(len(whole))] == [256, 256, 88]


def test_decompression_bomb_is_an_error_with_advice(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(bytes(10**7)))
    with pytest.raises(
        SoloError, match=r"x\.jsonl\.gz takes more memory than data\.max_shard_bytes = 1,000,000"
    ):
        open_source(tmp_path / "x.jsonl.gz", Limits(max_shard_bytes=10**6)).read(0)


def test_parquet_bomb_is_an_error_with_advice(tmp_path):
    pq.write_table(pa.table({"messages": [["x" * 10**6]] * 200}), tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 10**6
    with pytest.raises(SoloError, match=r"x\.parquet, row group 0 takes more memory"):
        source = open_source(tmp_path / "x.parquet", Limits(max_shard_bytes=10**7))
        source.read(0)


def test_duplicate_column_names_are_a_broken_shard(tmp_path):
    one = pa.array([[{"role": "user", "content": "a"}]])
    pq.write_table(pa.Table.from_arrays([one, one], ["messages", "messages"]), tmp_path / "x.parquet")
    assert reasons(open_source(tmp_path / "x.parquet")) == ["broken-shard"]


@pytest.mark.parametrize(
    "line",
    [
        '{"messages": [], "messages": [{"role": "user", "content": "a"}]}',
        '{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}',
    ],
)
def test_duplicate_key_is_a_row_error(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(SampleError, match="occurs twice"):
        open_source(tmp_path / "x.jsonl").read(0)[0]


@pytest.mark.parametrize("depth", [100, 500, 900, 990, 2000, 10**5])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deeply_nested_rows_are_row_errors_or_ignored(tmp_path, depth, opening):
    nested = opening * depth + "1" + {"[": "]", '{"a":': "}"}[opening] * depth
    for place in ("note", "image", "messages", "id"):
        row = json.dumps({**chat(), place: "HERE"}).replace('"HERE"', nested)
        (tmp_path / f"{place}.jsonl").write_text(row + "\n")
        assert reasons(open_source(tmp_path / f"{place}.jsonl"))[0] in (
            None,
            "json",
            "schema",
            "image-column",
        )


def test_names_with_thousands_of_digits_are_sorted():
    assert sorted(["a" + "9" * 5000, "a2", "a10"], key=natural_key)[:2] == ["a2", "a10"]


def test_megatron_index_with_false_size_is_rejected(tmp_path):
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, 2**60, 1)
    for feature in ("text", "role", "vision_patch", "vision_patch_indices"):
        (tmp_path / f"x-{feature}.idx").write_bytes(head + bytes(100))
        (tmp_path / f"x-{feature}.bin").write_bytes(bytes(100))
    with pytest.raises(SoloError, match=r"x-text\.idx is truncated: it should list"):
        open_source(tmp_path)


# ---------------------------------------------------------------------------------------------- damage


def rewrite(path, change):
    path.write_bytes(change(path.read_bytes()))


def flip(content, place):
    changed = bytearray(content)
    changed[place] ^= 0xFF
    return bytes(changed)


def make_set(folder, kind):
    """Write two shards of eight chats each; tests damage the second one."""
    folder.mkdir()
    rows = [{**chat(), "id": f"{n:04d}"} for n in range(8)]
    for number in range(2):
        path = folder / f"part{number}.{kind}"
        if kind == "jsonl":
            write_jsonl(path, rows)
        elif kind == "jsonl.gz":
            path.write_bytes(gzip.compress(json.dumps(rows[0]).encode() + b"\n"))
        elif kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_bytes(tar_bytes({f"{n}.txt": b"text" for n in range(8)}))
    return path


DAMAGES = {
    "jsonl, deleted": ("jsonl", lambda path: path.unlink()),
    "jsonl, truncated": ("jsonl", lambda path: rewrite(path, lambda c: c[:-30])),
    "jsonl, line appended": ("jsonl", lambda path: rewrite(path, lambda c: c + b"{}\n")),
    "jsonl, rewritten": ("jsonl", lambda path: rewrite(path, lambda c: c.replace(b"What", b"Whom"))),
    "jsonl, replaced by a folder": ("jsonl", lambda path: (path.unlink(), path.mkdir())),
    "jsonl.gz, truncated": ("jsonl.gz", lambda path: rewrite(path, lambda c: c[:-10])),
    "jsonl.gz, flipped bit": ("jsonl.gz", lambda path: rewrite(path, lambda c: flip(c, len(c) // 2))),
    "parquet, deleted": ("parquet", lambda path: path.unlink()),
    "parquet, truncated": ("parquet", lambda path: rewrite(path, lambda c: c[:-100])),
    "parquet, flipped bit in the footer": ("parquet", lambda path: rewrite(path, lambda c: flip(c, -6))),
    "tar, deleted": ("tar", lambda path: path.unlink()),
    "tar, truncated": ("tar", lambda path: rewrite(path, lambda c: c[:2000])),
    "tar, flipped bit in a header": ("tar", lambda path: rewrite(path, lambda c: flip(c, 100))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_while_the_source_is_open_is_reported_with_the_file_name(tmp_path, damage):
    kind, change = DAMAGES[damage]
    path = make_set(tmp_path / "data", kind)
    source = open_source(tmp_path / "data")
    assert set(reasons(source)) == {None}
    change(path)
    with pytest.raises(SoloError, match=rf"part1\.{kind} (is gone|was changed while it was in use): put it"):
        reasons(source)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_before_the_source_is_opened_is_detected(tmp_path, damage):
    """The fingerprint changes, so that a resume fails, or unreadable rows are reported."""
    kind, change = DAMAGES[damage]
    path = make_set(tmp_path / "data", kind)
    before = open_source(tmp_path / "data").fingerprint()
    change(path)
    try:
        source = open_source(tmp_path / "data")
        found = reasons(source)
    except SoloError as error:
        assert path.name in str(error)
        return
    assert source.fingerprint() != before or set(found) - {None}


@pytest.mark.parametrize("damage", ["jsonl, deleted", "jsonl, truncated"])
def test_run_stops_with_the_name_of_a_changed_shard(runs_folder, tmp_path, damage):
    plain = run_settings(runs_folder, tmp_path / "out", steps=40)
    text = runs_folder / "text.parquet"
    before = text.read_bytes()
    step = trainer.optimizer_step
    calls = iter(range(3))

    def changing(*arguments):
        if next(calls, None) == 2:
            DAMAGES[damage][1](text)
        return step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "optimizer_step", changing)
        with pytest.raises(SoloError, match=r"text\.parquet (is gone|was changed)"):
            run_recipe(plain)
    text.write_bytes(before)
    run_recipe(plain)
    assert (tmp_path / "out" / "model").is_dir()


@pytest.fixture
def runs_folder(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    write_training_data(folder, image_rows(24), text_rows(200))
    make_solo().save(folder / "llama")
    return folder


@pytest.mark.parametrize("target", ["pipe", "/dev/zero"])
def test_pipes_and_devices_are_rejected(tmp_path, target):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.jsonl").symlink_to(target)
    with pytest.raises(SoloError, match="not a regular file"):
        open_source(tmp_path)
    with pytest.raises(ImageMissingError, match="not a regular file"):
        load_image(tmp_path / "a.jsonl")
