"""The server's pages, who may ask for them, and its errors in one form."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from solo_vlm.serve.chat import ChatCompletions
from solo_vlm.serve.engine import Engine
from solo_vlm.serve.errors import ApiError, no_such_model
from solo_vlm.serve.limits import Limits
from solo_vlm.serve.metrics import Metrics

_MODELS = "/v1/models/"
_CLIENT_LEFT = 499  # nginx's number; HTTP has none


def make_app(engine: Engine, model: str, limits: Limits, api_keys: Sequence[str] = ()) -> Starlette:
    """The server as an ASGI application.

    Args:
        engine: answers; closed with the application.
        model: the name that requests give.
        limits: of each request, and of all together.
        api_keys: one of these must come with every request under /v1; none: nobody is asked for one.
    """
    metrics = Metrics(engine)
    chat = ChatCompletions(engine, model, limits, metrics)
    card = {"id": model, "object": "model", "created": 0, "owned_by": "solo-vlm"}

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if not name:
            return await models(request)
        if name != model:
            raise no_such_model(name, model)
        return JSONResponse(card)

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok", "model": model})

    async def exposition(_: Request) -> Response:
        return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(chat.close)
        await asyncio.to_thread(engine.close)

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", models),
        Route(f"{_MODELS}{{name:path}}", one_model),
        Route("/health", health),
        Route("/metrics", exposition),
    ]
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[
            Middleware(_CountRequests, metrics, {route.path for route in routes}),
            Middleware(_RequireKey, api_keys),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error},
    )


class _CountRequests:
    """Counts every request by its status."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: set[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = _CLIENT_LEFT

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            if scope["path"].startswith(_MODELS):  # one label, whatever names are asked for
                path = f"{_MODELS}{{name}}"
            self._metrics.count_request(path, status)


class _RequireKey:
    """Lets nobody to /v1 without a key."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app = app
        self._expected = [f"Bearer {key}".encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        protected = scope["type"] == "http" and scope["path"].startswith("/v1")
        if not protected or not self._expected or self._is_allowed(dict(scope["headers"])):
            return await self._app(scope, receive, send)
        error = ApiError(401, "send the API key: Authorization: Bearer KEY", code="invalid_api_key")
        await _response(error)(scope, receive, send)

    def _is_allowed(self, headers: dict[bytes, bytes]) -> bool:
        given = headers.get(b"authorization", b"")
        # In constant time, each of them: how long it takes tells nothing.
        return sum(hmac.compare_digest(given, expected) for expected in self._expected) > 0


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: there is no such page, or not with this method."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail.lower()}"
    return _response(ApiError(error.status_code, what, headers=dict(error.headers or {})))


def _response(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)
