"""Answers in the form of OpenAI's API: one object, or the events of a stream."""

from __future__ import annotations

import time
import uuid
from typing import Any

from pydantic_core import to_json
from starlette.types import Send

from solo_vlm.serve.job import Finish

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the pieces back
]


class Reply:
    """Wraps the answer to one request.

    Args:
        model: its name.
        prompt_tokens: of the request.
    """

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, text: str, finish: Finish) -> dict[str, Any]:
        """A complete answer."""
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": finish.reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage(finish)}

    def chunk(self, delta: dict[str, str], finish: Finish | None = None) -> dict[str, Any]:
        """A piece of an answer, or its end."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish.reason if finish else None}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, finish: Finish) -> dict[str, Any]:
        """The numbers of tokens, as the last chunk of a stream."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage(finish)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _usage(self, finish: Finish) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": finish.answer_tokens,
            "total_tokens": self._prompt_tokens + finish.answer_tokens,
        }


class EventStream:
    """A response of server-sent events, which begins with the first of them.

    Args:
        send: of the request.
    """

    def __init__(self, send: Send) -> None:
        self.begun = False
        self._send = send

    async def send(self, value: dict[str, Any] | str, last: bool = False) -> None:
        """Send an event: an object as JSON, or a text as it is."""
        if not self.begun:
            self.begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        data = value.encode() if isinstance(value, str) else to_json(value)
        body = b"data: " + data + b"\n\n"
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})
