"""Conversion of whole folders: formats, shares, resume, broken files, executors."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.data.catalog.catalog_rows import JPEG, USUAL, cauldron, llava
from tests.factories import locked_by_another_process, tar_bytes

from solo_vlm.data.catalog import convert as conversion
from solo_vlm.data.catalog import raw_files
from solo_vlm.data.catalog.convert import REPORT_FILE, convert
from solo_vlm.data.sample import parse_sample
from solo_vlm.utils.errors import SoloError

SLIMPAJAMA = [{"text": f"Document {n}.", "meta": {"redpajama_set_name": "RedPajamaBook"}} for n in range(40)]
WEB = {"text": "Buy!", "meta": {"redpajama_set_name": "RedPajamaC4"}}


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def compress(content: bytes, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
        stream.flush()
    return sink.getvalue().to_pybytes()


def write_parquet(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members))


def samples(out: Path):
    return [
        parse_sample(row) for file in sorted(out.glob("*.parquet")) for row in pq.read_table(file).to_pylist()
    ]


def texts(out: Path) -> set[str]:
    return {sample.messages[-1]["content"][-1]["text"] for sample in samples(out)}


def test_converted_folder_is_readable_by_training(tmp_path, raw):
    row = USUAL["vqav2"][0]
    write_parquet(raw / "vqav2" / "train-0.parquet", [row] * 5)
    write_parquet(raw / "vqav2" / "train-1.parquet", [row, {**row, "images": []}])
    report = convert("vqav2", [raw], tmp_path / "out", workers=1)
    assert (report["samples"], report["images"], report["files"]) == (6, 6, 2)
    assert report["rejected"] == {"image-missing": 1}
    (example,) = report["examples"]["image-missing"]
    assert "train-1.parquet, row 1" in example
    assert [sample.images for sample in samples(tmp_path / "out")] == [[JPEG]] * 6
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == [
        REPORT_FILE,
        "vqav2-00000-of-00002.parquet",
        "vqav2-00001-of-00002.parquet",
    ]
    assert not (tmp_path / "out" / ".pieces").exists()
    assert json.loads((tmp_path / "out" / REPORT_FILE).read_text()) == report


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".lz4"])
def test_compressed_json_lines_are_converted(tmp_path, suffix):
    content = lines([*SLIMPAJAMA, WEB]) + b'{"text": broken\n\n[1]\n'
    packed = {"": content, ".gz": gzip.compress(content)}
    for codec in ("zst", "lz4"):
        packed[f".{codec}"] = compress(content, {"zst": "zstd", "lz4": "lz4"}[codec])
    (tmp_path / f"chunk.jsonl{suffix}").write_bytes(packed[suffix])
    report = convert("slimpajama", [tmp_path / f"chunk.jsonl{suffix}"], tmp_path / "out", workers=1)
    assert report["samples"] == 40
    assert report["rejected"] == {"web-crawl": 1, "json": 1, "raw-schema": 1}
    assert "Document 39." in texts(tmp_path / "out")


def test_img2dataset_tars_are_converted(tmp_path):
    members = {
        "1.jpg": JPEG,
        "1.txt": b"a cat",
        "1.json": b"{}",
        "2.jpg": JPEG,
        "2.txt": "ein Käfer".encode(),
    }
    write_tar(tmp_path / "raw" / "00000.tar", {**members, "3.json": b"{}"})
    report = convert("cc3m", [tmp_path / "raw"], tmp_path / "out", workers=1)
    assert texts(tmp_path / "out") == {"a cat", "ein Käfer"}
    assert report["rejected"] == {"raw-schema": 1}


def test_img2dataset_statistics_are_not_raw_files(tmp_path):
    write_tar(tmp_path / "raw" / "00000.tar", {"1.jpg": JPEG, "1.txt": b"a cat"})
    write_parquet(
        tmp_path / "raw" / "00000.parquet", [{"url": "https://x/1", "caption": "a cat", "key": "1"}]
    )
    assert convert("cc3m", [tmp_path / "raw"], tmp_path / "out", workers=1)["samples"] == 1


def test_url_list_needs_a_download_first(tmp_path):
    (tmp_path / "list.tsv").write_text("a cat\thttps://x/1.jpg\na dog\thttps://x/2.jpg\n")
    convert("cc3m", [tmp_path / "list.tsv"], tmp_path / "out", workers=1)
    assert [sample.images for sample in samples(tmp_path / "out")] == [
        ["https://x/1.jpg"],
        ["https://x/2.jpg"],
    ]
    with pytest.raises(SoloError, match="then solo data download cc3m"):
        convert("cc3m", [tmp_path], tmp_path / "other")


def test_class_tars_are_converted(tmp_path, raw):
    write_tar(raw / "n02084071.tar", {"n02084071_1.JPEG": JPEG, "n02084071_2.JPEG": JPEG, "n1_1.JPEG": JPEG})
    report = convert("imagenet-21k", [raw], tmp_path / "out", workers=1)
    assert texts(tmp_path / "out") == {"dog"}
    assert (report["samples"], report["rejected"]) == (2, {"class-unknown": 1})


@pytest.mark.parametrize("kind", ["tar", "zst", "parquet", "json"])
def test_truncated_file_keeps_its_intact_rows(tmp_path, kind, raw):
    row = llava("gqa/images/2327515.jpg", "<image>\nQ" + "x" * 400, "A")
    files = {
        "tar": ("cc3m", "0.tar"),
        "zst": ("slimpajama", "0.jsonl.zst"),
        "parquet": ("vqav2", "0.parquet"),
        "json": ("gqa", "llava_v1_5_mix665k.json"),
    }
    name, file = files[kind]
    path = raw / file
    if kind == "tar":
        write_tar(
            path,
            {f"{n}.{end}": data for n in range(50) for end, data in (("jpg", JPEG * 100), ("txt", b"x"))},
        )
    elif kind == "zst":
        path.write_bytes(compress(lines(SLIMPAJAMA), "zstd"))
    elif kind == "parquet":
        write_parquet(path, [USUAL["vqav2"][0]] * 20)
    else:
        path.write_text(json.dumps([row] * 20))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    good = raw / f"more{path.name}" if kind != "json" else None
    if kind == "parquet":  # nothing of a cut parquet file can be read: its index is at the end
        write_parquet(good, [USUAL["vqav2"][0]])
    if kind == "zst":
        good.write_bytes(compress(lines(SLIMPAJAMA), "zstd"))
    report = convert(name, [raw], tmp_path / "out", workers=1)
    assert report["samples"] > 0
    assert report["rejected"] == {"file-broken": 1}
    assert file in report["examples"]["file-broken"][0]


def test_lone_surrogate_is_rejected_and_a_pair_is_kept(tmp_path):
    row = llava("https://x/1.jpg", "<image>\nQ \U0001f600", "A \ud83d")
    for name, content in (("a.jsonl", lines([row])), ("b.json", json.dumps([row]).encode())):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SoloError, match="surrogates not allowed"):
            convert("release-sft", [tmp_path / name], tmp_path / f"{name}-out", workers=1)
    row["conversations"][1]["value"] = "A"
    (tmp_path / "a.jsonl").write_bytes(lines([row]))
    assert convert("release-sft", [tmp_path / "a.jsonl"], tmp_path / "out", workers=1)["samples"] == 1


@pytest.mark.parametrize("file", ["a.jsonl", "a.json"])
def test_deep_nesting_and_bom_affect_no_other_row(tmp_path, file):
    row = json.dumps(llava("https://x/1.jpg", "<image>\nQ", "A"))
    deep = f'{{"id": {"[" * 3000}"]}}"{"]" * 3000}}}'
    rows = [row, deep, row]
    text = "\n".join(rows) if file == "a.jsonl" else f"[{', '.join(rows)}]"
    (tmp_path / file).write_text(text, encoding="utf-8-sig")
    report = convert("release-sft", [tmp_path / file], tmp_path / "out", workers=1)
    assert (report["samples"], report["rejected"]) == (2, {"json": 1})


def test_captions_of_another_encoding_are_rejected_and_a_bom_is_dropped(tmp_path):
    write_tar(
        tmp_path / "raw" / "0.tar",
        {
            **{"1.avif": JPEG, "1.txt": b"\xef\xbb\xbfa cat\r\n"},
            **{"2.jpg": JPEG, "2.txt": b"caf\xe9"},
            **{"3.jpg": JPEG, "3.txt": "café".encode()},
        },
    )
    report = convert("cc3m", [tmp_path / "raw"], tmp_path / "out", workers=1)
    assert (report["samples"], report["images"], report["rejected"]) == (2, 2, {"text": 1})
    assert texts(tmp_path / "out") == {"a cat", "café"}


def test_tsv_lines_of_another_encoding_are_rejected(tmp_path):
    lines_ = [b"\xef\xbb\xbfa cat\thttps://x/1.jpg\r\n", b"caf\xe9\thttps://x/2.jpg\n"]
    (tmp_path / "Train_GCC-training.tsv").write_bytes(b"".join(lines_))
    report = convert("cc3m", [tmp_path / "Train_GCC-training.tsv"], tmp_path / "out", workers=1)
    assert (report["samples"], report["rejected"]) == (1, {"text": 1})
    assert [sample.images for sample in samples(tmp_path / "out")] == [["https://x/1.jpg"]]
    assert texts(tmp_path / "out") == {"a cat"}


@pytest.mark.parametrize(("id", "name"), [(float("nan"), None), (1.5, "1.5"), (b"a\xff", "a\\xff"), (7, "7")])
def test_row_is_converted_with_any_id(tmp_path, id, name):
    write_parquet(
        tmp_path / "raw" / "0.parquet", [{"link": "https://x/1.jpg", "caption": "A cat.", "message_id": id}]
    )
    convert("laion-gpt4v", [tmp_path / "raw"], tmp_path / "out", workers=1)
    assert [sample.id for sample in samples(tmp_path / "out")] == [name]


def test_large_file_is_divided_and_every_row_converted_once(tmp_path, raw, monkeypatch):
    monkeypatch.setattr(conversion, "_SHARE_BYTES", 600)
    rows = [llava("gqa/images/2327515.jpg", "<image>\nQ?", f"A{n}") for n in range(23)]
    (raw / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))
    report = convert("gqa", [raw], tmp_path / "out", workers=1)
    assert report["files"] > 3
    assert report["samples"] == 23
    assert texts(tmp_path / "out") == {f"A{n}" for n in range(23)}


def test_second_run_resumes_where_the_first_stopped(tmp_path, raw, monkeypatch):
    for n in range(4):
        write_parquet(raw / f"train-{n}.parquet", [USUAL["vqav2"][0]] * (n + 1))
    out, read = tmp_path / "out", []

    def read_rows(path):
        read.append(path.name)
        if len(read) == 3:
            yield next(raw_files.read_rows(path))
            raise OSError(5, "the disk is offline")
        yield from raw_files.read_rows(path)

    monkeypatch.setattr(conversion, "read_rows", read_rows)
    with pytest.raises(SoloError, match=r"train-2\.parquet.*the disk is offline"):
        convert("vqav2", [raw], out, workers=1)
    assert sorted(path.name for path in out.glob(".pieces/*")) == [
        "train-0.parquet",
        "train-1.parquet",
    ]
    report = convert("vqav2", [raw], out, workers=1)
    assert read[3:] == ["train-2.parquet", "train-3.parquet"]
    assert report["samples"] == 1 + 2 + 3 + 4
    assert convert("vqav2", [raw], out, workers=1) == report
    assert len(read) == 5
    # If a raw file was downloaded again, all are converted and shuffled again.
    write_parquet(raw / "train-0.parquet", [USUAL["vqav2"][0]] * 7)
    assert convert("vqav2", [raw], out, workers=1)["samples"] == 7 + 2 + 3 + 4
    assert read[5:] == [f"train-{n}.parquet" for n in range(4)]


def test_rows_are_shuffled_across_files_by_a_seed(tmp_path, raw):
    """Class-sorted raw files: each file written has rows of all of them."""
    for n in range(4):
        write_parquet(raw / f"class-{n}.parquet", [cauldron(f"{n}", f"A{i}", "vqav2") for i in range(300)])

    def convert_with(seed: int, out: str) -> list[list[tuple[str, str]]]:
        convert("vqav2", [raw], tmp_path / out, workers=1, seed=seed)
        files = sorted((tmp_path / out).glob("*.parquet"))
        chats = [[parse_sample(row).messages for row in pq.read_table(file).to_pylist()] for file in files]
        return [[tuple(turn["content"][-1]["text"] for turn in chat) for chat in file] for file in chats]

    first = convert_with(0, "first")
    assert sorted(row for file in first for row in file) == sorted(
        {(f"{n}", f"A{i}") for n in range(4) for i in range(300)}
    )
    for file in first:
        neighbors = [a[0] == b[0] for a, b in pairwise(file)]
        assert sum(neighbors) < 0.6 * len(neighbors)  # 0.25 by chance, 1 in the order of the raw files
    assert convert_with(0, "again") == first
    assert convert_with(1, "other") != first


def test_progress_is_reported(tmp_path, raw):
    for n in range(2):
        write_parquet(raw / f"train-{n}.parquet", [USUAL["vqav2"][0]])
    seen: list[tuple[int, int]] = []
    convert("vqav2", [raw], tmp_path / "out", workers=1, on_progress=lambda *numbers: seen.append(numbers))
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_user_errors_are_reported(tmp_path, raw):
    out = tmp_path / "out"
    with pytest.raises(
        SoloError, match=r"no \*\.parquet in .*: get VQAv2 from HuggingFaceM4/the_cauldron:vqav2"
    ):
        convert("vqav2", [raw], out)
    with pytest.raises(SoloError, match="does not exist"):
        convert("vqav2", [raw / "nowhere"], out)
    write_parquet(raw / "a" / "x.parquet", [{"something": 1}])
    with pytest.raises(SoloError, match=r"no row of VQAv2 found: .*no field texts; expected parquet rows"):
        convert("vqav2", [raw], out, workers=1)
    (out / "vqav2-00000-of-00001.parquet").touch()
    with pytest.raises(SoloError, match=r"vqav2-00000-of-00001\.parquet is from another conversion"):
        convert("textvqa", [raw / "a"], out, workers=1)
    write_parquet(raw / "b" / "x.parquet", [{"something": 1}])
    with pytest.raises(SoloError, match="two raw files have the same name"):
        convert("vqav2", [raw / "a" / "x.parquet", raw / "b" / "x.parquet"], tmp_path / "new")
    with pytest.raises(SoloError, match="holds the raw files"):
        convert("vqav2", [raw / "a" / "x.parquet"], raw / "a")
    (raw / "notes.txt").write_text("x")
    with pytest.raises(SoloError, match=r"notes\.txt: unknown format, expected one of \.parquet"):
        convert("vqav2", [raw / "notes.txt"], tmp_path / "new", workers=1)


def test_partial_files_of_a_killed_process_are_removed(tmp_path, raw):
    write_parquet(raw / "x.parquet", [USUAL["vqav2"][0]])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".partial-99999999-x.parquet.parquet").write_bytes(b"half")
    assert convert("vqav2", [raw], tmp_path / "out", workers=1)["samples"] == 1
    assert not list((tmp_path / "out").glob(".partial-*"))


def test_second_conversion_into_the_same_folder_is_rejected(tmp_path, raw):
    write_parquet(raw / "x.parquet", [USUAL["vqav2"][0]])
    with (
        locked_by_another_process(tmp_path / "out"),
        pytest.raises(SoloError, match="another run is writing to"),
    ):
        convert("vqav2", [raw], tmp_path / "out", workers=1)


def test_output_below_the_raw_folder_is_not_raw(tmp_path, raw):
    write_parquet(raw / "x.parquet", [USUAL["vqav2"][0]])
    for _ in range(2):
        assert convert("vqav2", [raw], raw / "converted", workers=1)["files"] == 1


def engine_makes_the_same(engine, tmp_path, raw):
    for n in range(3):
        rows = [cauldron(f"Q{n}-{i}", "A", "vqav2") for i in range(5)]
        write_parquet(raw / f"train-{n}.parquet", [*rows, {"images": [], "texts": rows[0]["texts"]}])
    alone = convert("vqav2", [raw], tmp_path / "alone", workers=1)
    report = convert("vqav2", [raw], tmp_path / "out", engine, workers=2)
    order = ("samples", "images", "files", "rejected")
    assert (
        [report[key] for key in order] == [alone[key] for key in order] == [15, 15, 3, {"image-missing": 3}]
    )
    for path in (tmp_path / "alone").glob("*.parquet"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_process_pool_gives_the_same_files(tmp_path, raw):
    engine_makes_the_same("local", tmp_path, raw)


@pytest.mark.slow
def test_ray_gives_the_same_files(tmp_path, raw):
    ray = pytest.importorskip("ray")
    try:
        engine_makes_the_same("ray", tmp_path, raw)
        (raw / "mapping.txt").unlink()
        write_tar(raw / "n1.tar", {"n1_1.JPEG": JPEG})
        with pytest.raises(SoloError, match=r"^.*mapping\.txt is missing"):
            convert("imagenet-21k", [raw], tmp_path / "classes", "ray")
    finally:
        ray.shutdown()


def test_missing_ray_names_the_extra(tmp_path, raw, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    write_parquet(raw / "x.parquet", [USUAL["vqav2"][0]])
    with pytest.raises(SoloError, match=r"pip install 'solo-vlm\[ray\]'"):
        convert("vqav2", [raw], tmp_path / "out", "ray")
