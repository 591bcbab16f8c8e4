"""POST /v1/chat/completions: from the bytes of a request to its answer, within the limits."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from PIL import Image
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from solo_vlm.generate import ContextError
from solo_vlm.models.solo.processing_solo import Message
from solo_vlm.serve.chat_request import ChatMessage, ChatRequest, TextPart, parse_request
from solo_vlm.serve.connection import read_body, unless_disconnected
from solo_vlm.serve.engine import Engine
from solo_vlm.serve.errors import ApiError, no_such_model
from solo_vlm.serve.images import Source, decode_images, fetch_web_images
from solo_vlm.serve.job import Finish, Job, Sampling
from solo_vlm.serve.limits import Limits
from solo_vlm.serve.metrics import Metrics
from solo_vlm.serve.replies import EventStream, Reply
from solo_vlm.utils.errors import SoloError

logger = logging.getLogger(__name__)

_PREPARING_THREADS = 4
_LAST_EVENT_SECONDS = 5.0

Result = TypeVar("Result")


class ChatCompletions:
    """The endpoint, as an ASGI application.

    Args:
        engine: answers.
        model: its name.
        limits: of each request, and of all together.
        metrics: counts.
    """

    def __init__(self, engine: Engine, model: str, limits: Limits, metrics: Metrics) -> None:
        self._engine = engine
        self._model = model
        self._limits = limits
        self._metrics = metrics
        self._slots_taken = 0
        # What a thread has begun goes on when its client leaves: so many threads, and no more.
        self._threads = ThreadPoolExecutor(_PREPARING_THREADS, "prepare")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. A client that leaves ends it, at any moment."""
        with self._slot():
            try:
                body = await read_body(Request(scope, receive), self._limits)
            except ClientDisconnect:
                return
            await unless_disconnected(self._answer(body, scope, receive, send), receive)

    def close(self) -> None:
        """Prepare nothing any more."""
        self._threads.shutdown(cancel_futures=True)

    @contextmanager
    def _slot(self) -> Iterator[None]:
        if self._slots_taken >= self._limits.max_concurrent:
            message = f"{self._slots_taken} requests are in work already: try again later"
            raise ApiError(429, message, code="too_many_requests", headers={"Retry-After": "1"})
        self._slots_taken += 1
        try:
            yield
        finally:
            self._slots_taken -= 1

    async def _answer(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, or say what went wrong: as the end of the stream, where one has begun."""
        stream = EventStream(send)
        try:
            async with asyncio.timeout(self._limits.max_seconds):
                arrived = time.monotonic()
                request, job = await self._prepare(body)
                with self._submitted(job):
                    pieces = self._metrics.observe(job.events(), arrived)
                    reply = Reply(self._model, job.prompt_tokens)
                    if request.stream:
                        usage = request.stream_options and request.stream_options.include_usage
                        await _stream(pieces, reply, stream, bool(usage))
                    else:
                        await JSONResponse(await _whole(pieces, reply))(scope, receive, send)
        except Exception as error:
            known = self._as_api_error(error)
            if not stream.begun:
                raise known from error
            with suppress(TimeoutError):  # the client may have stopped to read
                async with asyncio.timeout(_LAST_EVENT_SECONDS):
                    await stream.send(known.body, last=True)

    async def _prepare(self, body: bytes) -> tuple[ChatRequest, Job]:
        """The request, checked, and the job that answers it."""
        request = await self._in_thread(parse_request, body, self._limits)
        if request.model not in (None, self._model):
            raise no_such_model(request.model, self._model)
        sources = await fetch_web_images(request.images, self._limits)
        inputs = await self._in_thread(self._encode, request, sources)
        prompt_tokens = inputs["input_ids"].shape[1]
        self._metrics.count_prompt(prompt_tokens, len(sources))
        return request, Job(inputs, self._sampling(request, prompt_tokens))

    def _encode(self, request: ChatRequest, sources: Sequence[Source]) -> Any:
        images = iter(decode_images(sources, self._limits))
        try:
            return self._engine.encode([_turn(message, images) for message in request.messages])
        except ContextError as error:
            raise ApiError(400, str(error), "messages", "context_length_exceeded") from error
        except SoloError as error:
            raise ApiError(400, str(error), "messages") from error

    def _sampling(self, request: ChatRequest, prompt_tokens: int) -> Sampling:
        context = self._engine.context
        room = context - prompt_tokens if context else self._limits.max_tokens
        wanted = request.longest_answer
        if wanted and wanted > room:
            message = (
                f"{prompt_tokens} tokens of prompt and {wanted} of answer exceed the context of {context}"
            )
            raise ApiError(400, message, "max_tokens", "context_length_exceeded")
        return Sampling(
            max_tokens=wanted or min(self._limits.max_tokens, room),
            temperature=request.temperature or 0.0,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            stop=tuple(request.stop or ()),
        )

    @contextmanager
    def _submitted(self, job: Job) -> Iterator[None]:
        self._engine.submit(job)
        try:
            yield
        finally:
            self._engine.cancel(job)

    def _as_api_error(self, error: Exception) -> ApiError:
        if isinstance(error, ApiError):
            return error
        if isinstance(error, TimeoutError):
            message = f"the answer was not complete within {self._limits.max_seconds:g} s"
            return ApiError(504, message, code="timeout")
        logger.error("a request failed", exc_info=error)
        return ApiError(500, "the server failed at this request; its log says why", code="internal_error")

    async def _in_thread(self, task: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, task, *arguments)


async def _whole(pieces: AsyncIterator[str | Finish], reply: Reply) -> dict[str, Any]:
    texts: list[str] = []
    async for piece in pieces:
        if isinstance(piece, Finish):
            return reply.whole("".join(texts), piece)
        texts.append(piece)
    raise AssertionError("an answer ends with its finish")


async def _stream(
    pieces: AsyncIterator[str | Finish], reply: Reply, stream: EventStream, usage: bool
) -> None:
    async for piece in pieces:
        if not stream.begun:
            await stream.send(reply.chunk({"role": "assistant", "content": ""}))
        if isinstance(piece, str):
            await stream.send(reply.chunk({"content": piece}))
        else:
            await stream.send(reply.chunk({}, piece))
            if usage:
                await stream.send(reply.usage_chunk(piece))
            await stream.send("[DONE]", last=True)


def _turn(message: ChatMessage, images: Iterator[Image.Image]) -> Message:
    """A turn as the processor takes it."""
    parts = [
        {"type": "text", "text": part.text}
        if isinstance(part, TextPart)
        else {"type": "image", "image": next(images)}
        for part in message.content
    ]
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": parts}
