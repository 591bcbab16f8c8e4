"""Rows of other formats in every kind of file, read in place."""

from __future__ import annotations

import gzip
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.data.formats.test_converters import messages, shown, turns
from tests.factories import png, tar_bytes

from solo_vlm.data.sample import FilteredRow, SampleError
from solo_vlm.data.sources import open_source
from solo_vlm.data.sources.files import Limits
from solo_vlm.utils.errors import SoloError

Rows = list[dict[str, Any]]

# Rows without their image, and the sample, in which <> is the image.
FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "llava": (
        {"id": 3, "conversations": turns("<image>\nWhat?", "A cat."), "extra": 0.5},
        "u:<>What?|a:A cat.",
    ),
    "sharegpt": ({"conversations": turns("Hi", "Hello"), "system": "Be brief."}, "s:Be brief.|u:Hi|a:Hello"),
    "chatml": ({"conversations": messages("What?", "A cat.", user="human")}, "u:<>What?|a:A cat."),
    "cauldron": ({"texts": [{"user": "What?", "assistant": "A cat."}]}, "u:<>What?|a:A cat."),
    "finevision": (
        {"texts": [{"user": "What?", "assistant": "A cat."}], "relevance_min": 4},
        "u:<>What?|a:A cat.",
    ),
    "instruction": ({"question": "What?", "answer": "A cat."}, "u:<>What?|a:A cat."),
    "captions": ({"caption": "A cat."}, "a:<>A cat."),
}


def write_tar(path: Path, rows: Rows) -> None:
    members = {}
    for number, row in enumerate(rows):
        images = row.pop("images", None)
        members[f"{number:04}.json"] = json.dumps(row).encode()
        if images:
            members[f"{number:04}.png"] = Path(path.parent, images[0]).read_bytes()
    path.write_bytes(tar_bytes(members))


WRITERS: dict[str, Callable[[Path, Rows], Any]] = {
    "x.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "lines.json": lambda path, rows: path.write_text("\n".join(map(json.dumps, rows))),
    "indented.json": lambda path, rows: path.write_text(json.dumps(rows, indent=4)),
    "x.json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "x.jsonl": lambda path, rows: path.write_text("\n".join(map(json.dumps, rows))),
    "x.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7),
    "x.tar": write_tar,
}


@pytest.fixture
def photo(tmp_path, picture) -> str:
    (tmp_path / "cat.png").write_bytes(png(picture()))
    return "cat.png"


def read(source) -> list[str]:
    return [shown(row) for shard in range(len(source)) for row in source.read(shard)]


@pytest.mark.parametrize("file", WRITERS)
@pytest.mark.parametrize("name", FORMATS)
def test_format_is_recognized_and_read_in_every_kind_of_file(tmp_path, photo, caplog, name, file):
    row, expected = FORMATS[name]
    rows = [{**row, **({"images": [photo]} if "<>" in expected else {})} for _ in range(20)]
    WRITERS[file](tmp_path / file, [dict(row) for row in rows])
    with caplog.at_level(logging.INFO):
        source = open_source(tmp_path / file, format="auto")
    found = read(source)
    image = f"{tmp_path}/{photo}" if not file.endswith(".tar") else str((tmp_path / photo).read_bytes())
    assert found == [expected.replace("<>", f"<{image}>")] * 20
    if file.endswith(".tar") and name == "captions":  # as tars always were read
        assert source.fingerprint() == open_source(tmp_path / file).fingerprint()
    else:
        unread = {"llava": "extra", "finevision": "relevance_min"}.get(name, "none")
        start = f"{tmp_path / file}: reading rows as {name}; columns not read: "
        assert caplog.messages == [start + unread]
        assert read(open_source(tmp_path / file, format=name)) == found
    assert read(pickle.loads(pickle.dumps(source))) == found


def test_large_array_is_read_block_by_block(tmp_path):
    rows = [{"conversations": turns(f"[{n}, ä]" * 40, "A")} for n in range(1000)]
    (tmp_path / "x.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    source = open_source(tmp_path / "x.json", format="auto")
    assert len(source) == 4
    assert read(source) == [f"u:{row['conversations'][0]['value']}|a:A" for row in rows]
    small = open_source(tmp_path / "x.json", Limits(max_row_bytes=2000), format="auto")
    assert len(small) > 200
    assert read(small) == read(source)
    assert small.fingerprint() == source.fingerprint()


def test_broken_element_affects_no_other_row(tmp_path):
    good = json.dumps({"conversations": turns("Hi", "Hello")})
    (tmp_path / "x.json").write_bytes(f'[{good}, "row", {{"a": 1, "a": 2}}, '.encode() + b'{"a": "\xff"},'
                                      + f"{good}]".encode())  # fmt: skip
    rows = open_source(tmp_path / "x.json", format="auto").read(0)
    assert shown(rows[0]) == shown(rows[4]) == "u:Hi|a:Hello"
    for number in (1, 2, 3):
        with pytest.raises(SampleError) as error:
            rows[number]
        assert error.value.reason == "json"


def test_truncated_array_is_refused(tmp_path):
    text = json.dumps([{"conversations": turns("Hi", "Hello")}] * 3)
    for end in (5, len(text) // 2, len(text) - 1):
        (tmp_path / "x.json").write_text(text[:end])
        with pytest.raises(SoloError, match=r"x\.json: (not JSON, or truncated|the array has no end)"):
            open_source(tmp_path / "x.json")


def test_images_are_relative_to_their_folder_and_stay_in_it(tmp_path, photo):
    (tmp_path / "photos").mkdir()
    (tmp_path / "rows").mkdir()
    rows = [
        {"image": image, "conversations": turns("What?", "A cat.")}
        for image in ("sub/a.png", "../cat.png", f"{tmp_path}/cat.png", f"{tmp_path}/photos/b.png")
    ]
    (tmp_path / "rows" / "x.json").write_text(json.dumps(rows))
    images = str(tmp_path / "photos")
    found = open_source(tmp_path / "rows", format="llava", images=images).read(0)
    assert shown(found[0]) == f"u:<{images}/sub/a.png>What?|a:A cat."
    assert shown(found[3]) == f"u:<{images}/b.png>What?|a:A cat."
    for number in (1, 2):
        with pytest.raises(SampleError, match="outside-path"):
            found[number]
    anywhere = open_source(tmp_path / "rows", Limits(allow_outside_paths=True), "llava", images).read(0)
    assert shown(anywhere[2]) == f"u:<{tmp_path}/cat.png>What?|a:A cat."
    with pytest.raises(SoloError, match=r"no folder .*nowhere"):
        open_source(tmp_path / "rows", format="llava", images=str(tmp_path / "nowhere"))


def test_fingerprint_covers_files_format_columns_and_filter(tmp_path):
    rows = [{"title": "Once", "text": "Twice", "stars": 3}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    options: list[dict[str, Any]] = [
        {"format": "text"},
        {"format": "text", "columns": {"text": "title"}},
        {"format": "text", "filter": "stars > 2"},
        {"format": "text", "filter": "stars > 3"},
    ]
    found = [open_source(tmp_path / "x.json", **option).fingerprint() for option in options]
    assert len(set(found)) == len(options)
    assert open_source(tmp_path / "x.json", format="auto").fingerprint() == found[0]
    (tmp_path / "x.json").write_text(json.dumps(rows * 2))
    assert open_source(tmp_path / "x.json", format="text").fingerprint() != found[0]


def test_filter_leaves_rows_out(tmp_path):
    (tmp_path / "x.jsonl").write_text(
        "\n".join(json.dumps({"text": f"row {n}", "stars": n}) for n in range(5))
    )
    rows = open_source(tmp_path / "x.jsonl", format="auto", filter="stars >= 2").read(0)
    for number in range(5):
        if number < 2:
            with pytest.raises(FilteredRow):
                rows[number]
        else:
            assert shown(rows[number]) == f"a:row {number}"


def test_json_notes_next_to_other_files_are_no_data(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "row"}))
    (tmp_path / "report.json").write_text("{}")
    assert read(open_source(tmp_path, format="auto")) == ["a:row"]


def test_folder_of_images_has_captions_of_text_files_and_classes(tmp_path, picture):
    for name in ("a/golden_retriever/1.png", "a/golden_retriever/2.JPG", "b.png", "c.png", ".hidden/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(tmp_path / name)
    (tmp_path / "a/golden_retriever/2.txt").write_bytes(b"\xef\xbb\xbfA dog in the snow.\r\n")
    (tmp_path / "b.TXT").write_text("A bee.")
    (tmp_path / "notes.txt").write_text("no caption")
    source = open_source(tmp_path, format="auto")
    rows = source.read(0)
    assert [shown(rows[number]) for number in range(3)] == [
        f"a:<{tmp_path}/a/golden_retriever/1.png>golden retriever",
        f"a:<{tmp_path}/a/golden_retriever/2.JPG>A dog in the snow.",
        f"a:<{tmp_path}/b.png>A bee.",
    ]
    assert len(rows) == 4
    with pytest.raises(SampleError, match=r"no-caption: no c\.txt beside c\.png"):
        rows[3]
    assert source.where(0, 2) == f"{tmp_path}/b.png"
    dogs = open_source(tmp_path, format="imagefolder", filter='label == "golden_retriever"')
    assert dogs.fingerprint() != source.fingerprint()
    with pytest.raises(SoloError, match="is not an expression"):
        open_source(tmp_path, filter="label > ", format="imagefolder")


def test_folder_of_images_that_would_lose_some_or_their_captions_is_refused(tmp_path, picture):
    (tmp_path / "photos" / "dog" / "old").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for folder in ("photos/dog", "photos/dog/old", "elsewhere"):
        picture().save(tmp_path / folder / "1.png")
    (tmp_path / "photos" / "cat").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SoloError, match=r"photos/cat is a link to a folder, whose images would be missed"):
        open_source(tmp_path / "photos", format="auto")
    (tmp_path / "photos" / "cat").unlink()
    captions = tmp_path / "photos" / "dog" / "old" / "metadata.jsonl"
    captions.write_text(json.dumps({"file_name": "1.png", "text": "An old dog."}))
    with pytest.raises(SoloError, match=r"captions in dog/old/metadata.jsonl would be missed: set path to "):
        open_source(tmp_path / "photos", format="imagefolder")
    source = open_source(tmp_path / "photos" / "**" / "metadata.jsonl", format="captions")
    assert read(source) == [f"a:<{captions.with_name('1.png')}>An old dog."]


@pytest.mark.parametrize("file", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
@pytest.mark.parametrize("name", ["auto", "imagefolder"])
def test_folder_of_images_has_captions_of_a_metadata_file(tmp_path, photo, file, name):
    rows = [{"file_name": photo, "text": "A cat, with\na hat."}, {"file_name": photo, "text": "A cat."}]
    if file.endswith(".csv"):
        (tmp_path / file).write_text(f'file_name,text\n{photo},"A cat, with\na hat."\n{photo},A cat.\n')
    else:
        WRITERS[f"x.{file.partition('.')[2]}"](tmp_path / file, rows)
    assert read(open_source(tmp_path, format=name)) == [
        f"a:<{tmp_path}/{photo}>A cat, with\na hat.",
        f"a:<{tmp_path}/{photo}>A cat.",
    ]


def test_labels_have_the_names_of_their_classes(tmp_path):
    label = {"names": ["tabby, tabby cat", "goldfish"], "_type": "ClassLabel"}
    for note, texts in (
        (json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}}), label["names"]),
        ("[]", None),
        ("{", None),
    ):
        rows = [{"image": {"bytes": b"jpeg", "path": None}, "label": n} for n in (0, 1, -1)]
        table = pa.Table.from_pylist(rows).replace_schema_metadata({"huggingface": note})
        pq.write_table(table, tmp_path / "x.parquet")
        if texts is None:
            with pytest.raises(SoloError, match="rows have image, label"):
                open_source(tmp_path / "x.parquet", format="auto", columns={"text": "label"})
            continue
        source = open_source(tmp_path / "x.parquet", format="captions", columns={"text": "label"})
        assert [shown(source.read(0)[n]) for n in (0, 1)] == [f"a:<{b'jpeg'!s}>{text}" for text in texts]
        with pytest.raises(SampleError):
            source.read(0)[2]


def test_arrow_files_of_save_to_disk_are_read(tmp_path):
    table = pa.Table.from_pylist(
        [{"image": {"bytes": b"jpeg", "path": None}, "text": f"row {n}"} for n in range(9)]
    )
    for part in range(2):
        with (
            pa.OSFile(str(tmp_path / f"data-0000{part}-of-00002.arrow"), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(table, max_chunksize=4)
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text("{}")
    for name in ("auto", "hf", "captions"):
        source = open_source(tmp_path, format=name)
        assert len(source) == 6
        assert read(source) == [f"a:<{b'jpeg'!s}>row {n}" for n in range(9)] * 2
    assert "data-00000-of-00002.arrow, batch at byte" in source.where(1, 2)
    whole = (tmp_path / "data-00001-of-00002.arrow").read_bytes()
    (tmp_path / "data-00001-of-00002.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SoloError, match=r"data-00001-of-00002\.arrow is not readable Arrow data"):
        open_source(tmp_path)


@pytest.mark.parametrize("fault", ["lines", "row group", "tar"])
def test_format_is_recognized_behind_unreadable_rows(tmp_path, fault):
    rows = [{"conversations": turns("Hi", f"Hello {n}")} for n in range(24)]
    if fault == "lines":
        lines = ["{"] * 9 + list(map(json.dumps, rows))
        (tmp_path / "x.jsonl").write_text("\n".join(lines))
    elif fault == "row group":
        pq.write_table(
            pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=4, write_page_checksum=True
        )
        data = bytearray((tmp_path / "x.parquet").read_bytes())
        data[data.index(b"Hello 0")] ^= 1
        (tmp_path / "x.parquet").write_bytes(data)
    else:
        (tmp_path / "0.tar").write_bytes(b"no tar")
        write_tar(tmp_path / "1.tar", rows)
    assert open_source(tmp_path, format="auto").row_format.name == "sharegpt"


@pytest.mark.parametrize(
    "content",
    ['[\n{"text": "a"},\n{"text": "b"}\n]\n', '{"text": "a"},\n{"text": "b"},\n', '{\n "text": "a"\n}\n'],
)
def test_lines_of_an_array_are_named_as_such(tmp_path, content):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(SampleError, match=r"^json: .*; a file with an array, .* must be named \.json$"):
        open_source(tmp_path / "x.jsonl", format="auto").read(0)[0]
    (tmp_path / "x.jsonl").rename(tmp_path / "x.json")
    assert read(open_source(tmp_path / "x.json", format="auto"))[0] == "a:a"


def test_hidden_members_of_a_tar_are_ignored(tmp_path, photo):
    """As macOS writes them: notes on every member, and on the folder."""
    image = (tmp_path / photo).read_bytes()
    members = {
        ".DS_Store": b"\0\1",
        "._a.png": b"\0\5\x16\7",
        "a.png": image,
        "._a.txt": b"\0\5",
        "a.txt": b"A cat.",
    }
    (tmp_path / "x.tar").write_bytes(tar_bytes({**members, "__MACOSX/._a.png": b"\0\5", "b/.c.png": image}))
    assert read(open_source(tmp_path / "x.tar", format="auto")) == [f"a:<{image!s}>A cat."]
