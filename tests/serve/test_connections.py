"""Slow, idle and too many connections do not block other clients."""

from __future__ import annotations

import http.client
import json
import socket
import time

import pytest

from solo_vlm.serve.limits import Limits

from .conftest import question, served, wait_until
from .hostile import http as http_request

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.001)
    try:
        return connection.recv(2**16) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize(
    "sent", [b"", b"POST", GET + b"GET /he"], ids=["nothing", "method", "second request"]
)
def test_connection_without_a_whole_head_is_closed(solo, sent):
    with served(solo, Limits(max_head_seconds=0.3)) as server:
        connection = server.connect(sent)
        for _ in range(3):  # more bytes do not extend the time
            time.sleep(0.05)
            connection.sendall(b"X" if sent else b"")
        wait_until(lambda: is_closed(connection))


def test_idle_connection_is_kept_as_long_as_documented(solo):
    with served(solo, Limits()) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        for pause in (0, 5.5):  # clients such as httpx keep connections for five seconds
            time.sleep(pause)
            connection.request("GET", "/health")
            assert connection.getresponse().read()


def test_client_that_keeps_sending_a_rejected_body_is_disconnected(solo):
    with served(solo, Limits(max_head_seconds=0.3, max_request_bytes=100)) as server:
        connection = server.connect(http_request(None) + b"1\r\n{\r\n" * 200)
        assert b"413" in connection.recv(2**16)

        def is_disconnected() -> bool:
            try:
                connection.sendall(b"1\r\n{\r\n")
            except ConnectionError:
                return True
            return False

        wait_until(is_disconnected)


def test_time_for_a_head_does_not_limit_its_answer(solo, slow_model):
    with served(solo, Limits(max_head_seconds=0.1)) as server:
        assert server.ask(question("hello", max_tokens=20))[0] == 200


def test_new_connection_replaces_the_longest_idle_one(solo, slow_model):
    with served(solo, Limits(max_connections=4)) as server:
        active = server.connect(http_request(json.dumps(question("hello", max_tokens=30)).encode()))
        wait_until(lambda: server.engine.running)
        idle = [server.connect(b"" if number else GET) for number in range(3)]
        wait_until(lambda: len(server.server.server_state.connections) == 4)
        assert '"ok"' in server.get("/health")
        wait_until(lambda: is_closed(idle[0]) or is_closed(idle[1]))
        for _ in range(20):
            assert '"ok"' in server.get("/health")
        assert b"200 OK" in active.recv(2**16)


def test_connections_of_clients_that_do_not_read_are_closed(solo):
    """Each client requests more pages than its buffers hold, so its responses never end."""
    with served(solo, Limits(max_connections=4)) as server:
        blocked = [server.connect(b"GET /page/app.js HTTP/1.1\r\nHost: x\r\n\r\n" * 1000) for _ in range(6)]
        wait_until(lambda: len(server.server.server_state.connections) == 4)
        assert len(blocked) == 6 and '"ok"' in server.get("/health")


def test_server_stays_responsive_during_a_body_in_tiny_chunks(solo):
    with served(solo, Limits(max_body_seconds=60)) as server:
        connection = server.connect(http_request(None))
        connection.setblocking(False)
        chunks, answers = b"1\r\n \r\n" * 10_000, 0
        deadline = time.monotonic() + 30
        while answers < 4 and time.monotonic() < deadline:
            try:
                connection.send(chunks)
            except BlockingIOError:
                answers += '"ok"' in server.get("/health")
        assert answers == 4


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/health"])
def test_request_of_two_lengths_ends_its_connection(server, path):
    """A proxy that believes the other length takes a part of the body for the next request."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    lengths = "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    connection = server.connect(f"{head}{lengths}0\r\n\r\n".encode() + GET)
    with connection.makefile("rb") as answer:
        received = answer.read()
    assert received.startswith(b"HTTP/1.1 400")
    assert received.count(b"HTTP/1.1") == 1


def test_malformed_requests_are_not_logged(server, caplog):
    upgrade = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    for request in (b"\x16\x03\x01\r\n\r\n", GET.replace(b"Host", b"H st"), upgrade, http_request(b"{")):
        with server.connect(request) as connection:
            assert connection.recv(2**16)
    assert caplog.records == []
