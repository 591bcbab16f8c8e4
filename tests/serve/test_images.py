"""Images in requests: all data URLs that the library reads; downloads from public addresses only."""

from __future__ import annotations

import base64
import contextlib
import gzip
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import numpy as np
import pytest
from openai import OpenAI
from PIL import Image
from tests.factories import ask, png

from solo_vlm.generate import GenerationPipeline
from solo_vlm.models.solo.image_loading_solo import ImageError, load_image
from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor
from solo_vlm.serve import images
from solo_vlm.serve.addresses import is_public
from solo_vlm.serve.images import ImageReader, PixelBudget, describe_image
from solo_vlm.serve.limits import Limits
from solo_vlm.serve.protocol import ApiError

from .conftest import question, served
from .hostile_images import jpeg_of_scans, png_file


def _file() -> bytes:
    """Return a PNG whose base64 has "+", "/" and padding."""
    for seed in range(1000):
        noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8))
        file = png(noise)
        encoded = base64.b64encode(file).decode()
        if "+" in encoded and "/" in encoded and encoded.endswith("="):
            return file
    raise AssertionError


FILE = _file()
TEXT = base64.b64encode(FILE).decode()
LINES = base64.encodebytes(FILE).decode()

READABLE = {
    "plain": f"data:image/png;base64,{TEXT}",
    "a parameter": f"data:image/png;charset=utf-8;base64,{TEXT}",
    "several parameters": f"data:image/png;name=x.png;charset=utf-8;base64,{TEXT}",
    "no media type": f"data:;base64,{TEXT}",
    "no media type, a parameter": f"data:;charset=utf-8;base64,{TEXT}",
    "another media type": f"data:application/octet-stream;base64,{TEXT}",
    "image/jpg": f"data:image/jpg;base64,{TEXT}",
    "upper case": f"DATA:IMAGE/PNG;BASE64,{TEXT}",
    "mixed case": f"Data:image/PNG;Base64,{TEXT}",
    "a space before base64": f"data:image/png; base64,{TEXT}",
    "line breaks": f"data:image/png;base64,{LINES}",
    "CRLF": "data:image/png;base64," + LINES.replace("\n", "\r\n"),
    "a line break first": f"data:image/png;base64,\n{TEXT}",
    "spaces and tabs": "data:image/png;base64," + " \t".join([TEXT[:10], TEXT[10:33], TEXT[33:]]),
    "URL-safe": "data:image/png;base64," + base64.urlsafe_b64encode(FILE).decode(),
    "no padding": "data:image/png;base64," + TEXT.rstrip("="),
    "URL-safe without padding": "data:image/png;base64,"
    + base64.urlsafe_b64encode(FILE).decode().rstrip("="),
    "percent-encoded base64": "data:image/png;base64," + quote(TEXT, safe=""),
    "percent-encoded in lower case": "data:image/png;base64,"
    + TEXT.replace("+", "%2b").replace("/", "%2f").replace("=", "%3d"),
    "percent-encoded line breaks": "data:image/png;base64," + quote(LINES),
    "percent-encoded bytes": "data:image/png," + quote(FILE),
    "percent-encoded bytes, no media type": "data:," + quote(FILE),
}
UNREADABLE = {
    "no comma": f"data:image/png;base64{TEXT}",
    "no base64": f"data:image/png,{TEXT}",
    "base64 as the type": f"data:base64,{TEXT}",
    "invalid characters": f"data:image/png;base64,{TEXT[:20]}*{TEXT[20:]}",
    "escapes that are none": f"data:image/png;base64,%zz{TEXT}",
    "one character too many": f"data:image/png;base64,{TEXT.rstrip('=')[: len(TEXT) // 4 * 4 - 3]}",
    "nothing": "data:image/png;base64,",
    "other letters": f"data:image/png;base64,é{TEXT}",
    "a lone surrogate": f"data:image/png;base64,\ud800{TEXT}",
}


def read(*urls, **limits):
    """Read images with a new reader."""
    return ImageReader(SoloImageProcessor(), Limits(**limits)).read([("x", url) for url in urls])


@pytest.mark.parametrize("name", READABLE)
def test_server_reads_what_the_library_reads(name):
    expected = np.asarray(load_image(FILE))
    assert np.array_equal(np.asarray(load_image(READABLE[name])), expected)
    (image,) = read(READABLE[name])
    assert np.array_equal(image.pixel_values, SoloImageProcessor()([expected])["pixel_values"])
    assert image.size == (7, 9)


@pytest.mark.parametrize("name", UNREADABLE)
def test_library_and_server_reject_invalid_data_urls(name):
    with pytest.raises(ImageError):
        load_image(UNREADABLE[name])
    with pytest.raises(ApiError) as error:
        read(UNREADABLE[name])
    assert (error.value.status, error.value.param, error.value.code) == (400, "x", "invalid_image")


def test_answers_do_not_depend_on_the_format_of_the_data_url(server):
    client = OpenAI(base_url=server.url, api_key="none", max_retries=0)
    body = question("what is this?", load_image(FILE), max_tokens=8)
    expected = client.chat.completions.create(model="tiny", **body)
    for url in READABLE.values():
        body["messages"][0]["content"][0]["image_url"]["url"] = url
        reply = client.chat.completions.create(model="tiny", **body)
        assert reply.choices == expected.choices
        assert reply.usage == expected.usage


@pytest.mark.parametrize("name", ["plain", "line breaks", "percent-encoded base64", "percent-encoded bytes"])
def test_limit_counts_bytes_of_the_decoded_file(name):
    assert read(READABLE[name], max_image_bytes=len(FILE))
    with pytest.raises(ApiError) as error:
        read(READABLE[name], max_image_bytes=len(FILE) - 1)
    assert error.value.code == "image_too_large"


def test_percent_encoding_is_limited_per_request():
    url = "data:image/png;base64," + TEXT + "%0A" * 600_000
    assert read(url)
    with pytest.raises(ApiError, match="Too much percent-encoding"):
        read(url, url)


class CountingProcessor(SoloImageProcessor):
    """Image processor that counts the images that it encodes."""

    encoded = 0

    def encode_pixels(self, pixels):
        self.encoded += 1
        return super().encode_pixels(pixels)


def test_image_seen_before_is_encoded_once():
    reader = ImageReader(processor := CountingProcessor(), Limits())
    (first,), (again,) = (reader.read([("x", READABLE[name])]) for name in ("plain", "URL-safe"))
    assert again is first and processor.encoded == 1


def test_image_cache_drops_least_recently_used_and_stays_within_its_bytes():
    files = [png(Image.new("RGB", (32, 32), color)) for color in ("red", "green", "blue")]
    reader = ImageReader(processor := CountingProcessor(), Limits(max_cached_image_bytes=2 * 3072))
    for index in (0, 1, 0, 2, 0):
        reader.read([("x", files[index])])
    assert processor.encoded == 3
    reader.read([("x", files[1])])
    assert processor.encoded == 4
    uncached = ImageReader(processor := CountingProcessor(), Limits(max_cached_image_bytes=0))
    for _ in range(2):
        uncached.read([("x", files[0])])
    assert processor.encoded == 2


def test_pixels_of_cached_images_count_towards_the_limit():
    file = png(Image.new("RGB", (10, 10)))
    reader = ImageReader(SoloImageProcessor(), Limits(max_pixels=250))
    assert len(reader.read([("x", file), ("y", file)])) == 2
    with pytest.raises(ApiError, match="limit of 50 pixels") as error:
        reader.read([("x", file), ("y", file), ("z", file)])
    assert error.value.param == "z"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "Unsupported image format"),
        (b"<svg/>", "Unsupported image format"),
        (png(Image.new("RGB", (64, 64)))[:-40], "truncated or damaged"),
        (png(Image.new("L", (101, 100))), "more than the limit of 10,000 pixels"),
        (png(Image.new("L", (2000, 1))), "2000 x 1|2,000 x 1"),
    ],
)
def test_unusable_image_is_rejected(file, message):
    with pytest.raises(ApiError, match=message) as error:
        ImageReader(SoloImageProcessor(), Limits(max_pixels=10_000)).read([("x", file)])
    assert (error.value.status, error.value.code) == (400, "invalid_image")


def test_images_that_are_decoded_together_share_a_budget_of_pixels():
    budget, fits = PixelBudget(100), threading.Event()

    def decode() -> None:
        with budget.decoding() as wait_for_memory:
            wait_for_memory(10, 5)
            wait_for_memory(10, 5)  # the same image, opened again by another decoder
            fits.set()

    with budget.decoding() as wait_for_memory:
        wait_for_memory(10, 6)
        other = threading.Thread(target=decode)
        other.start()
        assert not fits.wait(0.1)
        with budget.decoding() as small:
            small(3, 1)  # does not wait
    assert fits.wait(30)
    other.join()
    with budget.decoding() as wait_for_memory:
        wait_for_memory(10, 10)  # all is free again


def test_processor_time_of_images_is_limited_per_request(monkeypatch):
    monkeypatch.setattr(images, "_MAX_SECONDS", 0)
    with pytest.raises(ApiError, match="take more than 0 s to decode") as error:
        read(READABLE["plain"])
    assert (error.value.status, error.value.code) == (400, "invalid_image")


@pytest.mark.parametrize("file", [jpeg_of_scans(41), png_file(3, 16_000_000, pixels=b"")])
def test_costly_image_is_rejected_before_decoding(file):
    with pytest.raises(ApiError, match=r"take too long|exceeds the limit of 65,535 pixels per side") as error:
        ImageReader(SoloImageProcessor(), Limits()).read([("x", file)])
    assert (error.value.status, error.value.code) == (400, "invalid_image")


def test_description_shows_the_pixels_that_the_model_gets(picture):
    original = picture(90, 50)
    (image,) = read(f"data:image/png;base64,{base64.b64encode(png(original)).decode()}")
    described = describe_image(image)
    assert (described["original"], described["resized"]) == ((90, 50), (96, 64))
    assert [described[name] for name in ("rows", "columns", "patches", "tokens")] == [2, 3, 6, 9]
    seen = np.asarray(load_image(described["picture"]))
    patches = SoloImageProcessor()([original])["pixel_values"]
    assert np.array_equal(seen[32:64, 64:96].transpose(2, 0, 1).ravel(), patches[5])  # the last of six


# ------------------------------------------------------------------------------------------ downloads

PUBLIC = "127.0.0.2"  # stands for a public address in these tests


class Host(ThreadingHTTPServer):
    """Web server that records requested paths."""

    daemon_threads = True

    def __init__(self, address: str, image: bytes) -> None:
        self.image, self.seen = image, []
        super().__init__((address, 0), Pages)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Pages(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        body, headers, status = self.server.image, {}, 200
        if self.path.startswith("/to/"):
            status, headers = 302, {"Location": self.path.removeprefix("/to/")}
        elif self.path == "/missing":
            status = 404
        elif self.path == "/large":
            body = body + bytes(10_000_000)
        elif self.path == "/bomb":
            body, headers = gzip.compress(bytes(10_000_000)), {"Content-Encoding": "gzip"}
        elif self.path == "/slow":
            time.sleep(3)
        elif self.path.startswith("/wait"):
            time.sleep(0.4)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client stopped reading
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def image():
    return Image.effect_noise((64, 96), 60).convert("RGB")


@pytest.fixture(scope="module")
def hosts(image):
    pair = Host(PUBLIC, png(image)), Host("127.0.0.1", png(image))
    yield pair
    for host in pair:
        host.shutdown()
        host.server_close()


@pytest.fixture
def public(hosts):
    return hosts[0]


@pytest.fixture
def private(hosts):
    yield hosts[1]
    assert hosts[1].seen == []


@pytest.fixture(scope="module")
def server(solo):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "is_public", lambda address: address == PUBLIC or is_public(address))
        limits = Limits(allow_image_urls=True, max_fetch_seconds=1.0, max_image_bytes=1_000_000)
        with served(solo, limits) as running:
            yield running


def about(url: str) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is this?"}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 8}


def address(host: Host, name: str | None = None) -> str:
    return f"http://{name or host.server_address[0]}:{host.server_port}"


def test_image_at_a_public_address_is_read(server, public, solo, image):
    expected = GenerationPipeline(solo.model, solo.processor).answer([ask("what is this?", image)], 8)[0]
    for url in (f"{address(public)}/x.png", f"{address(public)}/to/{address(public)}/x.png"):
        status, body = server.ask(about(url))
        assert status == 200 and body["choices"][0]["message"]["content"] == expected


def test_redirect_to_a_private_address_is_rejected(server, public, private):
    status, body = server.ask(about(f"{address(public)}/to/{address(private)}/x.png"))
    assert status == 400 and "public address" in body["error"]["message"]


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.2/x", "/to/" * 9 + "x", "http://[", "//"]
)
def test_redirect_to_another_scheme_is_rejected(server, public, target):
    assert server.ask(about(f"{address(public)}/to/{target}"))[0] == 400


def test_dns_rebinding_is_rejected(server, public, private, monkeypatch):
    resolve, answers = socket.getaddrinfo, iter([PUBLIC, *["127.0.0.1"] * 5])

    def rebinding(host, port, *arguments, **options):
        host, port = (next(answers), port) if host == "rebind.test" else (host, port)
        return resolve(host, port, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    assert server.ask(about(f"{address(public, 'rebind.test')}/x.png"))[0] == 200
    assert server.ask(about(f"{address(private, 'rebind.test')}/x.png"))[0] == 400


def test_name_with_private_and_public_addresses_connects_to_the_public_one(
    server, public, private, monkeypatch
):
    resolve = socket.getaddrinfo

    def both(host, *arguments, **options):
        names = ["127.0.0.1", PUBLIC] if host == "both.test" else [host]
        return [found for name in names for found in resolve(name, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    assert server.ask(about(f"{address(public, 'both.test')}/x.png"))[0] == 200
    assert server.ask(about(f"{address(private, 'both.test')}/x.png"))[0] == 400


def test_downloads_together_are_limited_to_the_size_of_a_request(solo, public, monkeypatch, image):
    monkeypatch.setattr(images, "is_public", lambda address: address == PUBLIC)
    size = len(png(image))
    part = {"type": "image_url", "image_url": {"url": f"{address(public)}/x.png"}}
    with served(solo, Limits(allow_image_urls=True, max_request_bytes=3 * size - 1)) as server:
        for count, expected in ((2, 200), (3, 400)):
            content = [*[part] * count, {"type": "text", "text": "what is this?"}]
            status, body = server.ask({"messages": [{"role": "user", "content": content}], "max_tokens": 1})
            assert status == expected, body
        assert body["error"]["param"] == "messages.0.content.2.image_url.url"


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("missing", "HTTP 404"),
        ("large", "1,000,000 bytes"),
        ("bomb", "Unsupported image format"),  # it stays compressed
        ("slow", "timed out after 1 s"),
    ],
)
def test_missing_large_compressed_or_slow_download_is_rejected(server, public, page, message):
    status, body = server.ask(about(f"{address(public)}/{page}"))
    assert status == 400 and message in body["error"]["message"]


def test_downloads_together_are_limited_in_time(server, public):
    content = [
        part for n in range(3) for part in about(f"{address(public)}/wait?{n}")["messages"][0]["content"]
    ]
    status, body = server.ask({"messages": [{"role": "user", "content": content}], "max_tokens": 1})
    assert status == 400 and "timed out after 1 s" in body["error"]["message"]
    assert body["error"]["param"] == "messages.0.content.4.image_url.url"


def test_long_url_is_rejected(server, public):
    status, body = server.ask(about(f"{address(public)}/{'x' * 8192}"))
    assert status == 400 and "URL too long" in body["error"]["message"]
