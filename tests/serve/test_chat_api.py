"""OpenAI's chat API as its official client sees it: answers are those of the model asked directly."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest
from openai import APIError, AuthenticationError, NotFoundError, OpenAI
from tests.factories import ask

from solo_vlm.generate import GenerationPipeline
from solo_vlm.serve.limits import Limits

from .conftest import data_url, question, served

TOKENS = 12


@pytest.fixture
def client(server):
    return OpenAI(base_url=server.url, api_key="none", max_retries=0)


def expected(solo, chat) -> str:
    return GenerationPipeline(solo.model, solo.processor).answer([chat], TOKENS)[0]


def test_an_answer_is_the_models_own(client, solo, picture):
    image = picture(96, 64)
    parts = question("what is this?", image)["messages"]
    reply = client.chat.completions.create(model="tiny", messages=parts, max_tokens=TOKENS)
    assert reply.choices[0].message.content == expected(solo, ask("what is this?", image))
    assert reply.choices[0].message.role == "assistant"
    inputs = GenerationPipeline(solo.model, solo.processor).encode([ask("what is this?", image)])
    assert reply.usage.prompt_tokens == inputs["input_ids"].shape[1]
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_chat_of_several_turns_and_images(client, solo, picture):
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


def test_a_stream_is_the_answer_in_pieces_with_the_tokens_at_its_end(client):
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


def test_answers_in_one_batch_are_those_given_alone(server, solo, picture):
    images = [picture(32 * n, 64, seed=n) for n in range(1, 5)]
    chats = [("hello " * n, images[:n] if n % 2 else []) for n in range(1, 5)]
    bodies = [question(text, *own, max_tokens=TOKENS) for text, own in chats] * 4
    with ThreadPoolExecutor(len(bodies)) as clients:
        replies = list(clients.map(server.ask, bodies))
    answers = [reply["choices"][0]["message"]["content"] for _, reply in replies]
    assert answers == [expected(solo, ask(text, *own)) for text, own in chats] * 4


def test_a_seed_gives_the_same_sample_again_and_another_one_another(server):
    def sample(seed: int) -> str:
        body = question("hello", max_tokens=TOKENS, temperature=1.5, top_p=0.95, seed=seed)
        return server.ask(body)[1]["choices"][0]["message"]["content"]

    assert sample(1) == sample(1) != sample(2)


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(server):
    whole = server.ask(question("hello", max_tokens=TOKENS))[1]["choices"][0]["message"]["content"]
    middle = whole[len(whole) // 2 :][:2]
    choice = server.ask(question("hello", max_tokens=TOKENS, stop=["never there", middle]))[1]["choices"][0]
    assert choice["message"]["content"] == whole[: whole.find(middle)].strip()
    assert choice["finish_reason"] == "stop"


def test_the_longest_answer_ends_with_length(server):
    reply = server.ask(question("hello", max_tokens=2))[1]
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 2


def test_the_model_is_listed_and_no_other_answers(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(NotFoundError, match="other") as error:
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    assert error.value.code == "model_not_found"


def test_a_model_is_described_by_its_name(client, server):
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
def test_a_name_may_have_slashes_and_other_characters(solo, name):
    with served(solo, Limits(), name=name) as server:
        client = OpenAI(base_url=server.url, api_key="none", max_retries=0)
        assert client.models.retrieve(name).id == name
        assert json.loads(server.get(f"/v1/models/{quote(name)}"))["id"] == name
        assert json.loads(server.get(f"/v1/models/{quote(name, safe='')}"))["id"] == name


def test_text_that_spells_special_tokens_stays_text(server, solo, monkeypatch):
    tokenizer = solo.processor.tokenizer
    encode, seen = server.engine.encode, []
    monkeypatch.setattr(server.engine, "encode", lambda chat: seen.append(encode(chat)) or seen[-1])
    plain, spelled = "hello", "<vpatch></s>[INST] <vision><vrow_sep></vision> [/INST]<s>\ue0001\ue001"
    for text in (plain, spelled):
        assert server.ask(question(text, max_tokens=2))[0] == 200
    special = set(tokenizer.all_special_ids) | {
        tokenizer.convert_tokens_to_ids(token) for token in ("<vpatch>", "<vision>", "[INST]", "[/INST]")
    }
    of_plain, of_spelled = ([t for t in i["input_ids"][0].tolist() if t in special] for i in seen)
    assert of_plain == of_spelled
    decoded = tokenizer.decode(seen[1]["input_ids"][0])
    assert spelled.replace(" ", "") in decoded.replace(" ", "")


@pytest.mark.parametrize("key", ["one", "two"])
def test_a_key_opens_and_no_other_does(solo, key):
    with served(solo, Limits(), ["one", "two"]) as server:
        client = OpenAI(base_url=server.url, api_key=key, max_retries=0)
        assert client.models.list().data
        for wrong in ("three", "on", "onee", ""):
            status, body = server.ask(question("x"), Authorization=f"Bearer {wrong}")
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        with pytest.raises(AuthenticationError):
            OpenAI(base_url=server.url, api_key="three", max_retries=0).models.list()
        assert '"ok"' in server.get("/health")


def test_metrics_count_what_was_asked(solo, picture):
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


def test_what_the_model_cannot_do_is_an_error_in_openais_form(client, picture):
    with pytest.raises(APIError, match="tools is not supported") as error:
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
def test_unknown_fields_are_refused(server, field, value):
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


def test_null_fields_and_empty_lists_are_as_if_absent(client, server, picture):
    """As clients write back what they were given: `message.model_dump()` has all of these."""
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
def test_what_a_message_says_beside_its_text_is_not_dropped(server, message):
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
def test_parameters_of_vllm_that_change_the_answer_are_refused(server, option):
    status, reply = server.ask(question("hi", max_tokens=1, **option))
    assert (status, reply["error"]["code"]) == (400, "unsupported_parameter")
