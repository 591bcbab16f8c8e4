"""A server in this process, on a real socket."""

from __future__ import annotations

import base64
import http.client
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from tests.factories import png


@dataclass
class Served:
    """A running server."""

    port: int
    engine: object

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def ask(self, body: object, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, dict]:
        """Status and JSON of a POST."""
        status, _, answer = self.post(json.dumps(body).encode(), path, **headers)
        return status, json.loads(answer)

    def post(
        self, body: bytes, path: str = "/v1/chat/completions", **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        return response.status, response.headers, answer

    def get(self, path: str) -> str:
        return self.fetch(path)[2]

    def fetch(self, path: str, **headers: str) -> tuple[int, http.client.HTTPMessage, str]:
        """Status, headers and text of a GET."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, response.headers, text

    def metric(self, name: str) -> float:
        """The value of one line of /metrics."""
        lines = self.get("/metrics").splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), 0.0)


@contextmanager
def served(solo, limits, api_keys=(), name="tiny", prefix_cache=None):
    """The server over a model, while the context lasts."""
    import uvicorn

    from solo_vlm.generate import GenerationPipeline
    from solo_vlm.serve.app import make_app
    from solo_vlm.serve.engine import Engine

    pipeline = GenerationPipeline(solo.model, solo.processor, prefix_cache)
    engine = Engine(pipeline, limits.max_batch, limits.max_batch_tokens)
    app = make_app(engine, name, limits, api_keys)
    config = uvicorn.Config(app, port=0, http="h11", ws="none", log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Served(server.servers[0].sockets[0].getsockname()[1], engine)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server(solo):
    """With the default limits."""
    from solo_vlm.serve.limits import Limits

    with served(solo, Limits()) as running:
        yield running


@pytest.fixture
def slow_model(solo, monkeypatch):
    """Every step of the model takes a little; tells how many there were."""
    forward, steps = solo.model.model.forward, []

    def slow(*args, **kwargs):
        steps.append(None)
        time.sleep(0.02)
        return forward(*args, **kwargs)

    monkeypatch.setattr(solo.model.model, "forward", slow)
    return steps


def wait_until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def data_url(image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


def question(text: str, *images, **options) -> dict:
    """The body of a request."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], **options}
