"""Too many, too slow, gone away: each ends as it should, and makes room for the next."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import APIError, OpenAI

from solo_vlm.serve import chat
from solo_vlm.serve import engine as engine_module
from solo_vlm.serve.limits import Limits

from .conftest import question, served, wait_until

LONG = question("hello", max_tokens=400)


@pytest.fixture
def closed_gate(monkeypatch):
    """Nothing is answered before this event is set."""
    answer, gate = engine_module.answer_together, threading.Event()

    def when_open(*arguments):
        gate.wait(200)
        answer(*arguments)

    monkeypatch.setattr(engine_module, "answer_together", when_open)
    yield gate
    gate.set()


def send(server, body) -> socket.socket:
    """Ask, and leave the answer to the caller."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    text = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + text)
    return connection


def test_more_than_the_house_holds_are_sent_away_until_there_is_room(solo, closed_gate, picture):
    with served(solo, Limits(max_concurrent=3)) as server, ThreadPoolExecutor(3) as clients:
        answers = [clients.submit(server.ask, question("hello", max_tokens=2)) for _ in range(3)]
        wait_until(lambda: server.engine.running + server.engine.waiting == 3)
        assert server.metric("solo_running") + server.metric("solo_waiting") == 3
        # However much such a client has to send, it gets to read the answer.
        status, headers, body = server.post(json.dumps(question("hello", picture(1000, 1000))).encode())
        assert status == 429 and int(headers["Retry-After"]) >= 1
        assert json.loads(body)["error"]["code"] == "too_many_requests"
        closed_gate.set()
        assert [answer.result()[0] for answer in answers] == [200] * 3
        assert server.ask(question("hello", max_tokens=2))[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot_and_the_model(solo, slow_model, stream):
    with served(solo, Limits(max_concurrent=1)) as server:
        connection = send(server, {**LONG, "stream": stream})
        if stream:
            assert b"200 OK" in connection.recv(100)
        wait_until(lambda: len(slow_model) > 2)
        assert server.ask(LONG)[0] == 429
        connection.close()
        wait_until(lambda: not server.engine.running)
        assert len(slow_model) < 300  # of the 400 that the answer would have taken
        assert server.ask(question("hello", max_tokens=2))[0] == 200


def test_a_client_that_leaves_the_queue_is_never_answered(solo, closed_gate, slow_model):
    with served(solo, Limits()) as server:
        first = send(server, question("hello", max_tokens=2))
        wait_until(lambda: server.engine.running == 1)
        second = send(server, LONG)
        wait_until(lambda: server.engine.waiting == 1)
        second.close()
        wait_until(lambda: server.engine.waiting == 0)
        closed_gate.set()
        assert b"200 OK" in first.recv(100)
        assert len(slow_model) <= 3


def test_clients_that_leave_while_their_images_are_decoded_do_not_pile_up_work(solo, monkeypatch, picture):
    decode, gate, begun = chat.decode_images, threading.Event(), []

    def when_open(*arguments):
        begun.append(None)
        gate.wait(200)
        return decode(*arguments)

    monkeypatch.setattr(chat, "decode_images", when_open)
    left = 'solo_requests_total{path="/v1/chat/completions",status="499"}'
    with served(solo, Limits(max_concurrent=9)) as server:
        for wave in (1, 2, 3):
            connections = [send(server, question("hello", picture())) for _ in range(9)]
            wait_until(lambda: len(begun) >= 4)
            time.sleep(0.2)  # for more to begin, if they could
            for connection in connections:
                connection.close()
            wait_until(lambda: server.metric(left) == 9 * wave)  # noqa: B023 - used within the loop
        assert len(begun) == 4
        gate.set()
        assert server.ask(question("hello", max_tokens=2))[0] == 200


def test_a_request_that_takes_too_long_ends(solo, slow_model):
    with served(solo, Limits(max_seconds=0.5)) as server:
        status, body = server.ask(LONG)
        assert status == 504 and body["error"]["code"] == "timeout" and "0.5 s" in body["error"]["message"]
        wait_until(lambda: not server.engine.running)


def test_a_stream_that_takes_too_long_ends_with_an_error(solo, slow_model):
    with served(solo, Limits(max_seconds=4.0)) as server:  # of the eight or more that it would take
        client = OpenAI(base_url=server.url, api_key="none", max_retries=0)
        stream = client.chat.completions.create(model="tiny", **LONG, stream=True)
        with pytest.raises(APIError, match="4 s"):
            for _ in stream:
                pass
        wait_until(lambda: not server.engine.running)


def test_a_failure_of_the_model_is_an_error_and_not_the_end(solo, monkeypatch):
    with served(solo, Limits()) as server:
        with monkeypatch.context() as broken:
            broken.setattr(solo.model.model, "forward", lambda **_: 1 / 0)
            status, body = server.ask(question("hello"))
        assert status == 500 and "ZeroDivision" not in body["error"]["message"]
        assert server.ask(question("hello", max_tokens=2))[0] == 200


def test_batches_keep_within_their_limits(solo, monkeypatch, closed_gate):
    sizes = []
    gated = engine_module.answer_together
    monkeypatch.setattr(
        engine_module,
        "answer_together",
        lambda pipeline, tokenizer, jobs: (sizes.append(len(jobs)), gated(pipeline, tokenizer, jobs)),
    )
    with served(solo, Limits(max_batch=3, max_batch_tokens=100)) as server, ThreadPoolExecutor(9) as clients:
        first = clients.submit(server.ask, question("hello", max_tokens=2))
        wait_until(lambda: server.engine.running == 1)
        for number, tokens in enumerate([2, 2, 2, 2, 2, 60, 60, 2], start=1):
            clients.submit(server.ask, question("hello", max_tokens=tokens))
            wait_until(lambda: server.engine.waiting == number)  # noqa: B023 - used within the loop
        closed_gate.set()
        assert first.result()[0] == 200
    # Three at most; two of 60 tokens and a prompt each exceed 100 together, and the last waits its turn.
    assert sizes == [1, 3, 2, 1, 1, 1]
