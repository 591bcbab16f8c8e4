"""Request bodies are checked while they arrive: bytes, values, and the shared memory."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solo_vlm.serve.body import SMALL_BODY, BodyMemory, ValueCounter
from solo_vlm.serve.limits import Limits
from solo_vlm.serve.protocol import ApiError

from .conftest import question, served
from .hostile import costly_bodies, exchange, http

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text() | st.text('\\"[{,:}]', max_size=20)
VALUES = st.recursive(
    SCALARS | TEXTS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=30
)


def count(value) -> int:
    """Count the list's elements, the object's members, and the lists and objects themselves."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    commas = max(len(children) - 1, 0)
    return isinstance(value, list | dict) + commas + sum(map(count, children))


@given(VALUES, st.booleans(), st.integers(1, 20))
def test_value_count_is_independent_of_strings_and_chunks(value, ascii_only, size):
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    for maximum in (expected := count(value), expected - 1):
        counter, is_rejected = ValueCounter(maximum), False
        try:
            for start in range(0, len(text), size):
                counter.feed(text[start : start + size])
        except ApiError as error:
            is_rejected = error.code == "too_many_values"
        assert is_rejected == (maximum < expected)


@pytest.mark.parametrize("name", costly_bodies(2**19))
def test_costly_body_is_rejected(server, name):
    status, _, answer = server.post(costly_bodies(2**19)[name]())
    error = json.loads(answer)["error"]
    assert 400 <= status < 500 and error.keys() == {"message", "type", "param", "code"}, error
    assert len(answer) < 1500


def test_too_many_values_are_rejected_before_the_body_is_complete(server):
    start = b'{"messages": [{"role": "user", "content": [' + b"{}," * Limits.max_values
    status, answer = exchange(server.port, http(start, length=str(Limits.max_request_bytes)))
    assert status == 400 and json.loads(answer)["error"]["code"] == "too_many_values"


def test_commas_and_brackets_in_strings_are_not_counted(server):
    assert server.ask(question('[{,"' * 100, max_tokens=1))[0] == 200
    assert server.ask(question("," * Limits.max_values, max_tokens=1))[1]["error"]["code"] == (
        "context_length_exceeded"
    )


def test_memory_is_shared_and_released():
    memory = BodyMemory(10)
    memory.take(10)
    with pytest.raises(ApiError) as error:
        memory.take(1)
    assert error.value.status == 429 and error.value.headers == {"Retry-After": "1"}
    memory.give_back(10)
    memory.take(10)


def test_only_large_bodies_take_shared_memory(solo):
    limits = Limits(max_pending_bytes=1, max_request_bytes=3 * SMALL_BODY, max_body_seconds=60)
    large = json.dumps(question("x", max_tokens=1, user="x" * (limits.max_request_bytes - 200))).encode()
    with served(solo, limits) as server:
        for _ in range(20):  # if the second request comes first, it takes the memory, and the first gets 429
            waiting = server.connect(http(large)[:-1])
            if any(server.ask(json.loads(large))[0] == 429 for _ in range(20)):
                break
            waiting.close()
        assert server.ask(question("x", max_tokens=1))[0] == 200
        waiting.sendall(large[-1:])
        assert b"200 OK" in waiting.recv(100)
        waiting.close()
        assert [server.ask(json.loads(large))[0] for _ in range(3)] == [200] * 3
