"""Server in this process, on a real socket."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
from tests.factories import png


@dataclass
class Served:
    """Running server."""

    port: int
    engine: object
    server: object
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def ask(self, body: object, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, dict]:
        """POST JSON; return status and JSON."""
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

    def connect(self, data: bytes) -> socket.socket:
        """Send bytes; the caller reads the response, or leaves."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(data)
        return connection

    def get(self, path: str) -> str:
        return self.fetch(path)[2]

    def fetch(self, path: str, **headers: str) -> tuple[int, http.client.HTTPMessage, str]:
        """GET; return status, headers and text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, response.headers, text

    def metric(self, name: str) -> float:
        """Return the value of one line of /metrics."""
        lines = self.get("/metrics").splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), 0.0)


@contextmanager
def served(solo, limits, api_keys=(), name="tiny", prefix_cache=None):
    """Serve a model while the context lasts."""
    from solo_vlm.generate import GenerationPipeline
    from solo_vlm.serve.app import make_app
    from solo_vlm.serve.engine import Engine
    from solo_vlm.serve.server import Server, bind

    pipeline = GenerationPipeline(solo.model, solo.processor, prefix_cache)
    engine = Engine(pipeline, limits.max_batch, limits.max_batch_tokens)
    app = make_app(engine, name, limits, api_keys)
    with bind("127.0.0.1", 0) as address:
        address.listen()
        server = Server(app, replace(limits, max_drain_seconds=1))
        thread = threading.Thread(target=server.run, args=([address.socket],))
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield Served(address.socket.getsockname()[1], engine, server, thread)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def server(solo):
    """Run a server with the default limits."""
    from solo_vlm.serve.limits import Limits

    with served(solo, Limits()) as running:
        yield running


@pytest.fixture
def slow_model(solo, monkeypatch):
    """Slow down every forward pass; return a list with one entry per pass."""
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
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def data_url(image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


def question(text: str, *images, **options) -> dict:
    """Return the body of a chat completion request."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], **options}


def encode_prompt(processor, messages, add_generation_prompt=False):
    """Encode text and images separately, like the server."""
    from solo_vlm.serve.engine import Prompt
    from solo_vlm.serve.images import EncodedImage

    parts = [part for message in messages if message["role"] == "user" for part in message["content"]]
    sources = [part["image"] for part in parts if part["type"] == "image"]
    encoded = [processor.image_processor.encode_image(source) for source in sources]
    images = tuple(EncodedImage(*image, (0, 0), b"") for image in encoded)
    grids = [image.image_grid_thw for image in images]
    chat = processor.encode_chat(messages, grids, add_generation_prompt)
    return Prompt(chat.input_ids, chat.supervised, images)
