"""Backends: a local model in batches, and a server over HTTP."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from tests.factories import ask

from solo_vlm.evaluate.backends import ServerBackend
from solo_vlm.generate import BatchGenerator, GenerationOutput, GenerationPipeline, GenerationRequest
from solo_vlm.utils.errors import SoloError


@pytest.fixture(scope="module")
def pipeline(solo):
    return GenerationPipeline(solo.model, solo.processor)


@pytest.fixture
def chats(picture):
    """Return short and long chats with no, one and several images."""
    images = [picture(32 * (1 + n % 4), 32 * (1 + n % 3), seed=n) for n in range(20)]
    prompts = ["what is this?", "a red circle left of a blue square. " * 6, "seven"]
    return [ask(prompts[n % 3], *images[n : n + n % 3]) for n in range(18)]


def answers_by_number(backend, chats, max_new_tokens=6) -> dict[int, GenerationOutput]:
    questions = (GenerationRequest(number, chat, max_new_tokens) for number, chat in enumerate(chats))
    return {answer.request_id: answer for batch in backend.generate(questions) for answer in batch}


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_batched_answers_equal_single_answers(pipeline, chats, batch_size):
    found = answers_by_number(BatchGenerator(pipeline, batch_size), chats)
    assert [found[n].text for n in range(len(chats))] == [pipeline.answer([chat], 6)[0] for chat in chats]
    assert len({answer.text for answer in found.values()}) > 3  # the model distinguishes the chats


def test_batches_group_chats_of_similar_length(pipeline, chats, monkeypatch):
    widths = []
    encode = pipeline.encode

    def encode_and_measure(batch):
        inputs = encode(batch)
        widths.append((inputs["input_ids"].shape[1], inputs["attention_mask"].sum(1).min().item()))
        return inputs

    monkeypatch.setattr(pipeline, "encode", encode_and_measure)
    answers_by_number(BatchGenerator(pipeline, 3), chats)
    padding = sum(longest - shortest for longest, shortest in widths)
    widths.clear()
    for start in range(0, len(chats), 3):
        pipeline.encode(chats[start : start + 3])
    assert padding < sum(longest - shortest for longest, shortest in widths) / 3


def test_too_long_chat_fails_alone(pipeline, chats, picture):
    too_long = ask("what?", picture(1024, 1024))  # 1,057 tokens; the context is 512
    found = answers_by_number(BatchGenerator(pipeline, 4), [*chats[:3], too_long])
    assert found[3].text is None
    assert "512" in found[3].error
    assert [found[n].text for n in range(3)] == [pipeline.answer([chat], 6)[0] for chat in chats[:3]]


class Server(ThreadingHTTPServer):
    """Minimal OpenAI API that answers with the sizes of the received images."""

    def __init__(self, parallel: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.together = threading.Barrier(parallel, timeout=20)
        self.seen: list[dict] = []
        self.images: list[Image.Image] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append({"path": self.path, "key": self.headers["Authorization"], **body})
        self.server.together.wait()
        text = "".join(p["text"] for p in body["messages"][0]["content"] if p["type"] == "text")
        if "refuse" in text:
            self.reply(400, {"error": {"message": "this chat is too long"}})
            return
        urls = [p["image_url"]["url"] for p in body["messages"][0]["content"] if p["type"] == "image_url"]
        images = [Image.open(BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
        self.server.images += images
        content = f" {text}: {[image.size for image in images]} "
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        self.reply(
            200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        )

    def reply(self, status: int, value: dict) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator:
    servers = []

    def start(parallel: int = 1) -> Server:
        servers.append(Server(parallel))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_server_receives_images_and_concurrent_requests(serve, picture):
    server = serve(parallel=2)  # no request is answered before two are there
    images = [picture(64, 32), picture(32, 96, seed=1)]
    chats = [ask("none"), ask("one", images[0]), ask("two", *images), ask("again", images[1])]
    found = answers_by_number(ServerBackend("m", server.url, "secret", concurrency=2), chats)
    assert [found[n].text for n in range(4)] == [
        "none: []",
        "one: [(64, 32)]",
        "two: [(64, 32), (32, 96)]",
        "again: [(32, 96)]",
    ]
    assert all((s["model"], s["temperature"], s["max_tokens"]) == ("m", 0.0, 6) for s in server.seen)
    assert {s["path"] for s in server.seen} == {"/v1/chat/completions"}
    assert {s["key"] for s in server.seen} == {"Bearer secret"}
    sent = {image.size: np.asarray(image) for image in server.images}
    for image in images:
        np.testing.assert_array_equal(sent[image.size], np.asarray(image))


def test_rejected_request_fails_alone(serve):
    found = answers_by_number(
        ServerBackend("m", serve().url, "x", concurrency=1), [ask("refuse"), ask("hello")]
    )
    assert found[0].text is None
    assert "too long" in found[0].error
    assert found[1].text == "hello: []"


def test_unreachable_server_stops_the_run(serve):
    server = serve()
    server.shutdown()
    server.server_close()
    backend = ServerBackend("m", server.url, "x", retries=0)
    with pytest.raises(SoloError, match="no answer from http"):
        answers_by_number(backend, [ask("hello")])


def test_missing_key_error_names_the_variable(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(SoloError, match="OPENAI_API_KEY"):
        ServerBackend("m")
