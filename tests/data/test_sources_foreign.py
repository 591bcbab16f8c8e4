"""Folders that other programs wrote: read as those programs read them, or rejected with what was found."""

from __future__ import annotations

import json

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from tests.data.formats.test_converters import shown
from tests.data.hub_server import texts
from tests.factories import png, tar_bytes

from solo_vlm.data.sources import open_source
from solo_vlm.utils.errors import SoloError


@pytest.fixture
def pets(picture) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [picture() for _ in range(9)], "text": [f"pet {n}" for n in range(9)]}
    return datasets.Dataset.from_dict(rows, features=features)


def read(path) -> list[str]:
    return texts(open_source(path, format="auto"))


def test_saved_data_set_is_as_datasets_loads_it(tmp_path, pets):
    chosen = pets.select([7, 2, 2, 5]).sort("text")  # indices, which saving resolves
    chosen.save_to_disk(tmp_path / "saved", num_shards=2)
    loaded = datasets.load_from_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == loaded["text"][:] == ["pet 2", "pet 2", "pet 5", "pet 7"]
    stored = loaded.cast_column("image", datasets.Image(decode=False))[3]["image"]["bytes"]
    assert shown(open_source(tmp_path / "saved", format="auto").read(1)[1]) == f"a:<{stored!s}>pet 7"


def test_caches_that_datasets_writes_beside_saved_data_are_not_read(tmp_path, pets):
    pets.save_to_disk(tmp_path / "saved")
    loaded = datasets.load_from_disk(tmp_path / "saved")
    loaded.map(lambda row: {"text": row["text"].upper()}).shuffle(seed=1)
    assert len(list((tmp_path / "saved").glob("cache-*.arrow"))) > 0
    assert read(tmp_path / "saved") == read(tmp_path / "saved" / "*.arrow") == pets["text"][:]


def test_missing_file_of_saved_data_is_noticed(tmp_path, pets):
    pets.save_to_disk(tmp_path / "saved", num_shards=2)
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(SoloError, match=r"has no data-00001-of-00002\.arrow, which its state\.json names"):
        open_source(tmp_path / "saved", format="auto")


def test_splits_of_a_data_set_dict_are_read_one_by_one(tmp_path, pets):
    splits = {"train": pets, "test": pets.select([3])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    with pytest.raises(SoloError) as error:
        open_source(tmp_path / "saved", format="auto")
    assert str(error.value) == (
        f"{tmp_path}/saved is a DatasetDict with train, test: set path to one, {tmp_path}/saved/train"
    )
    assert read(tmp_path / "saved" / "test") == ["pet 3"]


def test_indices_of_old_versions_are_rejected(tmp_path, pets):
    pets.save_to_disk(tmp_path / "saved")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    with pytest.raises(SoloError, match="has a file of indices: load it with datasets, and save it again"):
        open_source(tmp_path / "saved", format="auto")


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("kind", ["stream", "file", "feather"])
def test_arrow_files_of_every_kind_are_read(tmp_path, kind, compression):
    table = pa.table({"text": [f"row {n}" for n in range(9)], "n": range(9)})
    path = tmp_path / ("x.feather" if kind == "feather" else "x.arrow")
    if kind == "feather":
        pyarrow.feather.write_feather(table, path, compression or "uncompressed", chunksize=4)
    else:
        writer = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with writer(str(path), table.schema, options=options) as sink:
            sink.write_table(table, max_chunksize=4)
    source = open_source(path, format="auto", filter="n != 8")
    assert len(source) == 3
    assert texts(open_source(tmp_path, format="auto")) == table["text"].to_pylist()


def test_categories_are_rejected(tmp_path):
    table = pa.table({"text": pa.array(["a", "b"]).dictionary_encode()})
    pyarrow.feather.write_feather(table, tmp_path / "x.feather")
    with pytest.raises(SoloError, match="without dictionaries, as of categories; write it as parquet"):
        open_source(tmp_path / "x.feather", format="auto")


@pytest.fixture
def tars(tmp_path, picture):
    """Return a folder with the shards a.tar and b.tar."""
    photo = png(picture())
    for name in "ab":
        text = f"pet {name}".encode()
        members = {f"{n}.{end}": data for n in range(2) for end, data in (("png", photo), ("txt", text))}
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(members))
    (tmp_path / ".nv-meta").mkdir()
    return tmp_path


def captions(path) -> list[str]:
    source = open_source(path, format="auto")
    return [row["txt"] for shard in range(len(source)) for row in source.read(shard)]


def test_splits_of_energon_are_not_mixed(tars):
    notes = tars / ".nv-meta" / "split.yaml"
    notes.write_text("split_parts: {train: [a.tar], val: [b.tar], test: []}\nexclude: []\n")
    with pytest.raises(
        SoloError, match=r"split\.yaml has the splits train, val: name the shards to read by a"
    ):
        open_source(tars, format="auto")
    assert captions(tars / "a*.tar") == ["pet a"] * 2
    notes.write_text("split_parts: {train: [a.tar, b.tar]}\nexclude: [b.tar/1]\n")
    with pytest.raises(SoloError, match=r"split\.yaml excludes shards: name"):
        open_source(tars, format="auto")
    notes.write_text("split_parts: {train: [a.tar, b.tar]}\nexclude: []\n")
    assert captions(tars) == ["pet a", "pet a", "pet b", "pet b"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["index.json", "shard.00000.mds"],
            "shard.00000.mds is a shard of MosaicML Streaming",
        ),
        (["index.json", "shard.00000.mds.zstd"], "MosaicML Streaming"),
        (["index.json", "chunk-0-0.bin"], "chunk-0-0.bin is a chunk of litdata"),
        (["_versions/1.manifest", "data/ab.lance"], "data of Lance"),
        (["pets.lance/data/ab.lance"], "pets.lance is data of Lance"),
        (["train-00000-of-00001.tfrecord"], "is a TFRecord, which is not read: write its rows as parquet"),
        (["train2017.zip"], "train2017.zip is an archive, which is not read: unpack it"),
        (["x.tar.gz"], "is a compressed tar, which is not read: decompress it"),
        (["x.txt", "y.txt"], 'x.txt is a text, which is not read: write rows {"text": ...} as JSON lines'),
        (["data.bin", "data.idx"], ": it has data.bin, data.idx"),
    ],
)
def test_what_is_not_read_is_named_with_what_to_do(tmp_path, files, message):
    for file in files:
        (tmp_path / "x" / file).parent.mkdir(parents=True, exist_ok=True)
        content = {"version": 2, "shards": [], "chunks": []}
        (tmp_path / "x" / file).write_text(json.dumps(content) if file == "index.json" else "?")
    for path in (
        tmp_path / "x",
        *([tmp_path / "x" / files[-1]] if len(files) == 1 and "/" not in files[0] else ()),
    ):
        with pytest.raises(SoloError) as error:
            open_source(path, format="auto")
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_archives_beside_rows_are_no_obstacle(tmp_path):
    (tmp_path / "index.json").write_text('[{"text": "a"}]')
    (tmp_path / "photos.zip").write_bytes(b"PK")
    (tmp_path / "chats.json").write_text('[{"text": "b"}]')
    assert read(tmp_path) == ["b", "a"]


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("pets-train.jsonl", "pets-validation.jsonl"),
        ("TRAIN.csv", "dev.csv", "more.csv"),
        ("pets-train.arrow", "pets-test.arrow"),
        ("train/a.png", "val/b.png"),
    ],
)
def test_splits_in_one_folder_are_not_mixed(tmp_path, picture, names):
    """As datasets would tell them apart; a pattern says that all, or which, are meant."""
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        table = pa.table({"text": [name]})
        if name.endswith(".parquet"):
            pa.parquet.write_table(table, path)
        elif name.endswith(".arrow"):
            with pa.ipc.new_stream(str(path), table.schema) as sink:
                sink.write_table(table)
        elif name.endswith(".png"):
            path.write_bytes(png(picture()))
        else:
            path.write_text(f"text\n{name}\n" if name.endswith("csv") else json.dumps({"text": name}))
    with pytest.raises(SoloError, match=r"has several splits, such as .*: make each a source of its own"):
        open_source(tmp_path, format="auto")
    if "/" in names[0]:
        assert len(open_source(tmp_path / "train", format="auto").read(0)) == 1
    else:
        assert sorted(read(f"{tmp_path}/*")) == sorted(names)
        assert read(tmp_path / names[0]) == [names[0]]


def test_names_that_only_contain_the_name_of_a_split_are_data(tmp_path):
    for name in ("trains.jsonl", "contest.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    assert read(tmp_path) == ["contest.jsonl", "test.jsonl", "trains.jsonl"]
