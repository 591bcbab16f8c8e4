"""Images from URLs: public addresses only, however the way leads elsewhere."""

from __future__ import annotations

import contextlib
import gzip
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tests.factories import ask, png

from solo_vlm.generate import GenerationPipeline
from solo_vlm.serve import web_images
from solo_vlm.serve.limits import Limits
from solo_vlm.serve.web_images import is_public

from .conftest import served

PUBLIC = "127.0.0.2"  # stands for a public address in these tests
# fmt: off
NOT_PUBLIC = [
    "127.0.0.1", "127.255.0.3", "10.1.2.3", "172.31.255.255", "192.168.0.1", "100.64.0.1", "0.0.0.0",
    "169.254.169.254", "168.63.129.16", "224.0.0.251", "240.0.0.1", "255.255.255.255",
    "192.0.2.1", "198.18.0.1", "203.0.113.9", "2001:db8::1",
    "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1",
    "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
]
# fmt: on


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.215.14", "2606:4700::6810:84e5", "2a00:1450:4001:82a::200e", "172.32.0.1"]
)
def test_addresses_of_the_internet_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_all_others_are_not(address):
    assert not is_public(address)


class Host(ThreadingHTTPServer):
    """A web server that knows who asked what."""

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
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client has seen enough
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def image():
    from PIL import Image

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
        patch.setattr(web_images, "is_public", lambda address: address == PUBLIC or is_public(address))
        limits = Limits(allow_image_urls=True, max_fetch_seconds=1.0, max_image_bytes=1_000_000)
        with served(solo, limits) as running:
            yield running


def about(url: str) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is this?"}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 8}


def address(host: Host, name: str | None = None) -> str:
    return f"http://{name or host.server_address[0]}:{host.server_port}"


def test_an_image_at_a_public_address_is_seen(server, public, solo, image):
    expected = GenerationPipeline(solo.model, solo.processor).answer([ask("what is this?", image)], 8)[0]
    for url in (f"{address(public)}/x.png", f"{address(public)}/to/{address(public)}/x.png"):
        status, body = server.ask(about(url))
        assert status == 200 and body["choices"][0]["message"]["content"] == expected


def test_a_redirect_leads_to_no_private_address(server, public, private):
    status, body = server.ask(about(f"{address(public)}/to/{address(private)}/x.png"))
    assert status == 400 and "public address" in body["error"]["message"]


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.2/x", "/to/" * 9 + "x", "http://[", "//"]
)
def test_a_redirect_leads_nowhere_else_either(server, public, target):
    assert server.ask(about(f"{address(public)}/to/{target}"))[0] == 400


def test_a_name_may_not_change_its_address_once_it_is_checked(server, public, private, monkeypatch):
    resolve, answers = socket.getaddrinfo, iter([PUBLIC, *["127.0.0.1"] * 5])

    def rebinding(host, port, *arguments, **options):
        host, port = (next(answers), port) if host == "rebind.test" else (host, port)
        return resolve(host, port, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    assert server.ask(about(f"{address(public, 'rebind.test')}/x.png"))[0] == 200
    assert server.ask(about(f"{address(private, 'rebind.test')}/x.png"))[0] == 400


def test_a_name_with_a_private_address_among_others_leads_to_the_public_one(
    server, public, private, monkeypatch
):
    resolve = socket.getaddrinfo

    def both(host, *arguments, **options):
        names = ["127.0.0.1", PUBLIC] if host == "both.test" else [host]
        return [found for name in names for found in resolve(name, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    assert server.ask(about(f"{address(public, 'both.test')}/x.png"))[0] == 200
    assert server.ask(about(f"{address(private, 'both.test')}/x.png"))[0] == 400


def test_all_images_of_a_request_together_are_no_larger_than_a_request(solo, public, monkeypatch, image):
    monkeypatch.setattr(web_images, "is_public", lambda address: address == PUBLIC)
    size = len(png(image))
    part = {"type": "image_url", "image_url": {"url": f"{address(public)}/x.png"}}
    with served(solo, Limits(allow_image_urls=True, max_request_bytes=3 * size - 1)) as server:
        for images, expected in ((2, 200), (3, 400)):
            content = [*[part] * images, {"type": "text", "text": "what is this?"}]
            status, body = server.ask({"messages": [{"role": "user", "content": content}], "max_tokens": 1})
            assert status == expected, body
        assert body["error"]["param"] == "messages.0.content.2.image_url.url"


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("missing", "HTTP 404"),
        ("large", "1,000,000 bytes"),
        ("bomb", "not a JPEG"),  # it stays packed
        ("slow", "within 1 s"),
    ],
)
def test_what_is_no_small_image_at_once_is_refused(server, public, page, message):
    status, body = server.ask(about(f"{address(public)}/{page}"))
    assert status == 400 and message in body["error"]["message"]
