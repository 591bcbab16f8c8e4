"""An S3 server on this machine, which can refuse or delay requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.request import Request, urlopen

import pytest


class S3:
    """Restartable S3 server.

    Attributes:
        answer: Function of a request's method and path that returns the HTTP status of an error, or 0. It may
            wait.
        environment: Variables with which clients find the server.
    """

    def __init__(self) -> None:
        self._port = 0
        self.answer: Callable[[str, str], int] = lambda method, path: 0
        self.start()
        self._port = self._server.get_host_and_port()[1]
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_MAX_ATTEMPTS": "1",
        }

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer("127.0.0.1", self._port, verbose=False)
        self._server.start()
        server = self._server._server
        accept = server.app

        def app(environ, start_response):
            if not (status := self.answer(environ["REQUEST_METHOD"], environ["PATH_INFO"])):
                return accept(environ, start_response)
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(f"{status} Refused", [("Content-Length", "0")])
            return [b""]

        server.app = app

    def stop(self) -> None:
        self._server.stop()


@contextmanager
def s3_server() -> Iterator[S3]:
    """Start a server with a bucket named `bucket`; only the project's own retries count."""
    pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = S3()
    # All servers of a process have the same buckets.
    reset = f"{server.environment['AWS_ENDPOINT_URL']}/moto-api/reset"
    urlopen(Request(reset, method="POST")).close()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield server
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()
