"""Remote sources: S3 on a local server, HTTP with range requests."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import threading

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.factories import png, tar_bytes
from tests.s3_server import s3_server

from solo_vlm.data.sample import parse_sample
from solo_vlm.data.sources import is_same_data, open_source
from solo_vlm.utils.errors import SoloError

TEXTS = [f"row {i}" for i in range(60)]
ROWS = [{"messages": [{"role": "assistant", "content": text}]} for text in TEXTS]


def parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), buffer, row_group_size=20)
    return buffer.getvalue()


def lines() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


FILES = {
    "a.parquet": parquet(),
    "b.jsonl": lines(),
    "c.jsonl.gz": gzip.compress(lines()),
    "d.tar": tar_bytes({f"{number:03}.txt": text.encode() for number, text in enumerate(TEXTS)}),
}


def texts(source) -> list[str]:
    samples = [parse_sample(row) for shard in range(len(source)) for row in source.read(shard)]
    return [sample.messages[0]["content"][-1]["text"] for sample in samples]


@pytest.fixture(scope="module")
def s3():
    with s3_server() as server:
        for name, data in FILES.items():
            fsspec.filesystem("s3").pipe(f"s3://bucket/data/{name}", data)
        yield server


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Return the list of waits between retries, which are skipped."""
    slept: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", slept.append)
    return slept


@pytest.mark.parametrize("name", FILES)
def test_every_format_is_read_from_s3(s3, name):
    source = open_source(f"s3://bucket/data/{name}")
    assert texts(source) == TEXTS
    assert f"s3://bucket/data/{name}" in source.where(0, 0)


def test_folder_and_glob_pattern_on_s3(s3):
    fsspec.filesystem("s3").pipe("s3://bucket/more/1.parquet", FILES["a.parquet"])
    fsspec.filesystem("s3").pipe("s3://bucket/more/0.parquet", FILES["a.parquet"])
    for path in ("s3://bucket/more", "s3://bucket/more/*.parquet"):
        source = open_source(path)
        assert texts(source) == 2 * TEXTS
        assert source.where(0, 5) == "s3://bucket/more/0.parquet, row group 0, row 5"
        assert source.fingerprint() == open_source(path).fingerprint()


@pytest.mark.parametrize("name", FILES)
def test_restarted_server_is_retried(s3, name, monkeypatch):
    source = open_source(f"s3://bucket/data/{name}")
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            s3.start()

    monkeypatch.setattr("tenacity.nap.time.sleep", wait)
    s3.stop()
    rows = source.read(0)
    assert parse_sample(rows[0]).messages[0]["content"][0]["text"] == "row 0"
    assert len(waited) == 3


@pytest.mark.parametrize("name", FILES)
def test_stopped_server_is_an_error_not_a_skipped_sample(s3, name, waits):
    from botocore.exceptions import ConnectionError

    source = open_source(f"s3://bucket/data/{name}")
    s3.stop()
    try:
        with pytest.raises(ConnectionError):
            source.read(0)
        assert len(waits) == 4
        with pytest.raises(SoloError, match=f"cannot read s3://bucket/data/{name}: Could not connect"):
            open_source(f"s3://bucket/data/{name}")
    finally:
        s3.start()


@pytest.fixture
def web():
    """Run a web server with FILES, and `b.jsonl` with an ETag as `tagged.jsonl`; yield (address, ranges)."""
    flask = pytest.importorskip("flask")
    from werkzeug.serving import make_server

    app, ranges = flask.Flask(__name__), []

    @app.get("/<name>")
    def serve(name: str):
        if "Range" in flask.request.headers:
            ranges.append(flask.request.headers["Range"])
        data = FILES.get("b.jsonl" if name == "tagged.jsonl" else name)
        if data is None:
            flask.abort(404)
        answer = flask.send_file(io.BytesIO(data), "application/octet-stream", conditional=True)
        if name == "tagged.jsonl":
            answer.set_etag(hashlib.sha256(data).hexdigest())
        return answer

    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.port}", ranges
    server.shutdown()


@pytest.mark.parametrize("name", FILES)
def test_every_format_is_read_over_http(web, name):
    address, ranges = web
    assert texts(open_source(f"{address}/{name}")) == TEXTS
    assert ranges or name.endswith(".gz")  # ranges of the file, not the whole file per shard
    assert type(fsspec.filesystem("https")) is type(fsspec.filesystem("http"))


def test_file_on_s3_that_was_replaced_by_one_of_the_same_size_is_noticed(s3, tmp_path):
    bucket = fsspec.filesystem("s3")
    bucket.pipe("s3://bucket/same/x.jsonl", FILES["b.jsonl"])
    before = open_source("s3://bucket/same/x.jsonl").fingerprint()
    assert is_same_data(before, open_source("s3://bucket/same").fingerprint())
    bucket.pipe("s3://bucket/same/x.jsonl", FILES["b.jsonl"].replace(b"row 7", b"row 8"))
    for path in ("s3://bucket/same/x.jsonl", "s3://bucket/same", "s3://bucket/same/*.jsonl"):
        assert not is_same_data(before, open_source(path).fingerprint())


@pytest.mark.parametrize(("name", "is_noticed"), [("tagged.jsonl", True), ("b.jsonl", False)])
def test_file_on_a_web_server_that_was_replaced_is_noticed_by_its_etag(
    web, monkeypatch, caplog, name, is_noticed
):
    address, _ = web
    before = open_source(f"{address}/{name}").fingerprint()
    assert is_same_data(before, open_source(f"{address}/{name}").fingerprint())
    monkeypatch.setitem(FILES, "b.jsonl", FILES["b.jsonl"].replace(b"row 7", b"row 8"))
    caplog.clear()
    assert is_same_data(before, open_source(f"{address}/{name}").fingerprint()) is not is_noticed
    said = [line for line in caplog.messages if "does not state what identifies contents" in line]
    assert len(said) == (0 if is_noticed else 1)


def test_images_and_captions_of_a_folder_are_compared(s3, tmp_path, picture):
    """Captions by content, images by what the file system states."""
    bucket = fsspec.filesystem("s3")
    photo, other = png(picture()), bytearray(png(picture()))
    other[-1] ^= 1
    (tmp_path / "cat.png").write_bytes(photo)
    (tmp_path / "cat.txt").write_text("A cat.")
    bucket.put(str(tmp_path), "s3://bucket/photos", recursive=True)
    folders = (str(tmp_path), "s3://bucket/photos")
    before = [open_source(folder, format="auto").fingerprint() for folder in folders]
    (tmp_path / "cat.txt").write_text("A dog.")
    bucket.pipe("s3://bucket/photos/cat.png", bytes(other))
    for folder, earlier in zip(folders, before, strict=True):
        assert not is_same_data(earlier, open_source(folder, format="auto").fingerprint())
