"""Shutdown of a busy server: clients receive an error, one line is printed, and the process ends in time."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from solo_vlm.serve.limits import Limits
from solo_vlm.utils.pages import png_url

from . import hostile_images
from .conftest import question, served, wait_until
from .hostile import http

LONG = question("hello", max_tokens=400)


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(2**16), b""))


def test_unfinished_requests_end_with_an_error(solo, slow_model, caplog):
    with served(solo, Limits()) as server:  # drains for 1 s; the answers take at least 8 s
        whole = server.connect(http(json.dumps(LONG).encode()))
        stream = server.connect(http(json.dumps({**LONG, "stream": True}).encode()))
        half = server.connect(http(b"{", length="100"))
        idle, head = server.connect(b""), server.connect(b"POST /v1/chat/completions HTTP/1.1\r\nX: ")
        wait_until(lambda: slow_model)
        server.server.should_exit = True
        assert read_all(idle) == read_all(head) == b""
        for connection in (whole, half):
            answer = read_all(connection)
            assert b"503 Service Unavailable" in answer and b'"code":"shutting_down"' in answer
        *_, last = read_all(stream).split(b"data: ")
        assert b'"code":"shutting_down"' in last
        server.thread.join(10)
        assert not server.thread.is_alive()
    assert [record.getMessage() for record in caplog.records] == [
        "requests unfinished after --max-drain-seconds 1: 3"
    ]


def test_client_that_does_not_read_does_not_delay_the_shutdown(solo, caplog):
    stream = json.dumps(question("hello", max_tokens=400, stream=True)).encode()
    with served(solo, Limits()) as server:
        connection = server.connect(b"")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.sendall(http(stream) * 20)
        wait_until(lambda: server.engine.running)
    assert "Traceback" not in caplog.text and "ERROR" not in caplog.text


# A server that is busy in every way: its threads decode or resolve a name, a download hangs, and the model
# generates, all without end.
BUSY = """
    import socket, sys, time
    import solo_vlm.serve.images as images
    from solo_vlm.cli import main

    resolve = socket.getaddrinfo
    socket.getaddrinfo = lambda host, *rest, **options: (
        time.sleep(600) if host == "slow.test" else resolve(host, *rest, **options)
    )
    images.is_public = lambda address: True
    images.ImageReader.read = lambda *arguments: time.sleep(600)

    def hang(*arguments):
        print("generating", file=sys.stderr)
        time.sleep(600)

    import solo_vlm.serve.engine as engine
    engine.generate_batch = hang
    main()
"""


def printed_port(process: subprocess.Popen[str]) -> int:
    """Return the port that a server prints; libraries that are imported before may print notes."""
    lines = iter(process.stderr.readline, "")
    found = (re.search(r"http://[\d.]+:(\d+)", line) for line in lines)
    return int(next(filter(None, found))[1])


def ask_about_images(port: int, names: list[str]) -> list[socket.socket]:
    """Send one request for each costly image, all at once."""
    build = hostile_images.costly_images()
    urls = [png_url(build[name]()) for name in names]
    bodies = [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
        for url in urls
    ]
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in bodies]
    for connection, body in zip(connections, bodies, strict=True):
        connection.sendall(http(json.dumps(body).encode()))
    return connections


@pytest.mark.slow
@pytest.mark.parametrize("drain_seconds", [0, 1])
def test_sigterm_ends_a_server_that_decodes_costly_images(solo, tmp_path, drain_seconds):
    solo.save(tmp_path / "solo")
    command = [sys.executable, "-m", "solo_vlm", "serve", "--model", str(tmp_path / "solo"), "--port", "0"]
    command += ["--max-drain-seconds", str(drain_seconds)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            port = printed_port(process)
            server = psutil.Process(process.pid)
            idle = server.memory_info().rss
            connections = ask_about_images(
                port,
                [
                    "PNG of 50 megapixels, 16 bits, transparent color",
                    "JPEG of as many scans as are read",
                    "WebP of 50 megapixels, lossless",
                    "PNG of 50 megapixels, 16 bits, alpha, interlaced",
                ],
            )
            wait_until(lambda: server.memory_info().rss > idle + 100e6)
            children = server.children(recursive=True)
            process.send_signal(signal.SIGTERM)
            started = time.monotonic()
            assert process.wait(60) == 0
            assert time.monotonic() - started < drain_seconds + 2
            assert not any(child.is_running() for child in children)
            for connection in connections:
                connection.close()
            assert process.stderr.read().count("\n") <= 1
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("drain_seconds", [0, 3])
def test_sigterm_ends_a_busy_server_within_its_limit(solo, tmp_path, drain_seconds):
    solo.save(tmp_path / "solo")
    options = ["--port", "0", "--max-drain-seconds", str(drain_seconds), "--allow-image-urls"]
    options += ["--max-fetch-seconds", "600"]
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(BUSY),
        "serve",
        "--model",
        str(tmp_path / "solo"),
        *options,
    ]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process,
        socket.create_server(("127.0.0.1", 0)) as silent,
    ):
        port = printed_port(process)
        urls = [
            "data:image/png;base64,x",
            "http://slow.test/",
            f"http://127.0.0.1:{silent.getsockname()[1]}/",
        ]
        images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        asked = [question("x"), question("x", stream=True)]
        asked += [{"messages": [{"role": "user", "content": [image]}]} for image in images * 5]
        sent = [http(json.dumps(body).encode()) for body in asked]
        sent += [http(b"{", length="100"), b"POST", b"", b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 1000]
        connections = [socket.create_connection(("127.0.0.1", port)) for _ in sent]
        for connection, request in zip(connections, sent, strict=True):
            connection.sendall(request)
        assert process.stderr.readline() == "generating\n"
        time.sleep(1)  # until everything hangs
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        try:
            assert process.wait(60) == 0
        finally:
            process.kill()
        assert time.monotonic() - started < drain_seconds + 2
        output = process.stderr.read()
        assert output.count("\n") == 1
        assert f"requests unfinished after --max-drain-seconds {drain_seconds}: 18" in output


# The signals arrive when the URL has been printed: a supervisor may stop a server as soon as it is ready.
STOPPED_WHEN_READY = """
    import signal, sys
    from solo_vlm.cli import main, serve

    names = sys.argv.pop()

    def print_and_stop(*_, **__):
        for name in names.split(","):
            signal.raise_signal(signal.Signals[name])

    serve.__globals__["STDERR"].print = print_and_stop
    main()
"""


@pytest.mark.parametrize("signals", ["SIGTERM", "SIGINT", "SIGHUP", "SIGTERM,SIGTERM", "SIGINT,SIGINT"])
def test_signals_to_a_server_that_just_became_ready_stop_it(solo, tmp_path, signals):
    solo.save(tmp_path)
    command = ["serve", "--model", str(tmp_path), "--port", "0"]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STOPPED_WHEN_READY), *command, signals],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
