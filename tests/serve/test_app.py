"""OpenAI's chat API through its official client, the page's endpoints, limits and disconnects."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from urllib.parse import quote

import numpy as np
import pytest
from openai import APIError, AuthenticationError, NotFoundError, OpenAI
from PIL import Image
from tests.factories import ask, make_solo

from solo_vlm.generate import GenerationPipeline, PrefixCache
from solo_vlm.serve import engine as engine_module
from solo_vlm.serve.images import ImageReader
from solo_vlm.serve.limits import Limits

from .conftest import data_url, question, served, wait_until

TOKENS = 12


@pytest.fixture
def client(server):
    return OpenAI(base_url=server.url, api_key="none", max_retries=0)


def expected(solo, chat) -> str:
    return GenerationPipeline(solo.model, solo.processor).answer([chat], TOKENS)[0]


def test_answer_equals_the_models_own(client, solo, picture):
    image = picture(96, 64)
    parts = question("what is this?", image)["messages"]
    reply = client.chat.completions.create(model="tiny", messages=parts, max_tokens=TOKENS)
    assert reply.choices[0].message.content == expected(solo, ask("what is this?", image))
    assert reply.choices[0].message.role == "assistant"
    inputs = GenerationPipeline(solo.model, solo.processor).encode([ask("what is this?", image)])
    assert reply.usage.prompt_tokens == inputs["input_ids"].shape[1]
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_chat_with_several_turns_and_images(client, solo, picture):
    one, two = picture(64, 64, seed=1), picture(32, 96, seed=2)
    messages = [
        {"role": "developer", "content": "be brief"},
        *question("a red circle", one)["messages"],
        {"role": "assistant", "content": "seven"},
        *question("and this?", two)["messages"],
    ]
    chat = [
        {"role": "system", "content": "be brief"},
        *ask("a red circle", one),
        {"role": "assistant", "content": "seven"},
        *ask("and this?", two),
    ]
    reply = client.chat.completions.create(model="tiny", messages=messages, max_tokens=TOKENS)
    assert reply.choices[0].message.content == expected(solo, chat)


def test_stream_is_the_answer_in_pieces_with_usage_at_its_end(client):
    messages = [{"role": "user", "content": "what is this?"}]
    whole = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=TOKENS)
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=messages,
            max_completion_tokens=TOKENS,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *pieces, end, usage = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == whole.choices[0].message.content
    )
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * len(pieces)
    assert end.choices[0].finish_reason == whole.choices[0].finish_reason
    assert usage.choices == [] and usage.usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_batched_answers_equal_those_given_alone(server, solo, picture):
    images = [picture(32 * n, 64, seed=n) for n in range(1, 5)]
    chats = [("hello " * n, images[:n] if n % 2 else []) for n in range(1, 5)]
    bodies = [question(text, *own, max_tokens=TOKENS) for text, own in chats] * 4
    with ThreadPoolExecutor(len(bodies)) as clients:
        replies = list(clients.map(server.ask, bodies))
    answers = [reply["choices"][0]["message"]["content"] for _, reply in replies]
    assert answers == [expected(solo, ask(text, *own)) for text, own in chats] * 4


def test_seed_reproduces_a_sample(server):
    def sample(seed: int) -> str:
        body = question("hello", max_tokens=TOKENS, temperature=1.5, top_p=0.95, seed=seed)
        return server.ask(body)[1]["choices"][0]["message"]["content"]

    assert sample(1) == sample(1) != sample(2)


def test_stop_string_ends_the_answer_and_is_excluded(server):
    whole = server.ask(question("hello", max_tokens=TOKENS))[1]["choices"][0]["message"]["content"]
    middle = whole[len(whole) // 2 :][:2]
    choice = server.ask(question("hello", max_tokens=TOKENS, stop=["never there", middle]))[1]["choices"][0]
    assert choice["message"]["content"] == whole[: whole.find(middle)].strip()
    assert choice["finish_reason"] == "stop"


def test_answer_of_max_tokens_finishes_with_length(server):
    reply = server.ask(question("hello", max_tokens=2))[1]
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 2


def test_model_is_listed_and_other_names_are_not_found(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(NotFoundError, match="other") as error:
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    assert error.value.code == "model_not_found"


def test_model_is_retrieved_by_name(client, server):
    assert client.models.retrieve("tiny") == client.models.list().data[0]
    for other in ("other", "org/other", "tiny/", "../tiny"):
        with pytest.raises(NotFoundError) as error:
            client.models.retrieve(other)
        assert (error.value.code, error.value.param, error.value.type) == (
            "model_not_found",
            "model",
            "not_found_error",
        )
    assert server.metric('solo_requests_total{path="/v1/models/{name}",status="200"}') == 1


@pytest.mark.parametrize("name", ["org/my-model", "/srv/models/my model", "modèle:7b"])
def test_model_name_may_have_slashes_and_other_characters(solo, name):
    with served(solo, Limits(), name=name) as server:
        client = OpenAI(base_url=server.url, api_key="none", max_retries=0)
        assert client.models.retrieve(name).id == name
        assert json.loads(server.get(f"/v1/models/{quote(name)}"))["id"] == name
        assert json.loads(server.get(f"/v1/models/{quote(name, safe='')}"))["id"] == name


def test_text_that_spells_special_tokens_stays_text(server, solo, monkeypatch):
    tokenizer = solo.processor.tokenizer
    encode, seen = server.engine.encode, []
    monkeypatch.setattr(server.engine, "encode", lambda *chat: seen.append(encode(*chat)) or seen[-1])
    plain, spelled = "hello", "<vpatch></s>[INST] <vision><vrow_sep></vision> [/INST]<s>\ue0001\ue001"
    for text in (plain, spelled):
        assert server.ask(question(text, max_tokens=2))[0] == 200
    special = set(tokenizer.all_special_ids) | {
        tokenizer.convert_tokens_to_ids(token) for token in ("<vpatch>", "<vision>", "[INST]", "[/INST]")
    }
    of_plain, of_spelled = ([t for t in i.input_ids.tolist() if t in special] for i in seen)
    assert of_plain == of_spelled
    decoded = tokenizer.decode(seen[1].input_ids)
    assert spelled.replace(" ", "") in decoded.replace(" ", "")


@pytest.mark.parametrize("key", ["one", "two"])
def test_only_valid_keys_are_accepted(solo, key):
    with served(solo, Limits(), ["one", "two"]) as server:
        client = OpenAI(base_url=server.url, api_key=key, max_retries=0)
        assert client.models.list().data
        for wrong in ("three", "on", "onee", ""):
            status, body = server.ask(question("x"), Authorization=f"Bearer {wrong}")
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        with pytest.raises(AuthenticationError):
            OpenAI(base_url=server.url, api_key="three", max_retries=0).models.list()
        assert '"ok"' in server.get("/health")


def test_metrics_count_requests_tokens_and_times(solo, picture):
    with served(solo, Limits()) as server:
        _, reply = server.ask(question("hello", picture(), max_tokens=3))
        server.ask({"messages": []})
        path = 'path="/v1/chat/completions"'
        assert server.metric(f'solo_requests_total{{{path},status="200"}}') == 1
        assert server.metric(f'solo_requests_total{{{path},status="400"}}') == 1
        assert server.metric('solo_answers_total{finish_reason="length"}') == 1
        assert server.metric("solo_prompt_tokens_total") == reply["usage"]["prompt_tokens"]
        assert server.metric("solo_answer_tokens_total") == 3
        assert server.metric("solo_images_total") == 1
        assert server.metric("solo_first_text_seconds_count") == 1
        assert 0 < server.metric("solo_first_text_seconds_sum") <= server.metric("solo_answer_seconds_sum")
        assert server.metric("solo_running") == server.metric("solo_waiting") == 0


def test_unsupported_parameter_is_an_error_in_openais_format(client, picture):
    with pytest.raises(APIError, match="'tools' is not supported") as error:
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    assert error.value.code == "unsupported_parameter" and error.value.param == "tools"


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_new_tokens", 1), ("num_beams", 4), ("stop_sequences", ["a"]), ("eos_token_id", 3)],
)
def test_unknown_fields_are_rejected(server, field, value):
    status, reply = server.ask({"messages": [{"role": "user", "content": "x"}], field: value})
    assert status == 400
    assert (reply["error"]["code"], reply["error"]["param"]) == ("unsupported_parameter", field)
    assert (
        server.ask({"messages": [{"role": "user", "content": "x"}], field: None, "max_tokens": 1})[0] == 200
    )


def test_harmless_fields_are_ignored(server, picture):
    part = {"type": "image_url", "image_url": {"url": data_url(picture()), "detail": "high"}}
    message = {"role": "user", "name": "me", "content": [part, {"type": "text", "text": "hi"}]}
    body = {
        "messages": [message],
        "max_tokens": 2,
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "n": 1,
        "logprobs": False,
        "tools": [],
    }
    assert server.ask({**body, "response_format": {"type": "text"}, "frequency_penalty": 0.0})[0] == 200


NULLS = (
    *("tools", "tool_choice", "functions", "function_call", "parallel_tool_calls", "response_format"),
    *("stop", "stream", "stream_options", "seed", "temperature", "top_p", "n", "logprobs", "top_logprobs"),
    *("logit_bias", "max_tokens", "frequency_penalty", "presence_penalty", "audio", "modalities", "metadata"),
    *("prediction", "reasoning_effort", "service_tier", "store", "user", "web_search_options", "verbosity"),
)


def test_null_fields_and_empty_lists_count_as_absent(client, server, picture):
    """Clients send messages back unchanged: `message.model_dump()` has all of these fields."""
    image = {"type": "image_url", "image_url": {"url": data_url(picture()), "detail": None}}
    user = {"role": "user", "content": [image, {"type": "text", "text": "hi"}]}
    plain = [user, {"role": "assistant", "content": "seven"}, {"role": "user", "content": "and now?"}]
    nothing = {
        "name": None,
        "refusal": None,
        "audio": None,
        "annotations": [],
        "function_call": None,
        "tool_calls": None,
        "tool_call_id": None,
        "reasoning_content": None,
    }
    expected = server.ask({"messages": plain, "max_completion_tokens": TOKENS})[1]["choices"]
    for tool_calls in (None, []):
        messages = [{**nothing, **message, "tool_calls": tool_calls} for message in plain]
        status, reply = server.ask(
            {"messages": messages, "max_completion_tokens": TOKENS, **dict.fromkeys(NULLS)}
        )
        assert (status, reply.get("choices")) == (200, expected)
    first = client.chat.completions.create(model="tiny", messages=[user], max_tokens=2)
    again = [user, first.choices[0].message.model_dump(), {"role": "user", "content": "and now?"}]
    again[1]["content"] = again[1]["content"] or "seven"
    assert client.chat.completions.create(model="tiny", messages=again, max_tokens=2, stop=None).choices
    for options in ({"include_usage": None}, {"include_usage": None, "include_obfuscation": None}):
        stream = client.chat.completions.create(
            model="tiny", messages=plain, max_tokens=2, stream=True, stream_options=options
        )
        assert all(chunk.choices for chunk in stream)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": None},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant", "content": "x", "tool_calls": [{"id": "1", "type": "function"}]},
        {"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "assistant", "content": "x", "audio": {"id": "1"}},
        {"role": "assistant", "content": "x", "refusal": "I will not"},
    ],
)
def test_unsupported_message_content_is_rejected(server, message):
    status, reply = server.ask({"messages": [message, {"role": "user", "content": "hi"}]})
    assert status == 400
    assert reply["error"]["param"].startswith("messages.0.")


@pytest.mark.parametrize(
    "option",
    [
        {"bad_words": ["x"]},
        {"allowed_token_ids": [1]},
        {"include_stop_str_in_output": True},
        {"truncate_prompt_tokens": 5},
        {"prompt_logprobs": 1},
        {"length_penalty": 2.0},
    ],
)
def test_vllm_parameters_that_change_the_answer_are_rejected(server, option):
    status, reply = server.ask(question("hi", max_tokens=1, **option))
    assert (status, reply["error"]["code"]) == (400, "unsupported_parameter")


# -------------------------------------------------------------------------------- limits and disconnects

LONG = question("hello", max_tokens=400)


@pytest.fixture
def closed_gate(monkeypatch):
    """No batch is generated before this event is set."""
    answer, gate = engine_module.generate_batch, threading.Event()

    def when_open(*arguments):
        gate.wait(200)
        answer(*arguments)

    monkeypatch.setattr(engine_module, "generate_batch", when_open)
    yield gate
    gate.set()


def send(server, body) -> socket.socket:
    """Send a request; the caller reads the response or disconnects."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    text = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + text)
    return connection


def test_requests_beyond_max_concurrent_get_429(solo, closed_gate, picture):
    with served(solo, Limits(max_concurrent=3)) as server, ThreadPoolExecutor(3) as clients:
        answers = [clients.submit(server.ask, question("hello", max_tokens=2)) for _ in range(3)]
        wait_until(lambda: server.engine.running + server.engine.waiting == 3)
        assert server.metric("solo_running") + server.metric("solo_waiting") == 3
        # Even a client with a large body can read the response.
        status, headers, body = server.post(json.dumps(question("hello", picture(1000, 1000))).encode())
        assert status == 429 and int(headers["Retry-After"]) >= 1
        assert json.loads(body)["error"]["code"] == "too_many_requests"
        closed_gate.set()
        assert [answer.result()[0] for answer in answers] == [200] * 3
        assert server.ask(question("hello", max_tokens=2))[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_frees_the_slot_and_the_model(solo, slow_model, stream):
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


def test_disconnected_request_in_the_queue_is_never_generated(solo, closed_gate, slow_model):
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


def test_disconnects_during_image_decoding_do_not_pile_up_work(solo, monkeypatch, picture):
    read, gate, begun = ImageReader.read, threading.Event(), []

    def when_open(*arguments):
        begun.append(None)
        gate.wait(200)
        return read(*arguments)

    monkeypatch.setattr(ImageReader, "read", when_open)
    left = 'solo_requests_total{path="/v1/chat/completions",status="499"}'
    with served(solo, Limits(max_concurrent=19)) as server:
        for wave in (1, 2, 3):
            connections = [send(server, question("hello", picture())) for _ in range(19)]
            wait_until(lambda: len(begun) >= 8)
            time.sleep(0.2)  # time in which more could start
            for connection in connections:
                connection.close()
            wait_until(lambda: server.metric(left) == 19 * wave)  # noqa: B023 - used within the loop
        assert len(begun) == 8
        gate.set()
        assert server.ask(question("hello", max_tokens=2))[0] == 200


def test_text_does_not_wait_for_images(solo, monkeypatch, picture):
    gate, begun = threading.Event(), []
    monkeypatch.setattr(ImageReader, "read", lambda *_: begun.append(None) or gate.wait(200))
    with served(solo, Limits()) as server, ThreadPoolExecutor(12) as clients:
        waiting = [clients.submit(server.ask, question("x", picture())) for _ in range(12)]
        wait_until(lambda: len(begun) == 8)
        assert server.ask(question("hello", max_tokens=2))[0] == 200
        assert not any(answer.done() for answer in waiting)
        gate.set()


def test_slow_request_times_out(solo, slow_model):
    with served(solo, Limits(max_seconds=0.5)) as server:
        status, body = server.ask(LONG)
        assert status == 504 and body["error"]["code"] == "timeout" and "0.5 s" in body["error"]["message"]
        wait_until(lambda: not server.engine.running)


def test_slow_stream_ends_with_an_error(solo, slow_model):
    with served(solo, Limits(max_seconds=4.0)) as server:  # of at least eight that it would take
        client = OpenAI(base_url=server.url, api_key="none", max_retries=0)
        stream = client.chat.completions.create(model="tiny", **LONG, stream=True)
        with pytest.raises(APIError, match="4 s"):
            for _ in stream:
                pass
        wait_until(lambda: not server.engine.running)


def test_server_survives_a_failure_of_the_model(solo, monkeypatch):
    with served(solo, Limits()) as server:
        with monkeypatch.context() as broken:
            broken.setattr(solo.model.model, "forward", lambda **_: 1 / 0)
            status, body = server.ask(question("hello"))
        assert status == 500 and "ZeroDivision" not in body["error"]["message"]
        assert server.ask(question("hello", max_tokens=2))[0] == 200


def test_batches_keep_within_their_limits(solo, monkeypatch, closed_gate):
    sizes = []
    gated = engine_module.generate_batch
    monkeypatch.setattr(
        engine_module,
        "generate_batch",
        lambda pipeline, tokenizer, batch: (sizes.append(len(batch)), gated(pipeline, tokenizer, batch)),
    )
    with served(solo, Limits(max_batch=3, max_batch_tokens=100)) as server, ThreadPoolExecutor(9) as clients:
        first = clients.submit(server.ask, question("hello", max_tokens=2))
        wait_until(lambda: server.engine.running == 1)
        for number, tokens in enumerate([2, 2, 2, 2, 2, 60, 60, 2], start=1):
            clients.submit(server.ask, question("hello", max_tokens=tokens))
            wait_until(lambda: server.engine.waiting == number)  # noqa: B023 - used within the loop
        closed_gate.set()
        assert first.result()[0] == 200
    # Three at most; two of 60 tokens plus prompt exceed 100 together; the last keeps its place.
    assert sizes == [1, 3, 2, 1, 1, 1]


# ------------------------------------------------------------------------------------------ the page


def attend(server, messages, start, end, layer=None):
    """Request the attention of a word; return status and body."""
    return server.ask({"messages": messages, "start": start, "end": end, "layer": layer}, "/api/attention")


def answered(text, *images, answer="a red circle"):
    return [*question(text, *images)["messages"], {"role": "assistant", "content": answer}]


def test_image_is_described_as_the_model_sees_it(server, picture):
    status, seen = server.ask({"image_url": {"url": data_url(picture(90, 50))}}, "/api/image")
    assert status == 200 and seen["original"] == [90, 50]
    assert [seen[name] for name in ("rows", "columns", "patches", "tokens")] == [2, 3, 6, 9]


def test_shown_image_is_encoded_once(solo, picture, monkeypatch):
    """Its description, several answers and the attention of their words share one encoding."""
    processor, encoded = type(solo.processor.image_processor), []
    encode = processor.encode_pixels
    monkeypatch.setattr(processor, "encode_pixels", lambda *a: encoded.append(None) or encode(*a))
    with served(solo, Limits()) as server:
        body = question("what is this?", picture(), max_tokens=2)
        assert (
            server.ask({"image_url": body["messages"][0]["content"][0]["image_url"]}, "/api/image")[0] == 200
        )
        assert [server.ask(body)[0] for _ in range(2)] == [200, 200]
        assert attend(server, answered("what is this?", picture()), 0, 1)[0] == 200
    assert len(encoded) == 1


def test_attention_of_a_word_is_divided_among_images_and_text(server, picture):
    messages = answered("what is this?", *(picture(96, 64, seed) for seed in range(2)))
    status, maps = attend(server, messages, 2, 5)
    assert status == 200
    assert [(i["rows"], i["columns"], len(i["weights"])) for i in maps["images"]] == [(2, 3, 6)] * 2
    for image in maps["images"]:
        assert image["share"] == pytest.approx(sum(image["weights"]))
        assert min(image["weights"]) >= 0
    assert sum(image["share"] for image in maps["images"]) + maps["text_share"] == pytest.approx(1)
    assert 0 < maps["text_share"] < 1

    layers = [attend(server, messages, 2, 5, layer)[1] for layer in range(2)]
    means = np.mean([layer["images"][1]["weights"] for layer in layers], axis=0)
    np.testing.assert_allclose(maps["images"][1]["weights"], means, atol=1e-6)
    assert attend(server, messages, 6, 12)[1]["images"][0]["weights"] != maps["images"][0]["weights"]


def test_attention_of_other_layers_is_rejected(picture):
    with served(make_solo("qwen3_5_text"), Limits()) as server:
        status, reply = attend(server, answered("what is this?", picture()), 0, 1)
    assert status == 400
    assert "qwen3_5_text has layers other than attention" in reply["error"]["message"]


def test_attention_runs_between_batches(solo, slow_model, picture):
    """An attention request waits for the running batch, and later requests wait for it."""
    expected = {}
    with served(solo, Limits()) as server, ThreadPoolExecutor(4) as clients:
        bodies = [question("hello", max_tokens=30), question("and", picture(), max_tokens=4)]
        expected = [server.ask(body)[1]["choices"] for body in bodies]
        alone = attend(server, answered("what is this?", picture()), 0, 5)[1]
        first = clients.submit(server.ask, bodies[0])
        wait_until(lambda: server.engine.running == 1)
        other = clients.submit(attend, server, answered("what is this?", picture()), 0, 5)
        wait_until(lambda: server.engine.waiting == 1)
        last = clients.submit(server.ask, bodies[1])
        assert [first.result()[1]["choices"], last.result()[1]["choices"]] == expected
        assert other.result() == (200, alone)


@pytest.mark.parametrize(
    ("messages", "span", "param", "message"),
    [
        (answered("x"), (3, 3), "start", "not in the answer"),
        (answered("x"), (3, 99), "start", "not in the answer"),
        (answered("x"), (0, 1, 2), "layer", "layers 0 to 1"),
        (answered("x"), (0, 1, -1), "layer", "greater than or equal to 0"),
        (answered("x", answer=" red"), (0, 1), "messages", "white space"),
        (answered("x", answer=" "), (0, 1), "messages", "white space"),
        (answered("x")[:1], (0, 1), "messages", "must have the role 'assistant'"),
        (answered("x")[1:], (0, 1), "messages", "must have the role 'assistant'"),
        (answered("x") + answered("x")[1:], (0, 1), "messages", "must have the role 'assistant'"),
        (answered("x " * 600), (0, 1), "messages", "maximum context length is 512 tokens"),
    ],
)
def test_invalid_attention_request_is_rejected(server, messages, span, param, message):
    status, body = attend(server, messages, *span)
    assert (status, body["error"]["param"]) == (400, param)
    assert message in body["error"]["message"]


def test_attention_of_an_answer_over_max_tokens_is_rejected(solo):
    with served(solo, Limits(max_tokens=5)) as server:
        assert attend(server, answered("x", answer="a"), 0, 1)[0] == 200
        status, body = attend(server, answered("x", answer="hello " * 50 + "world"), 0, 1)
        assert status == 400 and "at most 5 tokens" in body["error"]["message"]


@pytest.mark.parametrize("path", ["/api/image", "/api/attention"])
def test_page_endpoints_reject_unknown_fields_and_count_as_requests(solo, path):
    with served(solo, Limits(max_concurrent=1)) as server:
        for body in ({}, {"model": "tiny"}, {"image_url": {"url": "x"}, "messages": [], "n": 1}):
            status, reply = server.ask(body, path)
            assert status == 400 and reply["error"].keys() == {"message", "type", "param", "code"}
        assert server.metric(f'solo_requests_total{{path="{path}",status="400"}}') == 3


def test_page_endpoints_share_slots_and_keys_with_the_api(solo, closed_gate, picture):
    key = {"Authorization": "Bearer one"}
    body = {"image_url": {"url": data_url(picture())}}
    with served(solo, Limits(max_concurrent=1), ["one"]) as server, ThreadPoolExecutor(1) as clients:
        assert server.ask(body, "/api/image")[0] == 401
        assert server.ask(body, "/api/image", **key)[0] == 200
        answer = clients.submit(lambda: server.ask(question("hello", max_tokens=2), **key))
        wait_until(lambda: server.engine.running == 1)
        assert server.ask(body, "/api/image", **key)[0] == 429
        closed_gate.set()
        assert answer.result()[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://behind.a.proxy"}, 200),
        ({"Origin": "http://{host}"}, 200),
        ({"Origin": "http://other.site"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_cross_site_requests_are_rejected(server, picture, headers, status):
    headers = {name: value.format(host=f"127.0.0.1:{server.port}") for name, value in headers.items()}
    assert server.ask(question("x", max_tokens=1), **headers)[0] == status
    assert server.ask({"image_url": {"url": data_url(picture())}}, "/api/image", **headers)[0] == status
    assert server.fetch("/v1/models", **headers)[0] == status
    assert server.fetch("/", **headers)[0] == 200  # a link to the page works


def test_page_is_complete_and_loads_nothing_from_elsewhere(server):
    status, headers, page = server.fetch("/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    folder = files("solo_vlm.serve.page").joinpath("static")
    sources = {path.name: path.read_text() for path in folder.iterdir()}
    for name in sources:
        status, headers, text = server.fetch(f"/page/{name}")
        assert (status, text) == (200, sources[name])
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"
    for text in sources.values():
        assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"// .*", "", text))
    assert set(re.findall(r'(?:href|src)="/page/([^"]+)"', page)) <= set(sources)
    ids = set(re.findall(r'id="([\w-]+)"', page))
    scripts = "".join(text for name, text in sources.items() if name.endswith(".js"))
    assert set(re.findall(r'(?:\$|getElementById)\("([\w-]+)"\)', scripts)) <= ids
    for other in ("attention.py", "..%2f__init__.py", "%2e%2e", ""):
        assert server.fetch(f"/page/{other}")[0] == 404


def test_model_entry_has_size_and_limits_for_the_page(server, solo):
    card = json.loads(server.get("/v1/models"))["data"][0]
    assert (card["layers"], card["max_model_len"]) == (2, 512)
    assert card["parameters"] == sum(weights.numel() for weights in solo.model.parameters())
    assert card["limits"]["max_image_bytes"] == Limits().max_image_bytes


def test_usage_includes_cached_prompt_tokens():
    """A follow-up question about the same image reuses its prefix."""
    with served(make_solo(), Limits(), prefix_cache=PrefixCache()) as server:
        image = Image.new("RGB", (96, 64), "red")
        usages = [server.ask(question(text, image, max_tokens=2))[1]["usage"] for text in ("what", "where")]
        cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
        assert cached[0] == 0 and 9 < cached[1] < usages[1]["prompt_tokens"]
        body = question("which", image, max_tokens=2, stream=True, stream_options={"include_usage": True})
        *_, last, _ = server.post(json.dumps(body).encode())[2].decode().split("\n\n")[:-1]
        assert json.loads(last.removeprefix("data: "))["usage"]["prompt_tokens_details"]["cached_tokens"] > 9
