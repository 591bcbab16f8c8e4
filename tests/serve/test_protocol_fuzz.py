"""Any request body is answered or rejected with a message; the server never fails."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from . import hostile
from .conftest import data_url, wait_until

PATHS = ("/v1/chat/completions", "/api/attention", "/api/image")
NAMES = [
    "messages",
    "role",
    "content",
    "type",
    "text",
    "image_url",
    "url",
    "max_tokens",
    "stop",
    "stream",
    "end",
]
URLS = [url for url in {**hostile.OTHER_URLS, **hostile.PRIVATE_URLS}.values() if len(url) < 1000]
WORDS = [*NAMES, "user", "assistant", "system", "tiny", "", " ", "\ue000", "</s>", "<vision>", "{{ 7 * 7 }}"]
STRINGS = st.sampled_from(WORDS) | st.text(max_size=20)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.integers() | st.floats() | STRINGS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(STRINGS, inner, max_size=5),
    max_leaves=20,
)


def usually(strategy: st.SearchStrategy, otherwise: st.SearchStrategy = ANYTHING) -> st.SearchStrategy:
    return st.integers(0, 29).flatmap(lambda n: strategy if n else otherwise)


def record(required: dict[str, st.SearchStrategy], **optional: st.SearchStrategy) -> st.SearchStrategy:
    """Return a strategy for objects with given members, whose values are rarely of another kind."""
    return st.fixed_dictionaries(
        {name: usually(value) for name, value in required.items()},
        optional={name: usually(value) for name, value in optional.items()},
    )


URL = record({"url": usually(st.just(data_url(Image.new("RGB", (40, 30)))), st.sampled_from(URLS))})
TEXT = record({"type": st.just("text"), "text": STRINGS})
IMAGE = record({"type": st.just("image_url"), "image_url": URL})
SYSTEM = record({"role": st.sampled_from(["system", "developer"]), "content": STRINGS})
USER = record({"role": st.just("user"), "content": STRINGS | st.lists(TEXT | IMAGE, min_size=1, max_size=4)})
ASSISTANT = record({"role": st.just("assistant"), "content": st.just("a red x")}, tool_calls=st.just([]))
TURNS = st.lists(st.tuples(USER, ASSISTANT), max_size=2).map(
    lambda pairs: [turn for pair in pairs for turn in pair]
)
BODIES = {
    "/v1/chat/completions": record(
        {
            "messages": st.tuples(st.lists(SYSTEM, max_size=1), TURNS, USER).map(
                lambda x: [*x[0], *x[1], x[2]]
            ),
            "max_tokens": st.integers(1, 2),
        },
        temperature=st.floats(0, 2),
        top_p=st.floats(0.1, 1),
        seed=st.integers(0, 9),
        stop=st.just("x") | st.lists(st.just("yz"), max_size=4),
        stream=st.just(True),
        metadata=ANYTHING,
        n=st.just(1),
    ),
    "/api/attention": record(
        {
            "messages": st.tuples(TURNS, USER, ASSISTANT).map(lambda x: [*x[0], *x[1:]]),
            "start": st.integers(0, 3),
            "end": st.integers(4, 8),
        },
        layer=st.integers(0, 2),
    ),
    "/api/image": record({"image_url": URL}),
}
REQUESTS = st.sampled_from(PATHS).flatmap(lambda path: st.tuples(st.just(path), usually(BODIES[path])))
BYTES = st.sampled_from([text[:2000] for text in hostile.texts().values()]) | st.binary(max_size=50)


@st.composite
def encoded(draw) -> tuple[str, bytes]:
    """Draw a path and the bytes of a body, which are rarely damaged."""
    path, value = draw(REQUESTS)
    body = json.dumps(value, ensure_ascii=draw(st.booleans())).encode()
    if draw(st.integers(0, 4)) == 0:
        start, end = draw(st.integers(0, len(body))), draw(st.integers(0, len(body)))
        body = body[:start] + draw(BYTES) + body[end:]
    return path, body


def check(server, path: str, body: bytes) -> int:
    """Send a body, check the response and return its status."""
    status, headers, answer = server.post(body, path)
    if status != 200:
        assert 400 <= status < 500, answer
        error = json.loads(answer)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert 5 < len(error["message"]) < 500 and len(answer) < 3000
    elif headers["content-type"].startswith("text/event-stream"):
        assert answer.endswith(b"data: [DONE]\n\n"), answer
    else:
        assert json.loads(answer).keys() & {"choices", "patches", "images"}
    wait_until(lambda: not server.engine.running)
    return status


@pytest.mark.fuzz
@given(encoded())
def test_any_body_is_answered_or_rejected(server, request):
    check(server, *request)


@pytest.mark.fuzz
@given(st.lists(BYTES, max_size=3), st.sampled_from(PATHS))
def test_any_bytes_are_rejected(server, pieces, path):
    assert check(server, path, b"".join(pieces)) == 400


def test_fuzzed_bodies_reach_the_model(server):
    """Enough bodies pass validation for the fuzzing to be meaningful."""
    accepted = []

    @given(encoded())
    def collect(request):
        accepted.append(check(server, *request) == 200)

    collect()
    assert sum(accepted) > len(accepted) / 10
    for path in PATHS:
        assert server.metric(f'solo_requests_total{{path="{path}",status="200"}}')
