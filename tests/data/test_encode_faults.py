"""Images by path or URL: transient errors are retried and then raised, permanent ones are bad samples."""

import errno
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pytest
from PIL import Image
from tests.factories import png

from solo_vlm.data.encode import encode
from solo_vlm.data.sample import Sample, SampleError

PICTURE = png(Image.effect_noise((64, 32), 50).convert("RGB"))


class _Site(BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self):
        type(self).asked += 1
        recovers = self.path == "/recovers.png" and self.asked > 2
        status = {"/none.png": 404, "/gone.png": 410}.get(self.path, 200 if recovers else 503)
        self.send_response(status)
        self.end_headers()
        if status == 200:
            self.wfile.write(PICTURE)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    monkeypatch.setattr(_Site, "asked", 0)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def caption(image) -> Sample:
    content = [{"type": "image"}, {"type": "text", "text": "red"}]
    return Sample([{"role": "assistant", "content": content}], [image])


def test_recovering_server_is_retried(solo, site):
    fetched = encode(caption(f"{site}/recovers.png"), solo.processor)
    assert _Site.asked == 3
    expected = encode(caption(PICTURE), solo.processor)
    np.testing.assert_array_equal(fetched.pixel_values, expected.pixel_values)
    np.testing.assert_array_equal(fetched.input_ids, expected.input_ids)


def test_permanent_server_failure_is_raised_not_skipped(solo, site):
    with pytest.raises(OSError, match=r"down\.png: HTTP 503") as caught:
        encode(caption(f"{site}/down.png"), solo.processor)
    assert not isinstance(caught.value, SampleError)
    assert _Site.asked == 5


@pytest.mark.parametrize("page", ["none.png", "gone.png"])
def test_missing_page_is_a_bad_sample(solo, site, page):
    with pytest.raises(SampleError, match=rf"{page}: HTTP 4") as caught:
        encode(caption(f"{site}/{page}"), solo.processor)
    assert caught.value.reason == "image"
    assert _Site.asked == 1


@pytest.mark.parametrize("name", ["none.png", "folder", "folder/a.png/b.png", "x" * 5000, "nul\0"])
def test_missing_file_is_a_bad_sample(solo, tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(PICTURE)
    with pytest.raises(SampleError) as caught:
        encode(caption(f"{tmp_path}/{name}"), solo.processor)
    assert caught.value.reason == "image"


def test_recovering_disk_is_retried(solo, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(PICTURE)
    failures = iter([errno.EIO, errno.ESTALE])
    opened = type(tmp_path).open

    def flaky(path, *arguments, **options):
        if number := next(failures, None):
            raise OSError(number, "the disk is offline")
        return opened(path, *arguments, **options)

    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    monkeypatch.setattr("pathlib.Path.open", flaky)
    document = encode(caption(str(tmp_path / "a.png")), solo.processor)
    np.testing.assert_array_equal(
        document.pixel_values, encode(caption(PICTURE), solo.processor).pixel_values
    )
    assert next(failures, None) is None


def test_remote_image_is_read_and_a_missing_one_is_a_bad_sample(solo):
    fsspec.filesystem("memory").pipe("memory://rows/a.png", PICTURE)
    document = encode(caption("memory://rows/a.png"), solo.processor)
    np.testing.assert_array_equal(
        document.pixel_values, encode(caption(PICTURE), solo.processor).pixel_values
    )
    for url in ("memory://rows/none.png", "nowhere://rows/a.png"):
        with pytest.raises(SampleError, match=url) as caught:
            encode(caption(url), solo.processor)
        assert caught.value.reason == "image"


def test_file_url_must_name_a_file(solo, tmp_path):
    (tmp_path / "a b.png").write_bytes(PICTURE)
    document = encode(caption(f"file://{tmp_path}/a%20b.png"), solo.processor)
    np.testing.assert_array_equal(
        document.pixel_values, encode(caption(PICTURE), solo.processor).pixel_values
    )
    for url, message in (
        ("file://host/a.png", "absolute path"),
        (f"file://{tmp_path}/no.png", "No such file"),
    ):
        with pytest.raises(SampleError, match=message):
            encode(caption(url), solo.processor)
