"""The body of a chat completion request: OpenAI's schema, as far as a SOLO model can follow it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import from_json

from solo_vlm.serve.errors import ApiError
from solo_vlm.serve.limits import Limits

# Fields for the provider's accounts, caches and logs: no answer depends on them.
_HARMLESS = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "request_id", "priority"),
        *("parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "cache_salt"),
    }
)

# Parameters that would change the answer, and the values that ask for nothing. Any other value, and any field
# that is not known, is refused: an answer that silently ignores what was asked is worse than none.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "ignore_eos": (False,),
    "skip_special_tokens": (True,),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "prompt_logprobs": (0,),
    "length_penalty": (1,),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
}


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class TextPart(_Part):
    """A piece of text of a message."""

    type: Literal["text"]
    text: str


class _ImageUrl(_Part):
    url: str


class ImagePart(_Part):
    """An image of a message: a data URL, or an http(s) URL where the server allows it."""

    type: Literal["image_url"]
    image_url: _ImageUrl


class ChatMessage(_Part):
    """A turn of the chat. "developer" is OpenAI's newer name of the system's role.

    Clients send what they do not use as null, or as an empty list: as if it were absent.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] = Field(min_length=1)
    tool_calls: list[Any] | None = Field(None, max_length=0)
    function_call: None = None
    audio: None = None
    refusal: None = None

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class StreamOptions(_Part):
    """Whether the numbers of tokens follow a stream."""

    include_usage: bool | None = None


class ChatRequest(BaseModel):
    """A request that the model can answer; fields that change no answer are ignored, unknown ones refused.

    The limits on numbers that depend on the server's settings are in `parse_request`.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)

    messages: list[ChatMessage] = Field(min_length=1)
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

    @property
    def longest_answer(self) -> int | None:
        """Tokens, where the request says."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def images(self) -> Iterator[tuple[str, str]]:
        """Each image's place in the request, and its URL."""
        for number, message in enumerate(self.messages):
            for index, part in enumerate(message.content):
                if isinstance(part, ImagePart):
                    yield f"messages.{number}.content.{index}.image_url.url", part.image_url.url

    @property
    def text_chars(self) -> int:
        """Of all texts together."""
        parts = [part for message in self.messages for part in message.content]
        return sum(len(part.text) for part in parts if isinstance(part, TextPart))


def parse_request(body: bytes, limits: Limits) -> ChatRequest:
    """A request from the bytes of its body.

    Raises:
        ApiError: 400, naming the part that is wrong, unknown to the model, or over a limit.
    """
    try:
        raw = from_json(body, allow_inf_nan=False)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(raw, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    # Before they are validated one by one.
    if isinstance(raw.get("messages"), list) and len(raw["messages"]) > limits.max_messages:
        raise ApiError(400, f"a chat has at most {limits.max_messages} messages here", "messages")
    try:
        request = ChatRequest.model_validate(raw)
    except ValidationError as error:
        raise _explain(error) from error
    _refuse_unsupported(request)
    _check_roles(request)
    _check_limits(request, limits)
    return request


def _refuse_unsupported(request: ChatRequest) -> None:
    for name, value in (request.model_extra or {}).items():
        if name not in _HARMLESS and value is not None and value not in _NEUTRAL.get(name, ()):
            shown = name if len(name) <= 100 else f"{name[:100]}..."
            raise ApiError(400, f"{shown} is not supported by this server", shown, "unsupported_parameter")
    if request.stream_options and not request.stream:
        raise ApiError(400, "stream_options goes with stream: true", "stream_options")


def _check_roles(request: ChatRequest) -> None:
    for number, message in enumerate(request.messages):
        where = f"messages.{number}"
        if message.role in ("system", "developer") and number:
            raise ApiError(400, "a system message comes first or not at all", f"{where}.role")
        if message.role != "user" and any(isinstance(part, ImagePart) for part in message.content):
            raise ApiError(400, "only the user's messages may have images", f"{where}.content")
    if request.messages[-1].role != "user":
        raise ApiError(400, "the last message must be the user's", "messages")


def _check_limits(request: ChatRequest, limits: Limits) -> None:
    images = sum(1 for _ in request.images)
    if images > limits.max_images:
        raise ApiError(400, f"{images} images; a request may have {limits.max_images}", "messages")
    if request.text_chars > limits.max_text_chars:
        raise ApiError(
            400,
            f"the texts have {request.text_chars:,} characters; a request may have {limits.max_text_chars:,}",
            "messages",
        )
    if (request.longest_answer or 0) > limits.max_tokens:
        name = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
        raise ApiError(400, f"{name} is {request.longest_answer}; at most {limits.max_tokens} here", name)


def _explain(error: ValidationError) -> ApiError:
    """The first thing wrong, and where."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    steps = [str(step) for step in first["loc"]]
    if steps[0] == "messages" and len(steps) > 4:
        del steps[4]  # a part's type, by which pydantic has chosen what the part must be
    param = ".".join(steps)
    return ApiError(400, f"{param}: {first['msg']}", param)
