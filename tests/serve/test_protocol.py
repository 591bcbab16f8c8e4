"""Validation stops at its first error and quotes little of a request."""

from __future__ import annotations

import json

import pytest

from solo_vlm.serve.limits import Limits
from solo_vlm.serve.protocol import ApiError, ImageRequest, parse_attention, parse_body, parse_chat_completion

USER = {"role": "user", "content": "x"}


def error_of(body: object, parse=parse_chat_completion) -> ApiError:
    with pytest.raises(ApiError) as error:
        parse(json.dumps(body).encode(), Limits())
    assert error.value.status == 400
    return error.value


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": [{}] * 3000}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}] * 3000}]},
        {"messages": [None] * 200},
        {"messages": [USER], "stop": [1] * 9000},
        {"messages": [{**USER, "tool_calls": [{}] * 9000}, USER]},
    ],
)
def test_validation_stops_at_the_first_error(body):
    assert error_of(body).__cause__.error_count() == 1


@pytest.mark.parametrize("parse", [parse_chat_completion, parse_attention])
def test_unknown_fields_are_rejected_before_validation(parse):
    error = error_of({"messages": [None], **{f"x{n}": 1 for n in range(5000)}}, parse)
    assert (error.param, error.code, error.__cause__) == ("x0", "unsupported_parameter", None)


@pytest.mark.parametrize(
    ("body", "parse"),
    [
        ({"messages": [USER], "x" * 10**6: 1}, parse_chat_completion),
        ({"messages": [{"role": "user", "content": [{"type": "x" * 10**6}]}]}, parse_chat_completion),
        ({"x" * 10**6: 1}, parse_attention),
        ({"x" * 10**6: 1}, lambda body, limits: parse_body(ImageRequest, body, limits)),
    ],
)
def test_errors_quote_little_of_the_request(body, parse):
    assert len(json.dumps(error_of(body, parse).body)) < 1000


def test_nesting_is_limited():
    """The parser has a limit, so that recursion over a request is safe."""
    deep = [[]]
    for _ in range(197):
        deep = [deep]
    assert parse_chat_completion(json.dumps({"messages": [USER], "user": deep}).encode(), Limits())
    assert error_of({"messages": [USER], "user": [[deep]]}).code == "invalid_json"
