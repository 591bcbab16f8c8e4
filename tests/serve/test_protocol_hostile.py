"""Every hostile request gets a 4xx with a message, and the server keeps serving."""

from __future__ import annotations

import json
import socket
import time

import pytest

from solo_vlm.serve.limits import Limits

from . import hostile
from .conftest import question, served

LIMITS = Limits(
    allow_image_urls=True, max_request_bytes=4 * 2**20, max_body_seconds=0.3, max_fetch_seconds=1.0
)
REQUESTS = hostile.requests(LIMITS.max_request_bytes)


@pytest.fixture(scope="module")
def server(solo):
    resolve = socket.getaddrinfo

    def with_names(host, *arguments, **options):
        """Resolve names as an attacker might, without network access."""
        names = {"loopback.test": "127.0.0.1", "metadata.google.internal": "169.254.169.254"}
        return resolve(names.get(host, host), *arguments, **options)

    with pytest.MonkeyPatch.context() as patch, served(solo, LIMITS) as running:
        patch.setattr(socket, "getaddrinfo", with_names)
        yield running


def test_corpus_is_large_enough():
    assert len(REQUESTS) >= 60


@pytest.mark.parametrize("name", REQUESTS)
def test_hostile_request_is_rejected_with_a_message(server, name):
    status, body = hostile.exchange(server.port, REQUESTS[name])
    assert 400 <= status < 500, body
    if body.startswith("{"):
        error = json.loads(body)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert 5 < len(error["message"]) < 500
    else:  # invalid HTTP never reaches the application
        assert body == "Invalid HTTP request received."
    assert "Traceback" not in body and "root:" not in body
    assert server.ask(question("hello", max_tokens=1))[0] == 200


@pytest.mark.slow
def test_every_rejection_takes_at_most_two_seconds(server):
    """The only test that asserts a time, because the server guarantees it."""
    seconds = {}
    for name, request in REQUESTS.items():
        started = time.perf_counter()
        hostile.exchange(server.port, request)
        seconds[name] = time.perf_counter() - started
    slowest = max(seconds, key=seconds.__getitem__)
    print(f"slowest of {len(seconds)}: {slowest}, {seconds[slowest]:.2f} s")
    assert seconds[slowest] < 2
