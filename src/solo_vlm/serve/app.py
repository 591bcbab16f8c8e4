"""ASGI application: OpenAI's chat API, the page, and the page's own two endpoints."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from solo_vlm.generate.cache import supports_prefix_cache
from solo_vlm.models.solo.processing_solo import ChatTemplateError
from solo_vlm.serve.body import SMALL_BODY, Body, BodyMemory
from solo_vlm.serve.engine import Call, Engine, Finish, Prompt, Request, SamplingParams
from solo_vlm.serve.images import EncodedImage, ImageReader, describe_image
from solo_vlm.serve.limits import Limits
from solo_vlm.serve.metrics import Metrics
from solo_vlm.serve.page.attention import WordAttention, last_answer
from solo_vlm.serve.protocol import (
    ApiError,
    Chat,
    ChatCompletion,
    ChatCompletionRequest,
    EventStream,
    ImageRequest,
    StreamOptions,
    context_length_exceeded,
    model_not_found,
    parse_attention,
    parse_body,
    parse_chat_completion,
)

logger = logging.getLogger(__name__)

_STATIC = Path(__file__).parent / "page" / "static"
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_MODELS = "/v1/models/"
_API = ("/v1", "/api")  # protected by keys and against cross-site requests
_CLIENT_LEFT = 499  # nginx's status code; HTTP has none
_TEXT_THREADS = 2
_IMAGE_THREADS = 8  # most wait while others decode large images; see PixelBudget
_LAST_EVENT_SECONDS = 5.0

Parsed = TypeVar("Parsed")
Result = TypeVar("Result")
Handler = Callable[[Body, EventStream], Awaitable[dict[str, Any] | None]]
"""Handler of a request body. Returns a JSON object, or sends a stream and returns None."""


def make_app(
    engine: Engine, model: str, limits: Limits, api_keys: Sequence[str] = (), host: str = "localhost"
) -> Starlette:
    """Build the server as an ASGI application, whose `state.stop_requests` ends all requests.

    Args:
        engine: Engine of the model; closed with the application.
        model: Model name that requests must use, if they name one.
        api_keys: Accepted API keys; empty if none is required.
        host: Name under which pages may use the API without a key, besides those of this machine.
    """
    metrics = Metrics(engine)
    api = _Api(engine, model, limits, metrics)
    card = {
        **{"id": model, "object": "model", "created": 0, "owned_by": "solo-vlm"},
        "max_model_len": engine.pipeline.context_length,
        "parameters": sum(weights.numel() for weights in engine.pipeline.model.parameters()),
        "layers": engine.pipeline.model.config.text_config.num_hidden_layers,
        "limits": asdict(limits),
    }

    async def models(request: HttpRequest) -> Response:
        name = request.path_params.get("name")
        if not name:
            return JSONResponse({"object": "list", "data": [card]})
        if name != model:
            raise model_not_found(name, model)
        return JSONResponse(card)

    async def health(_: HttpRequest) -> Response:
        return JSONResponse({"status": "ok", "model": model})

    async def exposition(_: HttpRequest) -> Response:
        return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    async def page(request: HttpRequest) -> Response:
        path = _STATIC / request.path_params.get("name", "index.html")
        if path not in _STATIC.iterdir():
            raise HTTPException(404)
        return FileResponse(path, headers=_PAGE_HEADERS)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        api.close()
        await asyncio.to_thread(engine.close)

    routes = [
        Route("/v1/chat/completions", _Endpoint(api, api.chat_completion), methods=["POST"]),
        Route("/v1/models", models),
        Route(f"{_MODELS}{{name:path}}", models),
        Route("/api/image", _Endpoint(api, api.image), methods=["POST"]),
        Route("/api/attention", _Endpoint(api, api.attention), methods=["POST"]),
        Route("/health", health),
        Route("/metrics", exposition),
        Route("/", page),
        Route("/page/{name}", page),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[
            Middleware(_CountRequests, metrics, {route.path for route in routes}),
            Middleware(_RejectTwoLengths),
            Middleware(_ProtectApi, api_keys, host),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error},
    )
    app.state.stop_requests = api.stop_requests
    return app


class _Api:
    """Handlers of the requests that need the model."""

    def __init__(self, engine: Engine, model: str, limits: Limits, metrics: Metrics) -> None:
        self.limits = limits
        self._engine = engine
        self._model = model
        self._metrics = metrics
        self._images = ImageReader(engine.pipeline.processor.image_processor, limits)
        self._attention = WordAttention()
        self._slots_taken = 0
        self._time_limits: set[asyncio.Timeout] = set()
        self._stopped = False
        self._body_memory = BodyMemory(max(limits.max_pending_bytes, limits.max_request_bytes))
        # Threads cannot be cancelled when a client disconnects, so their number is bounded. Text never waits
        # for images, and one large body is parsed at a time, because parsing holds the interpreter's lock.
        self._texts = ThreadPoolExecutor(_TEXT_THREADS, "text")
        self._large_bodies = ThreadPoolExecutor(1, "large-body")
        self._image_files = ThreadPoolExecutor(_IMAGE_THREADS, "image")

    def close(self) -> None:
        """Drop requests that are not prepared yet; running threads finish their work."""
        for threads in (self._texts, self._large_bodies, self._image_files):
            threads.shutdown(wait=False, cancel_futures=True)

    def stop_requests(self) -> int:
        """End all requests with an error at shutdown; return their number."""
        self._stopped = True
        for running in (limits := tuple(self._time_limits)):
            running.reschedule(0)
        return len(limits)

    @asynccontextmanager
    async def time_limit(self, seconds: float, error: ApiError) -> AsyncIterator[None]:
        """Raise an error after some seconds, or status 503 once the server stops requests."""
        try:
            async with asyncio.timeout(seconds) as limit:
                self._time_limits.add(limit)
                try:
                    yield
                finally:
                    self._time_limits.remove(limit)
        except TimeoutError as expired:
            if not limit.expired():
                raise
            stopped = ApiError(503, "The server is shutting down.", code="shutting_down")
            raise (stopped if self._stopped else error) from expired

    @contextmanager
    def slot(self) -> Iterator[Body]:
        """Hold one of the `max_concurrent` slots, for a body to be read; raise 429 if all are taken."""
        if self._slots_taken >= self.limits.max_concurrent:
            message = f"Too many requests: {self._slots_taken} are in flight. Please retry later."
            raise ApiError(429, message, code="too_many_requests", headers={"Retry-After": "1"})
        self._slots_taken += 1
        body = Body(self.limits, self._body_memory)
        try:
            yield body
        finally:
            self._slots_taken -= 1
            body.release()

    async def chat_completion(self, body: Body, stream: EventStream) -> dict[str, Any] | None:
        """Answer a chat, as one object or as a stream."""
        arrived = time.monotonic()
        request, stream_options = await self._chat_request(body)
        prompt = request.prompt
        self._metrics.count_prompt(len(prompt), len(prompt.images))
        completion = ChatCompletion(self._model, len(prompt))
        self._engine.submit(request)
        try:
            events = self._metrics.observe(request.events(), arrived)
            if stream_options is None:
                return completion.whole([event async for event in events])
            await _stream(events, completion, stream, bool(stream_options.include_usage))
            return None
        finally:
            self._engine.cancel(request)

    async def image(self, body: Body, _: EventStream) -> dict[str, Any]:
        """Describe what the model sees of an image."""
        request = await self._parse(partial(parse_body, ImageRequest), body)
        (image,) = await self._read([("image_url.url", request.image_url.url)])
        return await _run_in(self._image_files, describe_image, image)

    async def attention(self, body: Body, _: EventStream) -> dict[str, Any]:
        """Return how much a word of an answer attended to each patch."""
        call = await self._attention_call(body)
        self._engine.submit(call)
        return await asyncio.wrap_future(call.future)

    # The parsed body is as large as the body: it is gone when one of the next two returns.

    async def _chat_request(self, body: Body) -> tuple[Request, StreamOptions | None]:
        """Prepare a chat completion; return it with the options of its stream, None without a stream."""
        chat = await self._parse(parse_chat_completion, body)
        if chat.model not in (None, self._model):
            raise model_not_found(chat.model, self._model)
        prompt = await self._encode(chat)
        body.release()
        request = Request(prompt, self._sampling_params(chat, len(prompt)))
        return request, (chat.stream_options or StreamOptions()) if chat.stream else None

    async def _attention_call(self, body: Body) -> Call[dict[str, Any]]:
        chat = await self._parse(parse_attention, body)
        decoder = self._engine.pipeline.model.config.text_config
        if not supports_prefix_cache(decoder):
            message = f"{decoder.model_type} has layers other than attention, so its attention is not shown."
            raise ApiError(400, message)
        layers, layer = decoder.num_hidden_layers, chat.layer
        if layer is not None and layer >= layers:
            message = f"Layer {layer} does not exist. The model has layers 0 to {layers - 1}."
            raise ApiError(400, message, "layer")
        prompt = await self._encode(chat, add_generation_prompt=False)
        body.release()
        start, end = last_answer(prompt.supervised)
        if (answer_tokens := end - start - 1) > self.limits.max_tokens:  # without the end token
            message = f"The answer is too long: {answer_tokens} tokens. "
            message += f"This server generates at most {self.limits.max_tokens} tokens per request."
            raise ApiError(400, message, "messages")
        span = (chat.messages[-1].text, chat.start, chat.end)
        return Call(lambda pipeline: self._attention(pipeline, prompt, *span, layer))

    async def _parse(self, parse: Callable[[bytearray, Limits], Parsed], body: Body) -> Parsed:
        threads = self._texts if len(body) <= SMALL_BODY else self._large_bodies
        return await _run_in(threads, parse, body.take(), self.limits)

    async def _encode(self, chat: Chat, add_generation_prompt: bool = True) -> Prompt:
        images = await self._read(chat.image_urls)
        messages = [message.for_processor() for message in chat.messages]
        try:
            prompt = await _run_in(self._texts, self._engine.encode, messages, images, add_generation_prompt)
        except ChatTemplateError as error:
            raise ApiError(400, f"Invalid messages: {error}.", "messages") from error
        context = self._engine.pipeline.context_length
        if context and len(prompt) + add_generation_prompt > context:
            raise context_length_exceeded(context, len(prompt))
        return prompt

    async def _read(self, urls: Iterable[tuple[str, str]]) -> list[EncodedImage]:
        sources = await self._images.fetch(urls)
        return await _run_in(self._image_files, self._images.read, sources) if sources else []

    def _sampling_params(self, chat: ChatCompletionRequest, prompt_tokens: int) -> SamplingParams:
        context = self._engine.pipeline.context_length
        room = context - prompt_tokens if context else self.limits.max_tokens
        requested = chat.requested_tokens
        if context and requested and requested > room:
            raise context_length_exceeded(context, prompt_tokens, requested)
        return SamplingParams(
            max_tokens=requested or min(self.limits.max_tokens, room),
            temperature=chat.temperature or 0.0,
            top_p=1.0 if chat.top_p is None else chat.top_p,
            seed=chat.seed,
            stop=tuple(chat.stop or ()),
        )


async def _run_in(threads: ThreadPoolExecutor, task: Callable[..., Result], *arguments: object) -> Result:
    return await asyncio.get_running_loop().run_in_executor(threads, task, *arguments)


async def _stream(
    events: AsyncIterator[str | Finish], completion: ChatCompletion, stream: EventStream, include_usage: bool
) -> None:
    async for event in events:
        if not stream.begun:
            await stream.send(completion.chunk({"role": "assistant", "content": ""}))
        if isinstance(event, str):
            await stream.send(completion.chunk({"content": event}))
        else:
            await stream.send(completion.chunk({}, event))
            if include_usage:
                await stream.send(completion.usage_chunk(event))
            await stream.send("[DONE]", last=True)


class _Endpoint:
    """ASGI application around a handler: one slot, a bounded body, a time limit, errors as JSON.

    A client's disconnect cancels its request at any time.
    """

    def __init__(self, api: _Api, handler: Handler) -> None:
        self._api = api
        self._limits = api.limits
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        seconds = self._limits.max_body_seconds
        message = f"The request body did not arrive within {seconds:g} s."
        with self._api.slot() as body:
            try:
                async with self._api.time_limit(seconds, ApiError(408, message, code="timeout")):
                    await body.read(HttpRequest(scope, receive))
            except ClientDisconnect:
                return
            await _unless_disconnected(self._respond(body, scope, receive, send), receive)

    async def _respond(self, body: Body, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the handler's result or error; an error within a stream becomes its last event."""
        stream, seconds = EventStream(send), self._limits.max_seconds
        message = f"The request timed out after {seconds:g} s."
        try:
            async with self._api.time_limit(seconds, ApiError(504, message, code="timeout")):
                result = await self._handler(body, stream)
                if result is not None:
                    await JSONResponse(result)(scope, receive, send)
        except Exception as error:
            known = error if isinstance(error, ApiError) else _internal_error(error)
            if not stream.begun:
                raise known from error
            with suppress(TimeoutError):  # the client may have stopped reading
                async with asyncio.timeout(_LAST_EVENT_SECONDS):
                    await stream.send(known.body, last=True)


def _internal_error(error: Exception) -> ApiError:
    logger.error("a request failed", exc_info=error)
    message = "The server had an error while processing the request. Its log has the details."
    return ApiError(500, message, code="internal_error")


async def _unless_disconnected(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Run `work`, raising its exceptions; cancel it if the client disconnects after its body."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.create_task(work)
    tasks = (working, asyncio.create_task(disconnected()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _CountRequests:
    """Middleware that counts requests by path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: set[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = _CLIENT_LEFT

        async def record_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, record_status)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            if scope["path"].startswith(_MODELS):  # one label for all names that clients request
                path = f"{_MODELS}{{name}}"
            self._metrics.count_request(path, status)


class _RejectTwoLengths:
    """Middleware that rejects requests with both headers for a body's length, and ends their connections.

    A proxy that believes the other one takes a part of the body for the next request (request smuggling).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        lengths = {b"content-length", b"transfer-encoding"}
        if scope["type"] == "http" and lengths <= {name for name, _ in scope["headers"]}:
            message = "A request has the header Content-Length or Transfer-Encoding, not both."
            error = ApiError(400, message, headers={"Connection": "close"})
            return await _response(error)(scope, receive, send)
        await self._app(scope, receive, send)


class _ProtectApi:
    """Middleware that rejects API requests without a valid key or from pages of other sites."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], host: str) -> None:
        self._app = app
        self._expected = [f"Bearer {key}".encode() for key in api_keys]
        self._own_names = {"localhost", host.lower(), socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(_API):
            headers = Headers(scope=scope)
            if _is_cross_site(headers):
                error = ApiError(403, "Requests from pages of other sites are not allowed.")
                return await _response(error)(scope, receive, send)
            if not self._expected and self._may_be_rebound(headers):
                message = "Pages under this name may use the server only with an API key. "
                message += "Set one, or open the page by the server's address."
                return await _response(ApiError(403, message))(scope, receive, send)
            if self._expected and not self._is_allowed(headers):
                message = "Missing or incorrect API key. Send it in the header Authorization: Bearer KEY."
                return await _response(ApiError(401, message, code="invalid_api_key"))(scope, receive, send)
        await self._app(scope, receive, send)

    def _may_be_rebound(self, headers: Headers) -> bool:
        """Return whether a page may come from another site, whose DNS name now resolves to this server.

        Such a site has its own name but no certificate for this server, and over plain HTTP, browsers do not
        send Sec-Fetch-Site.
        """
        if "origin" not in headers or "sec-fetch-site" in headers:
            return False
        name = re.sub(r":\d+$", "", headers["host"].lower()).strip("[]")
        try:
            ip_address(name)
        except ValueError:
            return name not in self._own_names
        return False

    def _is_allowed(self, headers: Headers) -> bool:
        given = headers.get("authorization", "").encode("latin-1")
        # Constant time over all keys, so that the duration reveals nothing.
        return sum(hmac.compare_digest(given, expected) for expected in self._expected) > 0


def _is_cross_site(headers: Headers) -> bool:
    """Return whether browser headers show a request from another site's page; other clients send none."""
    if site := headers.get("sec-fetch-site"):
        return site not in ("same-origin", "none")
    origin = headers.get("origin")  # from browsers without Sec-Fetch-Site, and over plain HTTP
    return origin is not None and origin.partition("://")[2] != headers.get("host")


async def _api_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _response(error)


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    """Respond to starlette's own errors: unknown path or wrong method."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}."
    return _response(ApiError(error.status_code, message, headers=dict(error.headers or {})))


def _response(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)
