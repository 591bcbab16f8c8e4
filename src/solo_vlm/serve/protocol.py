"""The part of OpenAI's chat API that SOLO models support: requests, responses and errors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import from_json, to_json
from starlette.types import Send

from solo_vlm.models.solo.processing_solo import Message
from solo_vlm.serve.limits import Limits

if TYPE_CHECKING:
    from solo_vlm.serve.engine import Finish

_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_MAX_ERROR_CHARS = 300  # most of which may come from the request

# Fields for the provider's accounts, caches and logs: they do not affect the answer.
_IGNORED = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "request_id", "priority"),
        *("parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "cache_salt"),
    }
)

# Parameters that change the answer, with the values that leave it unchanged. Any other value and any unknown
# field is an error: an answer that silently ignores part of the request is worse than none.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("n", "best_of", "repetition_penalty", "length_penalty"), (1,)),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p", "min_tokens"), (0,)),
    **dict.fromkeys(("top_logprobs", "prompt_logprobs"), (0,)),
    **dict.fromkeys(("tools", "functions", "stop_token_ids", "bad_words", "documents"), ([],)),
    **dict.fromkeys(("logit_bias", "chat_template_kwargs", "mm_processor_kwargs"), ({},)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("logprobs", "use_beam_search", "ignore_eos", "echo"), (False,)),
    **dict.fromkeys(("continue_final_message", "include_stop_str_in_output"), (False,)),
    **dict.fromkeys(("skip_special_tokens", "add_generation_prompt"), (True,)),
    "top_k": (0, -1),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}


# --------------------------------------------------------------------------------------------- errors


class ApiError(Exception):
    """An error response.

    Args:
        status: HTTP status code.
        message: Explanation, and what to do.
        param: Part of the request that is wrong.
        code: Machine-readable reason.
        headers: Headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        """Error in OpenAI's format."""
        kind = _ERROR_TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        message, param = _shorten(str(self)), self.param and _shorten(self.param)
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}


def _shorten(text: str) -> str:
    half = _MAX_ERROR_CHARS // 2
    return text if len(text) <= _MAX_ERROR_CHARS else f"{text[:half]}...{text[-half:]}"


def model_not_found(requested: str, served: str) -> ApiError:
    """Return the error for a model other than the served one."""
    message = f"The model {_shorten(requested)!r} does not exist. This server has {served!r}."
    return ApiError(404, message, "model", "model_not_found")


def context_length_exceeded(context_length: int, prompt_tokens: int, completion_tokens: int = 0) -> ApiError:
    """Return the error for a request longer than the model's context."""
    message = f"This model's maximum context length is {context_length} tokens, but the request has "
    message += f"{prompt_tokens} tokens in the messages"
    message += f" and {completion_tokens} in the completion." if completion_tokens else ". Shorten them."
    param = "max_tokens" if completion_tokens else "messages"
    return ApiError(400, message, param, "context_length_exceeded")


# ------------------------------------------------------------------------------------------- requests


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class TextPart(_Part):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Part):
    """A data URL, or an http(s) URL where the server allows it."""

    url: str


class ImagePart(_Part):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(_Part):
    """One turn of a chat. "developer" is OpenAI's newer name for the system role.

    Clients send unused fields as null or as an empty list, which counts as absent.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] = Field(
        min_length=1, fail_fast=True
    )
    tool_calls: list[Any] | None = Field(None, max_length=0)
    function_call: None = None
    audio: None = None
    refusal: None = None

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def text(self) -> str:
        """All text parts, concatenated."""
        return "".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def has_images(self) -> bool:
        return any(isinstance(part, ImagePart) for part in self.content)

    def for_processor(self) -> Message:
        """Return the message in the processor's format; its images are passed separately."""
        role = "system" if self.role == "developer" else self.role
        parts = [
            {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
            for part in self.content
        ]
        return {"role": role, "content": parts}


class StreamOptions(_Part):
    """Options of a stream: whether token counts follow it."""

    include_usage: bool | None = None


class _Body(BaseModel):
    """A request body. `parse_body` rejects fields that are neither defined nor ignored."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    @classmethod
    def ignores(cls, name: str, value: Any) -> bool:
        """Return whether a field that the body does not have may be there."""
        return False


class Chat(_Body):
    """Messages of a request."""

    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)

    @property
    def image_urls(self) -> Iterator[tuple[str, str]]:
        """Yield each image's place in the request, and its URL."""
        for number, message in enumerate(self.messages):
            for index, part in enumerate(message.content):
                if isinstance(part, ImagePart):
                    yield f"messages.{number}.content.{index}.image_url.url", part.image_url.url


class ChatCompletionRequest(Chat):
    """Body of POST /v1/chat/completions. Fields that do not affect the answer are ignored."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[Annotated[str, Field(min_length=1, max_length=1000)]] | None = Field(None, max_length=4)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @classmethod
    def ignores(cls, name: str, value: Any) -> bool:
        """Return whether a field does not affect the answer, or not with this value."""
        return name in _IGNORED or value is None or value in _NEUTRAL.get(name, ())

    @property
    def requested_tokens(self) -> int | None:
        """Maximum answer length, if the request sets one."""
        return self.max_completion_tokens or self.max_tokens


class ImageRequest(_Body):
    """Body of POST /api/image."""

    image_url: ImageUrl


class AttentionRequest(Chat):
    """Body of POST /api/attention: a chat that ends with an answer, and a range of its characters.

    Attributes:
        start, end: Code points of the answer, end excluded.
        layer: Single layer; None averages over all.
    """

    start: int = Field(ge=0)
    end: int
    layer: int | None = Field(None, ge=0)


Parsed = TypeVar("Parsed", bound=_Body)


def parse_body(model: type[Parsed], body: bytes | bytearray, limits: Limits) -> Parsed:
    """Parse and validate a request body.

    Raises:
        ApiError: 400, naming the first part that is wrong or unsupported.
    """
    try:
        raw = from_json(body, allow_inf_nan=False)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"Invalid JSON in the request body: {error}.", code="invalid_json") from error
    if not isinstance(raw, dict):
        raise ApiError(400, "The request body must be a JSON object.", code="invalid_json")
    for name, value in raw.items():
        if name not in model.model_fields and not model.ignores(name, value):
            name = _shorten(name)
            message = f"Unsupported parameter: '{name}' is not supported by this server."
            raise ApiError(400, message, name, "unsupported_parameter")
    messages = raw.get("messages")
    if isinstance(messages, list):  # before each one is validated
        _check_maximum("messages", len(messages), limits.max_messages)
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise _explain(error) from error


def parse_chat_completion(body: bytes | bytearray, limits: Limits) -> ChatCompletionRequest:
    """Parse a chat completion request.

    Raises:
        ApiError: 400, naming the part that is wrong, unsupported, or over a limit.
    """
    request = parse_body(ChatCompletionRequest, body, limits)
    if request.stream_options and not request.stream:
        message = "'stream_options' is only allowed when 'stream' is true."
        raise ApiError(400, message, "stream_options")
    _check_chat(request.messages, limits)
    if request.messages[-1].role != "user":
        raise ApiError(400, "The last message must have the role 'user'.", "messages")
    if (request.requested_tokens or 0) > limits.max_tokens:
        name = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
        message = f"'{name}' is too large: {request.requested_tokens}. "
        message += f"This server generates at most {limits.max_tokens} tokens per request."
        raise ApiError(400, message, name)
    return request


def parse_attention(body: bytes | bytearray, limits: Limits) -> AttentionRequest:
    """Parse an attention request.

    Raises:
        ApiError: 400, naming the part that is wrong or over a limit.
    """
    request = parse_body(AttentionRequest, body, limits)
    _check_chat(request.messages, limits)
    if [message.role for message in request.messages[-2:]] != ["user", "assistant"]:
        message = "The last message must have the role 'assistant' and answer one of the role 'user'."
        raise ApiError(400, message, "messages")
    answer = request.messages[-1].text
    if answer != answer.strip():  # chat templates strip it, which would shift the characters
        raise ApiError(400, "The answer must not begin or end with white space.", "messages")
    if not request.start < request.end <= len(answer):
        message = f"Characters {request.start} to {request.end} are not in the answer of {len(answer)} "
        raise ApiError(400, f"{message}characters.", "start")
    return request


def _check_chat(messages: Sequence[ChatMessage], limits: Limits) -> None:
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        if message.role in ("system", "developer") and number:
            raise ApiError(400, "A system message is only allowed as the first message.", f"{where}.role")
        if message.role != "user" and message.has_images:
            raise ApiError(400, "Only messages with the role 'user' may have images.", f"{where}.content")
    parts = [part for message in messages for part in message.content]
    texts = [len(part.text) for part in parts if isinstance(part, TextPart)]
    _check_maximum("images", len(parts) - len(texts), limits.max_images)
    _check_maximum("characters", sum(texts), limits.max_text_chars)


def _check_maximum(what: str, count: int, maximum: int) -> None:
    if count > maximum:
        message = f"Too many {what}: {count:,} in the request, at most {maximum:,} are allowed."
        raise ApiError(400, message, "messages")


def _explain(error: ValidationError) -> ApiError:
    """Return the first validation error, with its place in the request."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    steps = [str(step) for step in first["loc"]]
    if steps[0] == "messages" and len(steps) > 4:
        del steps[4]  # the tag by which pydantic chose the type of the part
    param = ".".join(steps)
    return ApiError(400, f"Invalid value for '{param}': {first['msg']}.", param)


# ------------------------------------------------------------------------------------------ responses


class ChatCompletion:
    """Response to one request: a whole object, or the chunks of a stream."""

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, events: Sequence[str | Finish]) -> dict[str, Any]:
        """Return the complete answer, from all its pieces and the finish."""
        finish: Any = events[-1]
        message = {"role": "assistant", "content": "".join(map(str, events[:-1]))}
        choice = {"index": 0, "message": message, "finish_reason": finish.reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage(finish)}

    def chunk(self, delta: dict[str, str], finish: Finish | None = None) -> dict[str, Any]:
        """Return a piece of the answer, or its end."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish.reason if finish else None}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, finish: Finish) -> dict[str, Any]:
        """Return the token counts that end a stream."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage(finish)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _usage(self, finish: Finish) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": finish.completion_tokens,
            "total_tokens": self._prompt_tokens + finish.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": finish.cached_tokens},
        }


class EventStream:
    """A response of server-sent events. The first event sends the headers and sets `begun`."""

    _HEADERS = (
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # nginx would buffer the pieces
    )

    def __init__(self, send: Send) -> None:
        self.begun = False
        self._send = send

    async def send(self, value: dict[str, Any] | str, last: bool = False) -> None:
        """Send one event: an object as JSON, or text unchanged."""
        if not self.begun:
            self.begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": list(self._HEADERS)})
        data = value.encode() if isinstance(value, str) else to_json(value)
        body = b"data: " + data + b"\n\n"
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})
